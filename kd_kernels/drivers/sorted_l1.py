"""Sorted probabilities against sorted probabilities (ULD), under the row kernel's contract.

Two forms of ``sum_k |p_(k) - q_(k)|``, with vocabularies of any two sizes:

* *exact*: the gather kernel gives the normalisers, the sorted_l1 kernel the rest.
* *top-K with tail*: the K largest of both sides as the topk kernel finds them, and all others as one more
  outcome. Its gradient extends to the vocabulary as a sparse teacher's does: an entry among the others gets
  the last outcome's times its share, which is what the gather kernel's second phase writes.

The log mass of each row, what its probabilities sum to, stands in ``job.parameter0`` (the student's) and
``job.parameter1``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.drivers.gathered import Gathered, Label, new_job, with_last
from kd_kernels.drivers.selection import Selection
from kd_kernels.drivers.sparse import Target, implied_log_tail
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.drivers.workspace import Workspace
from kd_kernels.reference.sorted_l1 import centred

_INF = float("inf")
_ANY_ID = 2**31 - 1  # the teacher's vocabulary, which a saved top-K does not name


# --- exact ----------------------------------------------------------------------------------------------


def exact_divergence(
    job: R.RowJob,
    phases: int,
    teacher_vocab: int,
    gather: Callable[..., None],
    sorted_l1: Callable[..., None],
) -> None:
    """``gather`` must leave the logits as they are."""
    student = _whole(job.student, job.n, job.vocab, job.labels, job.entropies, gather)
    teacher = _whole(job.teacher, job.n, teacher_vocab, None, job.entropies, gather)
    label = None if job.labels is None else Label(student, job.labels)

    def side(rows: R.Rows, vocab: int, view: Gathered, log_mass: Tensor) -> R.SortedSide:
        return R.SortedSide(rows, vocab, view.top, view.lse, log_mass.exp(), torch.empty_like(log_mass))

    sorted_job = R.SortedL1Job(
        job.n,
        side(job.student, job.vocab, student, job.parameter0),
        side(job.teacher, teacher_vocab, teacher, job.parameter1),
        job.soft_weight.contiguous(),
        torch.empty_like(job.soft_weight),
    )
    if label is not None:
        sorted_job.hard_weight = label.weight(job.hard_weight, job.soft_weight).contiguous()
        sorted_job.hard_logz, sorted_job.labels = label.logz, job.labels
    sorted_l1(sorted_job)
    if phases & R.TERMS:
        _store(job, sorted_job.loss, sorted_job.student.sum, sorted_job.teacher.sum, None)
        if label is not None:
            job.terms[:, R.HARD] = label.nll
        if job.entropies:
            job.terms[:, R.STUDENT_ENTROPY] = student.entropy()
            job.terms[:, R.TEACHER_ENTROPY] = teacher.entropy()


def _whole(
    rows: R.Rows, n: int, vocab: int, labels: Optional[Tensor], means: bool, gather: Callable[..., None]
) -> Gathered:
    ids = rows.temperature.new_empty(n, 0, dtype=torch.int64) if labels is None else labels[:, None]
    found = new_job(rows, Selection(ids, vocab).ids, n, vocab, labels is not None, means)
    gather(found, R.STATISTICS)
    return Gathered(found)


def _store(job: R.RowJob, loss: Tensor, student: Tensor, teacher: Tensor, bound: Optional[Tensor]) -> None:
    job.terms[:, R.SOFT] = loss
    job.statistics[:, R.SUM_STUDENT], job.statistics[:, R.SUM_TEACHER] = student, teacher
    job.statistics[:, R.ERROR_BOUND] = 0.0 if bound is None else bound


# --- top-K with tail ------------------------------------------------------------------------------------


@dataclass
class RankedRows:
    """A chunk of a sparse teacher, in the place of its logits; logarithms."""

    top: Tensor  # [n, K] descending
    rest: Tensor  # [n]: of all other probabilities together
    entropy: Tensor  # [n]: of what is recorded, and the tail as one outcome


class RankedSide:
    """The end of the walk of a teacher whose top-K was saved: nothing to project, nothing to carry back."""

    def __init__(self, target: Target, tokens: Tokens, top_k: int) -> None:
        self.target, self.tokens, self.top_k = target, tokens, top_k

    def buffer_itemsizes(self, later: bool = False) -> list[int]:
        return []

    def project(self, start: int, stop: int, workspace: Workspace, temperature: Tensor) -> RankedRows:
        tokens = self.tokens.part(start, stop)
        ids, logprobs = self.target.ids[tokens], self.target.logprobs[tokens].to(torch.float64)
        merged = Selection(ids, _ANY_ID).merge(logprobs, torch.logaddexp, -_INF)
        merged = merged.sort(dim=1, descending=True).values
        if self.target.log_tail is None:
            mass = torch.logsumexp(merged, 1).exp()
            tail = implied_log_tail(mass)
        else:
            tail = self.target.log_tail[tokens].to(torch.float64)
        outcomes = with_last(merged, tail)
        entropy = -torch.where(outcomes == -_INF, 0.0, outcomes.exp() * outcomes).sum(1)
        return RankedRows(merged[:, : self.top_k], torch.logsumexp(outcomes[:, self.top_k :], 1), entropy)

    def carry(self, start: int, stop: int, rows: RankedRows) -> None:
        """Nothing: a saved teacher is a constant."""

    def gradients(self) -> list[Optional[Tensor]]:
        return [None, None, None]


def topk_divergence(
    job: R.RowJob,
    phases: int,
    teacher_vocab: int,
    top_k: int,
    temperatures: tuple[Optional[Tensor], Optional[Tensor]],
    topk: Callable[..., None],
    gather: Callable[..., None],
) -> None:
    """``temperatures`` [1] of either side where it is the same for all rows."""
    gradient = phases & R.GRADIENT
    student = _top(
        job.student,
        job.n,
        job.vocab,
        top_k,
        job.labels,
        bool(gradient),
        job.entropies,
        temperatures[0],
        topk,
        gather,
    )
    if isinstance(job.teacher, RankedRows):
        teacher = _Outcomes(job.teacher.top, job.teacher.rest, job.teacher.entropy)
    else:
        pulls = bool(gradient) and job.teacher.grad is not None
        teacher = _top(
            job.teacher,
            job.n,
            teacher_vocab,
            top_k,
            None,
            pulls,
            job.entropies,
            temperatures[1],
            topk,
            gather,
        )
    label = None if job.labels is None else Label(student.view, job.labels)

    width = max(student.log_p.shape[1], teacher.log_p.shape[1]) - 1
    q, p = student.masses(width, job.parameter0), teacher.masses(width, job.parameter1)
    sign = (q - p).sign()
    # sign(NaN) is 0, and a row without a distribution is NaN on both sides.
    sign = torch.where((q - p).isnan().any(1, keepdim=True), torch.nan, sign)
    if phases & R.TERMS:
        bound = 2 * torch.minimum(q[:, -1], p[:, -1])
        _store(job, (q - p).abs().sum(1), (sign * q).sum(1), -(sign * p).sum(1), bound)
        if label is not None:
            job.terms[:, R.HARD] = label.nll
        if job.entropies:
            job.terms[:, R.STUDENT_ENTROPY] = student.entropy
            job.terms[:, R.TEACHER_ENTROPY] = teacher.entropy
    if gradient:
        for rows, outcomes, masses, signs in (
            (job.student, student, q, sign),
            (job.teacher, teacher, p, -sign),
        ):
            if isinstance(outcomes, _Top) and rows.grad is not None:
                _set_gradient(job, outcomes, masses, signs)
                if outcomes is student and label is not None:
                    label.add_gradient(job.hard_weight, job.soft_weight)
                gather(outcomes.view.found, R.GRADIENT)


class _Outcomes:
    """``log_p`` [n, K + 1]: the K largest, descending, and the others together; ``entropy`` [n] if wanted."""

    def __init__(self, top: Tensor, rest: Tensor, entropy: Optional[Tensor]) -> None:
        self.log_p, self.entropy = with_last(top, rest), entropy

    def masses(self, width: int, log_mass: Tensor) -> Tensor:
        """``[n, width + 1]``: probabilities times the mass, filled up with zeros before the last."""
        p = (self.log_p + log_mass[:, None]).exp()
        return with_last(torch.nn.functional.pad(p[:, :-1], (0, width + 1 - p.shape[1])), p[:, -1])


class _Top(_Outcomes):
    """Those of a model's row, with the way back to its vocabulary."""

    def __init__(self, view: Gathered, selection: Selection, k: int, means: bool) -> None:
        self.view, self.selection, self.k = view, selection, k
        self.given = view.found.ids.shape[1]  # k, or one more: the label
        named = view.temperature.new_ones(view.found.n, self.given)
        named[:, k:] = 0.0
        self.named = selection.merge(named, torch.maximum, 0.0) > 0
        rest = torch.where(self.named, -_INF, view.at_ids)
        top = selection.spread(view.at_ids, -_INF)[:, :k] - view.lse[:, None]
        rest = torch.logsumexp(with_last(rest, view.others), 1) - view.lse
        super().__init__(top, rest, view.entropy() if means else None)


def _top(
    rows: R.Rows,
    n: int,
    vocab: int,
    top_k: int,
    labels: Optional[Tensor],
    gradient: bool,
    means: bool,
    temperature: Optional[Tensor],
    topk: Callable[..., None],
    gather: Callable[..., None],
) -> _Outcomes:
    k = min(top_k, vocab)
    some = rows.temperature
    found = R.TopkJob.empty(rows, n, vocab, k, some.new_ones(1) if temperature is None else temperature)
    topk(found)
    if temperature is not None and labels is None and not gradient:
        lse, entropy, tail = (found.statistics[:, R.topk_column(i)] for i in range(3))
        top = found.values / temperature - lse[:, None]
        return _Outcomes(torch.where(lse.isnan()[:, None], torch.nan, top), tail, entropy)
    ids = found.ids if labels is None else torch.cat([found.ids, labels[:, None].to(torch.int32)], 1)
    selection = Selection(ids, vocab)
    gathered = new_job(rows, selection.ids, n, vocab, labels is not None, means)
    gather(gathered, R.STATISTICS)
    return _Top(Gathered(gathered), selection, k, means)


def _set_gradient(job: R.RowJob, side: _Top, masses: Tensor, signs: Tensor) -> None:
    """``a q_k (s_k - sum_j q_j s_j)`` at the K, the last outcome's for all others: kernel's coefficients."""
    view, k = side.view, side.k
    total = masses.sum(1, keepdim=True)
    pull = torch.where(signs.isnan(), torch.nan, centred(signs, masses))
    pull = job.soft_weight[:, None] * pull / view.temperature
    at_top = torch.nn.functional.pad((masses * pull)[:, :k], (0, side.given - k))

    def among_others(log_share: Tensor) -> Tensor:
        return (log_share - view.lse[:, None]).exp() * total * pull[:, -1:]

    at_ids = side.selection.merge(at_top, torch.add, 0.0)
    at_ids = torch.where(side.named, at_ids, among_others(view.at_ids))
    dead = (job.soft_weight == 0)[:, None]  # whatever the row holds
    view.found.soft = torch.where(dead, 0.0, among_others(view.others[:, None]))[:, 0].contiguous()
    view.found.at_ids = torch.where(dead | (view.found.ids < 0), 0.0, at_ids)
