// The row kernels of one storage (KD_STORAGE, of storage.h) and direction (KD_TEACHER: the teacher's parts too),
// for every objective. build.cmake compiles this file once for each.
#include <type_traits>

#include "device_thread.cuh"
#include "kernels.h"

namespace kd {
namespace cuda {
namespace {

constexpr bool kWithTeacher = KD_TEACHER != 0;
// Rows in float64 are read again by every walk: their arithmetic takes longer than that.
constexpr bool kMayHold = sizeof(KD_STORAGE::Number) == sizeof(float);
template <class Functor>
constexpr bool kIsSkew = std::is_same_v<Functor, SkewKL> || std::is_same_v<Functor, SkewReverseKL>;
// Blocks of a multiprocessor that must find room: one reads while the other computes. What looks up its types, and
// the skew divergences of eight entries at a time, would spill with the registers that two leave.
template <class S, class Functor>
constexpr int kLeastBlocks = !S::kFixed || (S::kGroup > 4 && kIsSkew<Functor>) ? 1 : 2;

// Storage and direction are parameters for the sake of the kernel's name (tests/cuda_resources.py reads it).
template <class S, class Functor, bool kTeacher, bool kHeld>
__global__ void __launch_bounds__(kThreads, (kLeastBlocks<S, Functor>)) row_kernel(const __grid_constant__ Work work) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  row_divergence<S, Functor, kTeacher>(DeviceThread(), work, kHeld);
#else  // geometry.h holds rows on sm_90 and later only, by what the library was compiled for
  if constexpr (kHeld) {
    __trap();
  } else {
    row_divergence<S, Functor, kTeacher>(DeviceThread(), work, kHeld);
  }
#endif
}

template <class Functor>
const void* kernel_of(bool held) {
  if (!held) return reinterpret_cast<const void*>(&row_kernel<KD_STORAGE, Functor, kWithTeacher, false>);
  if constexpr (kMayHold) return reinterpret_cast<const void*>(&row_kernel<KD_STORAGE, Functor, kWithTeacher, true>);
  return nullptr;
}

const void* kernel(Objective objective, bool held) {
  switch (objective) {
    case Objective::forward_kl:
      return kernel_of<ForwardKL>(held);
    case Objective::reverse_kl:
      return kernel_of<ReverseKL>(held);
    case Objective::jensen_shannon:
      return kernel_of<JensenShannon>(held);
    case Objective::skew_kl:
      return kernel_of<SkewKL>(held);
    case Objective::skew_reverse_kl:
      return kernel_of<SkewReverseKL>(held);
    case Objective::total_variation:
      return kernel_of<TotalVariation>(held);
    case Objective::weighted_kl:
      return kernel_of<WeightedKL>(held);
  }
  return nullptr;
}

}  // namespace

#define KD_JOIN(storage, direction) kernel_##storage##_##direction
#define KD_NAME(storage, direction) KD_JOIN(storage, direction)
#if KD_TEACHER
const void* KD_NAME(KD_STORAGE, both)(Objective objective, bool held) { return kernel(objective, held); }
#else
const void* KD_NAME(KD_STORAGE, student)(Objective objective, bool held) { return kernel(objective, held); }
#endif

}  // namespace cuda
}  // namespace kd
