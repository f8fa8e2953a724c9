"""The half_step kernel written plainly in torch; see :class:`kd_kernels.problems.HalfStepJob`."""

from __future__ import annotations

import torch

from kd_kernels.problems import HalfStepJob


def half_step(job: HalfStepJob) -> None:
    """The product is as exact as torch is told to make it."""
    sums = job.x @ (job.kernel if job.transposed else job.kernel.t())
    if not job.divide:
        torch.mul(job.weight, sums, out=job.out)
        return
    if job.extra is not None:
        sums += job.extra
    nothing = (job.weight == 0) | (sums == 0)
    job.out.copy_(torch.where(nothing, 0.0, job.weight / sums))
