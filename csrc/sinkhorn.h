// The Sinkhorn kernel's contract: batches of small transport problems, solved and differentiated.
// kd_kernels/problems.py (SinkhornJob) states the same, with the formulas.
#pragma once
#include "rows.h"

namespace kd {

enum SinkhornPhase : unsigned { kSolve = 1, kUnrolled = 2, kImplicit = 4 };
enum SinkhornDomain : int { kAutoDomain = 0, kScalingDomain = 1, kLogDomain = 2 };
enum SinkhornStatus : int { kSolved = 0, kInfeasible = 1, kOutOfRoom = 2 };
// Columns of `numbers` [count, 5].
enum SinkhornNumber : int { kTransport = 0, kError = 1, kIterations = 2, kGap = 3, kStatus = 4 };
constexpr int kSinkhornNumbers = 5;
// The largest (cost - row's least) / epsilon for which kAutoDomain takes scalings.
constexpr double kScalingRoom = 60.0;
// Of the implicit adjoint's conjugate gradients.
constexpr int kCgSteps = 1000;
constexpr double kCgTolerance = 1e-10;

// Floats of the state are float, or double where `wide`. A marginal of 0 is an absent entry: potential -inf.
struct Sinkhorn {
  int64_t count = 0, n = 0, m = 0;
  const void* cost = nullptr;  // [count, n, m], columns contiguous
  Dtype cost_dtype = Dtype::float32;
  int64_t cost_batch = 0, cost_row = 0;  // strides in elements; a batch stride of 0: one cost for all
  bool wide = false;
  const void* a = nullptr;           // [count, n]
  const void* b = nullptr;           // [count, m]
  const double* epsilons = nullptr;  // [iterations]
  int64_t iterations = 0;
  double tolerance = 0.0;  // share of the mass; 0: never
  int domain = kAutoDomain;
  void* phi = nullptr;                // [count, n] log scalings
  void* psi = nullptr;                // [count, m]
  double* numbers = nullptr;          // [count, 5]
  void* phi_history = nullptr;        // [count, iterations, n] or null
  void* psi_history = nullptr;        // [count, iterations, m] or null
  const void* d_transport = nullptr;  // [count]
  const void* d_value = nullptr;      // [count], kImplicit
  const void* d_plan = nullptr;       // [count, n, m] or null
  const void* d_phi = nullptr;        // [count, n], kUnrolled
  const void* d_psi = nullptr;        // [count, m], kUnrolled
  void* d_cost = nullptr;             // [count, n, m]
  void* d_a = nullptr;                // [count, n]; of log a in kUnrolled
  void* d_b = nullptr;                // [count, m]; of log b in kUnrolled
  int threads = 1;
};

// Each problem is one thread's: results do not depend on `threads`, nor on the other problems.
void sinkhorn(const Sinkhorn& args, unsigned phases);

}  // namespace kd
