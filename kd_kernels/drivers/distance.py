"""Relative distances between points: squared distances in, the sum over all pairs and its gradients out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.backends import pick
from kd_kernels.drivers.points import padded
from kd_kernels.rows import (
    BETA,
    DISTANCE_PADDING,
    EPS,
    GRADIENT,
    MEANS,
    SHIFTS,
    STATISTICS,
    TERMS,
    DistanceJob,
)


def walk_distances(
    student: Tensor, teacher: Tensor, beta: float, eps: float, backend: Optional[str], needs: Sequence[bool]
) -> tuple[Tensor, list[Optional[Tensor]]]:
    """(sum of all smooth L1 terms, its gradients ``[N, N]`` where ``needs`` says so), all in float64."""
    n = student.shape[0]
    _, kernel = pick("distance", student.device, backend)
    squared = [padded(x, DISTANCE_PADDING, -1.0) for x in (student, teacher)]
    gradients = [torch.empty_like(x) if wanted else None for x, wanted in zip(squared, needs)]
    numbers = student.new_empty(6)
    numbers[BETA].fill_(beta)  # not copied: nothing waits for the device
    numbers[EPS].fill_(eps)
    statistics, terms = student.new_empty(4, n), student.new_empty(3, n)
    job = DistanceJob(n, numbers, *squared, statistics, terms, *gradients)
    kernel(job, STATISTICS)
    total, positive = statistics.sum(1).view(2, 2).t()
    positive = positive.clamp(min=1)
    means = torch.div(total, positive, out=numbers[MEANS])
    means.masked_fill_(means == 0, 1.0)
    kernel(job, TERMS)
    sums = terms.sum(1)
    if any(needs):
        torch.div(sums[1:], positive, out=numbers[SHIFTS])
        kernel(job, GRADIENT)
    return sums[0].clone(), [None if g is None else g[:, :n] for g in gradients]
