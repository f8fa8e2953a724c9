// Smooth L1 terms, for the kernels that compare points.
#pragma once
#include "lanes.h"

namespace kd {
namespace KD_ISA {

// h(x) = slope (x - beta slope / 2), where slope = h'(x) is x / beta kept within [-1, 1].
class SmoothL1 {
 public:
  using V = Vec<double>;

  // A finite inverse: 0 stays 0 whatever beta.
  explicit SmoothL1(double beta)
      : half_beta_(0.5 * beta), inverse_beta_(1.0 / beta < __DBL_MAX__ ? 1.0 / beta : __DBL_MAX__) {}

  KD_INLINE V slope(V x) const {
    // NaN stays: it is the second operand.
    const V one(1.0), scaled = x * inverse_beta_;
    return -max_or_second(-one, -max_or_second(-one, scaled));
  }
  KD_INLINE V add_term(V slope, V x, V total) const { return fma(slope, fma(-half_beta_, slope, x), total); }

 private:
  const V half_beta_, inverse_beta_;
};

}  // namespace KD_ISA
}  // namespace kd
