// The gather kernel's contract: a few entries of each row by id, and sums over all the others. What a sparse target
// or the log-probability of given tokens needs of a row; kd_kernels/rows.py (GatherJob) states the same.
#pragma once
#include "rows.h"

namespace kd {

// Columns of `statistics` [n, 4], float64, over the entries that are at none of the row's ids. With z the logit
// after scale and softcap, x = (z - max z) / temperature. Where there are none, or all are -inf: -inf, -inf, -inf, 0.
enum GatherStatistic : int {
  kOthersMax = 0,       // max z
  kOthersLogz = 1,      // log sum exp(x)
  kOthersLogzHard = 2,  // the same at temperature 1
  kOthersMean = 3,      // mean of x under exp(x)
};
constexpr int kGatherColumns = 4;

struct Gather {
  int64_t n = 0;
  int64_t vocab = 0;
  Side side;
  int64_t k = 0;
  const int32_t* ids = nullptr;  // [n, k] ascending, none twice; -1 (unused) in front
  double* gathered = nullptr;    // [n, k] z at the ids, -inf where unused
  double* statistics = nullptr;  // [n, 4]
  bool hard = false;             // whether kOthersLogzHard and hard_weight are wanted
  bool means = false;            // whether kOthersMean is wanted
  // Gradient phase: dL/dz is share (soft + slope log share) + hard_weight share_hard among the others, where
  // log share = x - kOthersLogz (0 where z is -inf), and at_ids at the ids. A coefficient of 0 silences its
  // summand whatever the row holds.
  const double* soft = nullptr;         // [n]
  const double* slope = nullptr;        // [n] or null
  const double* hard_weight = nullptr;  // [n], where hard
  const double* at_ids = nullptr;       // [n, k]
  int threads = 1;
};

// Runs the phases kStatistics and kGradient, either or both, over all rows. Arithmetic is float32, or float64 for
// float64 logits. Results do not depend on `threads`, nor on which other rows are in the call.
void gather(const Gather& args, unsigned phases);

}  // namespace kd
