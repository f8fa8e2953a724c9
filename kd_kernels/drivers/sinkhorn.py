"""How a batch of transport problems reaches the kernel: which side is first, whether a cost is shared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from kd_kernels import problems as P
from kd_kernels.backends import pick
from kd_kernels.drivers.sinkhorn_shared import shared_cost

# Problems of one shared cost that go through the kernel at once where scalings have no room: their gradients
# of the cost are [n, m] each before they are summed.
_SLAB_ENTRIES = 1 << 24


@dataclass
class Call:
    """One call in plain values: what the op received."""

    cost: Tensor  # [B, n, m], or [n, m] shared by all problems
    a: Tensor  # [B, n]
    b: Tensor  # [B, m]
    epsilons: Tensor
    tolerance: float
    domain: int
    columns_first: bool
    backend: Optional[str]
    denominator: float = 0.0  # see SinkhornJob; of a shared cost, in scalings


@dataclass
class Potentials:
    """Of B problems: what SOLVE gives and the adjoints read."""

    phi: Tensor
    psi: Tensor
    phi_history: Optional[Tensor]
    psi_history: Optional[Tensor]


@dataclass
class Cotangents:
    """What arrives at the gradients; each may be None."""

    transport: Optional[Tensor] = None
    plan: Optional[Tensor] = None
    value: Optional[Tensor] = None
    phi: Optional[Tensor] = None
    psi: Optional[Tensor] = None


def solve(call: Call, history: bool) -> tuple[Potentials, Tensor]:
    """(potentials, numbers ``[B, 5]``) of the call's problems."""
    found, numbers = _potentials(call, history), _numbers(call)
    _run(call, found, Cotangents(), P.SOLVE, numbers, None)
    return found, numbers


def solve_and_differentiate(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers, gradients of ``<P, C>`` to a and b through all iterations) of a cost shared by all problems;
    their kernel is made once."""
    found, numbers = _potentials(call, history=True), _numbers(call)
    results = (None, torch.zeros_like(call.a), torch.zeros_like(call.b))
    _run(call, found, Cotangents(call.a.new_ones(call.a.shape[0])), P.SOLVE | P.UNROLLED, numbers, results)
    return numbers, *_from_logarithms(call, *results[1:])


def adjoint(
    call: Call, found: Potentials, arriving: Cotangents, phase: int, cost_gradient: bool
) -> tuple[Optional[Tensor], Tensor, Tensor]:
    """Gradients of (cost in the state's dtype or None, a, b), see
    :class:`kd_kernels.problems.SinkhornJob`."""
    # The kernel always makes the gradient of a problem's own cost.
    d_cost = None
    if cost_gradient or call.cost.dim() == 3:
        d_cost = torch.zeros(call.cost.shape, dtype=call.a.dtype, device=call.a.device)
    results = (d_cost, torch.zeros_like(call.a), torch.zeros_like(call.b))
    _run(call, found, arriving, phase, _numbers(call), results)
    d_cost, d_a, d_b = results
    if phase == P.UNROLLED:
        d_a, d_b = _from_logarithms(call, d_a, d_b)
    return d_cost if cost_gradient else None, d_a, d_b


def _potentials(call: Call, history: bool) -> Potentials:
    def keep(like: Tensor) -> Optional[Tensor]:
        return like.new_zeros(len(like), call.epsilons.numel(), like.shape[1]) if history else None

    return Potentials(torch.zeros_like(call.a), torch.zeros_like(call.b), keep(call.a), keep(call.b))


def _numbers(call: Call) -> Tensor:
    return torch.zeros(call.a.shape[0], P.NUMBER_COLUMNS, dtype=torch.float64, device=call.a.device)


def _from_logarithms(call: Call, d_a: Tensor, d_b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of masses from those of their logarithms, which UNROLLED gives."""
    return tuple(torch.where(x == 0, 0.0, d / x) for d, x in ((d_a, call.a), (d_b, call.b)))


def _run(
    call: Call,
    found: Potentials,
    arriving: Cotangents,
    phases: int,
    numbers: Tensor,
    results: Optional[tuple[Optional[Tensor], Tensor, Tensor]],
) -> None:
    name, kernel = pick("sinkhorn", call.a.device, call.backend)
    if call.cost.numel() == 0 or call.a.numel() == 0:
        return
    flip, shared = call.columns_first, call.cost.dim() == 2
    cost = call.cost.expand(call.a.shape[0], *call.cost.shape) if shared else call.cost
    if flip:
        cost = cost.mT
    if not shared:
        cost = cost.contiguous() if flip or cost.stride(2) != 1 and cost.shape[2] > 1 else cost

    def turned(first: Optional[Tensor], second: Optional[Tensor]) -> tuple:
        return (second, first) if flip else (first, second)

    zeros = call.a.new_zeros(call.a.shape[0])
    a, b = turned(call.a, call.b)
    phi, psi = turned(found.phi, found.psi)
    phi_history, psi_history = turned(found.phi_history, found.psi_history)
    job = P.SinkhornJob(
        cost, a, b, call.epsilons, call.tolerance, call.domain, phi, psi, numbers, phi_history, psi_history,
        denominator=call.denominator,
    )  # fmt: skip
    if results is not None:
        job.d_transport, job.d_value = (
            zeros if x is None else x.to(zeros.dtype).contiguous()
            for x in (arriving.transport, arriving.value)
        )
        if arriving.plan is not None:
            job.d_plan = (arriving.plan.mT if flip else arriving.plan).to(zeros.dtype).contiguous()
        d_phi, d_psi = turned(arriving.phi, arriving.psi)
        job.d_phi = torch.zeros_like(a) if d_phi is None else d_phi
        job.d_psi = torch.zeros_like(b) if d_psi is None else d_psi
        d_cost, d_a, d_b = results
        job.d_a, job.d_b = turned(d_a, d_b)
        job.d_cost = d_cost.mT.contiguous() if flip and d_cost is not None else d_cost
    if not shared:
        kernel(job, phases)
    elif call.domain == P.SCALING or (call.domain == P.AUTO and P.fits_scalings(cost[0], call.epsilons)):
        shared_cost(job, phases, *(pick(op, call.a.device, call.backend)[1] for op in ("gibbs", "half_step")))
        # Masses that forbidden pairs keep from being met drive scalings apart for ever; logarithms bear it.
        if (
            call.domain == P.AUTO
            and not job.denominator
            and _holds_nan(numbers, job.d_a, job.d_b, job.d_cost)
        ):
            if job.d_cost is not None:
                job.d_cost.zero_()
            _in_slabs(kernel, job, phases)
    else:
        _in_slabs(kernel, job, phases)
    if results is not None and flip and results[0] is not None:
        results[0].copy_(job.d_cost.mT)


def _holds_nan(*found: Optional[Tensor]) -> bool:
    """Not asked of a GPU, which would be waited for."""
    return any(x is not None and x.device.type == "cpu" and bool(x.isnan().any()) for x in found)


def _in_slabs(kernel, job: P.SinkhornJob, phases: int) -> None:
    """A shared cost problem by problem, its gradient summed."""
    cost = job.cost[0].contiguous().expand(job.cost.shape)
    step = max(1, _SLAB_ENTRIES // cost[0].numel())
    for start in range(0, job.a.shape[0], step):
        part = slice(start, start + step)
        of_part = {
            name: value[part]
            for name, value in vars(job).items()
            if isinstance(value, Tensor) and name not in ("cost", "epsilons", "d_cost")
        }
        slab = replace(job, cost=cost[part], **of_part)
        if phases != P.SOLVE:
            slab.d_cost = torch.zeros_like(
                slab.cost, dtype=job.a.dtype, memory_format=torch.contiguous_format
            )
        kernel(slab, phases)
        if job.d_cost is not None and slab.d_cost is not None:
            job.d_cost += slab.d_cost.sum(0)
