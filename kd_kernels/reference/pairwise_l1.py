"""The pairwise_l1 kernel in plain torch; see :class:`kd_kernels.rows.PairwiseL1Job` for the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.reference.row_divergence import shifted

_BLOCK_BYTES = 64 << 20  # of [rows, rows, slab] differences at a time


def pairwise_l1(job: R.PairwiseL1Job, phases: int) -> None:
    """Run ``phases`` over the slab of ``job``."""
    double = torch.float64 in (job.student.logits.dtype, job.teacher.logits.dtype)
    dtype = torch.float64 if double else torch.float32
    z_s, z_t = (shifted(side, job.n, job.vocab, dtype) for side in (job.student, job.teacher))
    p = _probabilities(z_s, job.student.temperature, job.student_statistics)
    q = _probabilities(z_t, job.teacher.temperature, job.teacher_statistics)
    if phases & R.TERMS:
        assert job.cost is not None
        for group, rows in _groups(job):
            for part, difference in _differences(p[rows], q[rows]):
                size = difference.shape[1]
                job.cost[group, part, :size] += difference.abs().sum(-1, dtype=torch.float64)
                if job.signs is not None:
                    signed = p[rows][part, None] * difference.sign()
                    job.signs[group, part, :size] += signed.sum(-1, dtype=torch.float64)
    if phases & R.GRADIENT:
        assert job.d_cost is not None
        g_s, g_t = torch.zeros_like(p), torch.zeros_like(q)
        live_s, live_t = (torch.zeros(job.n, dtype=torch.bool, device=p.device) for _ in range(2))
        for group, rows in _groups(job):
            g = job.d_cost[group, : rows.stop - rows.start, : rows.stop - rows.start].to(dtype)
            live_s[rows], live_t[rows] = (g != 0).any(1), (g != 0).any(0)
            for part, difference in _differences(p[rows], q[rows]):
                sign = torch.where(difference.isnan(), 0.0, difference.sign())
                g_s[rows][part] = torch.einsum("ij,ijv->iv", g[part], sign)
                g_t[rows] -= torch.einsum("ij,ijv->jv", g[part], sign)
        _store(job.student, p, g_s, job.student_means, live_s, z_s)
        _store(job.teacher, q, g_t, job.teacher_means, live_t, z_t)


def _groups(job: R.PairwiseL1Job):
    starts = job.starts.tolist()
    for group, (start, stop) in enumerate(zip(starts[:-1], starts[1:])):
        yield group, slice(start, stop)


def _differences(p: Tensor, q: Tensor):
    """``p_i - q_j`` ``[rows, m, V]``, some rows at a time."""
    step = max(1, _BLOCK_BYTES // max(1, q.numel() * q.itemsize))
    for start in range(0, p.shape[0], step):
        part = slice(start, min(p.shape[0], start + step))
        yield part, p[part, None] - q[None]


def _probabilities(z: Tensor, temperature: Tensor, statistics: Tensor) -> Tensor:
    top = statistics[:, R.PAIRWISE_MAX, None].to(z.dtype)
    # Not exp(x - logz): that difference would round to a larger number's last digit.
    share = (-statistics[:, R.PAIRWISE_LOGZ, None]).exp().to(z.dtype)
    return ((z - top) / temperature.to(z.dtype)[:, None]).exp() * share


def _store(side: R.Rows, p: Tensor, signed: Tensor, means: Tensor, live: Tensor, z: Tensor) -> None:
    if side.grad is None:
        return
    g = p * (signed - means.to(p.dtype)[:, None]) / side.temperature.to(p.dtype)[:, None]
    if side.softcap:
        g = torch.where(g == 0, 0.0, g * (1 - (z / side.softcap) ** 2))
    side.write_grad(torch.where(live[:, None], g * side.scale, 0.0))
