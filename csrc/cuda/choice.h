// Which of the compiled kernels serves a call.
#pragma once
#include "../row_divergence.h"

namespace kd {
namespace cuda {

enum class Storage { float32, bfloat16, float16, mixed, wide };

inline Storage storage_of(const RowDivergence& job) {
  if (job.student.dtype == Dtype::float64 || job.teacher.dtype == Dtype::float64) return Storage::wide;
  if (job.student.dtype != job.teacher.dtype) return Storage::mixed;
  if (job.student.dtype == Dtype::float32) return Storage::float32;
  return job.student.dtype == Dtype::bfloat16 ? Storage::bfloat16 : Storage::float16;
}

// Without a gradient phase in this call, a later one may want either side's sum.
inline bool teacher_parts(const RowDivergence& job, unsigned phases) {
  return job.teacher.grad != nullptr || !(phases & kGradient);
}

}  // namespace cuda
}  // namespace kd
