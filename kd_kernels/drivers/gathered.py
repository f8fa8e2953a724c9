"""What the gather kernel found, as one distribution: the entries at the ids, the others as one outcome."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import rows as R

_INF = float("inf")


class Gathered:
    """Logarithms relative to the row's largest logit, float64; K the number of ids.

    ``below`` [n, K] and ``others_below`` [n] are at temperature 1, all else is at the row's: ``at_ids``
    [n, K], ``others`` [n], ``lse`` [n].
    """

    def __init__(self, found: R.GatherJob) -> None:
        self.found, stats = found, found.statistics
        self.temperature = found.side.temperature[:, None]
        top = torch.cat([found.gathered, stats[:, R.OTHERS_MAX, None]], 1).amax(1)
        self.below, self.others_below = found.gathered - top[:, None], stats[:, R.OTHERS_MAX] - top
        self.at_ids = self.below / self.temperature
        self.others = self.others_below / self.temperature[:, 0] + stats[:, R.OTHERS_LOGZ]
        self.lse = torch.logsumexp(with_last(self.at_ids, self.others), 1)

    def log_q(self) -> Tensor:
        """``[n, K + 1]``: log-probabilities, of the others together in the last column."""
        return with_last(self.at_ids, self.others) - self.lse[:, None]

    def entropy(self) -> Tensor:
        """``[n]``: of the whole distribution; the gather had ``means``."""
        stats, log_q = self.found.statistics, self.log_q()
        own = torch.where(log_q == -_INF, 0.0, -log_q.exp() * log_q).sum(1)
        among_others = stats[:, R.OTHERS_LOGZ] - stats[:, R.OTHERS_MEAN]
        return own + torch.where(log_q[:, -1] == -_INF, 0.0, log_q[:, -1].exp() * among_others)


def new_job(rows: R.Rows, ids: Tensor, n: int, vocab: int, hard: bool, means: bool) -> R.GatherJob:
    """A gather over rows that have been projected, ready for its statistics phase."""
    numbers = torch.zeros(n, R.GATHER_COLUMNS, dtype=torch.float64, device=ids.device)
    return R.GatherJob(n, vocab, rows, ids, numbers.new_zeros(ids.shape), numbers, hard, means)


def with_last(x: Tensor, last: Tensor | float) -> Tensor:
    """``x`` [n, k] with one more column."""
    if not isinstance(last, Tensor):
        last = x.new_full((x.shape[0],), last)
    return torch.cat([x, last[:, None]], 1)
