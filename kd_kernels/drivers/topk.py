"""The k largest logits of each token, and what a saved teacher needs beside them: one product, in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.backends import pick
from kd_kernels.counter_random import uniforms
from kd_kernels.drivers.chunked_head import cut
from kd_kernels.drivers.sides import Model, side_of
from kd_kernels.drivers.tokens import moved
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
    vocab, n = model.vocab_size, model.values.shape[:-1].numel()
    _, kernel = pick("topk", device, problem.backend, k=problem.k)
    side = side_of(model, vocab, None, None, problem.compute_dtype, problem.logits_dtype)
    chunk, size = cut([side], n, vocab, device, problem.workspace_bytes)

    def of(columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(n, columns, dtype=dtype, device=device)

    temperatures = moved(problem.temperatures, device)
    whole = R.TopkJob(
        n=n,
        vocab=vocab,
        side=R.Rows(model.values, None, temperatures),
        temperatures=temperatures,
        ids=of(problem.k, torch.int32),
        values=of(problem.k),
        statistics=of(1 + 3 * temperatures.numel()),
        targets=problem.targets,
        target_values=of(problem.targets.shape[1]),
        target_ranks=of(problem.targets.shape[1], torch.int32),
        uniforms=of(0),
        samples=of(problem.samples, torch.int32),
    )
    one = torch.ones(min(chunk, n), dtype=torch.float64, device=device)
    with borrow(size, device) as workspace:
        for start in range(0, n, chunk):
            part = slice(start, min(n, start + chunk))
            count = part.stop - start
            tokens = torch.arange(start, part.stop, device=device)
            workspace.again()
            kernel(
                R.TopkJob(
                    n=count,
                    vocab=vocab,
                    side=side.project(start, part.stop, workspace, one[:count]),
                    temperatures=temperatures,
                    ids=whole.ids[part],
                    values=whole.values[part],
                    statistics=whole.statistics[part],
                    targets=whole.targets[part],
                    target_values=whole.target_values[part],
                    target_ranks=whole.target_ranks[part],
                    # Ascending: a kernel then visits each part of the row once.
                    uniforms=uniforms(problem.seed, tokens, problem.samples).sort(dim=1).values,
                    samples=whole.samples[part],
                )
            )
    return whole
