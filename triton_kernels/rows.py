"""What the kernels that walk rows of logits share: where a row starts, its logits, sums along it, gradients.

Partial sums stay in a block's lanes until the row ends: a lane adds up ``vocab / BLOCK`` numbers, the lanes
are then added in float64.
"""

import triton
import triton.language as tl

from .elementary import exponential, tanh


@triton.jit
def number(high, low, F: tl.constexpr):
    """A float64 of the host: Triton takes Python's floats as float32, so the rest of it comes beside it."""
    return tl.full([], high, F) + tl.full([], low, F)


@triton.jit
def lowest(F: tl.constexpr):
    """The lowest finite number, from which maxima start: differences to it are never NaN."""
    value: tl.constexpr = -1.7976931348623157e308 if F == tl.float64 else -3.4028234663852886e38
    return tl.full([], value, F)


@triton.jit
def row_start(base, offsets, row, ALIGNMENT: tl.constexpr):
    """Where a row starts. Without the hint, loads would be one number wide."""
    return base + tl.multiple_of(tl.load(offsets + row), ALIGNMENT)


@triton.jit
def shaped(x, scale, softcap, CAPPED: tl.constexpr, SCALED: tl.constexpr = True):
    """``scale x``, or ``softcap tanh(scale x / softcap)``; without SCALED the scale is known to be 1."""
    if CAPPED:
        return softcap * tanh(x * (scale / softcap))
    elif SCALED:
        return x * scale
    else:
        return x


@triton.jit
def load_block(start, columns, inside, scale, softcap, CAPPED: tl.constexpr, F: tl.constexpr):
    """A block of logits after scale and softcap; ``-inf`` past the end of the row."""
    x = tl.load(start + columns, mask=inside, other=0.0).to(F)
    return tl.where(inside, shaped(x, scale, softcap, CAPPED), -float("inf"))


@triton.jit
def load_whole(start, columns, scale, softcap, CAPPED: tl.constexpr, SCALED: tl.constexpr, F: tl.constexpr):
    """A block that the row does not end in: nothing is masked."""
    return shaped(tl.load(start + columns).to(F), scale, softcap, CAPPED, SCALED)


@triton.jit
def add_exp_block(total, top, z, inverse_temperature):
    """Lane sums of ``exp((z - top) / temperature)`` with one more block ``[lanes, width]``, brought to its
    lanes' new maxima first: ``(total, top)``. ``top`` is finite from the start, so that ``-inf`` adds 0; NaN
    goes into the sum."""
    new = tl.maximum(top, tl.max(z, 1))
    if z.dtype == tl.float64:
        added = tl.sum(exponential((z - new[:, None]) * inverse_temperature), 1)
        return tl.fma(total, exponential((top - new) * inverse_temperature), added), new
    else:
        exponent = inverse_temperature * 1.4426950408889634
        added = tl.sum(tl.exp2((z - new[:, None]) * exponent), 1)
        return tl.fma(total, tl.exp2((top - new) * exponent), added), new


@triton.jit
def add_exp_and_mean_block(total, weighted, top, z, inverse_temperature):
    """:func:`add_exp_block`, and beside it lane sums of ``x exp(x)``, ``x = (z - top) / temperature``:
    ``(total, weighted, top)``. All of these are <= 0: nothing cancels."""
    new = tl.maximum(top, tl.max(z, 1))
    x, moved = (z - new[:, None]) * inverse_temperature, (top - new) * inverse_temperature
    exp, decay = exponential(x), exponential(moved)
    joined = tl.sum(tl.where(exp == 0.0, 0.0, exp * x), 1)
    kept = tl.where(decay == 0.0, 0.0, decay * tl.fma(total, moved, weighted))
    return tl.fma(total, decay, tl.sum(exp, 1)), kept + joined, new


@triton.jit
def row_sum(total, top, row_top, inverse_temperature):
    """A row's sum of exponentials relative to its largest logit, from the lanes' sums along the last
    dimension; float64."""
    share = exponential((top - row_top) * inverse_temperature)
    return tl.sum(total.to(tl.float64) * share.to(tl.float64), len(total.shape) - 1)


@triton.jit
def log_sum(total, top, row_top, inverse_temperature):
    """log of a row's sum of exponentials relative to its largest logit; float64. A sum of 0 is a row
    without a finite logit, which has no distribution."""
    s = row_sum(total, top, row_top, inverse_temperature)
    return tl.where(s == 0.0, float("nan"), tl.log(s))


@triton.jit
def row_mean_sum(total, weighted, top, row_top, inverse_temperature):
    """A row's sum of ``x exp(x)`` relative to its largest logit, from the lanes' sums; float64."""
    distance = (top - row_top) * inverse_temperature
    share = exponential(distance).to(tl.float64)
    moved = weighted.to(tl.float64) + total.to(tl.float64) * distance.to(tl.float64)
    return tl.sum(tl.where(share == 0.0, 0.0, share * moved), len(total.shape) - 1)


@triton.jit
def total(lanes):
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def store_gradient(
    start, columns, inside, gradient, z, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr = True
):
    if CAPPED:  # the softcap's derivative 1 - (z / softcap)^2; a 0 stays 0 whatever z is
        y = z / softcap
        gradient = tl.where(gradient == 0.0, 0.0, gradient * (1.0 - y) * (1.0 + y))
    if start.dtype.element_ty == tl.bfloat16:
        gradient = gradient.to(tl.float32)  # the interpreter makes 0 of a float64 cast to bfloat16
    if MASKED:
        tl.store(start + columns, gradient.to(start.dtype.element_ty), mask=inside)
    else:
        tl.store(start + columns, gradient.to(start.dtype.element_ty))
