"""Log-probabilities of given ids, walked in chunks of tokens: one product forward; the backward pass projects
again, and carries the gradient on by two more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.backends import OVERWRITES, VOCABULARY_MAJOR, pick
from kd_kernels.drivers.chunks import cut
from kd_kernels.drivers.factor import common_factor
from kd_kernels.drivers.gathered import Gathered, new_job
from kd_kernels.drivers.selection import Selection
from kd_kernels.drivers.sides import Model, side_of
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.drivers.workspace import borrow


@dataclass
class LogprobProblem:
    """One call: what the op received, unpacked."""

    model: Model
    ids: Tensor  # [N, K]; -1: unused
    entropy: bool
    tokens: Tokens  # that have an id
    compute_dtype: Optional[torch.dtype]
    logits_dtype: Optional[torch.dtype]
    backend: Optional[str]
    workspace_bytes: Optional[int]


def walk_logprobs(
    problem: LogprobProblem, upstream: Optional[Tensor] = None, upstream_entropy: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, list[Optional[Tensor]], Tensor]:
    """Log-probabilities and entropies, or, given their upstream gradients, the gradients.

    Args:
        problem: the call.
        upstream: ``[N, K]`` float64; None: no gradients.
        upstream_entropy: ``[N]`` float64, or None.

    Returns:
        ``[N, K]`` and ``[N]`` float64 (0 where unused), and the gradients of the model's three tensors, to be
        multiplied by the factor that comes last.
    """
    model, device = problem.model, problem.model.values.device
    vocab, tokens = model.vocab_size, problem.tokens
    name, gather = pick("gather", device, problem.backend)
    vocabulary_major = model.is_head and name in VOCABULARY_MAJOR
    dtypes = problem.compute_dtype, problem.logits_dtype
    side = side_of(model, vocab, tokens, *dtypes, vocabulary_major, copy=name in OVERWRITES)

    ids = tokens.take(problem.ids)
    n = ids.shape[0]
    selection = Selection(ids, vocab)
    temperature = tokens.numbers(model.temperature, device, 1.0)
    g = g_entropy = None
    factor = torch.ones((), dtype=torch.float64, device=device)
    if upstream is not None:
        g = selection.merge(tokens.take(upstream), torch.add, 0.0)
        if upstream_entropy is not None:
            g_entropy = tokens.take(tokens.silenced(upstream_entropy))
        if model.is_head and g.numel() > 0:
            factor = _factor(g, g_entropy, temperature, problem)

    chunk, size = cut([side], n, vocab, device, problem.workspace_bytes, vocabulary_major)
    logprobs = torch.zeros(selection.ids.shape, dtype=torch.float64, device=device)
    entropies = torch.zeros(n, dtype=torch.float64, device=device)
    with borrow(size, device) as workspace:
        for start in range(0, n, chunk):
            part = slice(start, min(n, start + chunk))
            workspace.again()
            rows = side.project(part.start, part.stop, workspace, temperature[part])
            count = part.stop - part.start
            job = new_job(rows, selection.ids[part], count, vocab, False, problem.entropy)
            gather(job, R.STATISTICS)
            found = Gathered(job)
            logprobs[part] = found.log_q()[:, :-1]
            if problem.entropy:
                entropies[part] = found.entropy()
            if g is not None:
                _set_gradient(
                    job, found, g[part] / factor, None if g_entropy is None else g_entropy[part] / factor
                )
                gather(job, R.GRADIENT)
                side.carry(part.start, part.stop, rows)
    logprobs = selection.spread(logprobs, 0.0)
    bad = ((ids < -1) | (ids >= vocab)).any(1)  # never read
    logprobs = torch.where((ids < -1) | (ids >= vocab), torch.nan, logprobs)
    return (
        tokens.spread(logprobs),
        tokens.spread(torch.where(bad, torch.nan, entropies)),
        side.gradients(),
        factor,
    )


def _set_gradient(job: R.GatherJob, found: Gathered, g: Tensor, g_entropy: Optional[Tensor]) -> None:
    """d log q_j / du_v = [v = j] - q_v and dH / du_v = -q_v (log q_v + H), as the kernel's coefficients."""
    log_q, total = found.log_q(), g.sum(1, keepdim=True)
    q = log_q.exp()
    at_ids = g - q[:, :-1] * total
    soft = -q[:, -1] * total[:, 0]
    if g_entropy is not None:
        entropy = found.entropy()
        information = torch.where(log_q == -torch.inf, 0.0, q * (log_q + entropy[:, None]))
        at_ids = at_ids - g_entropy[:, None] * information[:, :-1]
        # log q_v = log share_v + log q_others
        soft = soft - g_entropy * information[:, -1]
        job.slope = torch.where(g_entropy == 0, 0.0, -q[:, -1] * g_entropy / found.temperature[:, 0])
    dead = (g == 0).all(1) if g_entropy is None else (g == 0).all(1) & (g_entropy == 0)
    job.soft = torch.where(dead, 0.0, soft / found.temperature[:, 0])
    job.at_ids = torch.where(dead[:, None] | (job.ids < 0), 0.0, at_ids / found.temperature)


def _factor(g: Tensor, g_entropy: Optional[Tensor], temperature: Tensor, problem: LogprobProblem) -> Tensor:
    """As the walk of the divergences: logit gradients near 1 while they are in the compute dtype."""
    top = (g.abs().amax(1) / temperature).amax()
    if g_entropy is not None:
        top = torch.maximum(top, (g_entropy.abs() / temperature).amax())
    return common_factor(top * abs(problem.model.scale), [problem.model], problem.compute_dtype)
