"""The k largest logits of each token, and what a saved teacher needs beside them: one product, in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.backends import pick
from kd_kernels.counter_random import uniforms
from kd_kernels.drivers.chunks import cut
from kd_kernels.drivers.sides import Model, side_of
from kd_kernels.drivers.tokens import Tokens, moved
from kd_kernels.drivers.workspace import borrow


@dataclass
class TopkProblem:
    """One call: what the op received, unpacked."""

    model: Model
    k: int
    temperatures: Tensor  # [M] float64
    targets: Tensor  # [N, R] int64
    samples: int
    seed: Tensor  # 0-d int64
    compute_dtype: Optional[torch.dtype]
    logits_dtype: Optional[torch.dtype]
    backend: Optional[str]
    workspace_bytes: Optional[int]


def walk_topk(problem: TopkProblem) -> R.TopkJob:
    """What a :class:`kd_kernels.rows.TopkJob` results in, over all N tokens; draws in ascending order."""
    model, device = problem.model, problem.model.values.device
    vocab, n = model.vocab_size, model.token_count
    _, kernel = pick("topk", device, problem.backend, k=problem.k)
    side = side_of(model, vocab, Tokens(n), problem.compute_dtype, problem.logits_dtype)
    chunk, size = cut([side], n, vocab, device, problem.workspace_bytes)

    temperatures = moved(problem.temperatures, device)
    rows = R.Rows(model.values, None, temperatures)
    whole = R.TopkJob.empty(rows, n, vocab, problem.k, temperatures, problem.targets, problem.samples)
    one = torch.ones(min(chunk, n), dtype=torch.float64, device=device)
    with borrow(size, device) as workspace:
        for start in range(0, n, chunk):
            part = slice(start, min(n, start + chunk))
            tokens = torch.arange(start, part.stop, device=device)
            workspace.again()
            projected = side.project(start, part.stop, workspace, one[: part.stop - start])
            # Ascending: a kernel then visits each part of the row once.
            draws = uniforms(problem.seed, tokens, problem.samples).sort(dim=1).values
            kernel(whole.part(part, projected, draws))
    return whole
