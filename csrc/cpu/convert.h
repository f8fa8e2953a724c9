// Logits and gradients between their storage type and the arithmetic type, a segment of kLanes<T> at a time.
#pragma once
#include "../rows.h"
#include "vec.h"

namespace kd {
namespace KD_ISA {

// A strip is this many numbers wide: two cache lines. Both instruction sets' widths divide it.
template <class T>
constexpr int kLanes = 128 / static_cast<int>(sizeof(T));

// Storage types. widen and narrow are loops over a segment, which the compiler turns into vector code.
struct Float32 {
  using Raw = float;
  KD_INLINE static float widen(Raw x) { return x; }
  template <class T>
  KD_INLINE static Raw narrow(T x) {
    return static_cast<Raw>(x);
  }
};

struct Float64 {
  using Raw = double;
  KD_INLINE static double widen(Raw x) { return x; }
  template <class T>
  KD_INLINE static Raw narrow(T x) {
    return x;
  }
};

struct Bfloat16 {
  using Raw = uint16_t;
  KD_INLINE static float widen(Raw x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }
  template <class T>
  KD_INLINE static Raw narrow(T wide) {  // to nearest even; NaN must not round up to infinity
    const float x = static_cast<float>(wide);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t is_nan = (bits & 0x7fffffff) > 0x7f800000 ? 0xffffffffu : 0u;
    return static_cast<Raw>((is_nan & 0x7fc0) | (~is_nan & rounded));
  }
};

struct Float16 {
  using Raw = uint16_t;
  // Shifted into float32's place, every exponent is 112 too small; a multiplication puts that right
  // for normal and subnormal numbers alike. Infinity and NaN have their own exponent.
  KD_INLINE static float widen(Raw x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value *= 5192296858534827628530496329220096.0f;  // 2^112
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : bits) | sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  template <class T>
  KD_INLINE static Raw narrow(T wide) {  // to nearest even
    const float x = static_cast<float>(wide);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    // Subnormal results: adding 0.5 aligns the mantissa so that the sum's low bits are the result.
    float small;
    std::memcpy(&small, &magnitude, sizeof small);
    small += 0.5f;
    uint32_t subnormal;
    std::memcpy(&subnormal, &small, sizeof subnormal);
    subnormal -= 0x3f000000;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    uint32_t result = magnitude < 0x38800000 ? subnormal : normal;
    result = magnitude >= 0x477ff000 ? 0x7c00 : result;
    result = magnitude > 0x7f800000 ? 0x7e00 : result;
    return static_cast<Raw>(result | sign);
  }
};

template <class Storage, class T>
KD_INLINE void widen_segment(const typename Storage::Raw* source, T* target) {
  for (int i = 0; i < kLanes<T>; ++i) target[i] = static_cast<T>(Storage::widen(source[i]));
}

template <class Storage, class T>
KD_INLINE void narrow_segment(const T* source, typename Storage::Raw* target) {
  for (int i = 0; i < kLanes<T>; ++i) target[i] = Storage::narrow(source[i]);
}

#if defined(__F16C__)
template <>
KD_INLINE void widen_segment<Float16, float>(const uint16_t* source, float* target) {
  for (int i = 0; i < kLanes<float>; i += 8)
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
}
template <>
KD_INLINE void narrow_segment<Float16, float>(const float* source, uint16_t* target) {
  for (int i = 0; i < kLanes<float>; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Where a block stands in memory: `steps` segments, `stride` elements apart. All but the last hold
// `width` numbers, the last `last_width`; both are kLanes<T> except at the edges.
struct BlockShape {
  int64_t first, stride;
  int steps, width, last_width;
};

template <class Storage, class T>
void load_segments(const void* base, const BlockShape& shape, T* block) {
  using Raw = typename Storage::Raw;
  const Raw* source = static_cast<const Raw*>(base) + shape.first;
  for (int step = 0; step < shape.steps; ++step, source += shape.stride, block += kLanes<T>) {
    const int width = step + 1 < shape.steps ? shape.width : shape.last_width;
    if (width == kLanes<T>) {
      widen_segment<Storage>(source, block);
    } else {
      Raw partial[kLanes<T>] = {};
      std::memcpy(partial, source, static_cast<size_t>(width) * sizeof(Raw));
      widen_segment<Storage>(partial, block);
    }
  }
}

template <class Storage, class T>
void store_segments(const T* block, const BlockShape& shape, void* base) {
  using Raw = typename Storage::Raw;
  Raw* target = static_cast<Raw*>(base) + shape.first;
  for (int step = 0; step < shape.steps; ++step, target += shape.stride, block += kLanes<T>) {
    const int width = step + 1 < shape.steps ? shape.width : shape.last_width;
    if (width == kLanes<T>) {
      narrow_segment<Storage>(block, target);
    } else {
      Raw partial[kLanes<T>];
      narrow_segment<Storage>(block, partial);
      std::memcpy(target, partial, static_cast<size_t>(width) * sizeof(Raw));
    }
  }
}

inline int element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 8;
    case Dtype::float32:
      return 4;
    case Dtype::bfloat16:
    case Dtype::float16:
      break;
  }
  return 2;
}

template <class T>
void load_block(const void* base, Dtype dtype, const BlockShape& shape, T* block) {
  switch (dtype) {
    case Dtype::float32:
      return load_segments<Float32>(base, shape, block);
    case Dtype::bfloat16:
      return load_segments<Bfloat16>(base, shape, block);
    case Dtype::float16:
      return load_segments<Float16>(base, shape, block);
    case Dtype::float64:
      return load_segments<Float64>(base, shape, block);
  }
}

template <class T>
void store_block(const T* block, Dtype dtype, const BlockShape& shape, void* base) {
  switch (dtype) {
    case Dtype::float32:
      return store_segments<Float32>(block, shape, base);
    case Dtype::bfloat16:
      return store_segments<Bfloat16>(block, shape, base);
    case Dtype::float16:
      return store_segments<Float16>(block, shape, base);
    case Dtype::float64:
      return store_segments<Float64>(block, shape, base);
  }
}

}  // namespace KD_ISA
}  // namespace kd
