"""What logit gradients are divided by while they are in the compute dtype: put back after the products."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Optional

import torch

from kd_kernels.drivers.sides import Model, Number

# Entries of a float16 gradient are stored this much larger: q - p reaches far below float16's 6e-8,
# and q log(q / p) hardly above 1000, which still fits under its 65504.
_FLOAT16_HEADROOM = 64


def common_factor(top: Number, models: Iterable[Model], compute_dtype: Optional[torch.dtype]) -> Number:
    """A power of two that brings gradients of up to ``top`` near 1, of ``models`` that have one.

    In float16 a weight like 1/tokens, or a temperature of 100, would flush most of them to zero before any
    loss scale; the other end would overflow.
    """
    if any(model.is_head and (compute_dtype or model.values.dtype) == torch.float16 for model in models):
        top = top / _FLOAT16_HEADROOM
    if isinstance(top, float):
        return math.ldexp(1.0, math.frexp(top)[1] - 1) if 0 < top < math.inf else 1.0
    power = torch.exp2(torch.floor(torch.log2(top)))
    return torch.where(torch.isfinite(power) & (power > 0), power, 1.0)
