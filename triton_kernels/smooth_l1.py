"""Smooth L1 terms, for the kernels that compare points."""

import triton
import triton.language as tl


@triton.jit
def slope_of(difference, beta):
    """Of the smooth L1; NaN stays."""
    scaled = difference / beta
    return tl.where(scaled > 1.0, 1.0, tl.where(scaled < -1.0, -1.0, scaled))


@triton.jit
def terms_of(slope, difference, beta):
    return slope * (difference - 0.5 * beta * slope)
