"""An op's backward is another op, which autograd does not enter: what their formulas share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

DENSE = (
    "; kd_kernels.reference.dense_distill, the loss with all logits in memory, can be differentiated twice"
)


def save(ctx, inputs: Sequence[Any], *made: Tensor) -> None:
    """Save an op's inputs, and what its backward takes of its outputs, to compute again from them."""
    ctx.set_materialize_grads(False)
    ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in inputs]
    ctx.save_for_backward(*made, *(x for x in inputs if isinstance(x, Tensor)))


def saved(ctx) -> tuple[Sequence[Tensor], list[Any]]:
    """(outputs, inputs) that :func:`save` kept."""
    tensors = ctx.saved_tensors  # once: activation checkpointing makes them once
    made = len(tensors) - ctx.rest.count(None)
    remaining = iter(tensors[made:])
    # As they were made; a hook on saved tensors may have laid them out otherwise.
    return [x.contiguous() for x in tensors[:made]], [
        next(remaining) if x is None else x[0] for x in ctx.rest
    ]


def for_all_inputs(
    gradients: Iterable[Tensor], needs: Sequence[bool], inputs: int
) -> tuple[Optional[Tensor], ...]:
    """As autograd takes them, one for each of all ``inputs``: ``gradients`` are those alone that ``needs``,
    which speaks of the first inputs, asks for."""
    remaining = iter(gradients)
    first = [next(remaining) if wanted else None for wanted in needs]
    return (*first, *(None,) * (inputs - len(first)))


def shapes_of(inputs: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
    """Such gradients, for a backward op's shape rule."""
    wanted = (x for x, needed in zip(inputs, needs) if needed)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]


def no_double_backward(function: str, instead: str = "") -> RuntimeError:
    """What a caller is told, who knows the op as ``function``."""
    return RuntimeError(
        f"kd_kernels.{function}: double backward (a gradient of the gradient) is not implemented{instead}"
    )


def refuse_double_backward(op: Any, function: str, instead: str = "") -> None:
    """Of a backward op: ``once_differentiable``, or marking outputs non-differentiable, would let a gradient
    penalty go silently wrong."""

    def refuse(ctx, *gradients):
        raise no_double_backward(function, instead)

    op.register_autograd(refuse)


def once(function: str, made: Tensor, *inputs: Optional[Tensor], instead: str = "") -> Tensor:
    """``made`` as a function of ``inputs`` whose derivative is refused, for backward passes that are no ops.
    ``once_differentiable`` refuses only who asks for the gradients of all leaves: one who names a leaf walks
    past it, to a second derivative without this part."""
    return _Once.apply(function, instead, made, *inputs)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: str, instead: str, made: Tensor, *inputs: Optional[Tensor]) -> Tensor:
        ctx.called = function, instead
        return made.view_as(made)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, ...]:
        raise no_double_backward(*ctx.called)


def differentiable_once(function: str, x: Tensor) -> Tensor:
    """``x``, whose gradient has no derivative: for what torch computes, and refuses in its own words."""
    return _DifferentiableOnce.apply(function, x)


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: str, x: Tensor) -> Tensor:
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, once(ctx.function, gradient)
