"""How the walk would cut a call, without running it.

The sides, the chunk size and the footprint are the walk's own functions, fed with tensors on the
``meta`` device: shapes without memory. A test compares the answer with what a walk really borrows.
"""

from __future__ import annotations

from dataclasses import dataclass

from kd_kernels.drivers.chunked_head import Problem, _side, chunk_rows
from kd_kernels.drivers.workspace import footprint


@dataclass(frozen=True)
class Chunking:
    rows: int  # tokens per chunk; the last may have fewer
    chunks: int
    workspace_bytes: int
    accumulator_bytes: int  # gradients as they are summed up, before the backward pass scales them


def chunking(problem: Problem) -> Chunking:
    """What :func:`kd_kernels.drivers.chunked_head.walk` would do with ``problem``, gradients included."""
    sides = [_side(problem, model) for model in (problem.student, problem.teacher)]
    itemsizes = [size for side in sides for size in side.buffer_itemsizes()]

    def room(tokens: int) -> int:
        rows, columns = (problem.vocab, tokens) if problem.vocabulary_major else (tokens, problem.vocab)
        return sum(footprint(rows, columns, size) for size in itemsizes)

    n = problem.tokens if problem.rows is None else problem.rows.numel()
    rows = chunk_rows(n, problem.vocab, itemsizes, problem.workspace_bytes, room)
    gradients = [g for side in sides for g in side.gradients() if g is not None]
    return Chunking(min(rows, n), -(-n // rows), room(rows), sum(g.numel() * g.itemsize for g in gradients))
