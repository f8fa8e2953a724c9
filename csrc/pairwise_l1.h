// The pairwise_l1 kernel's contract: L1 distances between the probabilities of all rows of two models, over a slab of
// the vocabulary, and the way back; kd_kernels/rows.py (PairwiseL1Job) states the same.
#pragma once
#include "rows.h"

namespace kd {

// Columns of a model's statistics [n, 2], float64, over the whole vocabulary: max z, and log sum exp(x) with
// x = (z - max z) / temperature. Probabilities are exp(x - log sum).
enum PairwiseStatistic : int { kPairwiseMax = 0, kPairwiseLogz = 1 };
constexpr int kPairwiseColumns = 2;

// Rows starts[g] .. starts[g + 1] of both sides are group g. p_i: student's, q_j: teacher's row of one group.
// kTerms adds to cost[g, i, j] sum_v |p_iv - q_jv| and to signs[g, i, j] sum_v p_iv sign(p_iv - q_jv).
// kGradient writes, where a side has grad, with G = d_cost, of the student
// p_iv (sum_j G_ij sign(p_iv - q_jv) - student_means_i) / T, of the teacher
// q_jv (sum_i G_ij sign(q_jv - p_iv) - teacher_means_j) / T, chained through softcap and scale to the raw logit.
// A G of 0 silences its pair; a row whose pairs are all silent gets 0, whatever it holds.
struct PairwiseL1 {
  int64_t n = 0;
  int64_t vocab = 0;  // of the slab
  Side student;       // both row-major
  Side teacher;
  int64_t groups = 0;
  int64_t longest = 0;              // L
  const int64_t* starts = nullptr;  // [groups + 1]
  const double* student_statistics = nullptr;
  const double* teacher_statistics = nullptr;
  double* cost = nullptr;                 // [groups, L, L]
  double* signs = nullptr;                // [groups, L, L] or null
  const double* d_cost = nullptr;         // [groups, L, L]
  const double* student_means = nullptr;  // [n]
  const double* teacher_means = nullptr;  // [n]
  int threads = 1;
};

// Runs the phases kTerms and kGradient, either or both. Arithmetic is float32, or float64 where a side has float64
// logits; float32 sums are of a few dozen terms, the others float64. Results do not depend on `threads`.
void pairwise_l1(const PairwiseL1& args, unsigned phases);

}  // namespace kd
