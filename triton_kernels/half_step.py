"""The half_step kernel: one half-step of all transport problems that share a cost.

``csrc/half_step.h`` states the contract. A program makes a tile ``[PROBLEMS, OUTER]`` of the result; which of
the kernel's two directions is summed over is a matter of strides.
"""

import triton
import triton.language as tl


@triton.jit
def half_step(
    kernel,
    x,
    weight,
    extra,
    out,
    count,
    outer,
    inner,
    x_stride,
    weight_stride,
    out_stride,
    outer_stride,
    inner_stride,
    DIVIDE: tl.constexpr,
    EXTRA: tl.constexpr,
    PROBLEMS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    F: tl.constexpr,
):
    problem = tl.program_id(1) * PROBLEMS + tl.arange(0, PROBLEMS)
    column = tl.program_id(0) * OUTER + tl.arange(0, OUTER)
    there, inside = problem < count, column < outer
    sums = tl.zeros([PROBLEMS, OUTER], F)
    for start in range(0, inner, INNER):
        i = start + tl.arange(0, INNER)
        left = i < inner
        of_problem = tl.load(
            x + problem.to(tl.int64)[:, None] * x_stride + i[None, :], there[:, None] & left[None, :], 0.0
        )
        at = i.to(tl.int64)[:, None] * inner_stride + column.to(tl.int64)[None, :] * outer_stride
        of_kernel = tl.load(kernel + at, left[:, None] & inside[None, :], 0.0)
        # Never TF32: scalings would stop converging at 1e-3.
        sums += tl.dot(of_problem, of_kernel, input_precision="ieee", out_dtype=F)
    row = problem.to(tl.int64)[:, None]
    both = there[:, None] & inside[None, :]
    factor = tl.load(weight + row * weight_stride + column[None, :], both, 0.0)
    if DIVIDE:
        if EXTRA:
            sums += tl.load(extra + column, inside, 0.0)[None, :]
        nothing = (factor == 0.0) | (sums == 0.0)
        found = tl.where(nothing, 0.0, factor / tl.where(nothing, 1.0, sums))
    else:
        found = factor * sums
    tl.store(out + row * out_stride + column[None, :], found, both)
