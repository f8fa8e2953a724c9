"""The distance kernel: relative distances between n points from their squares, student's against teacher's.

``csrc/distance.h`` states the contract. A program takes one row.
"""

import triton
import triton.language as tl

from .smooth_l1 import slope_of, terms_of


@triton.jit
def distances(squared, eps):
    """0 where there is no pair; NaN stays."""
    near = tl.where(squared < 0.0, 0.0, tl.sqrt(eps))
    return tl.where(squared <= eps, near, tl.sqrt(squared))


@triton.jit
def add_row(statistics, row, n, sums, positive):
    tl.store(statistics + row, tl.sum(sums, 0))
    tl.store(statistics + n + row, tl.sum(positive, 0))


@triton.jit
def distance(
    numbers,  # beta, eps, means, shifts
    student,
    teacher,
    statistics,
    terms,
    student_grad,
    teacher_grad,
    n,
    ld,
    STATISTICS: tl.constexpr,
    TERMS: tl.constexpr,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    beta, eps = tl.load(numbers), tl.load(numbers + 1)
    s_mean, t_mean = tl.load(numbers + 2), tl.load(numbers + 3)
    s_shift, t_shift = tl.load(numbers + 4), tl.load(numbers + 5)
    first = tl.zeros([BLOCK], tl.float64)
    second, third, fourth = first, first, first
    for start in range(0, n, BLOCK):
        k = start + lane
        inside = k < n
        at = row * ld + k
        s, t = tl.load(student + at, inside, -1.0), tl.load(teacher + at, inside, -1.0)
        d, e = distances(s, eps), distances(t, eps)
        if STATISTICS:
            first += d
            second += tl.where(d == 0.0, 0.0, 1.0)
            third += e
            fourth += tl.where(e == 0.0, 0.0, 1.0)
        else:
            x, y = d / s_mean, e / t_mean
            slope = slope_of(x - y, beta)
            if TERMS:
                first += terms_of(slope, x - y, beta)
                second += slope * x
                third += slope * y
            if STUDENT_GRAD:
                by_square = 0.5 * (slope - s_shift) / (s_mean * d)
                tl.store(student_grad + at, tl.where(s <= eps, 0.0, by_square), inside)
            if TEACHER_GRAD:
                by_square = -0.5 * (slope - t_shift) / (t_mean * e)
                tl.store(teacher_grad + at, tl.where(t <= eps, 0.0, by_square), inside)
    if STATISTICS:
        add_row(statistics, row, n, first, second)
        add_row(statistics + 2 * n, row, n, third, fourth)
    if TERMS:
        add_row(terms, row, n, first, second)
        tl.store(terms + 2 * n + row, tl.sum(third, 0))
