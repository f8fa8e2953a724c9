"""Angles between points: squared distances in, the sum over all triples and its gradients out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.backends import pick
from kd_kernels.drivers.points import padded
from kd_kernels.rows import ANGLE_PADDING, AngleJob


def walk_angles(
    student: Tensor, teacher: Tensor, beta: float, backend: Optional[str], needs: Sequence[bool]
) -> tuple[Tensor, list[Optional[Tensor]]]:
    """(sum of all smooth L1 terms, its gradients ``[N, N]`` where ``needs`` says so), all in float64."""
    n = student.shape[0]
    _, kernel = pick("angle", student.device, backend)
    # Where there is no pair, there is an edge without length.
    squared = [padded(x, ANGLE_PADDING, 0.0).clamp(min=0) for x in (student, teacher)]
    inverses = [torch.where(x <= 0, 0.0, x.rsqrt()) for x in squared]
    gradients = [torch.empty_like(x) if wanted else None for x, wanted in zip(squared, needs)]
    sums = student.new_empty(n)
    kernel(AngleJob(n, beta, squared[0], inverses[0], squared[1], inverses[1], sums, *gradients))
    return sums.sum(), [None if g is None else g[:, :n] for g in gradients]
