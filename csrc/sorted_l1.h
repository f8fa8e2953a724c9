// The sorted-L1 kernel's contract: the L1 distance of two rows of probabilities, each in descending order, the shorter
// one filled up with zeros; and its gradient. kd_kernels/rows.py (SortedL1Job) states the same.
#pragma once
#include "rows.h"

namespace kd {

// One model: its logits, row-major, and what makes probabilities of them.
struct SortedSide {
  Side logits;  // grad null: no gradient
  int64_t vocab = 0;
  const double* max = nullptr;   // [n] the largest z = logit after scale and softcap
  const double* logz = nullptr;  // [n] log sum exp((z - max) / temperature)
  const double* mass = nullptr;  // [n] > 0, what the row's probabilities sum to
  double* sum = nullptr;         // [n] out: dL/d log mass
};

// loss = sum_k |p_(k) - q_(k)|. Equal probabilities stand in the order of their ids, and sign(0) = 0. A row whose max
// or logz is not finite on either side gives NaN.
struct SortedL1 {
  int64_t n = 0;
  SortedSide student, teacher;
  const double* soft_weight = nullptr;  // [n] of the gradients; 0 silences them, whatever the row holds
  double* loss = nullptr;               // [n] out, unweighted
  // hard_weight times the gradient of the student's cross-entropy at temperature 1 is added. Null: none.
  const double* hard_weight = nullptr;  // [n] 0 silences it
  const double* hard_logz = nullptr;    // [n] log sum exp(z - max)
  const int64_t* labels = nullptr;      // [n] out of range: never read
  void* scratch = nullptr;              // threads * sorted_l1_scratch() bytes, at a multiple of 64
  int threads = 1;
};

// Bytes of scratch memory that each thread needs.
int64_t sorted_l1_scratch(const SortedL1& args);

// Arithmetic is float32, or float64 where either side's logits are; sums are in float64, in the sorted order. Results
// do not depend on `threads`, nor on which other rows are in the call.
void sorted_l1(const SortedL1& args);

}  // namespace kd
