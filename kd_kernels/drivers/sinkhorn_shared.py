"""One cost shared by many problems: every half-step of all of them is one matrix product.

``U [B, n]`` and ``V [B, m]`` are the scalings of all problems, ``K`` the kernel ``exp(-(C - row's least) /
epsilon)`` that they share, which the gibbs kernel makes: ``U = a / (V K')``, ``V = b / (U K)``, which the
half_step kernel makes. Nothing is ever ``[B, n, m]``. It takes the Sinkhorn kernel's jobs
(:class:`kd_kernels.problems.SinkhornJob`), but ``d_cost`` is ``[n, m]``, or None where it is not wanted,
``cost`` may have any strides, ``denominator`` counts, and the histories hold U and V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor

from kd_kernels import problems as P
from kd_kernels.convergence import Convergence
from kd_kernels.drivers.ieee_products import ieee_products
from kd_kernels.drivers.workspace import Workspace, borrow, footprint
from kd_kernels.reference.sinkhorn import product_gap, sensitivities

_INF = float("inf")
_MOST_KEPT = 256 << 20  # bytes that a thread keeps between calls


def shared_cost(
    job: P.SinkhornJob,
    phases: int,
    gibbs: Callable[[P.GibbsJob], None],
    half_step: Callable[[P.HalfStepJob], None],
) -> None:
    """Run the phases of ``job``."""
    cost = _readable(job)
    # As the cost lies in memory, for pages that come anew would cost more than the exponentials.
    turned = cost.stride(1) != 1
    shape, dtype = (cost.t() if turned else cost).shape, cost.dtype
    size = 2 * footprint(*shape, dtype.itemsize)
    kept = borrow(size, cost.device) if size <= _MOST_KEPT else _dropped(size, cost.device)
    with ieee_products(cost.device), kept as workspace:
        matrices = (workspace.take(*shape, dtype) for _ in range(2))
        shared = _Shared(job, cost, gibbs, half_step, *(x.t() if turned else x for x in matrices))
        if phases & P.SOLVE:
            shared.solve()
        if phases & P.UNROLLED:
            shared.unrolled()
        if phases & P.IMPLICIT:
            shared.implicit()


def _readable(job: P.SinkhornJob) -> Tensor:
    """The cost in the state's dtype, unit stride along a dimension; infinite where no problem has mass."""
    cost = job.cost[0].to(job.a.dtype)
    rows, columns = ((mass > 0).any(0) for mass in (job.a, job.b))
    if cost.device.type != "cpu" or not bool(rows.all() & columns.all()):
        cost = cost.masked_fill(~(rows[:, None] & columns), _INF)
    return cost if 1 in cost.stride() else cost.contiguous()


@contextmanager
def _dropped(size: int, device: torch.device) -> Iterator[Workspace]:
    yield Workspace(torch.empty(size, dtype=torch.uint8, device=device))


def _without_zeros(mass: Tensor) -> Tensor:
    """To divide by: what is absent has nothing to be divided."""
    return torch.where(mass == 0, 1.0, mass)


class _Shared:
    """``kernel`` and ``weighted`` are memory for two matrices like the cost."""

    def __init__(
        self,
        job: P.SinkhornJob,
        cost: Tensor,
        gibbs: Callable[[P.GibbsJob], None],
        half_step: Callable[[P.HalfStepJob], None],
        kernel: Tensor,
        weighted: Tensor,
    ) -> None:
        self.job, self.half_step, self.epsilon = job, half_step, float(job.epsilons[-1])
        self.cost = cost
        self.kernel, self.weighted = kernel, weighted  # P * C sums over the second
        self.shift, self.reach = (job.a.new_empty(len(kernel)) for _ in range(2))  # of each row
        gibbs(P.GibbsJob(self.cost, self.epsilon, self.shift, self.reach, kernel, weighted))

    def kernel_at(self, epsilon: float) -> Tensor:
        return (self.cost - self.shift[:, None]).div_(-epsilon).exp_()

    def product(
        self,
        kernel: Tensor,
        x: Tensor,
        weight: Tensor,
        transposed: bool,
        divide: bool = False,
        extra: Optional[Tensor] = None,
        out: Optional[Tensor] = None,
    ) -> Tensor:
        if kernel.stride(1) != 1:
            kernel, transposed = kernel.t(), not transposed
        out = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
        self.half_step(P.HalfStepJob(kernel, x, weight, out, transposed, divide, extra))
        return out

    def along_rows(self, v: Tensor, weight: Tensor, kernel: Optional[Tensor] = None) -> Tensor:
        """``weight (v K')``: [B, n]."""
        return self.product(self.kernel if kernel is None else kernel, v, weight, transposed=False)

    def along_columns(self, u: Tensor, weight: Tensor, kernel: Optional[Tensor] = None) -> Tensor:
        """``weight (u K)``: [B, m]."""
        return self.product(self.kernel if kernel is None else kernel, u, weight, transposed=True)

    def scalings(self, phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        return (phi - self.shift / self.epsilon).exp(), psi.exp()

    def potentials(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return u.log() + self.shift / self.epsilon, v.log()

    def start(self) -> Tensor:
        """The first v. Any size will do but where something is added to denominators: 1 in all, then."""
        present = self.job.b > 0
        first = present.to(self.job.b.dtype)
        return first / present.sum(1, keepdim=True).clamp(min=1) if self.job.denominator else first

    def extras(self) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """What is added to the denominators of rows, whose scalings have been shifted, and of columns."""
        added = self.job.denominator
        if not added:
            return None, None
        return added * (self.shift / self.epsilon).exp(), torch.full_like(self.job.b[0], added)

    def solve(self) -> None:
        job, kernel = self.job, self.kernel
        v, of_rows, of_columns = self.start(), *self.extras()
        u, done = torch.zeros_like(job.a), torch.zeros_like(job.a[:, 0], dtype=torch.bool)
        taken = torch.zeros_like(job.numbers[:, 0])
        lost, vanished = torch.zeros((), dtype=torch.bool, device=job.a.device), None
        converged = Convergence()
        # Another epsilon is another kernel, and v the same potentials in another unit.
        before = float(job.epsilons[0])
        for step, epsilon in enumerate(job.epsilons.tolist()):
            if step == 0 or epsilon != before:
                kernel = self.kernel if epsilon == self.epsilon else self.kernel_at(epsilon)
                if epsilon != before:  # its size is of no account, and would leave the numbers' range
                    size = v.amax(1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
                    v = torch.where(done[:, None], v, (v / size) ** (before / epsilon))
                    vanished = ((v == 0) & (job.b > 0)).any()
                before = epsilon
            of_step = [None if x is None else x[:, step] for x in (job.phi_history, job.psi_history)]
            next_u = self.product(kernel, v, job.a, False, True, of_rows, of_step[0])
            if vanished is not None:  # which matters to rows that had little else
                little = (next_u == 0) | (next_u * (1e8 * torch.finfo(v.dtype).tiny) > job.a)
                lost, vanished = lost | (vanished & (little & (job.a > 0)).any()), None
            if job.looks(step):  # a / next_u is what the plan's rows sum to, per u
                error = (u * (job.a / _without_zeros(next_u)) - job.a).abs().sum(1)
                done = done | (error <= job.tolerance * job.a.sum(1))
                if converged(done):
                    break
            next_v = self.product(kernel, next_u, job.b, True, True, of_columns, of_step[1])
            if job.tolerance > 0:
                next_u, next_v = (torch.where(done[:, None], x, y) for x, y in ((u, next_u), (v, next_v)))
            u, v = next_u, next_v
            taken += ~done
        self.report(u, v, taken, lost)

    def report(self, u: Tensor, v: Tensor, taken: Tensor, lost: Tensor) -> None:
        job, ones = self.job, (torch.ones_like(self.job.a), torch.ones_like(self.job.b))
        phi, psi = self.potentials(u, v)
        job.phi.copy_(phi)
        job.psi.copy_(psi)
        reached = self.along_rows(v, ones[0])
        sums = u * reached
        transport = self.along_rows(v, u, self.weighted).sum(1, dtype=torch.float64)
        job.numbers[:, P.TRANSPORT] = transport
        job.numbers[:, P.ERROR] = (sums - job.a).abs().sum(1, dtype=torch.float64)
        job.numbers[:, P.ITERATIONS] = taken
        job.numbers[:, P.GAP] = product_gap(job, sums.double(), self.epsilon)
        infeasible = ((job.a > 0) & (reached == 0)).any(1)
        unmet = (job.b > 0) & (v == 0)  # by rounding, or because nothing reaches it
        if job.b.device.type != "cpu" or bool(unmet.any()):
            infeasible |= (unmet & (self.along_columns(u, ones[1]) == 0)).any(1)
        least = min(job.epsilons.tolist())  # each epsilon of a schedule has been iterated at
        out = lost | (self.reach > least * P.room(job.a.dtype)).any()
        status = torch.where(
            out, float(P.OUT_OF_ROOM), torch.where(infeasible, float(P.INFEASIBLE), float(P.SOLVED))
        )
        job.numbers[:, P.STATUS] = status

    def unrolled(self) -> None:
        job = self.job
        # Not from their logarithms, which have fewer digits where costs are far from 0.
        u, v = job.phi_history[:, -1], job.psi_history[:, -1]
        by_row, by_column = self.through(u, v)
        d_phi, d_psi = job.d_phi + by_row, job.d_psi + by_column
        # With the sign that a half-step's adjoint has and a product has not.
        a, b = -_without_zeros(job.a), -_without_zeros(job.b)
        left, right = [], []  # factors of the cost's gradient
        for step in reversed(range(job.iterations)):
            u_step, v_step = job.phi_history[:, step], job.psi_history[:, step]
            before = job.psi_history[:, step - 1] if step > 0 else self.start()
            job.d_b += d_psi
            columns = v_step * (d_psi / b)  # v / b alone may have no room
            from_columns = self.along_rows(columns, u_step)
            d_phi = from_columns if d_phi is None else d_phi + from_columns
            job.d_a += d_phi
            rows = u_step * (d_phi / a)
            if job.d_cost is not None:
                left += [u_step, rows]
                right += [columns, before]
            if step > 0:  # what comes before the first is no variable
                d_psi, d_phi = self.along_columns(rows, before), None
        if job.d_cost is not None:
            spread = torch.cat(left).t() @ torch.cat(right) if left else torch.zeros_like(self.kernel)
            self.write_cost(u, v, job.d_transport, -spread)

    def through(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column sums of ``P * G``, where G arrives at P."""
        job = self.job
        weight = job.d_transport[:, None]
        by_row = self.along_rows(v, weight * u, self.weighted)
        by_column = self.along_columns(u, weight * v, self.weighted)
        if job.d_plan is not None:
            by_plan = self.by_plan(u, v)
            by_row, by_column = by_row + by_plan.sum(2), by_column + by_plan.sum(1)
        return by_row, by_column

    def by_plan(self, u: Tensor, v: Tensor) -> Tensor:
        """``[B, n, m]``, as the plan that was asked for."""
        plan = u[:, :, None] * self.kernel * v[:, None, :]
        return torch.where(plan == 0, 0.0, plan * self.job.d_plan)

    def write_cost(self, u: Tensor, v: Tensor, weight: Tensor, spread: Tensor) -> None:
        """``sum_b weight P - P * G / epsilon`` and ``K * spread / epsilon``."""
        job = self.job
        assert job.d_cost is not None
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
            lambda y: self.along_rows(v * y, u), lambda x: self.along_columns(u * x, v), by_row, by_column
        )
        if job.d_cost is not None:
            spread = torch.cat([u * x, u]).t() @ torch.cat([v, v * y])
            self.write_cost(u, v, job.d_transport + job.d_value, spread)
        job.d_a.copy_(x)
        job.d_b.copy_(y)
