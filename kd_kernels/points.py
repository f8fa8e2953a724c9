"""What the losses between points have in common: checks, and the precision they work in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_kernels.arguments import is_number
from kd_kernels.sources import FLOATING


def check_points(*named: tuple[str, Tensor], shape: str) -> None:
    """Floating tensors of as many dimensions as ``shape``, such as ``[N, D]``, names; on one device."""
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
        if x.dtype not in FLOATING:
            raise TypeError(f"{name} must be floating, got {x.dtype}")
        if x.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no numbers")
        if x.device != named[0][1].device:
            raise ValueError(f"{name} is on {x.device}, {named[0][0]} on {named[0][1].device}")


def check_points_mask(name: str, mask: Tensor, points: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor (True = counts), got {getattr(mask, 'dtype', mask)!r}")
    if mask.shape != points.shape[:-1]:
        raise ValueError(f"{name} must have the shape {tuple(points.shape[:-1])}, got {tuple(mask.shape)}")
    if mask.device != points.device:
        raise ValueError(f"{name} is on {mask.device}, the points on {points.device}")


def check_positive(name: str, value: float) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # A comparison would make the number a constant of a compiled graph.
    if not torch.compiler.is_compiling() and not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
