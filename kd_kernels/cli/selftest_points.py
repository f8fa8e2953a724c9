"""The self-test of what compares points: angles and distances of two models' rows, transport between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_kernels.distill import distill
from kd_kernels.objectives import SinkhornBatch
from kd_kernels.relational import relational_angle, relational_distance
from kd_kernels.sinkhorn import sinkhorn
from kd_kernels.transport import class_transport

POINTS, WIDTHS, BETA = 29, (24, 40), 0.3
EPSILON, ITERATIONS = 0.4, 12
Results = list[tuple[str, Tensor]]


class TwoModels:
    """Random rows of a student and a teacher."""

    def __init__(self, kind: str, dtype: torch.dtype, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tensors = [
            torch.randn(POINTS, width, generator=g, dtype=torch.float64).to(dtype) for width in WIDTHS
        ]


def angles(models: TwoModels, where: str, dtype: torch.dtype, backend: str, plainly: bool) -> Results:
    rows = [x.to(where, dtype).requires_grad_() for x in models.tensors]
    if plainly:
        loss = F.smooth_l1_loss(*(_cosines(x) for x in rows), beta=BETA)
    else:
        loss = relational_angle(*rows, beta=BETA, teacher_grad=True, backend=backend)
    return [("loss", loss), *zip(("d student", "d teacher"), torch.autograd.grad(loss, rows))]


def _cosines(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # as a careful user does it
    unit = F.normalize(x[None] - x[:, None], dim=2)
    return unit @ unit.transpose(1, 2)


def distances(models: TwoModels, where: str, dtype: torch.dtype, backend: str, plainly: bool) -> Results:
    rows = [x.to(where, dtype).requires_grad_() for x in models.tensors]
    if plainly:
        loss = F.smooth_l1_loss(*(_relative_distances(x) for x in rows), beta=BETA)
    else:
        loss = relational_distance(*rows, beta=BETA, teacher_grad=True, backend=backend)
    return [("loss", loss), *zip(("d student", "d teacher"), torch.autograd.grad(loss, rows))]


def _relative_distances(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    squared = (x[:, None] - x[None]).square().sum(2)
    d = torch.where(pairs, torch.where(pairs, squared, 1.0).sqrt(), 0.0)
    return d / d[pairs].mean()


def transport(models: TwoModels, where: str, dtype: torch.dtype, backend: str, plainly: bool) -> Results:
    cost = models.tensors[0].to(where, dtype).abs().requires_grad_()
    if plainly:
        n, m = cost.shape
        total = _transported(cost, cost.new_full((n,), 1 / n), cost.new_full((m,), 1 / m))
    else:
        options = {"epsilon": EPSILON, "iterations": ITERATIONS, "gradient": "unrolled", "backend": backend}
        total = sinkhorn(cost, **options).transport_cost
    return [("transport cost", total), ("d cost", *torch.autograd.grad(total, cost))]


def batch_sinkhorn(models: TwoModels, where: str, dtype: torch.dtype, backend: str, plainly: bool) -> Results:
    width = min(WIDTHS)
    logits = [x[:, :width].to(where, dtype).requires_grad_() for x in models.tensors]
    if plainly:
        wide = torch.promote_types(dtype, torch.float32)
        p, q = (x.to(wide).softmax(1) for x in logits)
        ones = p.new_ones(POINTS)
        loss = _transported((p[:, None] - q[None]).abs().sum(2), ones, ones)
    else:
        objective = SinkhornBatch(epsilon=EPSILON, iterations=ITERATIONS)
        loss = distill(*logits, objective, reduction="sum", teacher_grad=True, backend=backend)
    return [("loss", loss), *zip(("d student", "d teacher"), torch.autograd.grad(loss, logits))]


def classes(models: TwoModels, where: str, dtype: torch.dtype, backend: str, plainly: bool) -> Results:
    count = min(WIDTHS)
    logits = [x[:, :count].to(where, dtype).requires_grad_() for x in models.tensors]
    cost = models.tensors[1][:count, -count:].abs().to(where, dtype)
    if plainly:
        marginals = (x.to(torch.promote_types(dtype, torch.float32)).softmax(1) for x in logits)
        loss = torch.stack([_transported(cost, a, b) for a, b in zip(*marginals)]).sum()
    else:
        loss = class_transport(
            *logits, cost, epsilon=EPSILON, iterations=ITERATIONS, temperature=1.0, order="rows_columns",
            reduction="sum", teacher_grad=True, backend=backend,
        )  # fmt: skip
    return [("loss", loss), *zip(("d student", "d teacher"), torch.autograd.grad(loss, logits))]


def _transported(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``<P, C>`` after the iterations, rows first."""
    cost, a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (cost, a, b))
    scaled, psi = cost / EPSILON, torch.zeros_like(b)
    for _ in range(ITERATIONS):
        phi = a.log() - (psi[None] - scaled).logsumexp(1)
        psi = b.log() - (phi[:, None] - scaled).logsumexp(0)
    return ((phi[:, None] + psi[None] - scaled).exp() * cost).sum()


CHECKS: dict[str, dict[str, Callable[..., Results]]] = {
    "angle": {"relational angle": angles},
    "distance": {"relational distance": distances},
    "pairwise_l1": {"batch Sinkhorn": batch_sinkhorn},
    "gibbs": {"class transport": classes},
    "half_step": {"class transport": classes},
    "sinkhorn": {"transport": transport},
}
KINDS = ("rows x rows",)
