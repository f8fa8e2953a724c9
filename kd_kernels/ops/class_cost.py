"""Transport under one cost that is a constant, as a torch op: its gradients are found in the forward pass, by
the iterations' adjoint, while their kernel is there."""

import torch

from kd_kernels import problems as P
from kd_kernels.drivers.sinkhorn import Call, solve, solve_and_differentiate
from kd_kernels.ops.checks import check_positive, checks_values
from kd_kernels.ops.found_gradients import differentiated
from kd_kernels.ops.schema import names
from kd_kernels.ops.sinkhorn import check_outcome

_CALL = """
    Tensor a, Tensor b, Tensor cost, Tensor epsilons, Tensor denominator, int domain, bool columns_first,
    str? backend, bool[] needs"""


def _forward(a, b, cost, epsilons, denominator, domain, columns_first, backend, needs):
    """``<P, C>`` of B problems, through a fixed number of iterations.

    Args:
        a, b: ``[B, n]`` and ``[B, m]``: distributions, or 0 throughout.
        cost: ``[n, m]`` float32 or float64, as they are.
        epsilons: float64 on CPU, one for each iteration.
        denominator: 0-d float64 on CPU: see :class:`kd_kernels.problems.SinkhornJob`.
        domain: index into :data:`kd_kernels.problems.DOMAINS`.
        columns_first: whether an iteration's first half-step is the columns'.
        needs: gradients wanted of a and b.

    Returns:
        transport cost ``[B]``, numbers ``[B, 5]`` float64, its gradients of a and b, ``[0, 0]`` where not
        wanted.
    """
    check_positive("epsilon", epsilons)
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


def _shapes(*arguments):
    call = dict(zip(names(_CALL), arguments))
    a, count = call["a"], call["a"].shape[0]
    made = (x.new_empty(x.shape if wanted else (0, 0)) for x, wanted in zip((a, call["b"]), call["needs"]))
    return a.new_empty(count), a.new_empty(count, P.NUMBER_COLUMNS, dtype=torch.float64), *made


class_cost = differentiated("class_cost", _CALL, 4, _forward, _shapes, "class_transport")
