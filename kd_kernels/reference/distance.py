"""The distance kernel written plainly in torch; see :class:`kd_kernels.rows.DistanceJob` for the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels.reference.smooth_l1 import slope_of, terms_of
from kd_kernels.rows import GRADIENT, STATISTICS, TERMS, DistanceJob


def distance(job: DistanceJob, phases: int) -> None:
    beta, eps, *means_and_shifts = job.numbers
    means, shifts = means_and_shifts[:2], means_and_shifts[2:]
    squared = [job.student[:, : job.n], job.teacher[:, : job.n]]
    distances = [_distances(s, eps) for s in squared]
    if phases & STATISTICS:
        for i, d in enumerate(distances):
            job.statistics[2 * i] = d.sum(1)
            job.statistics[2 * i + 1] = (d != 0).sum(1)
    if not phases & (TERMS | GRADIENT):
        return
    relative = [d / mean for d, mean in zip(distances, means)]
    difference = relative[0] - relative[1]
    slope = slope_of(difference, beta)
    if phases & TERMS:
        job.terms[0] = terms_of(slope, difference, beta).sum(1)
        for i, x in enumerate(relative):
            job.terms[1 + i] = (slope * x).sum(1)
    if phases & GRADIENT:
        for i, (sign, grad) in enumerate(((1, job.student_grad), (-1, job.teacher_grad))):
            if grad is not None:
                by_square = 0.5 * sign * (slope - shifts[i]) / (means[i] * distances[i])
                grad[:, : job.n] = torch.where(squared[i] <= eps, 0.0, by_square)


def _distances(squared: Tensor, eps: Tensor) -> Tensor:
    near = torch.where(squared < 0, 0.0, eps.sqrt())
    return torch.where(squared <= eps, near, squared.sqrt())  # NaN stays
