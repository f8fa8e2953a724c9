"""Walk the tokens in chunks: project, run the row kernel, carry the gradient back.

Per chunk of C tokens two GEMMs write student and teacher logits into reused workspace, one row kernel
turns them into per-token terms and logit gradients, two more GEMMs carry those to ``d hidden`` and
``d weight``. Nothing of size ``[tokens, vocab]`` exists.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Optional, Union

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.backends import OVERWRITES, VOCABULARY_MAJOR, RowKernel, pick
from kd_kernels.drivers.chunks import cut
from kd_kernels.drivers.factor import common_factor
from kd_kernels.drivers.sides import HeadSide, LogitsSide, Model, Number, side_of
from kd_kernels.drivers.sorted_l1 import RankedSide, exact_divergence, topk_divergence
from kd_kernels.drivers.sparse import SparseSide, Target, sparse_divergence
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.drivers.vocabulary_parallel import Shards, vocabulary_parallel_divergence
from kd_kernels.drivers.workspace import borrow
from kd_kernels.reference.sorted_l1 import WORKING_BYTES

SORTED_L1 = "sorted_wasserstein"


@dataclass
class Problem:
    """One call, in plain values: what the op received, unpacked."""

    student: Model
    teacher: Model
    objective: str
    parameter0: Number
    parameter1: Number
    soft_weight: Number
    hard_weight: Optional[Number]  # None: no cross-entropy
    labels: Optional[Tensor]  # [N]
    tokens: Tokens
    entropies: bool
    compute_dtype: Optional[torch.dtype]  # autocast; None: each model's own
    logits_dtype: Optional[torch.dtype]
    backend: Optional[str]
    workspace_bytes: Optional[int]
    target: Optional[Target] = None  # a sparse teacher, in the place of ``teacher``
    top_k: Optional[int] = None  # of the sorted L1; None: exact
    shards: Optional[Shards] = None  # of a vocabulary that is split over ranks
    filled: dict[tuple[float, float], Tensor] = field(default_factory=dict)

    @property
    def is_sorted(self) -> bool:
        """The sorted L1, which compares vocabularies of any two sizes."""
        return self.objective == SORTED_L1

    @property
    def vocab(self) -> int:
        if self.target is not None or self.is_sorted:
            return self.student.vocab_size
        return min(self.student.vocab_size, self.teacher.vocab_size)

    @property
    def teacher_vocab(self) -> int:
        return self.teacher.vocab_size if self.is_sorted and self.target is None else self.vocab

    @property
    def shares_factor(self) -> bool:
        """Whether gradients are found up to a factor: those of existing logits are final as the kernel writes
        them, unless the other model has a head."""
        return any(m.is_head and any(m.needs) for m in (self.student, self.teacher))

    def walked_values(self, value: Number, silenced: float = 0.0) -> Number:
        """``value`` for each token that is walked, ``[n]`` float64, ``silenced`` at silenced ones; or, while
        it is one number on the host, just that: what is computed with it launches nothing."""
        if isinstance(value, float):
            return value
        return self.tokens.numbers(value, self.student.values.device, silenced)

    def per_token(self, value: Number, silenced: float = 0.0) -> Tensor:
        """``[n]`` of what :meth:`walked_values` gave, to be read only: one tensor serves equal numbers."""
        if isinstance(value, Tensor):
            return value
        if (value, silenced) not in self.filled:
            # Filling in a constant waits for nobody, copying it would.
            device = self.student.values.device
            made = torch.full((self.tokens.walked,), value, dtype=torch.float64, device=device)
            self.filled[value, silenced] = self.tokens.silenced(made, silenced)
        return self.filled[value, silenced]


@dataclass(frozen=True)
class Arrangement:
    """How a call is cut."""

    student: Union[HeadSide, LogitsSide]
    teacher: Union[HeadSide, LogitsSide, SparseSide, RankedSide]
    rows: int  # tokens per chunk; the last may have fewer
    workspace_bytes: int


def arrange(problem: Problem, backend: str, device: torch.device) -> Arrangement:
    """The two sides and the chunk size of a call that ``backend`` serves on ``device``."""
    tokens = problem.tokens
    # Where both models project, the chunk's layout is ours to choose. Logits that exist are rows.
    both_project = problem.student.is_head and (problem.teacher.is_head or problem.target is not None)
    vocabulary_major = both_project and backend in VOCABULARY_MAJOR and not problem.is_sorted

    def side(model: Model, vocab: int) -> Union[HeadSide, LogitsSide]:
        dtypes = problem.compute_dtype, problem.logits_dtype
        scratch = (problem.target is not None or problem.top_k is not None) and backend in OVERWRITES
        return side_of(model, vocab, tokens, *dtypes, vocabulary_major, scratch)

    student = side(problem.student, problem.vocab)
    if problem.target is None:
        teacher = side(problem.teacher, problem.teacher_vocab)
    elif problem.top_k is not None:
        teacher = RankedSide(problem.target, tokens, problem.top_k)
    else:
        labels = None if problem.hard_weight is None else problem.labels
        teacher = SparseSide(problem.target, labels, tokens, problem.vocab)
    vocab = max(problem.vocab, problem.teacher_vocab)
    if problem.shards is not None:
        vocab = problem.shards.largest
    sorts = problem.is_sorted and problem.top_k is None and backend != "cpu"
    rows, size = cut(
        (student, teacher),
        tokens.walked,
        vocab,
        device,
        problem.workspace_bytes,
        vocabulary_major,
        WORKING_BYTES if sorts else 0,
    )
    return Arrangement(student, teacher, rows, size)


@dataclass
class Outcome:
    loss: Tensor  # [N] float64: soft_weight * divergence + hard_weight * cross-entropy
    terms: Tensor  # [N, 4] float64; zeros at tokens that do not count
    statistics: Tensor  # [N, 10] float64
    gradients: list[Optional[Tensor]]  # student values, weight, bias, teacher values, weight, bias,
    factor: Tensor  # 0-d float64: to be multiplied by this


def walk(problem: Problem, phases: int, statistics: Optional[Tensor] = None) -> Outcome:
    """Run ``phases`` of the row kernel over all tokens that count.

    Args:
        problem: the call.
        phases: see :mod:`kd_kernels.rows`; without GRADIENT no gradient is computed or allocated.
        statistics: ``[N, 10]`` of an earlier call, when its phases are left out now.
    """
    device = problem.student.values.device
    name, kernel = _row_kernel(problem, device)
    cut = arrange(problem, name, device)
    student, teacher, chunk, n = cut.student, cut.teacher, cut.rows, problem.tokens.walked
    if problem.shards is not None:  # all ranks take as many chunks
        chunk = problem.shards.least(chunk, device)

    weights = (
        [problem.soft_weight] if problem.hard_weight is None else [problem.soft_weight, problem.hard_weight]
    )
    weights = [problem.walked_values(w) for w in weights]
    temperatures = [problem.walked_values(m.temperature, 1.0) for m in (problem.student, problem.teacher)]
    factor = _factor(problem, weights, temperatures)
    on_host = isinstance(factor, float)
    soft, *hard = (
        problem.per_token(w / factor) if on_host else problem.per_token(w) / factor for w in weights
    )
    t_s, t_t = (problem.per_token(t, 1.0) for t in temperatures)
    p0, p1 = (problem.per_token(problem.walked_values(p)) for p in (problem.parameter0, problem.parameter1))
    if on_host:
        factor = torch.full((), factor, dtype=torch.float64, device=device)
    labels = problem.labels
    if problem.target is not None and problem.hard_weight is None:
        labels = None
    if labels is not None:
        labels = problem.tokens.take(labels)
        if problem.shards is not None:
            labels = labels - problem.shards.start

    terms = torch.zeros(n, R.TERM_COLUMNS, dtype=torch.float64, device=device)
    if statistics is None:
        stats = torch.zeros(n, R.STATISTIC_COLUMNS, dtype=torch.float64, device=device)
    else:
        stats = problem.tokens.take(statistics)

    hard_weight = hard[0] if hard else problem.per_token(0.0)
    with borrow(cut.workspace_bytes, device) as workspace:
        for start in range(0, n, chunk):
            stop = min(n, start + chunk)
            part = slice(start, stop)
            workspace.again()
            s = student.project(start, stop, workspace, t_s[part])
            t = teacher.project(start, stop, workspace, t_t[part])
            job = R.RowJob(
                objective=problem.objective,
                n=stop - start,
                vocab=problem.vocab,
                student=s,
                teacher=t,
                parameter0=p0[part],
                parameter1=p1[part],
                labels=None if labels is None else labels[part],
                soft_weight=soft[part],
                hard_weight=hard_weight[part],
                statistics=stats[part],
                terms=terms[part],
                entropies=problem.entropies,
            )
            kernel(job, phases)
            if phases & R.GRADIENT:
                student.carry(start, stop, s)
                teacher.carry(start, stop, t)
    if problem.shards is not None:
        for side in (student, teacher):
            if isinstance(side, HeadSide) and side.d_hidden is not None:
                side.d_hidden = problem.shards.summed(side.d_hidden)
    # A weight of 0 silences its term, as it does in the gradient, also where that is infinite.
    columns = zip((soft, *hard), (R.SOFT, R.HARD))
    weighted = [torch.where(w == 0, 0.0, w * terms[:, i]) for w, i in columns]
    return Outcome(
        problem.tokens.spread(sum(weighted) * factor),
        problem.tokens.spread(terms),
        problem.tokens.spread(stats),
        student.gradients() + teacher.gradients(),
        factor,
    )


def _row_kernel(problem: Problem, device: torch.device) -> tuple[str, RowKernel]:
    if problem.is_sorted:
        return _sorted_kernel(problem, device)
    name, kernel = pick("row_divergence", device, problem.backend)
    if problem.shards is not None:
        return name, functools.partial(
            vocabulary_parallel_divergence, divergence=kernel, shards=problem.shards
        )
    if problem.target is None:
        return name, kernel
    return name, functools.partial(
        sparse_divergence, gather=pick("gather", device, name)[1], divergence=kernel
    )


def _sorted_kernel(problem: Problem, device: torch.device) -> tuple[str, RowKernel]:
    vocab = problem.teacher_vocab
    if problem.top_k is None:
        name, kernel = pick("sorted_l1", device, problem.backend)
        # One that overwrites logits would spoil what is to be sorted.
        gather = pick("gather", device, "reference" if name in OVERWRITES else name)[1]
        return name, functools.partial(exact_divergence, teacher_vocab=vocab, gather=gather, sorted_l1=kernel)
    k = min(problem.top_k, max(problem.student.vocab_size, vocab))
    name, topk = pick("topk", device, problem.backend, k=k)
    return name, functools.partial(
        topk_divergence,
        teacher_vocab=vocab,
        top_k=problem.top_k,
        temperatures=tuple(_uniform(m.temperature, device) for m in (problem.student, problem.teacher)),
        topk=topk,
        gather=pick("gather", device, name)[1],
    )


def _uniform(temperature: Number, device: torch.device) -> Optional[Tensor]:
    """``[1]`` on the device, of a temperature that all rows have; None where each has its own."""
    if isinstance(temperature, float):
        return torch.full((1,), temperature, dtype=torch.float64, device=device)
    return None if temperature.dim() else temperature.to(torch.float64).reshape(1)


def _factor(problem: Problem, weights: list[Number], temperatures: list[Number]) -> Number:
    """The walk's :func:`common_factor`, on the host where all that it comes from is. Gradients of existing
    logits are final as the kernel writes them, so a call without any head keeps its weights."""
    soft, *hard = weights
    if problem.tokens.walked == 0 or not problem.shares_factor:
        return 1.0
    models = [m for m in (problem.student, problem.teacher) if any(m.needs)]
    tops = [abs(w) * abs(problem.student.scale) for w in hard]
    for model, temperature in zip((problem.student, problem.teacher), temperatures):
        if any(model.needs):
            tops.append(abs(soft) / temperature * abs(model.scale))
    on_host = [x for x in tops if isinstance(x, float)]
    least = max(on_host, default=0.0)
    there = [x.amax() for x in tops if isinstance(x, Tensor)]
    top = functools.reduce(torch.maximum, there).clamp(min=least) if there else least
    return common_factor(top, models, problem.compute_dtype)
