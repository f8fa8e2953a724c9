"""Which token of the student goes with which of the teacher, where their answers are cut differently."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Optional, Union

import torch
from torch import Tensor

from kd_kernels.arguments import outside_graphs
from kd_kernels.logprobs import linear_logprobs
from kd_kernels.sources import Head, Logits, Shown, Source, SparseTarget, Teacher, as_teacher

Rows = Union[Sequence[int], Tensor]
Group = tuple[Sequence[int], Sequence[int]]

MERGES = ("observed", "bayesian")
# A token's probability is taken as at least this, as TRL does: a merged distribution of 0 teaches nothing.
_LEAST = 1e-8


@dataclass(frozen=True, eq=False, repr=False)
class AlignedSide(Shown):
    """One model's end of an :class:`Alignment` of P pairs. Rows count the model's tokens, flattened."""

    rows: Tensor
    """``[P]`` int64: whose distribution stands for the pair."""
    given: Tensor
    """``[M]`` int64: rows whose token is given: its probability multiplies the pair's distribution."""
    given_pair: Tensor
    """``[M]`` int64: to which pair each belongs."""

    def take(self, source: Teacher | Tensor) -> Teacher:
        """The source with the pairs' rows as its P tokens: a copy of hidden states, or of existing logits."""
        return take_rows(as_teacher(source, "source"), self.rows)

    def take_labels(self, labels: Tensor) -> Tensor:
        """``[P]``: labels, masks or weights ``[...]`` of the source's tokens, at the pairs' rows."""
        return _at(labels.reshape(-1), self.rows)

    def log_mass(
        self, source: Source | Tensor, labels: Tensor, *, temperature: float = 1.0, **options
    ) -> Tensor:
        """``[P]``: logarithm of what the given tokens multiply each pair by, differentiable; 0 without any.

        Only their rows are projected.

        Args:
            source: the model, as :func:`kd_kernels.distill` takes it.
            labels: integer, its leading shape: the token that each row predicts
                (:func:`kd_kernels.next_token_labels`).
            temperature: of the divergence.
            options: of :func:`kd_kernels.linear_logprobs`.
        """
        source = as_teacher(source, "source")
        if labels.numel() != source.leading_shape.numel():
            raise ValueError(
                f"labels must have the leading shape of the source, {tuple(source.leading_shape)}; got "
                f"{tuple(labels.shape)}"
            )
        given = take_rows(source, self.given)
        ids = _at(labels.reshape(-1), self.given)
        return self._sum(linear_logprobs(given, ids, temperature=temperature, **options))

    def log_mass_of(self, logprobs: Tensor) -> Tensor:
        """The same from log-probabilities ``[...]`` of the labels, known already (a saved teacher's
        ``target_logprob`` at one temperature); ``...`` are the tokens, all of them."""
        return self._sum(_at(logprobs.reshape(-1), self.given))

    def _sum(self, logprobs: Tensor) -> Tensor:
        floored = logprobs.clamp(min=math.log(_LEAST))
        return floored.new_zeros(len(self.rows)).index_add(0, self.given_pair.to(floored.device), floored)


@dataclass(frozen=True, eq=False, repr=False)
class Alignment(Shown):
    """P pairs of a student's and a teacher's row."""

    student: AlignedSide
    teacher: AlignedSide
    sample: Tensor
    """``[P]`` int64: the sample that each pair is of."""
    samples: int

    def sample_weight(self) -> Tensor:
        """``[P]`` float64: the ``token_weight`` with which ``reduction="mean"`` is the mean over samples of
        each sample's mean over its pairs, as published code has it; a sample without pairs adds 0."""
        pairs = torch.bincount(self.sample, minlength=self.samples)
        return len(self.sample) / (self.samples * pairs[self.sample]).to(torch.float64)


@outside_graphs
def answer_rows(mask: Tensor) -> list[Tensor]:
    """Of each sample, the rows that predict its answer's tokens.

    Args:
        mask: bool ``[B, T]``, such as ``kd.next_token_labels(labels) != -100``.

    Returns:
        B tensors of flat rows, ``sample * T + position``.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype != torch.bool:
        shape = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be bool [B, T], got {shape}")
    return [row.nonzero()[:, 0] + i * mask.shape[1] for i, row in enumerate(mask)]


@outside_graphs
def byte_groups(student: Sequence, teacher: Sequence) -> list[Group]:
    """The finest groups of tokens in which two tokenizations of one text agree.

    Whichever side's token ends earlier goes on; a group ends where both end on the same byte, with all tokens
    that end there: a tokenizer that cuts one character into several gives each of them its offsets. It does
    not end within a character that the next token has begun with already. Tokens without length after them
    belong to what follows. What is left at the end is one more group. Groups without a token on one side are
    left out.

    Args:
        student, teacher: per token of the answer its length in bytes, or its ``(start, end)`` as tokenizers
            give offsets (of the same text, in bytes or characters; both from the same origin). Offsets that
            leave out spaces (``trim_offsets``) do not say whose these are; lengths do.

    Returns:
        Pairs of ranges of positions, for :func:`align_tokens`.

    Source: TRL's GOLD (extended ULD).
    """
    spans = [_spans("student", student), _spans("teacher", teacher)]
    ends = [[end for _, end in side] for side in spans]
    groups, start, at = [], (0, 0), [0, 0]
    while at[0] < len(ends[0]) and at[1] < len(ends[1]):
        own, other = ends[0][at[0]], ends[1][at[1]]
        if own <= other:
            at[0] += 1
        if other <= own:
            at[1] += 1
        if own == other:
            for side, (span, end) in enumerate(zip(spans, ends)):
                while at[side] < len(end) and span[at[side]][0] < span[at[side]][1] == own:
                    at[side] += 1
            if any(_begins_before(own, *side) for side in zip(spans, at)):
                continue
            groups.append((range(start[0], at[0]), range(start[1], at[1])))
            start = (at[0], at[1])
    groups.append((range(start[0], len(ends[0])), range(start[1], len(ends[1]))))
    return [group for group in groups if group[0] and group[1]]


@outside_graphs
def align_tokens(
    student_rows: Sequence[Rows],
    teacher_rows: Sequence[Rows],
    groups: Optional[Sequence[Sequence[Group]]] = None,
    *,
    merge: str = "observed",
) -> Alignment:
    """Pairs of rows out of answers of unequal length.

    A group of several tokens is one pair: the distribution of one position, times the probabilities of the
    tokens at the others, not normalised again. ``"observed"``: the first position's, times the later tokens;
    ``"bayesian"``: the last one's, times the earlier tokens, as the chain rule has it.

    Args:
        student_rows: per sample, the rows that predict its answer's tokens (:func:`answer_rows`); -1 for a
            token that none does, an answer's first one at position 0: what it would be paired with, or its
            group, is left out.
        teacher_rows: likewise, of the teacher's tokens.
        groups: per sample, pairs of positions in these (:func:`byte_groups`). None: position by position, up
            to the end of the shorter answer.
        merge: see above.

    Raises:
        ValueError: not as many samples on both sides; positions that an answer does not have; an empty group;
            an unknown ``merge``.

    Sources: Boizard et al. 2024 (ULD: by position); TRL's GOLD (groups, ``merge``).
    """
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
    lengths = {"student_rows": len(student_rows), "teacher_rows": len(teacher_rows)}
    if groups is not None:
        lengths["groups"] = len(groups)
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"one entry per sample: got {given}")
    sides: tuple[_Building, _Building] = (_Building("student"), _Building("teacher"))
    sample = []
    for i, answers in enumerate(zip(student_rows, teacher_rows)):
        answers = [_rows(side.name, rows) for side, rows in zip(sides, answers)]
        shorter = min(len(rows) for rows in answers)
        for group in groups[i] if groups is not None else [((j,), (j,)) for j in range(shorter)]:
            chosen = [side.chosen(rows, positions, i) for side, rows, positions in zip(sides, answers, group)]
            if min(map(min, chosen)) < 0:
                continue
            for side, rows in zip(sides, chosen):
                side.add(rows, merge)
            sample.append(i)
    student, teacher = (side.done() for side in sides)
    return Alignment(student, teacher, torch.tensor(sample, dtype=torch.int64), len(student_rows))


def _rows(name: str, rows: Rows) -> list[int]:
    rows = rows.tolist() if hasattr(rows, "tolist") else list(rows)
    if all(isinstance(row, numbers.Integral) and not isinstance(row, bool) and row >= -1 for row in rows):
        return [int(row) for row in rows]
    raise ValueError(
        f"{name}_rows must hold row numbers for each sample, as kd.answer_rows(mask) gives, or -1 where none "
        f"predicts the token; got {rows[:8]}"
    )


class _Building:
    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[int] = []
        self.given: list[int] = []
        self.given_pair: list[int] = []

    def chosen(self, rows: list[int], positions: Sequence[int], sample: int) -> list[int]:
        """The rows of a group."""
        if not positions or min(positions) < 0 or max(positions) >= len(rows):
            raise ValueError(
                f"groups of sample {sample}: {list(positions)} must be one or more positions in the "
                f"{self.name}'s answer of {len(rows)} tokens that have a row (not the prompt's; -1 is the "
                f"row of a first token at position 0)"
            )
        return [rows[position] for position in positions]

    def add(self, tokens: list[int], merge: str) -> None:
        own = tokens.pop() if merge == "bayesian" else tokens.pop(0)
        self.given += tokens
        self.given_pair += [len(self.rows)] * len(tokens)
        self.rows.append(own)

    def done(self) -> AlignedSide:
        return AlignedSide(
            *(torch.tensor(x, dtype=torch.int64) for x in (self.rows, self.given, self.given_pair))
        )


def _begins_before(end: int, spans: list[tuple[int, int]], at: int) -> bool:
    """Whether the next token with a length does: it has a part of the character that ends there."""
    while at < len(spans) and spans[at][0] == spans[at][1]:
        at += 1
    return at < len(spans) and spans[at][0] < end


def _spans(name: str, tokens: Sequence) -> list[tuple[int, int]]:
    """(start, end) of each token."""
    wrong = ValueError(f"{name} must hold lengths >= 0, or (start, end) pairs, one per token of one sample")
    tokens = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    if not isinstance(tokens, list):  # a single number
        raise wrong
    if all(isinstance(token, numbers.Integral) for token in tokens):
        ends = list(accumulate(int(token) for token in tokens))
        spans = list(zip([0, *ends], ends))
    elif all(
        isinstance(token, Sequence)
        and len(token) == 2
        and all(isinstance(x, numbers.Integral) for x in token)
        for token in tokens
    ):
        spans = [(int(start), int(end)) for start, end in tokens]
    else:
        raise wrong
    if not all(0 <= start <= end for start, end in spans):
        raise wrong
    return spans


def take_rows(source: Teacher, rows: Tensor) -> Teacher:
    """The source of these tokens, counted through its leading dimensions."""

    def of(tensor: Tensor) -> Tensor:
        return _at(tensor.reshape(-1, tensor.shape[-1]), rows)

    if isinstance(source, Head):
        return Head(of(source.hidden), source.weight, source.bias, source.scale, source.softcap)
    if isinstance(source, Logits):
        return Logits(of(source.values), source.scale, source.softcap)
    tail = source.log_tail_mass
    return SparseTarget(
        of(source.ids),
        of(source.logprobs),
        source.missing,
        source.temperature,
        None if tail is None else _at(tail.reshape(-1), rows),
    )


def _at(tokens: Tensor, rows: Tensor) -> Tensor:
    """Of what there is for each token, flattened, that of these rows."""
    looks = not torch.compiler.is_compiling() and not rows.is_cuda
    if looks and rows.numel() and int(rows.max()) >= len(tokens):
        raise ValueError(f"row {int(rows.max())} of an alignment, but there are {len(tokens)} tokens")
    return tokens.index_select(0, rows.to(tokens.device))
