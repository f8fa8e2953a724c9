// What the lanes of a vector have in common: their sum, their maximum; and vectors of which only a part is memory.
#pragma once
#include <utility>

#include "vec.h"

namespace kd {
namespace KD_ISA {
namespace {

// Halves are added until one number is left.
template <class T, int kBytes>
struct Halves {
  typedef T Native __attribute__((vector_size(kBytes)));
  typedef T Half __attribute__((vector_size(kBytes / 2)));
  static KD_INLINE T sum(Native x) {
    Half halves[2];
    std::memcpy(halves, &x, sizeof x);
    return Halves<T, kBytes / 2>::sum(halves[0] + halves[1]);
  }
};

template <class T>
struct Halves<T, 2 * static_cast<int>(sizeof(T))> {
  typedef T Native __attribute__((vector_size(2 * sizeof(T))));
  static KD_INLINE T sum(Native x) { return x[0] + x[1]; }
};

template <class T>
KD_INLINE T sum_lanes(Vec<T> x) {
  return Halves<T, kVectorBytes>::sum(x.v);
}

// Of two vectors that hold a number in every `group` lanes, yet to be summed, one that does in every half of that.
template <int group, class T, size_t... lane>
KD_INLINE Vec<T> folded(Vec<T> x, Vec<T> y, std::index_sequence<lane...>) {
  constexpr int half = group / 2;
  return {__builtin_shufflevector(x.v, y.v, static_cast<int>(lane / half * group + lane % half)...) +
          __builtin_shufflevector(x.v, y.v, static_cast<int>(lane / half * group + lane % half + half)...)};
}

// Sums the lanes of `count` vectors, a power of two: sum_of[k] is of the k-th.
template <int count, int group, class T>
KD_INLINE void sum_lanes_of_many(Vec<T>* vectors, T* sum_of) {
  if constexpr (group == 1) {
    for (int i = 0; i < count; ++i) vectors[i].store(sum_of + i * Vec<T>::kLanes);
  } else if constexpr (count == 1) {
    // Fewer numbers than lanes: the last ones are repeated.
    vectors[0] = folded<group>(vectors[0], vectors[0], std::make_index_sequence<Vec<T>::kLanes>());
    sum_lanes_of_many<1, group / 2>(vectors, sum_of);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i)
      vectors[i] = folded<group>(vectors[2 * i], vectors[2 * i + 1], std::make_index_sequence<Vec<T>::kLanes>());
    sum_lanes_of_many<count / 2, group / 2>(vectors, sum_of);
  }
}

template <class T>
KD_INLINE T largest_lane(Vec<T> x) {
  T lanes[Vec<T>::kLanes];
  x.store(lanes);
  T max = lanes[0];
  for (int i = 1; i < Vec<T>::kLanes; ++i) max = lanes[i] > max ? lanes[i] : max;
  return max;
}

// The first `count` lanes, one or more; of what is loaded the others are 0.
#if defined(__AVX512F__)
KD_INLINE Vec<float> load_some(const float* source, int64_t count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), source)};
}
KD_INLINE Vec<double> load_some(const double* source, int64_t count) {
  return {_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), source)};
}
KD_INLINE void store_some(Vec<float> x, float* target, int64_t count) {
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1u), x.v);
}
KD_INLINE void store_some(Vec<double> x, double* target, int64_t count) {
  _mm512_mask_storeu_pd(target, static_cast<__mmask8>((1u << count) - 1u), x.v);
}
#else
template <class T>
KD_INLINE Vec<T> load_some(const T* source, int64_t count) {
  T lanes[Vec<T>::kLanes] = {};
  std::memcpy(lanes, source, static_cast<size_t>(count) * sizeof(T));
  return Vec<T>::load(lanes);
}
template <class T>
KD_INLINE void store_some(Vec<T> x, T* target, int64_t count) {
  T lanes[Vec<T>::kLanes];
  x.store(lanes);
  std::memcpy(target, lanes, static_cast<size_t>(count) * sizeof(T));
}
#endif

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
