// The compiled kernels, as the launcher finds them: one variant per storage and direction, each compiled on its own.
#pragma once
#include "../row_divergence.h"

namespace kd {
namespace cuda {

// The address that cudaLaunchKernelExC takes; null where a variant has no kernel that holds rows.
#define KD_CUDA_VARIANT(storage)                                          \
  const void* kernel_##storage##_student(Objective objective, bool held); \
  const void* kernel_##storage##_both(Objective objective, bool held);
KD_CUDA_VARIANT(Float32)
KD_CUDA_VARIANT(Bfloat16)
KD_CUDA_VARIANT(Float16)
KD_CUDA_VARIANT(Mixed)
KD_CUDA_VARIANT(Wide)
#undef KD_CUDA_VARIANT

}  // namespace cuda
}  // namespace kd
