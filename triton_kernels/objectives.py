"""Every divergence once, as ``@triton.jit`` functions; ``csrc/objectives.h`` explains the forms.

Each takes ``log p``, ``log q`` and ``d = log q - log p`` (which comes separately because it is more accurate
than their difference; 0 where both probabilities are 0) and the token's parameters ``first``, ``rest = 1 -
first`` and ``second``, and returns ``(p, q, term, student, teacher)``: the non-negative summand, and the two
parts whose gradients are ``student - q sum(student)`` and ``teacher - p sum(teacher)``.
"""

import triton
import triton.language as tl

from .elementary import exp_parts, exponential, log1p_parts, phi_series

# Objectives whose student parts (teacher parts) sum to 0 for any p and q: the gradient needs no sum.
STUDENT_SUMS_TO_ZERO = ("forward_kl",)
TEACHER_SUMS_TO_ZERO = ("reverse_kl",)


@triton.jit
def times(probability, logarithm):
    """``probability * logarithm``, where 0 * inf is 0."""
    return tl.where(probability == 0.0, 0.0, probability * logarithm)


@triton.jit
def larger_log(log_p, log_q):
    """``-inf`` where both are; NaN stays."""
    return tl.maximum(log_p, log_q, tl.PropagateNan.ALL)


@triton.jit
def pair(log_p, log_q, d):
    """p and q seen from the larger of the two, so that every exponential is of a number <= 0.

    Returns ``(teacher_larger, larger, smaller, gap, exp, expm1, phi, bounded)``, the last four of
    ``gap = -|d|``: ``exp = smaller / larger``.
    """
    teacher_larger = d <= 0.0
    gap = -tl.abs(d)
    exp, expm1, phi, bounded = exp_parts(gap)
    larger = exponential(larger_log(log_p, log_q))
    return teacher_larger, larger, larger * exp, gap, exp, expm1, phi, bounded


@triton.jit
def kl_term(of_larger, larger, gap, exp, expm1, phi, bounded):
    """The Kullback-Leibler summand ``p phi(log(q / p))`` of a p that is the larger one, or the smaller.

    Of the larger it is ``larger phi(gap)``, of the smaller ``larger (1 - e^gap (1 - gap))``; near 0 in a form
    that only halves instead of cancelling.
    """
    far = tl.fma(exp, bounded - 1.0, 1.0)
    near = tl.fma(gap, expm1, -phi)
    return times(larger, tl.where(of_larger, phi, tl.where(gap > -1.0, near, far)))


@triton.jit
def mixture(teacher_larger, larger, smaller, exp, expm1, bounded, weight_p, weight_q):
    """``m = weight_p p + weight_q q`` in logarithms relative to p and q.

    Returns ``(p log(m / p), q log(m / q), (q - p) / m, p phi(log(m / p)), q phi(log(m / q)))``.
    """
    weight_larger = tl.where(teacher_larger, weight_p, weight_q)
    weight_smaller = tl.where(teacher_larger, weight_q, weight_p)
    over_larger = tl.fma(weight_smaller, exp, weight_larger)  # m / larger
    log_larger, phi_larger = log1p_parts(weight_smaller * expm1, over_larger)
    term_larger = larger * phi_larger
    # Where the gap is unbounded the smaller one is 0, so a bounded logarithm gives the right product.
    log_smaller = log_larger - bounded
    far = -tl.fma(weight_larger * larger, expm1, smaller * log_smaller)
    term_smaller = tl.where(log_smaller < 0.34657359027997264, smaller * phi_series(log_smaller), far)
    larger_log, smaller_log = larger * log_larger, smaller * log_smaller
    quotient = expm1 / over_larger
    return (
        tl.where(teacher_larger, larger_log, smaller_log),
        tl.where(teacher_larger, smaller_log, larger_log),
        tl.where(teacher_larger, quotient, -quotient),
        tl.where(teacher_larger, term_larger, term_smaller),
        tl.where(teacher_larger, term_smaller, term_larger),
    )


@triton.jit
def forward_kl(log_p, log_q, d, first, rest, second):
    """KL(p || q)"""
    teacher_larger, larger, smaller, gap, exp, expm1, phi, bounded = pair(log_p, log_q, d)
    p, q = tl.where(teacher_larger, larger, smaller), tl.where(teacher_larger, smaller, larger)
    term = kl_term(teacher_larger, larger, gap, exp, expm1, phi, bounded)
    q_minus_p = larger * tl.where(teacher_larger, expm1, -expm1)
    return p, q, term, q_minus_p, -times(p, d)


@triton.jit
def reverse_kl(log_p, log_q, d, first, rest, second):
    """KL(q || p): the forward one with the roles exchanged."""
    q, p, term, p_minus_q, student = forward_kl(log_q, log_p, -d, first, rest, second)
    return p, q, term, student, p_minus_q


@triton.jit
def jensen_shannon(log_p, log_q, d, first, rest, second):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q"""
    teacher_larger, larger, smaller, gap, exp, expm1, phi, bounded = pair(log_p, log_q, d)
    p, q = tl.where(teacher_larger, larger, smaller), tl.where(teacher_larger, smaller, larger)
    teacher_log, student_log, _, teacher_term, student_term = mixture(
        teacher_larger, larger, smaller, exp, expm1, bounded, first, rest
    )
    return p, q, tl.fma(first, teacher_term, rest * student_term), -rest * student_log, -first * teacher_log


@triton.jit
def skew_kl(log_p, log_q, d, first, rest, second):
    """KL(p || m), m = alpha p + (1 - alpha) q"""
    teacher_larger, larger, smaller, gap, exp, expm1, phi, bounded = pair(log_p, log_q, d)
    p, q = tl.where(teacher_larger, larger, smaller), tl.where(teacher_larger, smaller, larger)
    teacher_log, _, difference, term, _ = mixture(
        teacher_larger, larger, smaller, exp, expm1, bounded, first, rest
    )
    difference = rest * difference  # 1 - p / m
    return p, q, term, rest * q * difference, tl.fma(first * p, difference, -teacher_log)


@triton.jit
def skew_reverse_kl(log_p, log_q, d, first, rest, second):
    """KL(q || m), m = (1 - alpha) p + alpha q: the skew one with the roles exchanged."""
    q, p, term, teacher, student = skew_kl(log_q, log_p, -d, first, rest, second)
    return p, q, term, student, teacher


@triton.jit
def total_variation(log_p, log_q, d, first, rest, second):
    """sum |p - q| / 2"""
    teacher_larger, larger, smaller, gap, exp, expm1, phi, bounded = pair(log_p, log_q, d)
    p, q = tl.where(teacher_larger, larger, smaller), tl.where(teacher_larger, smaller, larger)
    # The last resort is d itself: 0 stays 0 and NaN stays NaN.
    half_sign = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, d))
    return p, q, -0.5 * larger * expm1, q * half_sign, -p * half_sign


@triton.jit
def weighted_kl(log_p, log_q, d, first, rest, second):
    """first KL(p || q) + second KL(q || p)"""
    # A weight of 0 silences its divergence even where that one is infinite: the roles in `times` fit.
    p, q, term, student, teacher = forward_kl(log_p, log_q, d, first, rest, second)
    _, _, term_r, student_r, teacher_r = reverse_kl(log_p, log_q, d, first, rest, second)
    return (
        p,
        q,
        times(first, term) + times(second, term_r),
        times(first, student) + times(second, student_r),
        times(first, teacher) + times(second, teacher_r),
    )


@triton.jit
def evaluate(OBJECTIVE: tl.constexpr, log_p, log_q, d, first, rest, second):
    if OBJECTIVE == "forward_kl":
        return forward_kl(log_p, log_q, d, first, rest, second)
    elif OBJECTIVE == "reverse_kl":
        return reverse_kl(log_p, log_q, d, first, rest, second)
    elif OBJECTIVE == "jensen_shannon":
        return jensen_shannon(log_p, log_q, d, first, rest, second)
    elif OBJECTIVE == "skew_kl":
        return skew_kl(log_p, log_q, d, first, rest, second)
    elif OBJECTIVE == "skew_reverse_kl":
        return skew_reverse_kl(log_p, log_q, d, first, rest, second)
    elif OBJECTIVE == "total_variation":
        return total_variation(log_p, log_q, d, first, rest, second)
    else:
        tl.static_assert(OBJECTIVE == "weighted_kl", "unknown objective")
        return weighted_kl(log_p, log_q, d, first, rest, second)
