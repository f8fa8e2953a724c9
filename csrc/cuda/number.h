// Plain float and double as the number type of objectives.h. In float the hardware's exponential serves where
// nothing cancels, and a polynomial where something does, as in triton_kernels/elementary.py; the double one is that
// of cpu/vec.h, where the constants are explained. Nothing is contracted, and but for the exponential in float and
// a logarithm in double host and device do the same, so that a kernel's arithmetic can be run where there is no GPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KD_BOTH __host__ __device__ __forceinline__
#else
#define KD_BOTH inline
#endif
#if defined(__CUDA_ARCH__)
#define KD_UNROLL _Pragma("unroll")
#define KD_ROLL _Pragma("unroll 1")
#else
#define KD_UNROLL
#define KD_ROLL
#endif

namespace kd {

// Declared before objectives.h, which looks for them there: numbers have no namespace of their own.
template <class F>
struct ExpParts;
template <class F>
struct Log1pParts;

template <class F>
struct NumberTraits;

template <>
struct NumberTraits<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23, kPhiTerms = 5, kAtanhTerms = 4;
  static constexpr float kLowestExponent = -87.0f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExponentUnit = 1.4426950408889634f;  // exp(x) = exp_of_units(x * kExponentUnit)
  KD_BOTH static float phi(int i) {
    constexpr float terms[] = {0.5f, 0.16666577756404877f, 0.04166685417294502f, 0.008363153785467148f,
                               0.001390129211358726f};
    return terms[i];
  }
};

template <>
struct NumberTraits<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52, kExponentBias = 1023, kPhiTerms = 13, kAtanhTerms = 11;
  static constexpr double kExponentUnit = 1.0;
  static constexpr double kLowestExponent = -708.0, kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  KD_BOTH static double phi(int i) {
    constexpr double terms[] = {1.0 / 2,         1.0 / 6,          1.0 / 24,         1.0 / 120,     1.0 / 720,
                                1.0 / 5040,      1.0 / 40320,      1.0 / 362880,     1.0 / 3628800, 1.0 / 39916800,
                                1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200};
    return terms[i];
  }
};

template <class To, class From>
KD_BOTH To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// One instruction each on a GPU; on the host the library's.
KD_BOTH float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
KD_BOTH double fma(double a, double b, double c) { return ::fma(a, b, c); }
KD_BOTH float nearest(float x) { return ::rintf(x); }
KD_BOTH double nearest(double x) { return ::rint(x); }

KD_BOTH float select(bool mask, float a, float b) { return mask ? a : b; }
KD_BOTH double select(bool mask, double a, double b) { return mask ? a : b; }

template <class F>
KD_BOTH F infinity() {
  return static_cast<F>(HUGE_VAL);
}
template <class F>
KD_BOTH F not_a_number() {
  return infinity<F>() - infinity<F>();
}
// Where maxima start: differences to a finite number are never NaN.
template <class F>
KD_BOTH F lowest() {
  return sizeof(F) == 4 ? static_cast<F>(-3.4028234663852886e38) : static_cast<F>(-1.7976931348623157e308);
}

// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2.
template <class F>
KD_BOTH F phi_quotient(F r) {
  using Traits = NumberTraits<F>;
  F sum = Traits::phi(Traits::kPhiTerms - 1);
  KD_UNROLL
  for (int i = Traits::kPhiTerms - 2; i >= 0; --i) sum = fma(sum, r, Traits::phi(i));
  return sum;
}

template <class F>
KD_BOTH F phi_series(F x) {
  return x * x * phi_quotient(x);
}

// x = n log(2) + r; e^x = power (1 + r + square quotient). Below the lowest exponent power is 0.
struct ReducedExp {
  double bounded, r, tail, power;

  KD_BOTH explicit ReducedExp(double x) {
    using Traits = NumberTraits<double>;
    const bool vanishes = x < Traits::kLowestExponent;
    bounded = vanishes ? Traits::kLowestExponent : x;  // NaN stays
    const double n = nearest(bounded * 1.4426950408889634);
    r = fma(n, -Traits::kLn2Low, fma(n, -Traits::kLn2High, bounded));
    tail = r * r * phi_quotient(r);
    // The exponent of a NaN does not matter, r is NaN too; but its conversion must be defined.
    const int64_t exponent = n == n ? static_cast<int64_t>(n) : int64_t{0};
    power = vanishes ? 0.0 : bits_of<double>((exponent + Traits::kExponentBias) << Traits::kMantissaBits);
  }
};

// 2^x in float, 0 for what is not a normal number; e^x in double. Units of the exponent come with a factor that a
// row's logits have anyway. For x <= 0 or a little above, -inf and NaN; of 0 exactly 1.
KD_BOTH float exp_of_units(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return ::exp2f(x);
#endif
}
KD_BOTH double exp_of_units(double x) {
  const ReducedExp e(x);
  return ((e.tail + e.r) + 1.0) * e.power;
}
template <class F>
KD_BOTH F exp(F x) {
  return exp_of_units(x * NumberTraits<F>::kExponentUnit);
}

KD_BOTH ExpParts<float> exp_parts(float x);
KD_BOTH ExpParts<double> exp_parts(double x);
template <class F>
KD_BOTH Log1pParts<F> log1p_parts(F y, F w);

}  // namespace kd

#include "../objectives.h"

namespace kd {

// Above -1 a minimax polynomial of (e^x - 1 - x) / x^2, relative error 2e-8; below it nothing cancels.
KD_BOTH ExpParts<float> exp_parts(float x) {
  constexpr float terms[] = {0.5f, 0.1666661947965622f, 0.04166005551815033f, 0.008302842266857624f,
                             0.0013263644650578499f};
  float sum = 0.00013794969709124416f;
  KD_UNROLL
  for (int i = 4; i >= 0; --i) sum = fma(sum, x, terms[i]);
  const float tail = x * x * sum, power = exp(x), minus_one = power - 1.0f;
  const float lowest_exponent = NumberTraits<float>::kLowestExponent;
  const bool near = x > -1.0f;
  return {power, near ? x + tail : minus_one, near ? tail : minus_one - x,
          x < lowest_exponent ? lowest_exponent : x};  // NaN stays
}

KD_BOTH ExpParts<double> exp_parts(double x) {
  const ReducedExp e(x);
  const double rest = e.tail + e.r, minus_one = e.power - 1.0;
  return {fma(e.power, rest, e.power), fma(e.power, rest, minus_one),
          // r == x where n == 0, so that only the last summand of e^r is left there.
          fma(e.power, e.tail, fma(e.power, e.r, minus_one - x)), e.bounded};
}

// With w = 2^n (1 + f), s = f / (2 + f): log(1 + f) = 2 atanh(s). Near w = 1, f is y itself, which has the
// digits that w has lost. Taking the bits of sqrt(1/2) away centres the mantissa on 1.
template <class F>
KD_BOTH Log1pParts<F> log1p_parts(F y, F w) {
  using Traits = NumberTraits<F>;
  using Int = typename Traits::Int;
  const F sqrt_half = static_cast<F>(0.70710678118654752);
  const bool far = w <= sqrt_half;  // not so for NaN, which y then carries on
  const Int exponent = (bits_of<Int>(w) - bits_of<Int>(sqrt_half)) >> Traits::kMantissaBits;
  // Unsigned: the shift of a negative number is not defined before C++20.
  using Unsigned = decltype(sizeof(Int) == 4 ? uint32_t{} : uint64_t{});
  const Unsigned shift = static_cast<Unsigned>(exponent) << Traits::kMantissaBits;
  const F mantissa = bits_of<F>(static_cast<Int>(static_cast<Unsigned>(bits_of<Int>(w)) - shift));
  const F n = static_cast<F>(exponent);
  const F f = far ? mantissa - F(1) : y;
  const F s = f / (f + F(2)), square = s * s;
  F sum = static_cast<F>(2.0 / (2 * Traits::kAtanhTerms + 1));
  KD_UNROLL
  for (int i = Traits::kAtanhTerms - 1; i >= 1; --i) sum = fma(sum, square, static_cast<F>(2.0 / (2 * i + 1)));
  const F phi = s * (f - square * sum);
  const F log_far = fma(n, F(Traits::kLn2High), fma(n, F(Traits::kLn2Low), f - phi));
  return {far ? log_far : f - phi, far ? y - log_far : phi};
}

template <class F>
KD_BOTH F tanh_of(F x) {
  const F decay = exp_parts(F(-2) * (x < F(0) ? -x : x)).expm1;  // e^(-2|x|) - 1
  const F magnitude = -decay / (decay + F(2));
  return x < F(0) ? -magnitude : magnitude;
}

}  // namespace kd
