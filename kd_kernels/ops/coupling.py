"""Entropic couplings as a torch op: the gradient with respect to the cost is made in the forward pass."""

import torch

from kd_kernels.ops.schema import names
from kd_kernels.reference.coupling import coupling as _coupling

_CALL = """
    Tensor cost, Tensor a, Tensor b, Tensor epsilon, int iterations, str order, bool entropic, bool slope"""
_ARGUMENTS = names(_CALL)


@torch.library.custom_op(
    "kd_kernels::coupling", mutates_args=(), schema=f"({_CALL}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def coupling(cost, a, b, epsilon, *options):
    """:func:`kd_kernels.reference.coupling.coupling`; epsilon is 0-d float64 on CPU."""
    return _coupling(cost, a, b, epsilon.item(), *options)


@coupling.register_fake
def _(cost, a, b, epsilon, iterations, order, entropic, slope):
    gradient = torch.empty_like(cost, memory_format=torch.contiguous_format) if slope else cost.new_empty(0)
    each = cost.shape[:1]
    return cost.new_empty(each), gradient, cost.new_empty(each), cost.new_empty(each)


@torch.library.custom_op(
    "kd_kernels::coupling_backward", mutates_args=(), schema="(Tensor upstream, Tensor gradient) -> Tensor"
)
def coupling_backward(upstream, gradient):
    return upstream[:, None, None] * gradient


@coupling_backward.register_fake
def _(upstream, gradient):
    return torch.empty_like(gradient)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx, upstream, *others):
    gradient = None  # the other outputs carry none, nor do the marginals
    if upstream is not None:
        gradient = torch.ops.kd_kernels.coupling_backward(upstream, ctx.saved_tensors[0])
    return (gradient, *(None,) * (len(_ARGUMENTS) - 1))


def _double_backward(ctx, *gradients):
    raise RuntimeError("kd_kernels.*_transport: double backward is not implemented")


coupling.register_autograd(_backward, setup_context=_setup_context)
coupling_backward.register_autograd(_double_backward)
