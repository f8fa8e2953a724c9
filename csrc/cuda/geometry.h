// How a call is laid over a GPU: blocks per row, the slice of the vocabulary that each has, and whether it holds
// the slice in shared memory. Host code without CUDA, so that it is tested where there is none.
#pragma once
#include "row_walk.h"

namespace kd {
namespace cuda {

// What matters of a device.
struct Device {
  int major = 0;                // of the compute capability
  int64_t shared_bytes = 0;     // that a block may ask for
  int64_t shared_of_all = 0;    // that all blocks of a multiprocessor have together
  int64_t shared_reserved = 0;  // of it, by the system for each block
};

struct Geometry {
  bool held = false;  // one read of every logit
  int ranks = 1;      // blocks of a row: a cluster
  int64_t width = 0;  // vocabulary entries of a block
  int64_t student_bytes = 0, shared_bytes = kScratchBytes;
  int64_t rows = 0;  // of a launch: a grid has up to 2^31 - 1 blocks
};

constexpr int kMostRanks = 16;         // beyond 8 a kernel must ask for it
constexpr int64_t kSliceMultiple = 8;  // of every group, and of 16 bytes in every type

inline int64_t rounded_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

inline Geometry cut(const RowDivergence& job, int ranks) {
  Geometry cut;
  cut.ranks = ranks;
  cut.width = rounded_up((job.vocab + ranks - 1) / ranks, kSliceMultiple);
  const auto area = [&](Dtype dtype) { return rounded_up(cut.width * bytes_of(dtype), 16) + kSlack; };
  cut.student_bytes = area(job.student.dtype);
  cut.shared_bytes = kScratchBytes + cut.student_bytes + area(job.teacher.dtype);
  cut.rows = ((int64_t{1} << 31) - 1) / ranks;
  return cut;
}

// Clusters are cut alike whatever phases run, so that phases apart give the bits of all at once. Few enough
// blocks of a row to hold it, but so many that the shared memory of a multiprocessor has room for two: where their
// registers fit too (tests/cuda_resources.json), one reads while the other computes. Rows that 16 blocks cannot
// hold (fp32 pairs beyond 463,104 entries on sm_90) are read by one block, in every walk anew.
inline Geometry geometry(const RowDivergence& job, unsigned phases, const Device& device) {
  const bool wide = job.student.dtype == Dtype::float64 || job.teacher.dtype == Dtype::float64;
  const unsigned walks = (phases & kStatistics ? 1 : 0) + (phases & kTerms ? 1 : 0) + (phases & kGradient ? 1 : 0);
  const int64_t half = device.shared_of_all / 2 - device.shared_reserved;
  const int64_t rooms[] = {half < device.shared_bytes ? half : device.shared_bytes, device.shared_bytes};
  for (const int64_t room : rooms) {
    for (int ranks = 1; ranks <= kMostRanks && device.major >= 9 && !wide; ranks *= 2) {
      Geometry found = cut(job, ranks);
      if (found.shared_bytes > room) continue;
      found.held = walks > 1;
      if (!found.held) found.shared_bytes = kScratchBytes;
      return found;
    }
  }
  Geometry alone = cut(job, 1);
  alone.shared_bytes = kScratchBytes;
  return alone;
}

}  // namespace cuda
}  // namespace kd
