"""How the walk would cut a call, without running it: :func:`arrange` on tensors of the ``meta`` device, which
have shapes and no memory. A test compares the answer with what a walk really borrows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kd_kernels.drivers.chunked_head import Problem, arrange


@dataclass(frozen=True)
class Chunking:
    rows: int  # tokens per chunk; the last may have fewer
    chunks: int
    workspace_bytes: int
    accumulator_bytes: int  # gradients as they are summed up, before the backward pass scales them


def chunking(problem: Problem, backend: str, device: torch.device) -> Chunking:
    """What :func:`kd_kernels.drivers.chunked_head.walk` would do with ``problem``, gradients included."""
    cut, n = arrange(problem, backend, device), problem.tokens.walked
    gradients = [g for side in (cut.student, cut.teacher) for g in side.gradients() if g is not None]
    return Chunking(
        min(cut.rows, n),
        -(-n // cut.rows),
        cut.workspace_bytes,
        sum(g.numel() * g.itemsize for g in gradients),
    )
