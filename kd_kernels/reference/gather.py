"""The gather kernel written plainly in torch; see :class:`kd_kernels.rows.GatherJob` for the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.reference.row_divergence import shifted


def gather(job: R.GatherJob, phases: int) -> None:
    """Run ``phases`` over the rows of ``job``."""
    dtype = torch.float64 if job.side.logits.dtype == torch.float64 else torch.float32
    z = shifted(job.side, job.n, job.vocab, dtype)
    index = torch.where(job.ids < 0, job.vocab, job.ids.to(torch.int64))  # unused ones fall off the end
    if phases & R.STATISTICS:
        job.gathered.copy_(_with(z, -torch.inf).gather(1, index))
    others = _with(z, -torch.inf).scatter(1, index, -torch.inf)[:, : job.vocab]
    stats = job.statistics
    if phases & R.STATISTICS:
        top = others.amax(-1)
        stats[:, R.OTHERS_MAX] = top
        below = others - torch.where(top == -torch.inf, 0.0, top)[:, None]
        x = below / job.side.temperature.to(dtype)[:, None]
        weight = x.exp()
        stats[:, R.OTHERS_LOGZ] = weight.sum(-1).log()
        if job.hard:
            stats[:, R.OTHERS_LOGZ_HARD] = below.exp().sum(-1).log()
        if job.means:
            total = torch.where(weight == 0, 0.0, weight * x).sum(-1)
            stats[:, R.OTHERS_MEAN] = torch.where(total == 0, 0.0, total / weight.sum(-1))
    if phases & R.GRADIENT:
        assert job.soft is not None and job.at_ids is not None
        top, logz = (stats[:, i, None].to(dtype) for i in (R.OTHERS_MAX, R.OTHERS_LOGZ))
        below = torch.where(others == -torch.inf, -torch.inf, others - top)
        log_share = below / job.side.temperature.to(dtype)[:, None] - logz
        g = times(job.soft, log_share.exp())
        if job.slope is not None:
            g = g + times(job.slope, torch.where(log_share == -torch.inf, 0.0, log_share.exp() * log_share))
        if job.hard:
            assert job.hard_weight is not None
            g = g + times(job.hard_weight, (below - stats[:, R.OTHERS_LOGZ_HARD, None].to(dtype)).exp())
        g = torch.where(others == -torch.inf, 0.0, g)
        g = _with(g, 0.0).scatter(1, index, job.at_ids.to(dtype))[:, : job.vocab]
        if job.side.softcap:
            g = torch.where(g == 0, 0.0, g * (1 - (z / job.side.softcap) ** 2))
        job.side.write_grad(g * job.side.scale)


def _with(x: Tensor, fill: float) -> Tensor:
    """One more column."""
    return torch.nn.functional.pad(x, (0, 1), value=fill)


def times(coefficient: Tensor, x: Tensor) -> Tensor:
    """``[n]`` times ``[n, V]``; 0 silences whatever the row holds."""
    c = coefficient.to(x.dtype)[:, None]
    return torch.where(c == 0, 0.0, c * x)
