// A SIMD vector of the instruction set this file is compiled for, and the elementary functions that
// objectives.h asks for. Included once per instruction set with another KD_ISA: everything lives in a
// namespace of that name, so that the linker can never merge code of one instruction set into another.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../objectives.h"

#if !defined(KD_ISA)
#error "KD_ISA names the instruction set's namespace"
#endif

namespace kd {
namespace KD_ISA {

#define KD_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Not std::numeric_limits: an inline function of the library's would be compiled for this instruction set
// under a name that all of them share.
template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kNaN = static_cast<T>(__builtin_nan(""));

template <class T>
struct Traits;

// exp reduces to |r| <= log(2) / 2 by x = n log(2) + r, log(2) split so that n * kLn2High is exact.
// kRound is 1.5 * 2^(mantissa bits): adding it rounds to an integer and leaves that in the low bits.
template <>
struct Traits<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Int kExponentBias = 127;
  static constexpr float kRound = 12582912.0f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowestExponent = -87.0f;
  // (e^r - 1 - r) / r^2 on that range: minimax, relative error 1.3e-7.
  static constexpr int kPhiTerms = 5, kAtanhTerms = 4;
  static constexpr double kPhi[] = {0.5, 0.16666577756404877, 0.04166685417294502, 0.008363153785467148,
                                    0.001390129211358726};
};

template <>
struct Traits<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Int kExponentBias = 1023;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLowestExponent = -708.0;
  static constexpr int kPhiTerms = 13, kAtanhTerms = 11;  // of the Taylor series
  static constexpr double kPhi[] = {1.0 / 2,         1.0 / 6,          1.0 / 24,         1.0 / 120,     1.0 / 720,
                                    1.0 / 5040,      1.0 / 40320,      1.0 / 362880,     1.0 / 3628800, 1.0 / 39916800,
                                    1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200};
};

template <class T>
struct Mask;

template <class T>
struct Vec {
  using Scalar = T;
  using Int = typename Traits<T>::Int;
  typedef T Native __attribute__((vector_size(kVectorBytes)));
  typedef Int NativeInt __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

  Native v;

  Vec() = default;
  KD_INLINE Vec(Native native) : v(native) {}
  KD_INLINE explicit Vec(double scalar) : v(Native{} + static_cast<T>(scalar)) {}

  KD_INLINE static Vec load(const T* source) {
    Vec result;
    std::memcpy(&result.v, source, sizeof result.v);
    return result;
  }
  KD_INLINE void store(T* target) const { std::memcpy(target, &v, sizeof v); }

  KD_INLINE friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  KD_INLINE friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  KD_INLINE friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  KD_INLINE friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  KD_INLINE friend Vec operator-(Vec a) { return -a.v; }
  KD_INLINE friend Mask<T> operator<(Vec a, Vec b) { return Mask<T>::less(a, b); }
  KD_INLINE friend Mask<T> operator>(Vec a, Vec b) { return Mask<T>::less(b, a); }
  KD_INLINE friend Mask<T> operator<=(Vec a, Vec b) { return Mask<T>::less_equal(a, b); }
  KD_INLINE friend Mask<T> operator==(Vec a, Vec b) { return Mask<T>::equal(a, b); }
};

#if defined(__AVX512F__)

template <>
struct Mask<float> {
  __mmask16 bits;
  KD_INLINE static Mask less(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  KD_INLINE static Mask less_equal(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
  KD_INLINE static Mask equal(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  KD_INLINE Mask operator&(Mask other) const { return {static_cast<__mmask16>(bits & other.bits)}; }
  KD_INLINE bool any() const { return bits != 0; }
};

template <>
struct Mask<double> {
  __mmask8 bits;
  KD_INLINE static Mask less(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
  KD_INLINE static Mask less_equal(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)}; }
  KD_INLINE static Mask equal(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  KD_INLINE Mask operator&(Mask other) const { return {static_cast<__mmask8>(bits & other.bits)}; }
  KD_INLINE bool any() const { return bits != 0; }
};

KD_INLINE Vec<float> select(Mask<float> m, Vec<float> a, Vec<float> b) {
  return {_mm512_mask_blend_ps(m.bits, b.v, a.v)};
}
KD_INLINE Vec<double> select(Mask<double> m, Vec<double> a, Vec<double> b) {
  return {_mm512_mask_blend_pd(m.bits, b.v, a.v)};
}

#else

template <class T>
struct Mask {
  typename Vec<T>::NativeInt bits;  // all ones or all zeros
  KD_INLINE static Mask less(Vec<T> a, Vec<T> b) { return {a.v < b.v}; }
  KD_INLINE static Mask less_equal(Vec<T> a, Vec<T> b) { return {a.v <= b.v}; }
  KD_INLINE static Mask equal(Vec<T> a, Vec<T> b) { return {a.v == b.v}; }
  KD_INLINE Mask operator&(Mask other) const { return {bits & other.bits}; }
  KD_INLINE bool any() const {
    typename Traits<T>::Int found = 0;
    for (int i = 0; i < Vec<T>::kLanes; ++i) found |= bits[i];
    return found != 0;
  }
};

template <class T>
KD_INLINE Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) {
  return {m.bits ? a.v : b.v};
}

#endif

// Contraction is off in this build: what is fused is fused here, so that a value does not depend on
// the code around it (u_s - u_t must vanish where student and teacher agree).
#if defined(__AVX512F__)
KD_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
KD_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
#elif defined(__FMA__)
KD_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
KD_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
#elif defined(__aarch64__)
KD_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {(Vec<float>::Native)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
}
KD_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {(Vec<double>::Native)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v)};
}
#else
template <class T>
KD_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
#endif

#if defined(__AVX512F__)
KD_INLINE Vec<double> sqrt(Vec<double> x) { return {_mm512_sqrt_pd(x.v)}; }
#elif defined(__AVX2__)
KD_INLINE Vec<double> sqrt(Vec<double> x) { return {_mm256_sqrt_pd(x.v)}; }
#else
KD_INLINE Vec<double> sqrt(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = __builtin_sqrt(x.v[i]);
  return x;
}
#endif

// The larger, and b where either is NaN: the operand order that the hardware's max has.
#if defined(__AVX512F__)
KD_INLINE Vec<float> max_or_second(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
KD_INLINE Vec<double> max_or_second(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
#elif defined(__AVX2__)
KD_INLINE Vec<float> max_or_second(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
KD_INLINE Vec<double> max_or_second(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
#else
template <class T>
KD_INLINE Vec<T> max_or_second(Vec<T> a, Vec<T> b) {
  return select(a > b, a, b);
}
#endif

template <class T>
KD_INLINE Vec<T> from_bits(typename Vec<T>::NativeInt bits) {
  return {(typename Vec<T>::Native)bits};
}

template <class T>
KD_INLINE typename Vec<T>::NativeInt to_bits(Vec<T> x) {
  return (typename Vec<T>::NativeInt)x.v;
}

// (e^r - 1 - r) / r^2 for |r| <= kPhiSeriesRange.
template <class T>
KD_INLINE Vec<T> phi_quotient(Vec<T> r) {
  constexpr int terms = Traits<T>::kPhiTerms;
  Vec<T> sum(Traits<T>::kPhi[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) sum = fma(sum, r, Vec<T>(Traits<T>::kPhi[i]));
  return sum;
}

template <class T>
KD_INLINE Vec<T> phi_series(Vec<T> x) {
  return x * x * phi_quotient(x);
}

// The nearest integer, and 2^n for an integer n in the range of normal numbers.
#if defined(__AVX512F__)
KD_INLINE Vec<float> nearest(Vec<float> x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
KD_INLINE Vec<double> nearest(Vec<double> x) { return {_mm512_roundscale_pd(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
KD_INLINE Vec<float> times_power_of_two(Vec<float> x, Vec<float> n) { return {_mm512_scalef_ps(x.v, n.v)}; }
KD_INLINE Vec<double> times_power_of_two(Vec<double> x, Vec<double> n) { return {_mm512_scalef_pd(x.v, n.v)}; }
#else
template <class T>
KD_INLINE Vec<T> nearest(Vec<T> x) {
  const Vec<T> round(Traits<T>::kRound);
  return (x + round) - round;
}

template <class T>
KD_INLINE Vec<T> times_power_of_two(Vec<T> x, Vec<T> n) {
  const Vec<T> shifted = n + Vec<T>(Traits<T>::kRound);
  return x * from_bits<T>((to_bits(shifted) + Traits<T>::kExponentBias) << Traits<T>::kMantissaBits);
}
#endif

// x = n log(2) + r; e^x = 2^n (1 + r + square quotient). Below the lowest exponent e^x is 0, not a subnormal.
template <class T>
struct ReducedExp {
  Mask<T> vanishes;
  Vec<T> bounded, n, r, square, quotient;

  KD_INLINE explicit ReducedExp(Vec<T> x) {
    using Constants = Traits<T>;
    const Vec<T> lowest(Constants::kLowestExponent);
    vanishes = x < lowest;
    bounded = max_or_second(lowest, x);  // NaN stays
    n = nearest(bounded * Vec<T>(1.4426950408889634));
    r = fma(n, Vec<T>(-Constants::kLn2Low), fma(n, Vec<T>(-Constants::kLn2High), bounded));
    square = r * r;
    quotient = phi_quotient(r);
  }
};

// For x <= 0 or a little above, -inf and NaN. exp(0) is exactly 1.
template <class T>
KD_INLINE Vec<T> exp(Vec<T> x) {
  const ReducedExp<T> e(x);
  const Vec<T> rest = fma(e.square, e.quotient, e.r);
  return select(e.vanishes, Vec<T>(0.0), times_power_of_two(rest + Vec<T>(1.0), e.n));
}

template <class T>
KD_INLINE ExpParts<Vec<T>> exp_parts(Vec<T> x) {
  const ReducedExp<T> e(x);
  const Vec<T> scale = select(e.vanishes, Vec<T>(0.0), times_power_of_two(Vec<T>(1.0), e.n));
  const Vec<T> rest = fma(e.square, e.quotient, e.r), minus_one = scale - Vec<T>(1.0);
  return {fma(scale, rest, scale), fma(scale, rest, minus_one),
          // r == x where n == 0, so that only the last summand of e^r is left there.
          fma(scale, e.square * e.quotient, fma(scale, e.r, minus_one - x)), e.bounded};
}

// w = 2^n times a mantissa in [sqrt(1/2), sqrt(2)), for normal w > 0.
template <class T>
struct ReducedLog {
  Vec<T> n, mantissa;

  KD_INLINE explicit ReducedLog(Vec<T> w) {
    using NativeInt = typename Vec<T>::NativeInt;
    // Taking the bits of sqrt(1/2) away before reading the exponent centres the mantissa on 1.
    const NativeInt offset = to_bits(w) - to_bits(Vec<T>(0.70710678118654752));
    const NativeInt exponent = offset >> Traits<T>::kMantissaBits;
    mantissa = from_bits<T>(to_bits(w) - (exponent << Traits<T>::kMantissaBits));
    // The exponent as a number: kRound's low mantissa bits hold an integer.
    typename Vec<T>::Int round_bits;
    const T round = Traits<T>::kRound;
    std::memcpy(&round_bits, &round, sizeof round);
    n = from_bits<T>(exponent + round_bits) - Vec<T>(round);
  }
};

// f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)): with s = f / (2 + f), log(1 + f) = 2 atanh(s) and
// f - log(1 + f) = f s - 2 s^3 (1/3 + s^2/5 + ...).
template <class T>
KD_INLINE Vec<T> below_its_tangent(Vec<T> f) {
  const Vec<T> s = f / (f + Vec<T>(2.0)), square = s * s;
  Vec<T> sum(2.0 / (2 * Traits<T>::kAtanhTerms + 1));
#pragma GCC unroll 16
  for (int i = Traits<T>::kAtanhTerms - 1; i >= 1; --i) sum = fma(sum, square, Vec<T>(2.0 / (2 * i + 1)));
  return s * (f - square * sum);
}

template <class T>
KD_INLINE Vec<T> log_of(Vec<T> n, Vec<T> f, Vec<T> phi) {
  return fma(n, Vec<T>(Traits<T>::kLn2High), fma(n, Vec<T>(Traits<T>::kLn2Low), f - phi));
}

// For w <= 1 or a little above. Near w = 1, f is y itself, which has the digits that w has lost.
template <class T>
KD_INLINE Log1pParts<Vec<T>> log1p_parts(Vec<T> y, Vec<T> w) {
  const auto far = w <= Vec<T>(0.70710678118654752);  // not so for NaN, which y then carries on
  const ReducedLog<T> reduced(w);
  const Vec<T> f = select(far, reduced.mantissa - Vec<T>(1.0), y), phi = below_its_tangent(f);
  const Vec<T> log_far = log_of(reduced.n, f, phi);
  return {select(far, log_far, f - phi), select(far, y - log_far, phi)};
}

// For any w >= 0; infinity and NaN stay.
template <class T>
KD_INLINE Vec<T> log(Vec<T> w) {
  constexpr int kScale = Traits<T>::kMantissaBits + 1;  // makes subnormal numbers normal
  const auto small = w < Vec<T>(sizeof(T) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308);
  const ReducedLog<T> reduced(select(small, w * Vec<T>(static_cast<double>(int64_t{1} << kScale)), w));
  const Vec<T> f = reduced.mantissa - Vec<T>(1.0);
  const Vec<T> n = select(small, reduced.n - Vec<T>(kScale), reduced.n);
  const Vec<T> finite = select(w < Vec<T>(kInfinity<double>), log_of(n, f, below_its_tangent(f)), w);
  return select(w == Vec<T>(0.0), Vec<T>(-kInfinity<double>), finite);
}

template <class T>
KD_INLINE Vec<T> tanh(Vec<T> x) {
  const auto negative = x < Vec<T>(0.0);
  const Vec<T> decay = exp_parts(Vec<T>(2.0) * select(negative, x, -x)).expm1;
  const Vec<T> magnitude = decay / (decay + Vec<T>(2.0));  // -tanh(|x|)
  return select(negative, magnitude, -magnitude);
}

}  // namespace KD_ISA
}  // namespace kd
