// The row kernel's contract: rows of student and teacher logits in, divergence, statistics and
// gradients out. Plain addresses and numbers, so that any caller (pybind11, ctest, CUDA) can fill it.
#pragma once
#include "rows.h"

namespace kd {

// Names and order are those of kd_kernels/objectives.py (checked by a test).
enum class Objective : int {
  forward_kl = 0,
  reverse_kl = 1,
  jensen_shannon = 2,   // parameter0 = beta in (0, 1)
  skew_kl = 3,          // parameter0 = alpha in (0, 1)
  skew_reverse_kl = 4,  // parameter0 = alpha in (0, 1)
  total_variation = 5,
  weighted_kl = 6,  // parameter0 = forward weight, parameter1 = reverse weight
};
constexpr int kObjectives = 7;
const char* objective_name(Objective objective);

// Columns of `statistics` [n, 10], float64. z is the logit after scale and softcap, u = z / temperature.
enum Statistic : int {
  kMaxStudent = 0,   // max z
  kLogzStudent = 1,  // log sum exp(u - max u)
  kMaxTeacher = 2,
  kLogzTeacher = 3,
  kLogzHard = 4,     // log sum exp(z - max z) of the student, at temperature 1, for the cross-entropy
  kSumStudent = 5,   // sum over the vocabulary of q dL/dq: what the student's gradient subtracts
  kSumTeacher = 6,   // sum over the vocabulary of p dL/dp
  kLabelLogit = 7,   // z of the student at the label; NaN where that is out of range, which makes the row NaN
  kMassStudent = 8,  // sum of q and of p as computed: 1 up to rounding. The gradient divides the sums
  kMassTeacher = 9,  // by them, or a sharp row would pay for that rounding with most of its digits.
};
constexpr int kStatisticColumns = 10;

// Columns of `terms` [n, 4], float64, unweighted: divergence, cross-entropy, H(q), H(p).
enum Term : int { kSoft = 0, kHard = 1, kStudentEntropy = 2, kTeacherEntropy = 3 };
constexpr int kTermColumns = 4;

struct RowDivergence {
  int64_t n = 0;
  int64_t vocab = 0;
  Objective objective = Objective::forward_kl;
  Side student, teacher;
  const double* parameter0 = nullptr;   // [n], where the objective has one
  const double* parameter1 = nullptr;   // [n]
  const int64_t* labels = nullptr;      // [n] or null: no cross-entropy. Out of range: never read
  const double* soft_weight = nullptr;  // [n] gradient = soft_weight dSoft/dz + hard_weight dHard/dz;
  const double* hard_weight = nullptr;  // [n] a row whose weights are both 0 gets gradient 0, whatever it holds
  double* statistics = nullptr;         // [n, 10]
  double* terms = nullptr;              // [n, 4]; written by the terms phase
  bool entropies = false;               // fill the two entropy columns (they cost two more sums)
  int threads = 1;
};

// Runs `phases` over all rows. Arithmetic is float32, or float64 where either side is float64.
// Results do not depend on `threads`, nor on which other rows are in the call.
void row_divergence(const RowDivergence& args, unsigned phases);

}  // namespace kd
