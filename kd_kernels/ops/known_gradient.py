"""A term of a loss that is 0 in value and has a gradient that another op has found already."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kd_kernels.ops.backward import DENSE, no_double_backward


def known_gradient(variable: Tensor, gradient: Tensor) -> Tensor:
    """Zeros like ``variable``, with ``gradient`` for it; a gradient of that gradient raises."""
    return _GradientOnly.apply(variable, gradient)


class _GradientOnly(torch.autograd.Function):
    """0, with a gradient that is known."""

    @staticmethod
    def forward(ctx, mass: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return torch.zeros_like(mass)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Optional[Tensor], ...]:
        (gradient,) = ctx.saved_tensors
        return _OnceOnly.apply(upstream * gradient), None


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        raise no_double_backward("distill", DENSE)
