"""The angle kernel written plainly in torch; see :class:`kd_kernels.rows.AngleJob` for the contract.

Distances alone give the angles: ``cos(i; j, k) = (s_ij + s_ik - s_jk) / (2 sqrt(s_ij s_ik))`` is the law of
cosines, so no difference vector is ever formed.
"""

from __future__ import annotations

from torch import Tensor

from kd_kernels.reference.smooth_l1 import slope_of, terms_of
from kd_kernels.rows import AngleJob


def angle(job: AngleJob) -> None:
    """One vertex at a time: ``[n, n]`` numbers in memory, whatever n."""
    for gradient in (job.student_grad, job.teacher_grad):
        if gradient is not None:
            gradient.zero_()
    job.sums.zero_()
    for vertex in range(job.n):
        difference = cosines(job.student, job.student_inverse, vertex, job.n)
        difference -= cosines(job.teacher, job.teacher_inverse, vertex, job.n)
        slope = slope_of(difference, job.beta)
        job.sums += terms_of(slope, difference, job.beta).sum(1)
        if job.student_grad is not None:
            _add_gradient(job.student_grad, slope, job.student, job.student_inverse, vertex, job.n)
        if job.teacher_grad is not None:
            _add_gradient(job.teacher_grad, -slope, job.teacher, job.teacher_inverse, vertex, job.n)


def cosines(squared: Tensor, inverse: Tensor, vertex: int, n: int) -> Tensor:
    """``[n, n]``: the cosine at ``vertex`` of the edges to j and to k; 0 where an edge has no length."""
    s, r = squared[vertex, :n], inverse[vertex, :n]
    return 0.5 * (s[:, None] + s[None, :] - squared[:n, :n]) * (r[:, None] * r[None, :])


def _add_gradient(grad: Tensor, slope: Tensor, squared: Tensor, inverse: Tensor, vertex: int, n: int) -> None:
    """By ``d cos / d s_ij = (r_ij r_ik - cos r_ij^2) / 2`` (the edge to k likewise) and
    ``d cos / d s_jk = -r_ij r_ik / 2``, with r the inverse lengths."""
    r = inverse[vertex, :n]
    weighted = slope * (r[:, None] * r[None, :])
    grad[:, :n] -= 0.5 * weighted
    along = (slope * cosines(squared, inverse, vertex, n)).sum(1)
    grad[:, vertex] += weighted.sum(1) - along * r * r
