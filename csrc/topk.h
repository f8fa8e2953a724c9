// The topk kernel's contract: the k largest logits of each row and what a saved teacher needs beside them, in one
// read of the logits; forward only. kd_kernels/rows.py (TopkJob) states the same.
#pragma once
#include "rows.h"

namespace kd {

// Columns of `statistics` [n, 1 + 3 M], float64: the largest logit, then three for each temperature.
constexpr int kTopkMax = 0;
enum TopkStatistic : int {
  kTopkLse = 0,  // log sum exp(z / temperature)
  kTopkEntropy = 1,
  kTopkLogTail = 2,  // log of the probability that is not among the k largest, summed from what is not
};
constexpr int kTopkColumns = 3;

// z is the logit after scale and softcap; the order is by z descending, then by id ascending. -inf is never among
// the k largest: ids are -1 and values -inf where a row has fewer. A row with NaN or +inf, or without a finite
// logit, has NaN statistics; its ids and samples are in range or -1.
struct Topk {
  int64_t n = 0;
  int64_t vocab = 0;
  Side side;                             // row-major; temperature and grad are not read
  const double* temperatures = nullptr;  // [M]
  int64_t temperature_count = 1;         // M >= 1
  int64_t k = 0;
  int32_t* ids = nullptr;            // [n, k]
  double* values = nullptr;          // [n, k] z
  double* statistics = nullptr;      // [n, 1 + 3 M]
  int64_t target_count = 0;          // R
  const int64_t* targets = nullptr;  // [n, R]; out of range: value NaN, rank 0
  double* target_values = nullptr;   // [n, R] z
  int32_t* target_ranks = nullptr;   // [n, R] 1 + how many entries come before it
  int64_t sample_count = 0;          // N
  const double* uniforms = nullptr;  // [n, N] in [0, 1); fastest in ascending order
  int32_t* samples = nullptr;  // [n, N] draws at temperatures[0]: the first id whose cumulated probability exceeds it
  int threads = 1;
};

// Arithmetic is float32, or float64 for float64 logits, sums are in float64. Results do not depend on `threads`,
// nor on which other rows are in the call.
void topk(const Topk& args);

}  // namespace kd
