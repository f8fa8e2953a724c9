// bfloat16 x bfloat16 -> float32 matrix product, for processors where no vendor library reachable from
// torch has a fast one (MKL's falls back to float32 arithmetic on AMD; oneDNN's is not exported).
#pragma once
#include <cstdint>

namespace kd {

// c[m, n] = (accumulate ? c : 0) + sum_k a[m, k] b[k, n]; element (i, j) of a stands at
// a + i * a_row + j * a_col, likewise b; c has unit column stride and row stride ldc.
// One of each operand's two strides is 1. Float32 accumulation. Deterministic, and independent of `threads`.
struct GemmBf16 {
  int64_t m = 0, n = 0, k = 0;
  const uint16_t* a = nullptr;
  int64_t a_row = 0, a_col = 0;
  const uint16_t* b = nullptr;
  int64_t b_row = 0, b_col = 0;
  float* c = nullptr;
  int64_t ldc = 0;
  bool accumulate = false;
  int threads = 1;
};

bool gemm_bf16_available();  // true where the processor has AVX512_BF16
void gemm_bf16(const GemmBf16& args);

}  // namespace kd
