// Random numbers, and the storage types by the slow road, for the tests of the row kernels.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../rows.h"

namespace row_test {

using kd::Dtype;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// --- a reproducible source of numbers -----------------------------------------------------------
struct Random {
  uint64_t state;
  double uniform() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state >> 11) * 0x1p-53;
  }
  double normal() {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
};

// --- storage types, by the slow road ---------------------------------------------------------------
inline int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

inline double decode(const char* at, Dtype dtype) {
  if (dtype == Dtype::float64) {
    double x;
    std::memcpy(&x, at, 8);
    return x;
  }
  if (dtype == Dtype::float32) {
    float x;
    std::memcpy(&x, at, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const int mantissa_bits = dtype == Dtype::bfloat16 ? 7 : 10, bias = dtype == Dtype::bfloat16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 2 * bias + 1) return mantissa ? kNaN : sign * kInf;
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  return sign * (exponent ? std::ldexp(1.0 + fraction, exponent - bias) : std::ldexp(fraction, 1 - bias));
}

inline double decode16(int bits, Dtype dtype) {
  char bytes[8] = {};  // as long as the longest type, whose branch the compiler sees too
  const uint16_t narrow = static_cast<uint16_t>(bits);
  std::memcpy(bytes, &narrow, 2);
  return decode(bytes, dtype);
}

// The largest number not above, by search among the neighbours: for the 16-bit types the candidates are few.
inline void encode(double value, char* at, Dtype dtype) {
  if (dtype == Dtype::float64) {
    std::memcpy(at, &value, 8);
  } else if (dtype == Dtype::float32) {
    const float x = static_cast<float>(value);
    std::memcpy(at, &x, 4);
  } else {
    int low = 0, high = dtype == Dtype::bfloat16 ? 0x7f80 : 0x7c00;  // largest magnitude not above |value|
    if (std::isnan(value)) {
      low = high + 1;
    } else {
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (decode16(middle, dtype) <= std::fabs(value)) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
    }
    const uint16_t bits = static_cast<uint16_t>(low | (std::signbit(value) ? 0x8000 : 0));
    std::memcpy(at, &bits, 2);
  }
}

inline double relative_rounding(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 1e-15;
    case Dtype::float32:
      return 1.2e-7;
    case Dtype::float16:
      return 1.0e-3;
    case Dtype::bfloat16:
      break;
  }
  return 8.0e-3;
}

}  // namespace row_test
