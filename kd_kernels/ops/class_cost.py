"""Transport under one cost that is a constant, as a torch op: its gradients are made in the forward pass, by
the iterations' adjoint while their kernel is there, and the backward pass multiplies them."""

import torch

from kd_kernels import problems as P
from kd_kernels.drivers.sinkhorn import Call, solve, solve_and_differentiate
from kd_kernels.ops import points  # noqa: F401  (registers points_backward)
from kd_kernels.ops.checks import checks_values
from kd_kernels.ops.direct import direct
from kd_kernels.ops.schema import names
from kd_kernels.ops.sinkhorn import check_outcome

_CALL = """
    Tensor cost, Tensor a, Tensor b, Tensor epsilons, Tensor denominator, int domain, bool columns_first,
    str? backend, bool[] needs"""
_ARGUMENTS = names(_CALL)


def _forward(cost, a, b, epsilons, denominator, domain, columns_first, backend, needs):
    """``<P, C>`` of B problems, through a fixed number of iterations.

    Args:
        cost: ``[n, m]`` float32 or float64.
        a, b: ``[B, n]`` and ``[B, m]`` in its dtype: distributions, or 0 throughout.
        epsilons: float64 on CPU, one for each iteration.
        denominator: 0-d float64 on CPU: see :class:`kd_kernels.problems.SinkhornJob`.
        domain: index into :data:`kd_kernels.problems.DOMAINS`.
        columns_first: whether an iteration's first half-step is the columns'.
        needs: gradients wanted of a and b.

    Returns:
        transport cost ``[B]``, numbers ``[B, 5]`` float64, its gradients of a and b, ``[0, 0]`` where not
        wanted.
    """
    a, b = a.contiguous(), b.contiguous()
    call = Call(cost, a, b, epsilons, 0.0, domain, columns_first, backend, denominator.item())
    if any(needs):
        numbers, *gradients = solve_and_differentiate(call)
    else:
        numbers, gradients = solve(call, history=False)[1], (None, None)
    if checks_values(a.device):
        check_outcome(call, numbers)
    made = (g if wanted else a.new_empty(0, 0) for g, wanted in zip(gradients, needs))
    return numbers[:, P.TRANSPORT].to(a.dtype, copy=True), numbers, *made


class_cost_op = torch.library.custom_op(
    "kd_kernels::class_cost",
    _forward,
    mutates_args=(),
    schema=f"({_CALL}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@class_cost_op.register_fake
def _(*arguments):
    call = dict(zip(_ARGUMENTS, arguments))
    a, count = call["a"], call["a"].shape[0]
    made = (x.new_empty(x.shape if wanted else (0, 0)) for x, wanted in zip((a, call["b"]), call["needs"]))
    return a.new_empty(count), a.new_empty(count, P.NUMBER_COLUMNS, dtype=torch.float64), *made


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[_ARGUMENTS.index("needs")]
    ctx.save_for_backward(*(g for g, wanted in zip(output[2:], ctx.needs) if wanted))


def _backward(ctx, upstream, *others):
    made = dict.fromkeys(_ARGUMENTS)
    if upstream is not None:  # the other outputs carry no gradient
        saved = iter(ctx.saved_tensors)
        for name, wanted in zip("ab", ctx.needs):
            if wanted:
                gradient = next(saved)
                made[name] = torch.ops.kd_kernels.points_backward(
                    upstream[:, None], gradient, gradient.dtype, "class_transport"
                )
    return tuple(made.values())


class_cost_op.register_autograd(_backward, setup_context=_setup_context)

class_cost = direct(class_cost_op, _forward, _backward, _setup_context)
