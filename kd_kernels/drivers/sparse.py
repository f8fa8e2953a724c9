"""A sparse teacher against a student's full vocabulary, by two kernels that know nothing of it.

Seen from a teacher that names K tokens, the student has K + 1 outcomes: each of them, and *another token*,
whose probability is the sum over all others. A divergence over those outcomes is one of two short rows of
logits, so the row_divergence kernel computes it, every objective alike; what the student's short row holds
comes from the gather kernel. The softmax over the short row being the coarse form of the softmax over the
vocabulary, its gradient extends: an entry among the others gets the last outcome's, times its share of it.

What ``missing`` says of the teacher's mass beyond its K tokens only changes the last outcome:

=================  ======================  ===================
``missing``        teacher                 student
=================  ======================  ===================
tail               its tail mass           the others' mass
teacher_renorm     0                       the others' mass
unnormalised       0; weight: sum of t     the others' mass
renorm_both        absent                  absent
=================  ======================  ===================
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
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.drivers.workspace import Workspace

_INF = float("inf")
_WIDTH = 8  # the short rows' length is a multiple of this, for wide loads on a GPU
# A tail mass that is 1 - sum of float32 probabilities is known to half of this.
_RESOLUTION = 2.0**-23


@dataclass
class Target:
    """A sparse teacher as the op received it."""

    ids: Tensor  # [N, K]
    logprobs: Tensor  # [N, K]; temperature applied
    log_tail: Optional[Tensor]  # [N]; None: from the logprobs
    missing: str


@dataclass
class SparseRows:
    """A chunk of a sparse teacher, in the place of its logits."""

    ids: Tensor  # [n, K] int32, as the gather kernel wants them: the teacher's, and the label's
    logprobs: Tensor  # [n, K] float64, -inf where the teacher does not name the token
    named: Tensor  # [n, K] bool: the teacher names it
    log_tail: Optional[Tensor]  # [n] float64
    missing: str


class SparseSide:
    """The teacher's end of the walk where it is sparse: nothing to project, nothing to carry back."""

    def __init__(self, target: Target, labels: Optional[Tensor], tokens: Tokens, vocab: int) -> None:
        self.target, self.labels, self.tokens, self.vocab = target, labels, tokens, vocab

    def buffer_itemsizes(self, later: bool = False) -> list[int]:
        return []

    def project(self, start: int, stop: int, workspace: Workspace, temperature: Tensor) -> SparseRows:
        """A chunk of tokens, brought from the temperature of the record to ``temperature`` [n] times it."""
        tokens = self.tokens.part(start, stop)
        target, vocab = self.target, self.vocab
        ids, logprobs = target.ids[tokens], target.logprobs[tokens].to(torch.float64)
        bad = ((ids < -1) | (ids >= vocab)).any(1, keepdim=True)  # never read; makes its row NaN
        named = torch.ones_like(logprobs)
        if self.labels is not None:  # the label's entry is gathered too
            ids = torch.cat([ids, self.labels[tokens][:, None].to(ids.dtype)], 1)
            logprobs, named = with_last(logprobs, -_INF), with_last(named, 0.0)
        selection = Selection(ids, vocab)
        # Repeated ids add up before they are brought to another temperature.
        merged = selection.merge(logprobs, torch.logaddexp, -_INF) / temperature[:, None]
        return SparseRows(
            selection.ids,
            torch.where(bad, torch.nan, merged),
            selection.merge(named, torch.maximum, 0.0) > 0,
            None if target.log_tail is None else target.log_tail[tokens].to(torch.float64),
            target.missing,
        )

    def carry(self, start: int, stop: int, rows: SparseRows) -> None:
        """Nothing: a sparse teacher is a constant."""

    def gradients(self) -> list[Optional[Tensor]]:
        return [None, None, None]


def sparse_divergence(
    job: R.RowJob, phases: int, gather: Callable[..., None], divergence: Callable[..., None]
) -> None:
    """The row kernel's contract (:class:`kd_kernels.rows.RowJob`), ``job.teacher`` being :class:`SparseRows`.

    Its ``statistics`` are not filled, and not asked for: a later gradient phase runs everything again, which
    costs next to nothing beside the products of the walk.
    """
    target: SparseRows = job.teacher
    student, labels = job.student, job.labels
    found = new_job(student, target.ids, job.n, job.vocab, labels is not None, job.entropies)
    gather(found, R.STATISTICS)
    view = _View(found, target)
    short, gain = _short_job(job, view, phases)
    divergence(short, phases if phases & R.GRADIENT == 0 else R.STATISTICS | R.TERMS | R.GRADIENT)

    label = None if labels is None else Label(view, labels)
    if phases & R.TERMS:
        # gain KL(t / gain || q) + gain log gain = sum t log(t / q)
        soft = short.terms[:, R.SOFT] * gain + torch.xlogy(gain, gain)
        job.terms[:, R.SOFT] = torch.where(gain == 0, 0.0, soft)  # a sum over nothing
        if label is not None:
            job.terms[:, R.HARD] = label.nll
        if job.entropies:
            job.terms[:, R.STUDENT_ENTROPY] = view.entropy()
            job.terms[:, R.TEACHER_ENTROPY] = short.terms[:, R.TEACHER_ENTROPY]
    if phases & R.GRADIENT and student.grad is not None:
        _spread_gradient(job, found, view, short.student.grad, label)
        gather(found, R.GRADIENT)


class _View(Gathered):
    """The student as the teacher sees it."""

    def __init__(self, found: R.GatherJob, target: SparseRows) -> None:
        super().__init__(found)
        self.target = target
        # A label that the teacher does not name is another token to it.
        self.named = torch.where(target.named, self.at_ids, -_INF)
        self.label = torch.where(target.named, -_INF, self.at_ids)
        self.rest = torch.logsumexp(with_last(self.label, self.others), 1)


def _short_job(job: R.RowJob, view: _View, phases: int) -> tuple[R.RowJob, Tensor]:
    """The K + 1 outcomes as two rows of logits, and what their divergence is to be multiplied by."""
    target, n = view.target, job.n
    # The mass of each token is at most 1, but what is recorded unnormalised need not sum to it.
    mass = torch.logsumexp(target.logprobs, 1).exp()
    gain = mass if target.missing == "unnormalised" else torch.ones_like(mass)
    tail = torch.full_like(mass, -_INF)
    rest = tail if target.missing == "renorm_both" else view.rest
    if target.missing == "tail":
        tail = target.log_tail
        if tail is None:
            tail = torch.where(rest == -_INF, -_INF, implied_log_tail(mass))

    width = -(-(target.ids.shape[1] + 1) // _WIDTH) * _WIDTH
    offsets = torch.arange(n, device=mass.device) * width
    one = torch.ones_like(mass)

    def short(at_ids: Tensor, last: Tensor) -> R.Rows:
        logits = torch.nn.functional.pad(
            with_last(at_ids, last), (0, width - at_ids.shape[1] - 1), value=-_INF
        )
        return R.Rows(logits, offsets, one, multiple=width, grad_multiple=width)

    student, teacher = short(view.named, rest), short(target.logprobs, tail)
    if phases & R.GRADIENT:
        student.grad, student.grad_offsets = torch.empty_like(student.logits), offsets
    return (
        R.RowJob(
            job.objective,
            n,
            width,
            student,
            teacher,
            job.parameter0,
            job.parameter1,
            None,
            job.soft_weight * gain,
            torch.zeros_like(one),
            one.new_zeros(n, R.STATISTIC_COLUMNS),
            one.new_zeros(n, R.TERM_COLUMNS),
            job.entropies,
        ),
        gain,
    )


def implied_log_tail(mass: Tensor) -> Tensor:
    """log(1 - mass), at least that of float32's last digit: rounding leaves no more of it. Whether there is
    any other token the caller knows."""
    return torch.log((1 - mass).clamp(min=_RESOLUTION))


def _spread_gradient(
    job: R.RowJob, found: R.GatherJob, view: _View, short: Tensor, label: Optional[Label]
) -> None:
    """From the gradient of the short row to the gather kernel's coefficients."""
    k = found.ids.shape[1]
    last = short[:, k, None]

    def share(part: Tensor) -> Tensor:  # of the outcome "another token"
        return torch.where(part == -_INF, 0.0, (part - view.rest[:, None]).exp())

    soft = last * share(view.others[:, None])
    at_ids = torch.where(view.target.named, short[:, :k], last * share(view.label))
    dead = (job.soft_weight == 0)[:, None]  # whatever the row holds
    found.soft = torch.where(dead, 0.0, soft / view.temperature)[:, 0].contiguous()
    found.at_ids = torch.where(dead | (found.ids < 0), 0.0, at_ids / view.temperature)
    if label is not None:
        label.add_gradient(job.hard_weight, job.soft_weight)
