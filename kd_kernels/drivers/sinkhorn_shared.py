"""One cost shared by many problems: every half-step of all of them is one matrix product.

``U [B, n]`` and ``V [B, m]`` are the scalings of all problems, ``K`` the kernel ``exp(-(C - row's least) /
epsilon)`` that they share: ``U = a / (V K')``, ``V = b / (U K)``. Nothing is ever ``[B, n, m]``. It takes the
jobs of the kernel (:class:`kd_kernels.problems.SinkhornJob`), except that ``d_cost`` is ``[n, m]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kd_kernels import problems as P
from kd_kernels.reference.sinkhorn import product_gap, sensitivities

_INF = float("inf")


def fits_scalings(cost: Tensor, epsilon: float) -> bool:
    """Whether a cost [n, m] leaves scalings room; waits for the device."""
    above = _above(cost.float())
    return bool(torch.where(above < _INF, above, 0.0).amax() <= P.SCALING_ROOM * epsilon)


def _above(cost: Tensor) -> Tensor:
    """Each row's costs above its least."""
    least = cost.amin(1, keepdim=True)
    return cost - torch.where(least < _INF, least, 0.0)


@contextmanager
def _ieee_products(device: torch.device) -> Iterator[None]:
    """Products of float32 as float32: without autocast, and without TF32 or bfloat16 in their place, in which
    scalings would stop converging at 1e-3."""
    library = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    with torch.autocast(device.type, enabled=False):
        if hasattr(
            library, "fp32_precision"
        ):  # torch >= 2.9, whose older setting refuses to be mixed with it
            before, library.fp32_precision = library.fp32_precision, "ieee"
            try:
                yield
            finally:
                library.fp32_precision = before
        else:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)


def shared_cost(job: P.SinkhornJob, phases: int) -> None:
    """Run the phases of ``job``."""
    with _ieee_products(job.a.device):
        shared = _Shared(job)
        if phases & P.SOLVE:
            shared.solve()
        if phases & P.UNROLLED:
            shared.unrolled()
        if phases & P.IMPLICIT:
            shared.implicit()


def _per(x: Tensor, mass: Tensor) -> Tensor:
    return torch.where(mass == 0, 0.0, x / mass)


class _Shared:
    def __init__(self, job: P.SinkhornJob) -> None:
        self.job, self.epsilon = job, float(job.epsilons[-1])
        cost = job.cost[0].to(job.a.dtype)
        least = cost.amin(1)
        self.shift = torch.where(least < _INF, least, 0.0)  # of each row
        self.above = _above(cost)
        self.kernel = (self.above / -self.epsilon).exp()
        # P * C sums over this; a forbidden pair has no plan.
        self.weighted = torch.where(self.kernel == 0, 0.0, self.kernel * cost)

    def scalings(self, phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        return (phi - self.shift / self.epsilon).exp(), psi.exp()

    def solve(self) -> None:
        job, kernel = self.job, self.kernel
        v = (job.b > 0).to(job.b.dtype)
        u, done = torch.zeros_like(job.a), torch.zeros_like(job.a[:, 0], dtype=torch.bool)
        taken = torch.zeros_like(job.numbers[:, 0])
        # Another epsilon is another kernel, and v the same potentials in another unit.
        before = self.epsilon if job.iterations == 0 else float(job.epsilons[0])
        for step, epsilon in enumerate(job.epsilons.tolist()):
            if step == 0 or epsilon != before:
                kernel = self.kernel if epsilon == self.epsilon else (self.above / -epsilon).exp()
                v = torch.where(done[:, None], v, v ** (before / epsilon))
                before = epsilon
            sums = v @ kernel.t()
            if job.looks(step):
                done = done | ((u * sums - job.a).abs().sum(1) <= job.tolerance * job.a.sum(1))
                if job.a.device.type == "cpu" and bool(done.all()):
                    break
            u = torch.where(done[:, None], u, _per(job.a, sums).masked_fill(job.a == 0, 0.0))
            v = torch.where(done[:, None], v, _per(job.b, u @ kernel).masked_fill(job.b == 0, 0.0))
            taken += ~done
            if job.phi_history is not None and job.psi_history is not None:
                job.phi_history[:, step], job.psi_history[:, step] = self.potentials(u, v)
        phi, psi = self.potentials(u, v)
        job.phi.copy_(phi)
        job.psi.copy_(psi)
        sums = u * (v @ self.kernel.t())
        job.numbers[:, P.TRANSPORT] = (u * (v @ self.weighted.t())).sum(1, dtype=torch.float64)
        job.numbers[:, P.ERROR] = (sums - job.a).abs().sum(1, dtype=torch.float64)
        job.numbers[:, P.ITERATIONS] = taken
        job.numbers[:, P.GAP] = product_gap(job, sums.double(), self.epsilon)
        infeasible = ((job.a > 0) & (v @ self.kernel.t() == 0)).any(1) | (
            (job.b > 0) & (u @ self.kernel == 0)
        ).any(1)
        out = torch.where(self.above < _INF, self.above, 0.0).amax() > self.epsilon * P.room(job.a.dtype)
        status = torch.where(
            out, float(P.OUT_OF_ROOM), torch.where(infeasible, float(P.INFEASIBLE), float(P.SOLVED))
        )
        job.numbers[:, P.STATUS] = status

    def potentials(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return u.log() + self.shift / self.epsilon, v.log()

    def unrolled(self) -> None:
        job = self.job
        u, v = self.scalings(job.phi, job.psi)
        d_phi, d_psi = job.d_phi, job.d_psi
        d_phi, d_psi = d_phi + self.through(u, v)[0], d_psi + self.through(u, v)[1]
        left, right = [], []  # factors of the cost's gradient
        for step in reversed(range(job.iterations)):
            u, v = self.scalings(job.phi_history[:, step], job.psi_history[:, step])
            before = (job.b > 0).to(v.dtype)
            if step > 0:
                before = self.scalings(job.phi_history[:, step - 1], job.psi_history[:, step - 1])[1]
            job.d_b += d_psi
            columns = v * _per(d_psi, job.b)
            d_phi = d_phi - u * (columns @ self.kernel.t())
            job.d_a += d_phi
            rows = u * _per(d_phi, job.a)
            left += [u, rows]
            right += [columns, before]
            d_psi = -before * (rows @ self.kernel)
            d_phi = torch.zeros_like(d_phi)
        spread = torch.cat(left).t() @ torch.cat(right) if left else torch.zeros_like(self.kernel)
        self.write_cost(job.d_transport, spread)

    def through(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column sums of ``P * G``, where G arrives at P."""
        job = self.job
        weight = job.d_transport[:, None]
        by_row = weight * u * (v @ self.weighted.t())
        by_column = weight * v * (u @ self.weighted)
        if job.d_plan is not None:
            by_plan = self.by_plan(u, v)
            by_row, by_column = by_row + by_plan.sum(2), by_column + by_plan.sum(1)
        return by_row, by_column

    def by_plan(self, u: Tensor, v: Tensor) -> Tensor:
        """``[B, n, m]``, as the plan that was asked for."""
        plan = u[:, :, None] * self.kernel * v[:, None, :]
        return torch.where(plan == 0, 0.0, plan * self.job.d_plan)

    def write_cost(self, weight: Tensor, spread: Tensor) -> None:
        """``sum_b weight P - P * G / epsilon`` and ``K * spread / epsilon``."""
        job = self.job
        u, v = self.scalings(job.phi, job.psi)
        own = (weight[:, None] * u).t() @ v
        times_cost = (job.d_transport[:, None] * u).t() @ v
        d_cost = self.kernel * (own + spread / self.epsilon) - self.weighted * times_cost / self.epsilon
        if job.d_plan is not None:
            d_cost -= self.by_plan(u, v).sum(0) / self.epsilon
        # Where a pair is forbidden the factors of the others may have no bound.
        job.d_cost.copy_(torch.where(self.kernel == 0, 0.0, d_cost))

    def implicit(self) -> None:
        job = self.job
        u, v = self.scalings(job.phi, job.psi)
        by_row, by_column = self.through(u, v)
        x, y = sensitivities(
            lambda y: u * ((v * y) @ self.kernel.t()),
            lambda x: v * ((u * x) @ self.kernel),
            by_row,
            by_column,
        )
        spread = torch.cat([u * x, u]).t() @ torch.cat([v, v * y])
        self.write_cost(job.d_transport + job.d_value, spread)
        job.d_a.copy_(x)
        job.d_b.copy_(y)
