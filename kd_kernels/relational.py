"""Relational distillation (RKD): the student's points shall lie to each other as the teacher's do."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.arguments import check_backend, check_positive, is_number, number, refuse_transforms
from kd_kernels.ops.angle import angle as _angle
from kd_kernels.ops.distance import distance as _distance
from kd_kernels.points import check_points, check_points_mask


def relational_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Optional[Tensor] = None,
    beta: float = 1.0,
    eps: float = 1e-12,
    teacher_grad: bool = False,
    backend: Optional[str] = None,
) -> Tensor:
    """RKD-D: smooth L1 between the two models' distances, each relative to the mean of its own.

    ``sum_ij smooth_l1(d_ij / mean d, e_ij / mean e) / N^2`` with ``d_ij = |x_i - x_j|`` of the student's
    rows and e of the teacher's; means over the positive ones; all ``N^2`` pairs count in the denominator, as
    in the published code (Park et al. 2019, lenscloth/RKD). ``O(N^2)`` memory beside float64 copies of the
    inputs.

    Args:
        student: ``[N, D_s]``.
        teacher: ``[N, D_t]``; a constant unless ``teacher_grad``.
        mask: bool ``[N]``, True = counts. A row that does not reaches neither loss nor gradient.
        beta: > 0, where smooth L1 passes from square to absolute.
        eps: squared distances between different rows are raised to this, as published: rows that coincide are
            ``sqrt(eps)`` apart and count in the mean. With 0 they are 0 apart and do not count.
            Their gradient is 0 either way.
        teacher_grad: a gradient for the teacher too.
        backend: "cpu", "triton", "reference" or None for the first that serves the device.

    Returns:
        0-d float32 (float64 for float64 inputs); 0 for fewer than two rows.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.

    Double backward is not implemented and raises; ``torch.func`` transforms are refused.
    """
    _check("relational_distance", student, teacher, mask, beta, backend)
    if not (is_number(eps) and 0 <= eps < math.inf):
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r}")
    rows, needs = _rows(student, teacher, teacher_grad)
    return _distance(*rows, mask, number(beta), number(eps), backend, needs)[0]


def relational_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Optional[Tensor] = None,
    beta: float = 1.0,
    teacher_grad: bool = False,
    backend: Optional[str] = None,
) -> Tensor:
    """RKD-A: smooth L1 between the two models' angles at every vertex i of every pair of edges to j and k.

    ``sum_ijk smooth_l1(cos_ijk, cos'_ijk) / N^3``, all ``N^3`` triples counting in the denominator, as in the
    published code (Park et al. 2019, lenscloth/RKD). The cosines come from the centred Gram matrix and are
    summed in registers: ``O(N^2)`` memory beside float64 copies of the inputs, no ``[N, N, D]`` tensor and no
    ``[N, N, N]`` one.

    An edge between rows that coincide has the cosine 0 with every other, as published; its gradient is 0 (the
    published code divides by 1e-12 there). Rows closer than 1e-7 of their distance from the centre coincide.

    Args:
        student, teacher, mask, beta, teacher_grad, backend: as for :func:`relational_distance`.

    Returns:
        0-d float32 (float64 for float64 inputs); 0 for fewer than two rows.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.

    Double backward is not implemented and raises; ``torch.func`` transforms are refused.
    """
    _check("relational_angle", student, teacher, mask, beta, backend)
    rows, needs = _rows(student, teacher, teacher_grad)
    return _angle(*rows, mask, number(beta), backend, needs)[0]


def _check(
    function: str,
    student: Tensor,
    teacher: Tensor,
    mask: Optional[Tensor],
    beta: float,
    backend: Optional[str],
) -> None:
    check_points(("student", student), ("teacher", teacher), shape="[N, D]")
    if len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must have the same rows, got {len(student)} and {len(teacher)}"
        )
    if mask is not None:
        check_points_mask("mask", mask, student)
    check_positive("beta", beta)
    check_backend(backend)
    refuse_transforms(f"kd_kernels.{function}", student, teacher)


def _rows(student: Tensor, teacher: Tensor, teacher_grad: bool) -> tuple[list[Tensor], list[bool]]:
    """Both models' rows, and which of them want a gradient."""
    rows = [student, teacher if teacher_grad else teacher.detach()]
    return rows, [torch.is_grad_enabled() and x.requires_grad for x in rows]
