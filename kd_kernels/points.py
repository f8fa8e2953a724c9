"""Checks of points and their masks, which the losses between points share."""

from __future__ import annotations

import torch
from torch import Tensor

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
