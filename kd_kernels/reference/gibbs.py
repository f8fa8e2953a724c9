"""The gibbs kernel written plainly in torch; see :class:`kd_kernels.problems.GibbsJob`."""

from __future__ import annotations

import math

import torch

from kd_kernels.problems import GibbsJob, reach


def gibbs(job: GibbsJob) -> None:
    """In place: pages that come anew would cost more than the exponentials."""
    least = job.cost.amin(1)
    job.shift.copy_(torch.where(least < math.inf, least, 0.0))
    job.reach.copy_(reach(job.cost))
    torch.sub(job.cost, job.shift[:, None], out=job.kernel).div_(-job.epsilon).exp_()
    # NaN is the kernel's to show.
    torch.mul(job.kernel, job.cost, out=job.weighted).nan_to_num_(0.0)
