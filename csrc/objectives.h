// Every divergence once, as a functor on a number type F: a scalar (CUDA) or a SIMD vector (CPU).
//
// F brings, visible to argument-dependent lookup or declared before this header:
//   arithmetic and comparison operators, F(double), select(mask, a, b), fma(a, b, c),
//   exp_parts(x)       for x <= 0 or NaN: ExpParts{e^x, e^x - 1, e^x - 1 - x, x bounded from below}
//   log1p_parts(y, w)  for w = 1 + y in (0, 1]: Log1pParts{log w, y - log w}
//   phi_series(x)      e^x - 1 - x for |x| <= kPhiSeriesRange, to full relative accuracy
//
// All are f-divergences, so one scheme serves: with p, q and d = log q - log p a functor returns
//   term     its summand made non-negative: the parts that sum to zero are added entry by entry, which
//            keeps the relative accuracy of a divergence far below the rounding error of its logarithms
//   student  q dL/dq and
//   teacher  p dL/dp, each up to a constant times q or p, which the softmax Jacobian removes:
//            dL/d(logit) = student - q sum(student), likewise for the teacher.
// No eps and no clamps; probabilities of exactly 0 contribute 0.
#pragma once

#if defined(__CUDACC__)
#define KD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define KD_HD inline __attribute__((always_inline))
#else
#define KD_HD inline
#endif

namespace kd {

constexpr double kPhiSeriesRange = 0.34657359027997264;  // log(2) / 2, what exp reduces to

template <class F>
struct ExpParts {
  F exp, expm1, phi;
  F bounded;  // max(x, lowest exponent): finite where x is -inf
};

template <class F>
struct Log1pParts {
  F log, phi;
};

// Per-token parameters. The complement is passed, not recomputed: 1 - (1 - beta) loses a small beta.
template <class F>
struct Parameters {
  F first, first_complement, second;
};

template <class F>
struct Parts {
  F term, student, teacher;
};

// p and q seen from the larger of the two, so that every exponential is of a number <= 0: nothing
// overflows, and differences come from expm1 instead of a subtraction of nearly equal numbers.
template <class F>
struct Pair {
  using Mask = decltype(F(0.0) < F(0.0));
  Mask teacher_larger;  // d <= 0
  F d;                  // log q - log p
  F larger, smaller;    // max(p, q), min(p, q)
  F gap;                // -|d|; -inf where one of the two is 0
  ExpParts<F> ratio;    // of the gap: ratio.exp = smaller / larger

  // log_p and log_q may be -inf. d comes separately: it is more accurate than their difference.
  KD_HD Pair(F log_p, F log_q, F log_ratio) : d(log_ratio) {
    teacher_larger = d <= F(0.0);
    gap = select(teacher_larger, d, -d);
    ratio = exp_parts(gap);
    larger = exp(select(teacher_larger, log_p, log_q));
    smaller = larger * ratio.exp;
  }

  KD_HD F p() const { return select(teacher_larger, larger, smaller); }
  KD_HD F q() const { return select(teacher_larger, smaller, larger); }
  KD_HD F q_minus_p() const {
    const F difference = larger * ratio.expm1;
    return select(teacher_larger, difference, -difference);
  }
  KD_HD F of_teacher(F if_larger, F if_smaller) const { return select(teacher_larger, if_larger, if_smaller); }
  KD_HD F of_student(F if_larger, F if_smaller) const { return select(teacher_larger, if_smaller, if_larger); }

  // larger * phi(log(smaller / larger)), the Kullback-Leibler summand of the larger one.
  KD_HD F larger_term() const { return times(larger, ratio.phi); }

  // smaller * phi(log(larger / smaller)) = larger (1 - e^gap (1 - gap)), that of the smaller one. For a small
  // gap in the form gap expm1(gap) - phi(gap), which only halves instead of cancelling.
  KD_HD F smaller_term() const {
    const F far = fma(ratio.exp, ratio.bounded - F(1.0), F(1.0));
    const F near = fma(gap, ratio.expm1, -ratio.phi);
    return larger * select(gap < F(-1.0), far, near);
  }

  // probability * logarithm, where 0 * inf is 0.
  KD_HD static F times(F probability, F logarithm) {
    return select(probability == F(0.0), F(0.0), probability * logarithm);
  }
};

// m = weight_p p + weight_q q, in logarithms relative to p and q.
template <class F>
struct Mixture {
  F log_larger;    // log(m / larger) <= 0
  F log_smaller;   // log(m / smaller) >= 0
  F over_larger;   // m / larger
  F larger_term;   // larger * phi(log(m / larger)), the summand of KL(larger || m)
  F smaller_term;  // smaller * phi(log(m / smaller))

  KD_HD Mixture(const Pair<F>& pair, F weight_p, F weight_q) {
    const F weight_larger = pair.of_teacher(weight_p, weight_q);
    const F weight_smaller = pair.of_teacher(weight_q, weight_p);
    over_larger = fma(weight_smaller, pair.ratio.exp, weight_larger);
    const Log1pParts<F> parts = log1p_parts(weight_smaller * pair.ratio.expm1, over_larger);
    log_larger = parts.log;
    larger_term = pair.larger * parts.phi;
    // Where the gap is unbounded the smaller one is 0, so a bounded logarithm gives the right product.
    log_smaller = parts.log - pair.ratio.bounded;
    const F far = -fma(weight_larger * pair.larger, pair.ratio.expm1, pair.smaller * log_smaller);
    const F near = pair.smaller * phi_series(log_smaller);
    smaller_term = select(log_smaller < F(kPhiSeriesRange), near, far);
  }

  // p log(m / p) and q log(m / q).
  KD_HD F teacher_log(const Pair<F>& pair) const {
    return pair.of_teacher(pair.larger * log_larger, pair.smaller * log_smaller);
  }
  KD_HD F student_log(const Pair<F>& pair) const {
    return pair.of_student(pair.larger * log_larger, pair.smaller * log_smaller);
  }
  // (q - p) / m
  KD_HD F difference(const Pair<F>& pair) const {
    const F quotient = pair.ratio.expm1 / over_larger;
    return select(pair.teacher_larger, quotient, -quotient);
  }
};

// `kStudentSumsToZero`: sum(student) is 0 for any p and q, so the gradient needs no sum and can be
// written in the pass that adds up the terms.

struct ForwardKL {  // KL(p || q)
  static constexpr bool kStudentSumsToZero = true, kTeacherSumsToZero = false;
  template <class F>
  KD_HD static Parts<F> evaluate(const Pair<F>& pair, const Parameters<F>&) {
    return {pair.of_teacher(pair.larger_term(), pair.smaller_term()), pair.q_minus_p(), -pair.times(pair.p(), pair.d)};
  }
};

struct ReverseKL {  // KL(q || p)
  static constexpr bool kStudentSumsToZero = false, kTeacherSumsToZero = true;
  template <class F>
  KD_HD static Parts<F> evaluate(const Pair<F>& pair, const Parameters<F>&) {
    return {pair.of_student(pair.larger_term(), pair.smaller_term()), pair.times(pair.q(), pair.d), -pair.q_minus_p()};
  }
};

struct JensenShannon {  // beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
  static constexpr bool kStudentSumsToZero = false, kTeacherSumsToZero = false;
  template <class F>
  KD_HD static Parts<F> evaluate(const Pair<F>& pair, const Parameters<F>& parameters) {
    const F beta = parameters.first, rest = parameters.first_complement;
    const Mixture<F> m(pair, beta, rest);
    return {fma(pair.of_teacher(beta, rest), m.larger_term, pair.of_teacher(rest, beta) * m.smaller_term),
            -rest * m.student_log(pair), -beta * m.teacher_log(pair)};
  }
};

struct SkewKL {  // KL(p || m), m = alpha p + (1 - alpha) q
  static constexpr bool kStudentSumsToZero = false, kTeacherSumsToZero = false;
  template <class F>
  KD_HD static Parts<F> evaluate(const Pair<F>& pair, const Parameters<F>& parameters) {
    const F alpha = parameters.first, rest = parameters.first_complement;
    const Mixture<F> m(pair, alpha, rest);
    const F difference = rest * m.difference(pair);  // 1 - p / m
    return {pair.of_teacher(m.larger_term, m.smaller_term), rest * pair.q() * difference,
            fma(alpha * pair.p(), difference, -m.teacher_log(pair))};
  }
};

struct SkewReverseKL {  // KL(q || m), m = (1 - alpha) p + alpha q
  static constexpr bool kStudentSumsToZero = false, kTeacherSumsToZero = false;
  template <class F>
  KD_HD static Parts<F> evaluate(const Pair<F>& pair, const Parameters<F>& parameters) {
    const F alpha = parameters.first, rest = parameters.first_complement;
    const Mixture<F> m(pair, rest, alpha);
    const F difference = rest * m.difference(pair);  // q / m - 1
    return {pair.of_student(m.larger_term, m.smaller_term), -fma(alpha * pair.q(), difference, m.student_log(pair)),
            -rest * pair.p() * difference};
  }
};

struct TotalVariation {  // sum |p - q| / 2
  static constexpr bool kStudentSumsToZero = false, kTeacherSumsToZero = false;
  template <class F>
  KD_HD static Parts<F> evaluate(const Pair<F>& pair, const Parameters<F>&) {
    // The last resort is d itself: 0 stays 0 and NaN stays NaN.
    const F half_sign = select(pair.d > F(0.0), F(0.5), select(pair.d < F(0.0), F(-0.5), pair.d));
    return {F(-0.5) * pair.larger * pair.ratio.expm1, pair.q() * half_sign, -pair.p() * half_sign};
  }
};

struct WeightedKL {  // forward KL(p || q) + reverse KL(q || p)
  static constexpr bool kStudentSumsToZero = false, kTeacherSumsToZero = false;
  template <class F>
  KD_HD static Parts<F> evaluate(const Pair<F>& pair, const Parameters<F>& parameters) {
    // A weight of 0 silences its divergence even where that one is infinite: the roles in `times` fit.
    const F forward = parameters.first, reverse = parameters.second;
    const Parts<F> f = ForwardKL::evaluate(pair, parameters), r = ReverseKL::evaluate(pair, parameters);
    return {pair.times(forward, f.term) + pair.times(reverse, r.term),
            pair.times(forward, f.student) + pair.times(reverse, r.student),
            pair.times(forward, f.teacher) + pair.times(reverse, r.teacher)};
  }
};

}  // namespace kd
