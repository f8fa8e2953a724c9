"""Ops whose gradients are found in the forward pass, from what lies there between inputs and loss: nothing
else is kept, and the backward pass multiplies."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kd_kernels.ops.backward import for_all_inputs, no_double_backward
from kd_kernels.ops.direct import direct
from kd_kernels.ops.schema import names


def differentiated(
    op: str, call: str, results: int, forward: Callable, shapes: Callable, function: str
) -> Callable:
    """The op ``kd_kernels::<op>``, differentiable in its first result and its first two arguments.

    ``call`` is its schema's arguments, ``bool[] needs`` the last: gradients wanted of the first two. Of its
    ``results`` tensors the last two are these gradients, the first is what they are of: one number, or one
    for each of the gradients' rows. ``function`` is what a caller knows it as.
    """
    count = len(names(call))

    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.needs = inputs[-1]
        ctx.dtypes = [x.dtype for x, wanted in zip(inputs, ctx.needs) if wanted]
        ctx.save_for_backward(*(g for g, wanted in zip(output[-2:], ctx.needs) if wanted))

    def backward(ctx, upstream, *others):
        if upstream is None:  # the other results carry no gradient
            return (None,) * count
        scale = torch.ops.kd_kernels.found_gradient
        made = (scale(upstream, g, dtype, function) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return for_all_inputs(made, ctx.needs, count)

    schema = f"({call}) -> ({', '.join(['Tensor'] * results)})"
    made = torch.library.custom_op(f"kd_kernels::{op}", forward, mutates_args=(), schema=schema)
    made.register_fake(shapes)
    made.register_autograd(backward, setup_context=setup_context)
    return direct(made, forward, backward, setup_context)


@torch.library.custom_op(
    "kd_kernels::found_gradient",
    mutates_args=(),
    schema="(Tensor upstream, Tensor gradient, ScalarType dtype, str function) -> Tensor",
)
def found_gradient(upstream, gradient, dtype, function):
    """Of an input: what arrives, one number or one for each row, times what was found."""
    return ((upstream[:, None] if upstream.dim() else upstream) * gradient).to(dtype)


@found_gradient.register_fake
def _(upstream, gradient, dtype, function):
    return torch.empty_like(gradient, dtype=dtype)


def _keep_name(ctx, inputs, output) -> None:
    ctx.function = inputs[-1]


def _double_backward(ctx, *gradients):
    raise no_double_backward(ctx.function)


found_gradient.register_autograd(_double_backward, setup_context=_keep_name)
