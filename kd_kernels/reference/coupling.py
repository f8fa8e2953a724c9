"""Entropic couplings of small batched problems, plainly in torch, by a fixed number of iterations.

The gradient with respect to the cost is closed, so that nothing is kept of the iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = ("rows_columns", "columns_rows")
SCALING_RANGE = 60.0  # of costs, in epsilons: exp(-60) leaves float32 room for the scalings of both sides


def coupling(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    iterations: int,
    order: str,
    entropic: bool,
    slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sinkhorn's plan P between a ``[B, n]`` and b ``[B, m]`` at ``cost`` ``[B, n, m]``.

    A marginal of 0 takes its row or column out of the problem, whatever cost stands there. The gradient is
    that of the converged coupling at the plan found: with entropy P itself, without it needs the solution
    (x, y) of ``diag(P 1) x + P y = (P C) 1``, ``P^T x + diag(P^T 1) y = (P C)^T 1``, and is
    ``P - P (C - x_i - y_j) / epsilon``. (P alone would be a quarter off.)

    Returns:
        Of each problem: ``<P, C>``, with ``entropic`` plus ``epsilon KL(P | a b)``; its gradient with respect
        to the cost (empty without ``slope``); the total variation between P and ``a b``; the L1 distance of
        P's marginals from a and b.
    """
    there = (a > 0)[:, :, None] & (b > 0)[:, None, :]
    cost = torch.where(there, cost, 0.0)
    plan = _plan(cost, there, a, b, epsilon, iterations, order)
    product = a[:, :, None] * b[:, None, :]
    value = (plan * cost).sum((1, 2))
    gradient = plan
    if entropic:
        value = value + epsilon * _divergence(plan, product).sum((1, 2))
    elif slope:
        gradient = _cost_gradient(plan, cost, epsilon, iterations)
    gap = 0.5 * (plan - product).abs().sum((1, 2))
    error = (plan.sum(2) - a).abs().sum(1) + (plan.sum(1) - b).abs().sum(1)
    return value, gradient if slope else cost.new_empty(0), gap, error


def _plan(
    cost: Tensor, there: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int, order: str
) -> Tensor:
    # Without exponentials in the loop where float32 can carry it; on a GPU that look would wait for it.
    if cost.device.type == "cpu" and cost.numel() and (cost.max() - cost.min()) <= SCALING_RANGE * epsilon:
        return _scaled(cost, there, a, b, epsilon, iterations, order)
    kernel = torch.where(there, -cost / epsilon, -torch.inf)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for half in _half_steps(order, iterations):
        if half == "rows":
            f = torch.where(a > 0, a.log() - (kernel + g[:, None, :]).logsumexp(2), -torch.inf)
        else:
            g = torch.where(b > 0, b.log() - (kernel + f[:, :, None]).logsumexp(1), -torch.inf)
    return torch.where(there, kernel + f[:, :, None] + g[:, None, :], -torch.inf).exp()


def _scaled(
    cost: Tensor, there: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int, order: str
) -> Tensor:
    kernel = torch.where(there, ((cost.min() - cost) / epsilon).exp(), 0.0)
    transposed = kernel.transpose(1, 2).contiguous()
    # Where nothing is, 0 / 1.
    a, b = a[:, :, None], b[:, :, None]
    no_row, no_column = (a == 0).to(a.dtype), (b == 0).to(b.dtype)
    u, v = torch.ones_like(a), torch.ones_like(b)
    for half in _half_steps(order, iterations):
        if half == "rows":
            u = a / torch.baddbmm(no_row, kernel, v)
        else:
            v = b / torch.baddbmm(no_column, transposed, u)
    return u * kernel * v.transpose(1, 2)


def _half_steps(order: str, iterations: int) -> list[str]:
    return order.split("_") * iterations


def _divergence(plan: Tensor, product: Tensor) -> Tensor:
    """Terms of KL(plan | product). Their masses are the same: the last half-step sees to it."""
    there = plan > 0
    return torch.where(there, plan * torch.where(there, plan / product, 1.0).log(), plan)  # NaN stays


def _cost_gradient(plan: Tensor, cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    weighted, transposed = plan * cost, plan.transpose(1, 2).contiguous()
    by_row, by_column = (
        weighted.sum(2, keepdim=True),
        transposed.mul(cost.transpose(1, 2)).sum(2, keepdim=True),
    )
    per_row, per_column = _inverse(plan.sum(2, keepdim=True)), _inverse(transposed.sum(2, keepdim=True))
    x, y = torch.zeros_like(by_row), torch.zeros_like(by_column)
    for _ in range(max(iterations, 50)):  # contracts as fast as the iterations that made the plan
        x = torch.baddbmm(by_row, plan, y, alpha=-1) * per_row
        y = torch.baddbmm(by_column, transposed, x, alpha=-1) * per_column
    return plan - plan * (cost - x - y.transpose(1, 2)) / epsilon


def _inverse(mass: Tensor) -> Tensor:
    """0 where the mass is 0, NaN where it is NaN."""
    return torch.where(mass == 0, 0.0, 1.0 / mass)
