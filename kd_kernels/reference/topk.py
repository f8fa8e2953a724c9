"""The topk kernel written plainly in torch; see :class:`kd_kernels.rows.TopkJob` for the contract."""

from __future__ import annotations

import torch

from kd_kernels import rows as R
from kd_kernels.reference.row_divergence import shifted


def topk(job: R.TopkJob) -> None:
    """Fill the results of ``job``."""
    n, k = job.ids.shape
    # Sums in float64: this is what the others are measured against.
    z = shifted(job.side, job.n, job.vocab, torch.float64)
    ranked, order = z.sort(
        dim=-1, descending=True, stable=True
    )  # NaN first, in a row whose ids are unspecified
    known = ranked[:, :k] > -torch.inf
    job.ids.copy_(torch.where(known, order[:, :k], -1))
    job.values.copy_(torch.where(known, ranked[:, :k], -torch.inf))
    job.statistics[:, R.TOPK_MAX] = torch.where(ranked[:, 0].isfinite(), ranked[:, 0], torch.nan)
    for i, temperature in enumerate(job.temperatures.tolist()):
        lse = torch.logsumexp(z / temperature, -1)
        lse = torch.where(lse.isfinite(), lse, torch.nan)
        log_p = ranked / temperature - lse[:, None]
        p = log_p.exp()
        entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
        tail = torch.logsumexp(log_p[:, k:], -1) if k < job.vocab else torch.full_like(lse, -torch.inf)
        tail = torch.where(lse.isnan(), torch.nan, tail)
        for column, value in ((R.TOPK_LSE, lse), (R.TOPK_ENTROPY, entropy), (R.TOPK_LOG_TAIL, tail)):
            job.statistics[:, R.topk_column(column, i)] = value
    if job.targets.numel():
        inside = (job.targets >= 0) & (job.targets < job.vocab)
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(job.vocab, device=z.device).expand(n, -1)
        )
        index = torch.where(inside, job.targets, 0)
        job.target_values.copy_(torch.where(inside, z.gather(1, index), torch.nan))
        job.target_ranks.copy_(torch.where(inside, place.gather(1, index) + 1, 0))
    if job.uniforms.numel():
        p = torch.softmax(z / job.temperatures[0], -1)
        reached = p.cumsum(-1)
        drawn = torch.searchsorted(reached, job.uniforms * reached[:, -1:], right=True)
        last = torch.where(p > 0, torch.arange(job.vocab, device=z.device), 0).amax(-1, keepdim=True)
        job.samples.copy_(torch.minimum(drawn, last))  # rounding must not draw what has no probability
