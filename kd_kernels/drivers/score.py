"""Walk the tokens in chunks with any number of models: project each once, measure it, compare it.

Nothing is carried back, so a chunk's workspace holds one tensor of logits per head and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.backends import RowKernel, pick
from kd_kernels.drivers.chunks import cut
from kd_kernels.drivers.sides import Model, side_of
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.drivers.workspace import borrow

NLL, ENTROPY, CONFIDENCE = range(3)
MEASURES = 3
# What a teacher is compared by, in the order of the results; one parameter serves all, the mixture's share.
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")
_SHARE = 0.5


@dataclass
class Scoring:
    """One call, in plain values."""

    models: list[Model]  # the student first
    labels: Optional[Tensor]  # [N] int64
    tokens: Tokens  # that count
    temperature: float
    compute_dtype: Optional[torch.dtype]  # autocast; None: each model's own
    logits_dtype: Optional[torch.dtype]
    backend: Optional[str]
    workspace_bytes: Optional[int]

    @property
    def vocab(self) -> int:
        return min(model.vocab_size for model in self.models)

    @property
    def device(self) -> torch.device:
        return self.models[0].values.device


@dataclass
class Measured:
    """Results for M models and N tokens; zeros at tokens that do not count."""

    measures: Tensor  # [M, 3, N] float64: NLL (0 without labels), ENTROPY, CONFIDENCE
    top1: Tensor  # [M, N] int64; -1 where a model has no distribution
    divergences: Tensor  # [M - 1, 3, N] float64, in the order of DIVERGENCES


def walk(call: Scoring) -> Measured:
    """Score all tokens that count."""
    device, n, count = call.device, call.tokens.walked, len(call.models)
    _, topk = pick("topk", device, call.backend)
    compare = pick("row_divergence", device, call.backend)[1] if count > 1 else None
    dtypes = call.compute_dtype, call.logits_dtype
    # Row-major, as the topk kernel reads them.
    sides = [side_of(model, call.vocab, call.tokens, *dtypes) for model in call.models]
    chunk, size = cut(sides, n, call.vocab, device, call.workspace_bytes)

    labels = None if call.labels is None else call.tokens.take(call.labels)
    measures = torch.zeros(count, MEASURES, n, dtype=torch.float64, device=device)
    top1 = torch.zeros(count, n, dtype=torch.int64, device=device)
    divergences = torch.zeros(count - 1, len(DIVERGENCES), n, dtype=torch.float64, device=device)
    one = torch.full((min(chunk, n),), call.temperature, dtype=torch.float64, device=device)
    with borrow(size, device) as workspace:
        for start in range(0, n, chunk):
            part = slice(start, min(n, start + chunk))
            temperature = one[: part.stop - start]
            workspace.again()
            # All of them first: a comparison reads two models' logits.
            rows = [side.project(start, part.stop, workspace, temperature) for side in sides]
            for i, model in enumerate(rows):
                of_chunk = None if labels is None else labels[part]
                _measure(topk, model, call, of_chunk, measures[i, :, part], top1[i, part])
            for i, teacher in enumerate(rows[1:]):
                assert compare is not None
                _compare(compare, rows[0], teacher, call.vocab, divergences[i, :, part])
    # Tokens first, as spread wants them, and last again.
    found = (call.tokens.spread(x.movedim(-1, 0)) for x in (measures, top1, divergences))
    return Measured(*(x.movedim(0, -1).contiguous() for x in found))


def _measure(
    kernel: RowKernel, side: R.Rows, call: Scoring, labels: Optional[Tensor], measures: Tensor, top1: Tensor
) -> None:
    """One model over one chunk of c tokens: fill ``measures`` [3, c] and ``top1`` [c]."""
    n, device = top1.numel(), top1.device
    temperature = torch.full((1,), call.temperature, dtype=torch.float64, device=device)
    targets = None if labels is None else labels[:, None]
    job = R.TopkJob.empty(side, n, call.vocab, 1, temperature, targets)
    kernel(job)
    statistics = job.statistics
    log_sum = statistics[:, R.topk_column(R.TOPK_LSE)]
    measures[ENTROPY] = statistics[:, R.topk_column(R.TOPK_ENTROPY)]
    log_largest = statistics[:, R.TOPK_MAX] / call.temperature - log_sum
    measures[CONFIDENCE] = log_largest.exp().clamp(max=1)  # above 1 by a rounding otherwise
    if labels is not None:
        measures[NLL] = log_sum - job.target_values[:, 0] / call.temperature
    top1.copy_(torch.where(log_sum.isnan(), -1, job.ids[:, 0]))


def _compare(kernel: RowKernel, student: R.Rows, teacher: R.Rows, vocab: int, divergences: Tensor) -> None:
    """Two models over one chunk of c tokens: fill ``divergences`` [3, c]."""
    n = divergences.shape[1]
    unused = divergences.new_zeros(n)
    statistics = divergences.new_zeros(n, R.STATISTIC_COLUMNS)
    terms = divergences.new_zeros(n, R.TERM_COLUMNS)
    for column, objective in enumerate(DIVERGENCES):
        job = R.RowJob(
            objective=objective,
            n=n,
            vocab=vocab,
            student=student,
            teacher=teacher,
            parameter0=torch.full_like(unused, _SHARE),
            parameter1=unused,
            labels=None,
            soft_weight=unused,
            hard_weight=unused,
            statistics=statistics,
            terms=terms,
            entropies=False,
        )
        kernel(job, R.TERMS | (R.STATISTICS if column == 0 else 0))
        divergences[column] = terms[:, R.SOFT]
