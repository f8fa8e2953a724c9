"""The elementary functions that objectives.py asks for, alike on every target and in the interpreter.

The hardware's exponential has no ``expm1`` and no ``e^x - 1 - x``. In float32 it serves where those do not
cancel, and a polynomial where they do: half the instructions of a reduction in software, and instructions are
what the row kernel is bound by. In float64 all three come from one reduction and one polynomial, as in
``csrc/cpu/vec.h``, where the constants are explained; so does the logarithm, whose fast form not every target
has. The kernels are compiled without contraction: what is fused is fused by name.
"""

import triton
import triton.language as tl


@triton.jit
def exponential(x):
    """``e^x``; in float32 0 for what is below its normal numbers. Base 2 is what the hardware has: for
    another, the compiler spends four instructions more on those."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def phi_quotient(r):
    """``(e^r - 1 - r) / r^2`` for ``|r| <= log(2) / 2``."""
    if r.dtype == tl.float64:  # Taylor
        s = r * (1 / 87178291200) + 1 / 6227020800
        s = s * r + 1 / 479001600
        s = s * r + 1 / 39916800
        s = s * r + 1 / 3628800
        s = s * r + 1 / 362880
        s = s * r + 1 / 40320
        s = s * r + 1 / 5040
        s = s * r + 1 / 720
        s = s * r + 1 / 120
        s = s * r + 1 / 24
        s = s * r + 1 / 6
        s = s * r + 0.5
    else:  # minimax, relative error 1.3e-7
        s = tl.fma(r, 0.001390129211358726, 0.008363153785467148)
        s = tl.fma(s, r, 0.04166685417294502)
        s = tl.fma(s, r, 0.16666577756404877)
        s = tl.fma(s, r, 0.5)
    return s


@triton.jit
def phi_series(x):
    """``e^x - 1 - x`` for ``|x| <= log(2) / 2``, to full relative accuracy."""
    return x * x * phi_quotient(x)


@triton.jit
def exp_parts(x):
    """``(e^x, e^x - 1, e^x - 1 - x, x bounded from below)`` for ``x <= 0``, ``-inf`` and NaN."""
    if x.dtype == tl.float64:
        # x = n log(2) + r; log(2) is split so that n times its high part is exact.
        vanishes = x < -708.0
        bounded = tl.where(vanishes, -708.0, x)  # NaN stays
        n = tl.floor(bounded * 1.4426950408889634 + 0.5)
        r = (bounded - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
        power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
        scale = tl.where(vanishes, 0.0, power)
        tail = r * r * phi_quotient(r)
        minus_one = scale - 1.0
        rest = tail + r
        # r is x where n is 0, so that only the tail is left there.
        phi = tl.fma(scale, tail, tl.fma(scale, r, minus_one - x))
        return tl.fma(scale, rest, scale), tl.fma(scale, rest, minus_one), phi, bounded
    else:
        # Above -1 a minimax polynomial of (e^x - 1 - x) / x^2, relative error 2e-8; below it nothing cancels.
        s = tl.fma(x, 0.00013794969709124416, 0.0013263644650578499)
        s = tl.fma(s, x, 0.008302842266857624)
        s = tl.fma(s, x, 0.04166005551815033)
        s = tl.fma(s, x, 0.1666661947965622)
        s = tl.fma(s, x, 0.5)
        tail = x * x * s
        exp = exponential(x)
        minus_one = exp - 1.0
        near = x > -1.0
        bounded = tl.maximum(x, -87.0)  # NaN is in the others
        return exp, tl.where(near, x + tail, minus_one), tl.where(near, tail, minus_one - x), bounded


@triton.jit
def log1p_parts(y, w):
    """``(log w, y - log w)`` for ``w = 1 + y`` in (0, 1]."""
    # w = 2^n (1 + f), s = f / (2 + f): log(1 + f) = 2 atanh(s). Near w = 1, f is y itself, which has the
    # digits that w has lost. Taking the bits of sqrt(1/2) away centres the mantissa on 1.
    far = w <= 0.70710678118654752
    if w.dtype == tl.float64:
        bits = w.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
        mantissa = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
        n = exponent.to(tl.float64)
        f = tl.where(far, mantissa - 1.0, y)
        s = f / (f + 2.0)
        square = s * s
        t = square * (2 / 23) + 2 / 21
        t = t * square + 2 / 19
        t = t * square + 2 / 17
        t = t * square + 2 / 15
        t = t * square + 2 / 13
        t = t * square + 2 / 11
        t = t * square + 2 / 9
        t = t * square + 2 / 7
        t = t * square + 2 / 5
        t = t * square + 2 / 3
        phi = s * (f - square * t)
        log_far = n * 6.93147180369123816490e-01 + (n * 1.90821492927058770002e-10 + (f - phi))
    else:
        bits = w.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23
        mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
        n = exponent.to(tl.float32)
        f = tl.where(far, mantissa - 1.0, y)
        s = f / (f + 2.0)
        square = s * s
        t = tl.fma(square, 2 / 9, 2 / 7)
        t = tl.fma(t, square, 2 / 5)
        t = tl.fma(t, square, 2 / 3)
        phi = s * (f - square * t)
        log_far = tl.fma(n, 0.693359375, tl.fma(n, -2.12194440e-4, f - phi))
    return tl.where(far, log_far, f - phi), tl.where(far, y - log_far, phi)


@triton.jit
def tanh(x):
    _, decay, _, _ = exp_parts(-2.0 * tl.abs(x))  # e^(-2|x|) - 1
    magnitude = -decay / (decay + 2.0)
    return tl.where(x < 0.0, -magnitude, magnitude)
