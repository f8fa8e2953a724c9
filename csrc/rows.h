// What the row kernels share: how logits lie in memory, and the phases of a call. Plain addresses and numbers,
// so that any caller (pybind11, ctest, CUDA) can fill it.
#pragma once
#include <cstdint>

namespace kd {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };
constexpr int kDtypes = 4;

// The three phases; a call runs any consecutive subset, fused. A phase that is left out must have been
// run before (by this process, or by a reduction over ranks) and its results stand in `statistics`.
enum Phase : unsigned { kStatistics = 1, kTerms = 2, kGradient = 4 };

// One model's logits. Two layouts:
//   row-major         `offsets` [n] gives the element offset of each row; the vocabulary is contiguous.
//   vocabulary-major  `offsets` is null; logit v of token i stands at v * ld + i.
// Both sides of a call have the same layout.
struct Side {
  const void* logits = nullptr;
  Dtype dtype = Dtype::float32;
  const int64_t* offsets = nullptr;
  int64_t ld = 0;
  double scale = 1.0;                   // z = scale * logit, or softcap * tanh(scale * logit / softcap)
  double softcap = 0.0;                 // 0: none
  const double* temperature = nullptr;  // [n]
  // Gradient with respect to the raw logit, in the same layout. Null: not wanted. May be the logits'
  // own memory when dtype and offsets (or ld) agree.
  void* grad = nullptr;
  Dtype grad_dtype = Dtype::float32;
  const int64_t* grad_offsets = nullptr;
  int64_t grad_ld = 0;
};

// "avx512", "avx2" or "baseline": what row_divergence runs on this machine.
// KD_KERNELS_ISA=avx2|baseline in the environment lowers it (for tests), never raises it.
const char* instruction_set();

}  // namespace kd
