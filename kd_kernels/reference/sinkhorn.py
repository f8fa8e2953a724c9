"""The Sinkhorn kernel written plainly in torch, all problems at once, in logarithms; see
:class:`kd_kernels.problems.SinkhornJob` for the contract."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kd_kernels import problems as P
from kd_kernels.convergence import Convergence

_INF = float("inf")
Product = Callable[[Tensor], Tensor]


def sinkhorn(job: P.SinkhornJob, phases: int) -> None:
    """Run the phases of ``job``."""
    if phases & P.SOLVE:
        _solve(job)
    if phases & P.UNROLLED:
        _unrolled(job)
    if phases & P.IMPLICIT:
        _implicit(job)


def _costs(job: P.SinkhornJob) -> Tensor:
    """In the state's dtype; ``inf`` where a pair is absent or forbidden."""
    absent = (job.a == 0)[:, :, None] | (job.b == 0)[:, None, :]
    return torch.where(absent, _INF, job.cost.to(job.a.dtype))


def _log_sum(x: Tensor, dim: int) -> Tensor:
    """logsumexp whose sum over nothing but -inf is -inf."""
    top = x.amax(dim, keepdim=True)
    top = torch.where(top == -_INF, 0.0, top)
    return (x - top).exp().sum(dim).log() + top.squeeze(dim)


def _step(log_mass: Tensor, log_sum: Tensor) -> Tensor:
    return torch.where(log_mass == -_INF, -_INF, log_mass - log_sum)


def _plan(phi: Tensor, psi: Tensor, scaled: Tensor) -> Tensor:
    present = (phi != -_INF)[:, :, None] & (psi != -_INF)[:, None, :]  # NaN stays NaN
    return torch.where(present, (phi[:, :, None] + psi[:, None, :] - scaled).exp(), 0.0)


def _times(plan: Tensor, x: Tensor) -> Tensor:
    """``plan * x``, 0 where the plan is, whatever x holds there."""
    return torch.where(plan == 0, 0.0, plan * x)


def product_gap(job: P.SinkhornJob, sums: Tensor, epsilon: float) -> Tensor:
    """The column GAP, of the plan's row sums: log(P / ab') is (f + g - C) / epsilon, so no sum has n m
    terms."""

    def part(sums: Tensor, potential: Tensor, mass: Tensor) -> Tensor:
        return torch.where(mass == 0, 0.0, sums * (potential.double() - mass.double().log())).sum(1)

    mass = job.b.sum(1, dtype=torch.float64)
    inner = part(sums, job.phi, job.a) + part(job.b.double(), job.psi, job.b)
    gap = (inner - job.numbers[:, P.TRANSPORT] / epsilon) / mass + mass.log()
    return torch.where(mass == 0, 0.0, gap)


def _out_of_room(job: P.SinkhornJob, cost: Tensor, epsilon: float) -> Tensor:
    """``[B]``: whether scalings in the state's dtype have no room for the costs."""
    above = torch.where(cost < _INF, cost - cost.amin(2, keepdim=True), 0.0)
    return above.flatten(1).amax(1) / epsilon > P.room(job.a.dtype)


def _solve(job: P.SinkhornJob) -> None:
    cost = _costs(job)
    log_a, log_b = job.a.log(), job.b.log()
    phi, psi = torch.full_like(log_a, -_INF), torch.where(job.b == 0, -_INF, 0.0).to(job.b.dtype)
    done = torch.zeros(job.a.shape[0], dtype=torch.bool, device=cost.device)
    taken = torch.zeros(job.a.shape[0], dtype=torch.float64, device=cost.device)
    epsilons, mass, converged = job.epsilons.tolist(), job.a.sum(1), Convergence()
    for step, (before, epsilon) in enumerate(zip(epsilons[:1] + epsilons, epsilons)):
        psi = torch.where(done[:, None], psi, psi * (before / epsilon))  # the same potential in the new unit
        scaled = cost / epsilon
        sums = _log_sum(psi[:, None, :] - scaled, 2)
        if job.looks(step):
            error = ((phi + sums).exp() - job.a).abs().nan_to_num(0.0).sum(1)
            done = done | (error <= job.tolerance * mass)
            if converged(done):
                break
        new_phi = _step(log_a, sums)
        phi = torch.where(done[:, None], phi, new_phi)
        new_psi = _step(log_b, _log_sum(phi[:, :, None] - scaled, 1))
        psi = torch.where(done[:, None], psi, new_psi)
        taken += ~done
        if job.phi_history is not None:
            job.phi_history[:, step], job.psi_history[:, step] = phi, psi
    forbidden = scaled == _INF
    infeasible = (forbidden.all(2) & (job.a > 0)).any(1) | (forbidden.all(1) & (job.b > 0)).any(1)
    plan = _plan(phi, psi, scaled)
    job.phi.copy_(phi)
    job.psi.copy_(psi)
    sums = plan.sum(2, dtype=torch.float64)
    job.numbers[:, P.TRANSPORT] = _times(plan, cost).sum((1, 2), dtype=torch.float64)
    job.numbers[:, P.ERROR] = (sums - job.a).abs().sum(1)
    job.numbers[:, P.ITERATIONS] = taken
    job.numbers[:, P.GAP] = product_gap(job, sums, epsilon)
    status = torch.where(infeasible, float(P.INFEASIBLE), float(P.SOLVED))
    if job.domain == P.SCALING:
        status = torch.where(_out_of_room(job, cost, min(epsilons)), float(P.OUT_OF_ROOM), status)
    job.numbers[:, P.STATUS] = status


def _unrolled(job: P.SinkhornJob) -> None:
    cost, epsilon = _costs(job), float(job.epsilons[-1])
    scaled = cost / epsilon

    def per_mass(x: Tensor, mass: Tensor) -> Tensor:
        return torch.where(mass == 0, 0.0, x / mass)

    plan = _plan(job.phi, job.psi, scaled)
    d_cost = job.d_transport[:, None, None] * plan
    through = _cotangent(job, plan, cost)
    d_cost -= through / epsilon
    d_phi, d_psi = job.d_phi + through.sum(2), job.d_psi + through.sum(1)
    job.d_a.zero_()
    job.d_b.zero_()
    first = torch.where(job.b == 0, -_INF, 0.0).to(job.b.dtype)
    for step in reversed(range(job.iterations)):
        phi, psi = job.phi_history[:, step], job.psi_history[:, step]
        before = job.psi_history[:, step - 1] if step > 0 else first
        job.d_b += d_psi
        columns = _plan(phi, psi, scaled) * per_mass(d_psi, job.b)[:, None, :]
        d_phi = d_phi - columns.sum(2)
        job.d_a += d_phi
        rows = _plan(phi, before, scaled) * per_mass(d_phi, job.a)[:, :, None]
        d_psi = -rows.sum(1)
        d_phi = torch.zeros_like(d_phi)
        d_cost += (columns + rows) / epsilon
    job.d_cost.copy_(d_cost)


def _cotangent(job: P.SinkhornJob, plan: Tensor, cost: Tensor) -> Tensor:
    """``P * G``, where G arrives at P."""
    through = job.d_transport.to(plan.dtype)[:, None, None] * _times(plan, cost)
    return through if job.d_plan is None else through + _times(plan, job.d_plan)


def _implicit(job: P.SinkhornJob) -> None:
    """In float64: where plans are nearly permutations the system is nearly singular."""
    cost, epsilon = _costs(job).double(), float(job.epsilons[-1])
    plan = _plan(job.phi.double(), job.psi.double(), cost / epsilon)
    through = _cotangent(job, plan, cost)
    x, y = sensitivities(
        lambda y: (plan @ y[:, :, None])[:, :, 0],
        lambda x: (plan.mT @ x[:, :, None])[:, :, 0],
        through.sum(2),
        through.sum(1),
    )
    weight = (job.d_transport + job.d_value).double()[:, None, None]
    job.d_cost.copy_(weight * plan - (through - plan * (x[:, :, None] + y[:, None, :])) / epsilon)
    job.d_a.copy_(x)
    job.d_b.copy_(y)


def sensitivities(
    times: Product, times_transposed: Product, by_row: Tensor, by_column: Tensor
) -> tuple[Tensor, Tensor]:
    """(x, y) with ``diag(P1) x + P y = by_row`` and ``P'x + diag(P'1) y = by_column``, ``times`` being y -> P
    y: by conjugate gradients on y's equation, preconditioned by ``P'1``. It is singular along constants,
    consistent."""
    rows, columns = times(torch.ones_like(by_column)), times_transposed(torch.ones_like(by_row))
    per_row, per_column = (torch.where(x > 0, 1 / x, 0.0) for x in (rows, columns))
    residual = by_column - times_transposed(by_row * per_row)
    y, preconditioned = torch.zeros_like(residual), residual * per_column
    direction, rho = preconditioned, (residual * preconditioned).sum(1)
    enough = rho * P.CG_TOLERANCE**2
    least = torch.finfo(rows.dtype).eps * 100
    converged = Convergence()
    for _ in range(P.CG_STEPS):
        image = columns * direction - times_transposed(times(direction) * per_row)
        curvature = (direction * image).sum(1)
        # Along a constant there is none: only rounding is left there.
        active = (rho > enough) & (curvature > least * (columns * direction**2).sum(1))
        if converged(~active):
            break
        alpha = torch.where(active, rho / torch.where(active, curvature, 1.0), 0.0)[:, None]
        y, residual = y + alpha * direction, residual - alpha * image
        preconditioned = residual * per_column
        next_rho = (residual * preconditioned).sum(1)
        beta = torch.where(active, next_rho / torch.where(active, rho, 1.0), 0.0)[:, None]
        direction = preconditioned + beta * direction
        rho = torch.where(active, next_rho, 0.0)
    return (by_row - times(y)) * per_row, y
