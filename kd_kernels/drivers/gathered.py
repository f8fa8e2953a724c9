"""What the gather kernel found, as one distribution: the entries at the ids, the others as one outcome."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import rows as R

_INF = float("inf")


class Gathered:
    """Logarithms relative to the row's largest logit, float64; K the number of ids.

    ``below`` [n, K] and ``others_below`` [n] are at temperature 1, all else is at the row's: ``at_ids``
    [n, K], ``others`` [n], ``lse`` [n]. ``top`` [n] is that largest logit.
    """

    def __init__(self, found: R.GatherJob) -> None:
        self.found, stats = found, found.statistics
        self.temperature = found.side.temperature[:, None]
        top = torch.cat([found.gathered, stats[:, R.OTHERS_MAX, None]], 1).amax(1)
        self.top = top
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


class Label:
    """The cross-entropy at temperature 1; the label's entry is one of the gathered."""

    def __init__(self, view: Gathered, labels: Tensor) -> None:
        self.found = view.found
        logits = with_last(view.below, view.others_below + view.found.statistics[:, R.OTHERS_LOGZ_HARD])
        self.logz = torch.logsumexp(logits, 1)
        self.log_q = logits - self.logz[:, None]
        self.is_label = (view.found.ids == labels[:, None]) & (view.found.ids >= 0)
        at_label = torch.where(self.is_label, self.log_q[:, :-1], -_INF).amax(1)
        # NaN for a label out of range, which has not been read.
        self.known = self.is_label.any(1)
        self.nll = torch.where(self.known, -at_label, torch.nan)

    def weight(self, hard_weight: Tensor, soft_weight: Tensor) -> Tensor:
        """``[n]``: 0 where the gradient is silent, NaN at a label that is not known."""
        silent = (hard_weight == 0) & (self.known | (soft_weight == 0))
        return torch.where(silent, 0.0, torch.where(self.known, hard_weight, hard_weight + torch.nan))

    def add_gradient(self, hard_weight: Tensor, soft_weight: Tensor) -> None:
        """To the gather's coefficients, beside those of the divergence."""
        weight = self.weight(hard_weight, soft_weight)
        silent, probability = weight == 0, self.log_q.exp()
        self.found.hard_weight = torch.where(silent, 0.0, weight * probability[:, -1])
        own = weight[:, None] * (probability[:, :-1] - self.is_label.to(probability.dtype))
        self.found.at_ids += torch.where(silent[:, None] | (self.found.ids < 0), 0.0, own)


def new_job(rows: R.Rows, ids: Tensor, n: int, vocab: int, hard: bool, means: bool) -> R.GatherJob:
    """A gather over rows that have been projected, ready for its statistics phase."""
    numbers = torch.zeros(n, R.GATHER_COLUMNS, dtype=torch.float64, device=ids.device)
    return R.GatherJob(n, vocab, rows, ids, numbers.new_zeros(ids.shape), numbers, hard, means)


def with_last(x: Tensor, last: Tensor | float) -> Tensor:
    """``x`` [n, k] with one more column."""
    if not isinstance(last, Tensor):
        last = x.new_full((x.shape[0],), last)
    return torch.cat([x, last[:, None]], 1)
