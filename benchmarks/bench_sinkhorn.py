"""Entropic transport, forward and backward: B costs of their own, and one cost for all.

Every step returns a number per problem and the gradient of their sum to the cost. What the number is differs,
and so does what it is held against: ``<P, C>`` after just these iterations with its exact gradient, or the
entropic value with the plan as gradient. ``kd solve`` is the number alone. The yardstick is one read of the
costs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from contest import Step, contest, errors, graded, run_cases
from providers import need
from record import Row
from registry import Bench
from report import cases, failure, judged, median, ratio, seconds, spread, worst_error
from torch import Tensor
from workloads import DTYPES, SINKHORN, SINKHORN_OVER_READ, SINKHORN_SPEEDUP, SinkhornSize

YARDSTICK = "one read"
Result = tuple[Tensor, ...]
# Relative error of the worse of numbers and gradient beyond which a provider's row is not timed. The implicit
# gradient is the solution's; GeomLoss's schedule ends before the solution, and averages its half-steps.
BAR = {"fp32": 1e-3, "bf16": 2e-2}
LOOSER = {"geomloss": 0.15, "kd implicit": 2e-2}


class Case:
    """Costs uniform in [0, 1), epsilon a tenth of them, marginals by softmax."""

    epsilon = 0.1

    def __init__(self, size: SinkhornSize, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (size.rows, size.columns) if size.shared else (size.problems, size.rows, size.columns)
        self.size = size
        self.cost = torch.rand(shape, generator=generator, device=device).to(dtype).requires_grad_()
        self.a, self.b = (
            torch.randn(size.problems, width, generator=generator, device=device).softmax(1)
            for width in (size.rows, size.columns)
        )

    def whole(self, cost: Tensor) -> Tensor:
        """``[B, n, m]`` for those who know nothing else."""
        return cost.expand(self.size.problems, -1, -1) if self.size.shared else cost

    def gradients(self, numbers: Tensor) -> Result:
        return numbers.detach(), *torch.autograd.grad(numbers.sum(), self.cost)

    # --- the steps --------------------------------------------------------------------------------

    def ours(self, gradient: str, result: str = "transport_cost") -> Result:
        return self.gradients(getattr(self.solved(self.cost, gradient), result))

    def solved(self, cost: Tensor, gradient: str = "unrolled") -> Any:
        return need("kd_kernels").sinkhorn(
            cost, self.a, self.b, epsilon=self.epsilon, iterations=self.size.iterations, gradient=gradient
        )

    def scaling(self, cost: Tensor) -> Tensor:
        """As published losses write it."""
        cost = self.whole(cost)
        kernel = (-cost / self.epsilon).exp()
        v = torch.ones_like(self.b)
        for _ in range(self.size.iterations):
            u = self.a / (kernel @ v[:, :, None])[:, :, 0]
            v = self.b / (kernel.mT @ u[:, :, None])[:, :, 0]
        return (u[:, :, None] * kernel * v[:, None] * cost).sum((1, 2))

    def log(self, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """<P, C>, value and plan."""
        cost = self.whole(cost)
        a, b = (x.to(cost.dtype) for x in (self.a, self.b))
        psi, scaled = torch.zeros_like(b), cost / self.epsilon
        for _ in range(self.size.iterations):
            phi = a.log() - (psi[:, None] - scaled).logsumexp(2)
            psi = b.log() - (phi[:, :, None] - scaled).logsumexp(1)
        plan = (phi[:, :, None] + psi[:, None] - scaled).exp()
        value = self.epsilon * ((a * (phi - a.log())).sum(1) + (b * (psi - b.log())).sum(1))
        return (plan * cost).sum((1, 2)), value, plan

    def pot(self) -> Result:
        found = need("ot").batch.solve_batch(
            self.whole(self.cost.float()), self.epsilon, self.a, self.b, max_iter=self.size.iterations,
            tol=0.0, grad="autodiff",
        )  # fmt: skip
        return self.gradients(found.value_linear)

    def geomloss(self) -> Result:
        """Its tensorised solver, made to take costs; steps of 0.9, about as many as ours."""
        cost = self.whole(self.cost.float())
        loss = need("geomloss").SamplesLoss(
            "sinkhorn", p=1, blur=self.epsilon, scaling=0.9, diameter=1.0, debias=False, backend="tensorized",
            cost=lambda x, y: cost.detach().mT if bool(x.any()) else cost,
        )  # fmt: skip
        # It asks for the costs both ways, and is told by the points which way; half of its gradient each.
        points = [self.a.new_zeros(*self.a.shape, 1), self.b.new_ones(*self.b.shape, 1)]
        with torch.enable_grad():  # which it leaves disabled where it raises
            return self.gradients(loss(self.a, points[0], self.b, points[1]))

    def steps(self) -> dict[str, Step]:
        compiled = functools.cache(lambda: torch.compile(self.scaling, dynamic=False))
        return {
            "kd solve": lambda: (self.solved(self.cost.detach()).transport_cost,),
            "kd": lambda: self.ours("unrolled"),
            "kd implicit": lambda: self.ours("implicit"),
            "kd value": lambda: self.ours("envelope", "value"),
            "torch": lambda: self.gradients(self.scaling(self.cost.float())),
            "torch log": lambda: self.gradients(self.log(self.cost.float())[0]),
            "torch.compile": lambda: self.gradients(compiled()(self.cost.float())),
            "pot": self.pot,
            "geomloss": self.geomloss,
        }

    # --- what they should be ----------------------------------------------------------------------

    def truth(self) -> dict[str, Result]:
        """By provider; others are held against ``<P, C>`` and its exact gradient."""
        cost = self.cost.detach().double().requires_grad_()
        transport, value, plan = self.log(cost)
        unrolled = (transport.detach(), *torch.autograd.grad(transport.sum(), cost))
        envelope = (value.detach(), plan.detach().sum(0) if self.size.shared else plan.detach())
        return {"": unrolled, "kd value": envelope, "geomloss": envelope}


def run_case(
    name: str, size: SinkhornSize, dtype: str, *, threads: int, device: str, **timing: Any
) -> list[Row]:
    case = Case(size, DTYPES[dtype], device)
    truth = case.truth()

    def check(provider: str, found: Result) -> Row:
        off = errors(found, truth.get(provider, truth[""]))
        return graded(off, LOOSER.get(provider, BAR[dtype]))

    row = {
        "bench": "sinkhorn",
        "case_id": f"sinkhorn/{name}/{dtype}/{size.problems}x{size.rows}x{size.columns}",
        "case": {"what": name, "dtype": dtype, "threads": threads, **vars(size)},
    }
    one_read = lambda: case.cost.detach().amax(-1)  # noqa: E731
    return contest(row, case.steps(), check, yardstick=YARDSTICK, floor=one_read, device=device, **timing)


def run(results: Optional[Path], *, sizes: str, dtypes: Sequence[str], **timing: Any) -> list[Row]:
    chosen = SINKHORN[sizes].items()
    cases = [(f"{name} {x}", run_case, (name, size, x)) for name, size in chosen for x in dtypes]
    return run_cases("sinkhorn", results, cases, compiling=sizes != "quick", **timing)


# --- the table ----------------------------------------------------------------------------------------

SINKHORN_HEADER = (
    "what", "size", "dtype", "provider", "median [p20 .. p80]", "x yardstick", "worst error", "targets",
)  # fmt: skip


def sinkhorn_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    lines = []
    for case in cases(rows).values():
        pot = median(case.get("pot"))
        for row in case.values():
            given, mine = row["case"], median(row)
            size = SinkhornSize(*(given[x] for x in ("problems", "rows", "columns", "iterations", "shared")))
            note = failure(row)
            wanted = SINKHORN_SPEEDUP.get((size, given["dtype"]))
            if wanted is not None and row["provider"] in ("kd", "kd implicit") and None not in (mine, pot):
                note = judged(pot / mine >= wanted, f"pot >= {wanted:g}x")
            limit, over = SINKHORN_OVER_READ.get((size, given["dtype"])), median(row, "ratio_floor")
            if limit is not None and row["provider"] == "kd solve" and over is not None:
                note = judged(over <= limit, f"one read <= {limit:g}")
            lines.append(
                (
                    given["what"], f"{size.problems} x {size.rows} x {size.columns}, L = {size.iterations}",
                    given["dtype"], row["provider"], spread(row, "seconds", seconds),
                    ratio(median(row, "ratio_floor")), worst_error(row), note,
                )
            )  # fmt: skip
    return lines


BENCH = Bench(
    name="sinkhorn",
    title="Entropic transport, forward and backward",
    about=(
        "Entropic transport, forward and backward to the costs, at epsilon a tenth of their range. `kd`, "
        "`torch` and `pot` go back through the iterations, `kd implicit` by the solution; `kd solve` has no "
        "gradient; `kd value` and `geomloss` are of the entropic value, whose gradient is the plan. The "
        "yardstick is one read of the costs."
    ),
    header=SINKHORN_HEADER,
    lines=sinkhorn_lines,
    run=run,
)
