"""The angles of relational distillation as a torch op: the gradient is made in the forward pass."""

import torch

from kd_kernels.drivers.angle import walk_angles
from kd_kernels.ops.schema import names

_CALL = "Tensor student, Tensor teacher, Tensor beta, str? backend, bool[] needs"
_ARGUMENTS = names(_CALL)


@torch.library.custom_op(
    "kd_kernels::angle", mutates_args=(), schema=f"({_CALL}) -> (Tensor, Tensor, Tensor)"
)
def angle(student, teacher, beta, backend, needs):
    """The sum of smooth L1 terms over all angles between N points, and what its gradient is made of.

    Args:
        student, teacher: squared distances ``[N, N]`` float64, 0 where an edge has no length.
        beta: 0-d float64 on CPU, > 0.
        needs: gradients wanted of the first two arguments.

    Returns:
        0-d float64, and two ``[N, N]`` (``[0, 0]`` where not wanted).
    """
    total, gradients = walk_angles(student, teacher, beta.item(), backend, needs)
    return (total, *(student.new_empty(0, 0) if g is None else g.contiguous() for g in gradients))


@angle.register_fake
def _(student, teacher, beta, backend, needs):
    shapes = [x.shape if wanted else (0, 0) for x, wanted in zip((student, teacher), needs)]
    return (student.new_empty(()), *(student.new_empty(shape) for shape in shapes))


@torch.library.custom_op(
    "kd_kernels::angle_backward", mutates_args=(), schema="(Tensor upstream, Tensor gradient) -> Tensor"
)
def angle_backward(upstream, gradient):
    return upstream * gradient


@angle_backward.register_fake
def _(upstream, gradient):
    return torch.empty_like(gradient)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs = dict(zip(_ARGUMENTS, inputs))["needs"]
    ctx.save_for_backward(*(g for g, wanted in zip(output[1:], ctx.needs) if wanted))


def _backward(ctx, upstream, *others):
    if upstream is None:  # the other outputs carry no gradient
        return (None,) * len(_ARGUMENTS)
    saved = iter(ctx.saved_tensors)
    made = [torch.ops.kd_kernels.angle_backward(upstream, next(saved)) if w else None for w in ctx.needs]
    return (*made, *(None,) * (len(_ARGUMENTS) - len(made)))


def _double_backward(ctx, *gradients):
    raise RuntimeError("kd_kernels.relational_angle: double backward is not implemented")


angle.register_autograd(_backward, setup_context=_setup_context)
angle_backward.register_autograd(_double_backward)
