"""Transport problems, and entropic transport the dense way: float64, in logarithms, differentiated by
autograd."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from cases import error
from torch import Tensor

import kd_kernels as kd
from kd_kernels.backends import TABLE

# Without the ones that are not built; Triton's where it is.
BACKENDS = [name for name in ("cpu", "reference", "triton") if name in TABLE["sinkhorn"]]
ORDERS = ("rows_columns", "columns_rows")
NAMES = ("transport_cost", "value", "plan")
# Of the float64 results, whatever the cost's dtype; and of a gradient in it.
BAR = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
GRADIENT_BAR = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class Problems:
    """B random problems; costs uniform, marginals no two alike. A mass of 3 so that none is taken for 1."""

    count: int = 3
    rows: int = 7
    columns: int = 9
    shared: bool = False
    seed: int = 0
    mass: float = 3.0
    cost: Tensor = field(init=False)
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=g, dtype=torch.float64)

        self.cost = draw(*(() if self.shared else (self.count,)), self.rows, self.columns)
        self.a, self.b = (
            self.mass * (2 * draw(self.count, size)).softmax(1) for size in (self.rows, self.columns)
        )

    def leaves(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh cost, a and b; marginals in the state's dtype."""
        state = torch.float64 if dtype == torch.float64 else torch.float32
        kinds = (dtype, state, state)
        return tuple(
            x.to(kind).clone().requires_grad_() for x, kind in zip((self.cost, self.a, self.b), kinds)
        )


@dataclass
class Dense:
    transport_cost: Tensor
    value: Tensor
    plan: Tensor
    f: Tensor
    g: Tensor


def dense(cost: Tensor, a: Tensor, b: Tensor, epsilons: list[float], order: str = ORDERS[0]) -> Dense:
    """B problems; ``epsilons`` holds one for each iteration."""
    count = a.shape[0]
    problems = [one(c, *ab, epsilons, order) for c, *ab in zip(cost.expand(count, *cost.shape[-2:]), a, b)]
    return Dense(*(torch.stack(x) for x in zip(*problems)))


def one(cost: Tensor, a: Tensor, b: Tensor, epsilons: list[float], order: str) -> tuple[Tensor, ...]:
    """A problem over its entries with mass; infinite costs count for nothing."""
    rows, columns = a.detach() > 0, b.detach() > 0
    inner = cost[rows][:, columns]
    log_a, log_b = a[rows].log(), b[columns].log()
    phi, psi = torch.zeros_like(log_a), torch.zeros_like(log_b)
    before = epsilons[0]
    for epsilon in epsilons:
        phi, psi = phi * before / epsilon, psi * before / epsilon
        before, scaled = epsilon, inner / epsilon
        for half in order.split("_"):
            if half == "rows":
                phi = log_a - (psi - scaled).logsumexp(1)
            else:
                psi = log_b - (phi[:, None] - scaled).logsumexp(0)
    inner_plan = (phi[:, None] + psi - scaled).exp()
    f, g = epsilon * (phi - log_a), epsilon * (psi - log_b)
    transport = (inner_plan * inner.nan_to_num(posinf=0.0)).sum()
    value = (a[rows] * f).sum() + (b[columns] * g).sum()
    pairs = rows[:, None] & columns
    plan = torch.zeros_like(cost).masked_scatter(pairs, inner_plan)
    whole = [
        torch.zeros_like(mass).masked_scatter(where, x) for mass, where, x in ((a, rows, f), (b, columns, g))
    ]
    return transport, value, plan, *whole


def converged(problems: Problems, epsilon: float, order: str = ORDERS[0], count: int = 2000) -> Dense:
    return dense(problems.cost, problems.a, problems.b, [epsilon] * count, order)


def along_simplex(gradient: Tensor, mass: Tensor) -> Tensor:
    """A marginal's gradient without the constant that one marginal gains and the other loses."""
    present = mass.detach() > 0
    mean = (gradient * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
    return torch.where(present, gradient - mean, gradient)


def scalar(result: kd.Transport | Dense, name: str) -> Tensor:
    """Of one of the three differentiable results, with weights that tell its entries apart."""
    x = getattr(result, name)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1.5
    return (x * weights.to(x.dtype)).sum()


def gradients(result: kd.Transport | Dense, name: str, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Of cost, a and b; the last two without their common constant."""
    d_cost, d_a, d_b = torch.autograd.grad(scalar(result, name), leaves, retain_graph=True)
    return [d_cost, along_simplex(d_a, leaves[1]), along_simplex(d_b, leaves[2])]


def agree(found: Tensor, exact: Tensor, bar: float, what: str = "") -> None:
    assert found.shape == exact.shape, (what, found.shape, exact.shape)
    assert exact.abs().sum() > 0, f"{what}: the test is vacuous"
    off = error(found, exact)
    assert off <= bar, f"{what}: error {off:.2e}, bar {bar:.2e}"
