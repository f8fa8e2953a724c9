"""Entropic optimal transport as torch ops: potentials, plan, costs; and their gradients."""

import torch
from torch import Tensor

from kd_kernels import problems as P
from kd_kernels.drivers.sinkhorn import Call, Cotangents, Potentials, adjoint, solve
from kd_kernels.ops.backward import refuse_double_backward, save, saved
from kd_kernels.ops.checks import check_positive, checks_values
from kd_kernels.ops.direct import direct
from kd_kernels.ops.schema import names

# What both ops take, in the order in which autograd sees it.
_CALL = """
    Tensor cost, Tensor a, Tensor b, Tensor epsilons, Tensor tolerance, int domain,
    bool columns_first, bool unrolled, bool plan, str? backend"""
_ARGUMENTS = names(_CALL)
_DIFFERENTIABLE = 3  # the first three
_PHI, _PSI, _TRANSPORT, _VALUE, _PLAN, _NUMBERS, _PHI_HISTORY, _PSI_HISTORY = range(8)


def _unpack(call: dict) -> Call:
    return Call(
        call["cost"],
        call["a"].contiguous(),
        call["b"].contiguous(),
        call["epsilons"],
        call["tolerance"].item(),
        call["domain"],
        call["columns_first"],
        call["backend"],
    )


def _check_marginals(a: Tensor, b: Tensor) -> None:
    for name, mass in (("a", a), ("b", b)):
        right = (mass >= 0) & (mass < torch.inf)
        if not bool(right.all()):
            wrong = mass[~right]
            raise ValueError(f"{name} must be finite and >= 0, got {wrong[0].item()}")
    masses = torch.stack([x.sum(1, dtype=torch.float64) for x in (a, b)])
    apart = (masses[0] - masses[1]).abs() > 1e-3 * masses.amax(0)
    if bool(apart.any()):
        first = int(apart.nonzero()[0])
        raise ValueError(
            f"a and b must have the same mass; those of problem {first} sum to "
            f"{masses[0, first].item():.6g} and {masses[1, first].item():.6g}"
        )


def check_outcome(call: Call, numbers: Tensor) -> None:
    failed = ((numbers[:, P.STATUS] != P.SOLVED) | numbers[:, P.TRANSPORT].isnan()).nonzero()
    if not failed.numel():
        return
    first = int(failed[0])
    shared = call.cost.dim() == 2
    cost = call.cost if shared else call.cost[first]
    inner = cost[call.a[first] > 0][:, call.b[first] > 0]
    # Before the status: what a kernel makes of NaN is its own affair.
    if bool((inner.isnan() | (inner == -torch.inf)).any()):
        raise ValueError(f"cost holds NaN or -infinity{'' if shared else f' in problem {first}'}")
    if numbers[first, P.STATUS] == P.INFEASIBLE:
        raise ValueError(
            f"problem {first} has a row or column with mass whose pairs are all forbidden (infinite cost, or "
            f"the other side without mass)"
        )
    instead = ""
    if call.domain == P.SCALING:
        instead = ' in scalings; domain="log" (or "auto") takes any'
    if call.denominator:
        instead += ", without denominator_eps"
    whose = "cost" if shared else f"problem {first}"
    raise ValueError(f"{whose} has entries too far apart for this epsilon{instead}")


def _forward(*arguments):
    """Solve B problems.

    Args:
        cost: ``[B, n, m]``, or ``[n, m]`` for all problems; any floating dtype.
        a, b: ``[B, n]`` and ``[B, m]`` float32, float64 for float64 costs.
        epsilons: float64 on CPU, one for each iteration at most.
        tolerance: 0-d float64 on CPU; 0: all iterations.
        domain: index into :data:`kd_kernels.problems.DOMAINS`.
        columns_first: whether an iteration's first half-step is the columns'.
        unrolled: whether gradients go through the iterations.
        plan: whether the plan is wanted.

    Returns:
        phi ``[B, n]``, psi ``[B, m]``, transport cost ``[B]``, value ``[B]``, plan ``[B, n, m]`` (or empty)
        in the dtype of ``a``, numbers ``[B, 5]`` float64, histories of phi and psi (or empty).
    """
    values = dict(zip(_ARGUMENTS, arguments))
    call = _unpack(values)
    check_positive("epsilon", call.epsilons)
    if call.tolerance != 0:
        check_positive("tolerance", values["tolerance"])
    looks = checks_values(call.a.device)
    if looks:
        _check_marginals(call.a, call.b)
    found, numbers = solve(call, history=values["unrolled"])
    if looks:
        check_outcome(call, numbers)
    epsilon = float(call.epsilons[-1])
    value = epsilon * sum(
        torch.where(mass == 0, 0.0, mass.double() * (potential.double() - mass.double().log())).sum(1)
        for mass, potential in ((call.a, found.phi), (call.b, found.psi))
    )
    plan = _plan(call, found, epsilon) if values["plan"] else call.a.new_empty(0)
    kept = (found.phi_history, found.psi_history)
    histories = (call.a.new_empty(0) if x is None else x for x in kept)
    transport = numbers[:, P.TRANSPORT].to(call.a.dtype, copy=True)
    return found.phi, found.psi, transport, value.to(call.a.dtype), plan, numbers, *histories


def _plan(call: Call, found: Potentials, epsilon: float) -> Tensor:
    present = (call.a > 0)[:, :, None] & (call.b > 0)[:, None, :]
    scaled = call.cost.to(call.a.dtype) / epsilon
    plan = torch.where(present, (found.phi[:, :, None] + found.psi[:, None, :] - scaled).exp(), 0.0)
    # No more than the marginal that is exact: potentials of 1e30 round to anything.
    return torch.minimum(plan, call.a[:, :, None] if call.columns_first else call.b[:, None, :])


sinkhorn_op = torch.library.custom_op(
    "kd_kernels::sinkhorn", _forward, mutates_args=(), schema=f"({_CALL}) -> ({', '.join(['Tensor'] * 8)})"
)


@sinkhorn_op.register_fake
def _(*arguments):
    call = dict(zip(_ARGUMENTS, arguments))
    (count, n), m, length = call["a"].shape, call["b"].shape[1], call["epsilons"].shape[0]

    def of(*shape: int, dtype=None) -> Tensor:
        return call["a"].new_empty(shape, dtype=dtype)

    plan = of(count, n, m) if call["plan"] else of(0)
    histories = (of(count, length, n), of(count, length, m)) if call["unrolled"] else (of(0), of(0))
    numbers = of(count, P.NUMBER_COLUMNS, dtype=torch.float64)
    return of(count, n), of(count, m), of(count), of(count), plan, numbers, *histories


@torch.library.custom_op(
    "kd_kernels::sinkhorn_backward",
    mutates_args=(),
    schema=f"(Tensor? d_transport, Tensor? d_value, Tensor? d_plan, Tensor phi, Tensor psi, "
    f"Tensor phi_history, Tensor psi_history, bool cost_gradient, {_CALL}) -> (Tensor, Tensor, Tensor)",
)
def sinkhorn_backward(
    d_transport, d_value, d_plan, phi, psi, phi_history, psi_history, cost_gradient, *arguments
):
    """Gradients of cost (empty where not wanted), a and b."""
    values = dict(zip(_ARGUMENTS, arguments))
    call, unrolled = _unpack(values), values["unrolled"]
    found = Potentials(phi, psi, phi_history if unrolled else None, psi_history if unrolled else None)
    epsilon = float(call.epsilons[-1])
    arriving = Cotangents(d_transport, d_plan, d_value)
    # value = epsilon sum a (phi - log a) + epsilon sum b (psi - log b); its partial derivatives, and the
    # total ones at a solution.
    masses, potentials = (call.a, call.b), (phi, psi)
    partial = [torch.zeros_like(x) for x in masses]
    if d_value is not None:
        weight = epsilon * d_value[:, None]
        logs = [torch.where(x == 0, 0.0, p - x.log()) for x, p in zip(masses, potentials)]
        partial = [weight * (log - (1.0 if unrolled else 0.0)) for log in logs]
        partial = [torch.where(x == 0, 0.0, p) for x, p in zip(masses, partial)]
        if unrolled:
            arriving.phi, arriving.psi, arriving.value = weight * call.a, weight * call.b, None
    phase = P.UNROLLED if unrolled else P.IMPLICIT
    d_cost, d_a, d_b = adjoint(call, found, arriving, phase, cost_gradient)
    d_cost = call.cost.new_empty(0) if d_cost is None else d_cost.to(call.cost.dtype)
    return d_cost, d_a + partial[0], d_b + partial[1]


@sinkhorn_backward.register_fake
def _(d_transport, d_value, d_plan, phi, psi, phi_history, psi_history, cost_gradient, *arguments):
    cost = arguments[0]
    d_cost = (
        torch.empty_like(cost, memory_format=torch.contiguous_format) if cost_gradient else cost.new_empty(0)
    )
    return d_cost, torch.empty_like(phi), torch.empty_like(psi)


def _setup_context(ctx, inputs, output) -> None:
    save(ctx, inputs, *(output[i] for i in (_PHI, _PSI, _PHI_HISTORY, _PSI_HISTORY)))


def _backward(ctx, *arriving):
    found, inputs = saved(ctx)
    none = (None,) * len(_ARGUMENTS)
    arriving = [arriving[i] for i in (_TRANSPORT, _VALUE, _PLAN)]
    if all(x is None for x in arriving):
        return none
    gradients = torch.ops.kd_kernels.sinkhorn_backward(*arriving, *found, ctx.needs_input_grad[0], *inputs)
    wanted = ctx.needs_input_grad[:_DIFFERENTIABLE]
    first = [gradient if needed else None for gradient, needed in zip(gradients, wanted)]
    return (*first, *none[_DIFFERENTIABLE:])


sinkhorn_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(sinkhorn_backward, "sinkhorn")

sinkhorn = direct(sinkhorn_op, _forward, _backward, _setup_context)
