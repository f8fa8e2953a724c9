"""L1 distances between all rows of two models, walked in slabs of the vocabulary.

Every pair of rows needs every vocabulary entry, so it is the vocabulary that is cut, not the tokens: a
slab's logits of all rows are projected, the kernel takes them to probabilities and pairs, and the next slab
takes their place. The statistics of the softmax come first, from a walk of their own unless one slab holds
all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Optional, Union

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.backends import PAIRWISE_L1_SCRATCH, pick
from kd_kernels.drivers.chunks import default_workspace
from kd_kernels.drivers.factor import common_factor
from kd_kernels.drivers.gathered import new_job
from kd_kernels.drivers.sides import HeadEnd, LogitsSide, Model
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.drivers.workspace import Workspace, borrow, footprint, fresh
from kd_kernels.gemm import as_matrix, matmul

_GRANULE = 128  # slabs end at multiples of this where the budget allows
_NOTHING = (False, False, False)  # of a model's three tensors wants a gradient


@dataclass
class PairwiseProblem:
    """One call: what the op received, unpacked."""

    student: Model
    teacher: Model
    members: Tensor  # [G, L] int64: tokens of each group, -1 behind them (or, in one group, in between)
    tokens: Tokens  # group after group
    compute_dtype: Optional[torch.dtype]
    logits_dtype: Optional[torch.dtype]
    backend: Optional[str]
    workspace_bytes: Optional[int]

    @property
    def vocab(self) -> int:
        return min(self.student.vocab_size, self.teacher.vocab_size)

    @property
    def n(self) -> int:
        return self.tokens.walked

    def packed(self, padded: Tensor) -> Tensor:
        """``[G, L, ...]`` to ``[n, ...]``."""
        return padded.flatten(0, 1) if self.tokens.rows is None else padded[self.members >= 0]

    def padded(self, packed: Tensor) -> Tensor:
        """``[n, ...]`` to ``[G, L, ...]``, zeros where there is no row."""
        shape = self.members.shape + packed.shape[1:]
        if self.tokens.rows is None:
            return packed.reshape(shape)
        out = packed.new_zeros(shape)
        out[self.members >= 0] = packed
        return out

    def starts(self) -> Tensor:
        if self.tokens.rows is None:
            return torch.arange(2, device=self.members.device) * self.n  # not copied: nothing waits
        return torch.nn.functional.pad((self.members >= 0).sum(1).cumsum(0), (1, 0))


@dataclass
class Distances:
    """What :func:`measure` finds, padded to the groups; float64."""

    cost: Tensor  # [G, L, L]: sum_v |p - q|; 0 beyond a group
    signs: Optional[Tensor]  # [G, L, L]: sum_v p sign(p - q), where gradients are wanted
    statistics: Tensor  # [G, L, 4]: PAIRWISE_* of the student, then of the teacher


def measure(problem: PairwiseProblem) -> Distances:
    """All distances within the groups."""
    walk = _Walk(problem, gradients=False)
    signs = any(map(any, walk.needs))
    groups, longest = problem.members.shape
    cost = torch.zeros(groups, longest, longest, dtype=torch.float64, device=walk.device)
    sums = torch.zeros_like(cost) if signs else None
    job = walk.job(cost=cost, signs=sums)

    def add(slab: _Slab) -> None:
        walk.kernel(replace(job, vocab=slab.width, student=slab.student, teacher=slab.teacher), R.TERMS)

    partial = []
    for slab in walk.slabs():
        partial.append([_slab_statistics(walk, side, slab.width) for side in (slab.student, slab.teacher)])
        if slab.whole:
            _set_statistics(job, partial, walk.temperatures)
            add(slab)
    if len(partial) > 1:
        _set_statistics(job, partial, walk.temperatures)
        for slab in walk.slabs():
            add(slab)
    statistics = torch.cat([job.student_statistics, job.teacher_statistics], 1)
    return Distances(cost, sums, problem.padded(statistics))


def carry_back(problem: PairwiseProblem, found: Distances, d_cost: Tensor) -> list[Optional[Tensor]]:
    """Gradients of the student's and the teacher's three tensors, None where not wanted.

    Args:
        problem: the call.
        found: what :func:`measure` gave for it.
        d_cost: ``[G, L, L]`` float64, 0 beyond the groups.
    """
    assert found.signs is not None
    silent = d_cost == 0
    of_teacher = torch.where(silent, 0.0, d_cost * (found.cost - found.signs)).sum(1)
    of_student = torch.where(silent, 0.0, d_cost * found.signs).sum(2)
    walk = _Walk(problem, gradients=True)
    factor = walk.factor(d_cost)
    job = walk.job(
        d_cost=(d_cost / factor).contiguous(),
        student_means=(problem.packed(of_student) / factor).contiguous(),
        teacher_means=(problem.packed(of_teacher) / factor).contiguous(),
    )
    job.student_statistics, job.teacher_statistics = (
        x.contiguous() for x in problem.packed(found.statistics).split(R.PAIRWISE_COLUMNS, 1)
    )
    for slab in walk.slabs():
        walk.kernel(replace(job, vocab=slab.width, student=slab.student, teacher=slab.teacher), R.GRADIENT)
        for side, rows in zip(walk.sides, (slab.student, slab.teacher)):
            side.carry(slab, rows, factor)
    return [gradient for side in walk.sides for gradient in side.gradients(factor)]


def _slab_statistics(walk: _Walk, side: R.Rows, width: int) -> Tensor:
    """``[n, 2]``: MAX and LOGZ over the slab."""
    nothing = torch.empty(walk.n, 0, dtype=torch.int32, device=walk.device)
    job = new_job(side, nothing, walk.n, width, False, False)
    walk.gather(job, R.STATISTICS)
    return job.statistics[:, [R.OTHERS_MAX, R.OTHERS_LOGZ]]


def _set_statistics(job: R.PairwiseL1Job, partial: list[list[Tensor]], temperatures: list[Tensor]) -> None:
    """From those of all slabs."""
    both = []
    for parts, temperature in zip(zip(*partial), temperatures):
        tops, logs = torch.stack(parts).unbind(-1)  # [slabs, n]
        top = tops.amax(0)
        logz = torch.logsumexp((tops - top) / temperature + logs, 0)  # NaN where all are -inf
        both.append(torch.stack([top, logz], 1).contiguous())
    job.student_statistics, job.teacher_statistics = both


@dataclass
class _Slab:
    start: int
    stop: int
    whole: bool
    workspace: Workspace
    student: R.Rows
    teacher: R.Rows

    @property
    def width(self) -> int:
        return self.stop - self.start


class _Walk:
    """One call's sides, kernels and slabs."""

    def __init__(self, problem: PairwiseProblem, gradients: bool) -> None:
        self.problem, self.n, self.vocab = problem, problem.n, problem.vocab
        self.device = problem.student.values.device
        name, self.kernel = pick("pairwise_l1", self.device, problem.backend)
        self.scratch = PAIRWISE_L1_SCRATCH.get(name)
        self.gather = pick("gather", self.device, name)[1]
        models = [problem.student, problem.teacher]
        self.needs = [model.needs for model in models]  # sooner or later
        if not gradients:
            models = [replace(model, needs=_NOTHING) for model in models]
        self.temperatures = [problem.tokens.numbers(m.temperature, self.device, 1.0) for m in models]
        self.sides = [_side(model, problem) for model in models]
        self.width, self.bytes = self._cut(gradients)

    def job(self, **results: Optional[Tensor]) -> R.PairwiseL1Job:
        """To be completed by a slab and the statistics."""
        rows = R.Rows(self.problem.student.values, None, self.temperatures[0])
        nothing = self.temperatures[0].new_empty(self.n, R.PAIRWISE_COLUMNS)
        return R.PairwiseL1Job(self.n, 0, rows, rows, self.problem.starts(), nothing, nothing, **results)

    def _cut(self, gradients: bool) -> tuple[int, int]:
        """(entries per slab, bytes of workspace that its logits and gradients take)."""
        least = self._room(1, gradients)
        if self.n == 0 or least == 0:
            return self.vocab, 0
        given = self.problem.workspace_bytes
        budget = default_workspace(self.device) if given is None else given
        if any(map(any, self.needs)):  # a backward pass that will not fit is refused before it is needed
            least = max(least, self._room(1, True))
        if least > budget:
            raise ValueError(
                f"workspace_bytes={budget} holds less than one vocabulary entry of {self.n} rows, which are "
                f"compared with each other; at least {least} bytes are needed"
            )
        most = min(self.vocab, max(1, budget // max(1, self._room(1024, gradients) // 1024)))
        while self._room(most, gradients) > budget:
            most -= max(1, most // 64)
        even = -(-self.vocab // -(-self.vocab // most))
        width = min(-(-even // _GRANULE) * _GRANULE, most)
        return width, self._logits_room(width, gradients)

    def _room(self, width: int, gradients: bool) -> int:
        """Bytes that a slab takes, forward or backward: of the workspace, and by the kernel beside it."""
        own = self._logits_room(width, gradients)
        if self.scratch is None:
            return own
        wide = any(side.logits_dtype == torch.float64 for side in self.sides)
        phase = R.GRADIENT if gradients else R.TERMS
        return own + self.scratch(self.n, *self.problem.members.shape, width, wide, phase)

    def _logits_room(self, width: int, gradients: bool) -> int:
        needs = self.needs if gradients else [_NOTHING] * 2
        return sum(side.room(width, wanted) for side, wanted in zip(self.sides, needs))

    def slabs(self) -> Iterator[_Slab]:
        with borrow(self.bytes, self.device) as workspace:
            for start in range(0, self.vocab if self.n else 0, self.width):
                stop = min(self.vocab, start + self.width)
                workspace.again()
                rows = [
                    side.project(start, stop, workspace, t) for side, t in zip(self.sides, self.temperatures)
                ]
                yield _Slab(start, stop, stop - start == self.vocab, workspace, *rows)

    def factor(self, d_cost: Tensor) -> Tensor:
        """See ``drivers/factor.py``. Without any head 1: gradients of existing logits are final as they are
        written."""
        top = d_cost.new_zeros(())
        models = [self.problem.student, self.problem.teacher]
        heads = [model for model in models if model.is_head and any(model.needs)]
        if self.n == 0 or not heads:
            return torch.ones_like(top)
        for model, temperature, axis in zip(models, self.temperatures, (2, 1)):
            if any(model.needs):
                entries = self.problem.packed(d_cost.abs().sum(axis)) / temperature
                top = torch.maximum(top, entries.amax() * abs(model.scale))
        return common_factor(top, heads, self.problem.compute_dtype)


class _HeadSlabs(HeadEnd):
    """Logits of a slab by one product; its gradients carried back by two."""

    def __init__(self, model: Model, problem: PairwiseProblem) -> None:
        assert model.weight is not None
        super().__init__(model, problem.vocab, problem.tokens, problem.compute_dtype, problem.logits_dtype)
        if model.needs[0]:
            self.d_hidden = self.hidden.new_zeros(self.hidden.shape, dtype=self.wide)
        if model.needs[1]:
            self.d_weight = self._result(model.weight)
        if model.needs[2]:
            assert model.bias is not None
            self.d_bias = self._result(model.bias)

    def _result(self, like: Tensor) -> Tensor:
        """In the parameter's dtype: a slab's part is written once, so that nothing wider need be kept."""
        return self.cleared(fresh(like.shape, like.dtype, like.device))

    def room(self, width: int, needs: Sequence[bool]) -> int:
        """Bytes of workspace of a slab whose walk finds those gradients."""
        assert self.model.weight is not None
        n, features = self.hidden.shape
        total = footprint(n, width, self.logits_dtype.itemsize)
        if any(needs) and not self.gradient_in_place:
            total += footprint(n, width, self.hidden.dtype.itemsize)
        if needs[1] and self.model.weight.dtype != self.wide:
            total += footprint(width, features, self.wide.itemsize)
        return total

    def _weight(self, start: int, stop: int) -> Tensor:
        assert self.model.weight is not None
        return as_matrix(self.model.weight[start:stop].to(self.hidden.dtype))

    def project(self, start: int, stop: int, workspace: Workspace, temperature: Tensor) -> R.Rows:
        (n, _), width = self.hidden.shape, stop - start
        logits = workspace.take(n, width, self.logits_dtype)
        if self.model.bias is not None:
            logits.copy_(self.model.bias[start:stop])
        matmul(self.hidden, self._weight(start, stop).t(), logits, accumulate=self.model.bias is not None)
        grad = None
        if self.wants_gradient:
            grad = logits if self.gradient_in_place else workspace.take(n, width, self.hidden.dtype)
        token = torch.arange(n, device=logits.device)
        return R.Rows(
            logits,
            token * logits.stride(0),
            temperature,
            self.model.scale,
            self.model.softcap,
            grad,
            None if grad is None else token * grad.stride(0),
            multiple=logits.stride(0),
            grad_multiple=1 if grad is None else grad.stride(0),
        )

    def carry(self, slab: _Slab, rows: R.Rows, factor: Tensor) -> None:
        if rows.grad is None:
            return
        if self.d_hidden is not None:
            matmul(rows.grad, self._weight(slab.start, slab.stop), self.d_hidden, accumulate=True)
        if self.d_weight is not None:
            part = self.d_weight[slab.start : slab.stop]
            wide = part
            if part.dtype != self.wide:
                wide = slab.workspace.take(*part.shape, self.wide)
            matmul(rows.grad.t(), self.hidden, wide)
            torch.mul(wide, factor, out=part)
        if self.d_bias is not None:
            self.d_bias[slab.start : slab.stop] = rows.grad.sum(0, dtype=self.wide) * factor

    def gradients(self, factor: Tensor) -> list[Optional[Tensor]]:
        d_hidden = self.d_hidden
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(factor).to(self.model.values.dtype)
        return [self.of_all(d_hidden), self.d_weight, self.d_bias]


class _LogitsSlabs:
    """Logits that exist: a slab of them is read, and its gradient written, where it lies."""

    def __init__(self, model: Model, problem: PairwiseProblem) -> None:
        self.side = LogitsSide(model, problem.vocab, problem.tokens)
        self.logits_dtype = model.values.dtype
        self.n = problem.n
        heads = [other for other in (problem.student, problem.teacher) if other.is_head]
        self.shares_factor = any(any(other.needs) for other in heads)

    def room(self, width: int, needs: Sequence[bool]) -> int:
        return 0

    def project(self, start: int, stop: int, workspace: Workspace, temperature: Tensor) -> R.Rows:
        rows = self.side.project(0, self.n, workspace, temperature)
        grad_offsets = None if rows.grad_offsets is None else rows.grad_offsets + start
        return replace(
            rows,
            offsets=rows.offsets + start,
            grad_offsets=grad_offsets,
            multiple=math.gcd(rows.multiple, start),
            grad_multiple=math.gcd(rows.grad_multiple, start),
        )

    def carry(self, slab: _Slab, rows: R.Rows, factor: Tensor) -> None:
        """Nothing: the kernel wrote the gradient where it belongs."""

    def gradients(self, factor: Tensor) -> list[Optional[Tensor]]:
        grad = self.side.grad
        if grad is not None and self.shares_factor:
            grad.mul_(factor)
        return [grad, None, None]


def _side(model: Model, problem: PairwiseProblem) -> Union[_HeadSlabs, _LogitsSlabs]:
    return (_HeadSlabs if model.is_head else _LogitsSlabs)(model, problem)
