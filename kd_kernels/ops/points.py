"""Torch ops that compare the rows of two models: the gradients are made in the forward pass, from what lies
there between the rows and the loss, and the backward pass multiplies them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kd_kernels.ops.direct import direct
from kd_kernels.ops.schema import names
from kd_kernels.sources import result_dtype


def between_points(op: str, numbers: str, function: str) -> Callable[[Callable], Callable]:
    """Makes an op of ``(student, teacher, mask, *numbers, backend, needs) -> (loss, gradients)``.

    Its arguments: student and teacher ``[N, D]``; mask bool ``[N]`` or None; ``numbers``, each 0-d float64 on
    the CPU; gradients wanted of the first two. Its results: 0-d, and two of the rows' shapes, ``[0, 0]``
    where not wanted; float64 for float64 rows, else float32. ``function`` is what a caller knows it as.
    """
    call = f"Tensor student, Tensor teacher, Tensor? mask, {numbers}, str? backend, bool[] needs"
    arguments = names(call)

    def register(walk: Callable) -> Callable:
        def forward(student, teacher, *others):
            loss, gradients = walk(student, teacher, *others)
            made = [
                x.new_empty(0, 0, dtype=result_dtype(x)) if g is None else g.to(result_dtype(x))
                for x, g in zip((student, teacher), gradients)
            ]
            return (loss.to(result_dtype(student, teacher)), *made)

        def shapes(student, teacher, *others):
            made = [
                x.new_empty(x.shape if wanted else (0, 0), dtype=result_dtype(x))
                for x, wanted in zip((student, teacher), others[-1])
            ]
            return (student.new_empty((), dtype=result_dtype(student, teacher)), *made)

        def setup_context(ctx, inputs, output) -> None:
            given = dict(zip(arguments, inputs))
            ctx.set_materialize_grads(False)
            ctx.needs, ctx.dtypes = given["needs"], [given[name].dtype for name in ("student", "teacher")]
            ctx.save_for_backward(*(g for g, wanted in zip(output[1:], ctx.needs) if wanted))

        def backward(ctx, upstream, *others):
            if upstream is None:  # the other outputs carry no gradient
                return (None,) * len(arguments)
            saved = iter(ctx.saved_tensors)
            multiply = torch.ops.kd_kernels.points_backward
            made = [
                multiply(upstream, next(saved), dtype, function) if wanted else None
                for dtype, wanted in zip(ctx.dtypes, ctx.needs)
            ]
            return (*made, *(None,) * (len(arguments) - len(made)))

        schema = f"({call}) -> (Tensor, Tensor, Tensor)"
        made = torch.library.custom_op(f"kd_kernels::{op}", forward, mutates_args=(), schema=schema)
        made.register_fake(shapes)
        made.register_autograd(backward, setup_context=setup_context)
        return direct(made, forward, backward, setup_context)

    return register


@torch.library.custom_op(
    "kd_kernels::points_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor gradient, ScalarType dtype, str function) -> Tensor",
)
def points_backward(upstream, gradient, dtype, function):
    return (upstream * gradient).to(dtype)


@points_backward.register_fake
def _(upstream, gradient, dtype, function):
    return torch.empty_like(gradient, dtype=dtype)


def _keep_name(ctx, inputs, output) -> None:
    ctx.function = inputs[-1]


def _double_backward(ctx, *gradients):
    raise RuntimeError(f"kd_kernels.{ctx.function}: double backward is not implemented")


points_backward.register_autograd(_double_backward, setup_context=_keep_name)
