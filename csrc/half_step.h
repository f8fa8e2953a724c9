// The half_step kernel's contract: one half-step of all transport problems that share a cost, whose kernel
// K = exp(-C / epsilon) is given. kd_kernels/problems.py (HalfStepJob) states the same.
#pragma once
#include <cstdint>

namespace kd {

// With s_bi = sum_j K_ij x_bj, or, transposed, s_bj = sum_i K_ij x_bi: `out` is weight / (s + extra), 0 where the
// weight or that denominator is, or, where it does not `divide`, weight s. Numbers are float, double if `wide`; columns
// are contiguous, the strides are of rows.
struct HalfStep {
  int64_t count = 0;  // problems
  int64_t n = 0, m = 0;
  bool wide = false, transposed = false, divide = false;
  const void* kernel = nullptr;  // [n, ld], m columns
  int64_t ld = 0;
  const void* x = nullptr;       // [count, m]; transposed: [count, n]
  const void* weight = nullptr;  // [count, n]; transposed: [count, m]
  int64_t x_ld = 0, weight_ld = 0, out_ld = 0;
  const void* extra = nullptr;  // [n]; transposed: [m]; or null: nothing is added
  void* out = nullptr;          // as weight
  int threads = 1;
};

// Results do not depend on `threads`.
void half_step(const HalfStep& args);

}  // namespace kd
