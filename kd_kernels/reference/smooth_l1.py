"""Smooth L1 terms written plainly in torch, for the kernels that compare points."""

from __future__ import annotations

from torch import Tensor


def slope_of(difference: Tensor, beta: float | Tensor) -> Tensor:
    return (difference / beta).clamp(-1, 1)


def terms_of(slope: Tensor, difference: Tensor, beta: float | Tensor) -> Tensor:
    return slope * (difference - 0.5 * beta * slope)
