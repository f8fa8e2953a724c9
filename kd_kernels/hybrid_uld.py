"""TRL GOLD's hybrid loss: tokens of the same text compared directly, all others by the sorted L1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.arguments import (
    Scalar,
    check_per_token,
    check_positive,
    check_reduction,
    check_resources,
    check_sources,
    detached,
    is_number,
    outside_graphs,
    per_token,
    refuse_transforms,
    saveable,
    saveable_source,
)
from kd_kernels.dense_chunks import by_chunks, chunk_logits, chunks_of, wide_sums
from kd_kernels.distill import distill
from kd_kernels.objectives import JensenShannon, SortedWasserstein
from kd_kernels.ops.checks import check_log_mass, checks_values
from kd_kernels.sources import Source, as_source, result_dtype

# A matched token's probability counts as at least this, as in TRL, and without gradient below.
_LEAST = math.log(1e-8)
_NOTHING = -1e3  # logarithm of a probability of 0, in float64 too


@dataclass(frozen=True, eq=False)
class HybridParts:
    """The two terms of each pair before their weights: the leading shape, detached."""

    matched: Tensor
    unmatched: Tensor


def match_vocabularies(student: Mapping[str, int], teacher: Mapping[str, int]) -> Tensor:
    """``[M, 2]`` int64: ids (student, teacher) of the tokens that both vocabularies spell alike, in the order
    of the teacher's ids.

    Args:
        student, teacher: id by token, such as ``tokenizer.get_vocab()``.
    """
    for name, vocabulary in (("student", student), ("teacher", teacher)):
        if not isinstance(vocabulary, Mapping):
            got = type(vocabulary).__name__
            raise TypeError(f"{name} must map tokens to ids, as tokenizer.get_vocab() does, got {got}")
    pairs = sorted((i, student[token]) for token, i in teacher.items() if token in student)
    return torch.tensor([(own, other) for other, own in pairs], dtype=torch.int64).reshape(-1, 2)


@outside_graphs
def hybrid_uld(
    student: Source | Tensor,
    teacher: Source | Tensor,
    matches: Tensor,
    *,
    beta: float = 0.5,
    weights: Optional[tuple[float, float]] = None,
    student_log_mass: Scalar = 0.0,
    teacher_log_mass: Scalar = 0.0,
    temperature: float = 1.0,
    teacher_temperature: Optional[float] = None,
    token_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    teacher_grad: bool = False,
    return_parts: bool = False,
    backend: Optional[str] = None,
    workspace_bytes: Optional[int] = None,
) -> Tensor | tuple[Tensor, HybridParts]:
    """The cross-tokenizer loss of TRL's GOLD with ``uld_use_hybrid_loss``, of pairs of tokens.

    With q and p the probabilities at a pair's tokens times its masses (:meth:`AlignedSide.log_mass`), it is
    the sum of

    * matched: the generalised Jensen-Shannon sum of :class:`JensenShannon` over the matched entries alone,
      not normalised again, each probability at least 1e-8. Between masses that differ that is no divergence:
      it may be negative;
    * unmatched: :class:`SortedWasserstein` of the others; 0 where a side has none.

    Args:
        student, teacher: :class:`Head`, :class:`Logits` or logits, the pairs as leading dimensions
            (:meth:`AlignedSide.take`); vocabularies of any two sizes.
        matches: integer ``[M, 2]``: ids of matched tokens, (student, teacher); see
            :func:`match_vocabularies`.
        beta: in [0, 1], of the matched term; 0 is forward KL, 1 reverse KL.
        weights: of the matched and the unmatched term. None: M over the teacher's vocabulary size, and the
            rest of 1.
        student_log_mass, teacher_log_mass: <= 0, number or leading shape; differentiable, the teacher's too:
            detach a constant.
        temperature, teacher_temperature: > 0; the teacher's is the student's where it is None.
        token_weight: leading shape; multiplies each pair's loss, such as :meth:`Alignment.sample_weight`.
        reduction: "mean" over the pairs, "sum", or "none".
        teacher_grad: also differentiate the teacher, which is a constant otherwise.
        return_parts: also :class:`HybridParts`.
        backend: of the sorted L1; the matched term is plain torch on the sources' device.
        workspace_bytes: what the logits of a chunk of pairs and the work on them may take.

    Returns:
        0-d, or the leading shape; float32 (float64 for float64 inputs). 0 without pairs.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.

    The logits are made a few pairs at a time, and again in the backward pass unless the workspace holds all.
    Double backward raises; ``torch.func`` transforms are refused. ``torch.compile`` leaves a call as it
    stands, between two graphs.

    Source: TRL 1.16, ``trl.experimental.gold``; Boizard et al. 2024 (ULD).
    """
    student, teacher = as_source("student", student), as_source("teacher", teacher)
    refuse_transforms("kd_kernels.hybrid_uld", *student.tensors(), *teacher.tensors())
    check_sources(student, teacher, "truncate")
    hot = temperature if teacher_temperature is None else teacher_temperature
    check_positive("temperature", temperature)
    check_positive("teacher_temperature", hot)
    check_reduction(reduction)
    check_resources(-100, backend, workspace_bytes, None)
    JensenShannon(beta)  # checks it
    lead, device = student.leading_shape, student.tensors()[0].device
    sizes = student.vocab_size, teacher.vocab_size
    _check_matches(matches, sizes)
    if weights is None:
        share = len(matches) / sizes[1]
        weights = share, 1.0 - share
    weights = _two_numbers(weights)
    if not teacher_grad:
        teacher = detached(teacher)
    student, teacher, matches = saveable_source(student), saveable_source(teacher), saveable(matches)
    dtype = result_dtype(*(x for x in (*student.tensors(), *teacher.tensors()) if x is not None))
    matched = matches.to(device=device, dtype=torch.int64).unbind(1)
    others = [torch.ones(n, dtype=torch.bool, device=device).index_fill(0, ids, False).nonzero()[:, 0]
              for n, ids in zip(sizes, matched)]  # fmt: skip

    sums = [wide_sums(source) for source in (student, teacher)]

    def terms(own: Tensor, other: Tensor, own_mass: Tensor, other_mass: Tensor) -> Tensor:
        log_q, log_p = (
            (chunk_logits(source, chunk, dtype, sum_) / t).log_softmax(1) + mass[:, None]
            for source, sum_, chunk, t, mass in (
                (student, sums[0], own, temperature, own_mass),
                (teacher, sums[1], other, hot, other_mass),
            )
        )
        direct = _jensen_shannon(
            *(x[:, ids].clamp(min=_LEAST) for x, ids in zip((log_q, log_p), matched)), beta
        )
        if not all(len(ids) for ids in others):
            return torch.stack([direct, torch.zeros_like(direct)], 1)
        rest = [x[:, ids].clamp(min=_NOTHING) for x, ids in zip((log_q, log_p), others)]
        # NaN is its own row's, and would be refused as a mass.
        rest_masses = (torch.where(x.isnan().any(1), 0.0, x.logsumexp(1)) for x in rest)
        objective = SortedWasserstein(None, *rest_masses)
        ranked = distill(*rest, objective, reduction="none", teacher_grad=True, backend=backend)
        return torch.stack([direct, ranked], 1)

    values = [x.reshape(lead.numel(), x.shape[-1]) for x, *_ in (student.tensors(), teacher.tensors())]
    masses = [
        _of_pairs(name, x, lead, device).to(dtype)
        for name, x in (("student_log_mass", student_log_mass), ("teacher_log_mass", teacher_log_mass))
    ]
    chunks = [chunks_of(x, sum(sizes), dtype, workspace_bytes) for x in values]
    kept = [x for x in (*student.tensors(), *teacher.tensors(), matches, *masses) if x is not None]
    found = by_chunks(terms, kept, *chunks, *(x.split(len(chunks[0][0]) or 1) for x in masses))
    loss = (found * found.new_tensor(weights)).sum(1)
    if token_weight is not None:
        loss = loss * saveable(per_token("token_weight", token_weight, lead, device)).to(dtype)
    if reduction == "none":
        loss = loss.reshape(lead)
    else:
        loss = loss.sum() / (max(lead.numel(), 1) if reduction == "mean" else 1)
    if not return_parts:
        return loss
    return loss, HybridParts(*(x.detach().reshape(lead) for x in found.unbind(1)))


def _two_numbers(weights: Sequence[float]) -> tuple[float, ...]:
    try:
        found = tuple(float(x) for x in weights)
    except (TypeError, ValueError):
        found = ()
    if len(found) != 2 or not all(map(math.isfinite, found)):
        raise ValueError(f"weights must be two finite numbers, of matched and unmatched, got {weights!r}")
    return found


def _of_pairs(name: str, value: Scalar, lead: torch.Size, device: torch.device) -> Tensor:
    """A number, or one per pair, as ``[P]``; differentiable."""
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        check_log_mass(name, value)
        return torch.full((lead.numel(),), float(value), dtype=torch.float64, device=device)
    if value.dim() > 0:
        check_per_token(name, value, lead, device)
    if checks_values(device):
        check_log_mass(name, value.detach())
    return saveable(value).to(device).expand(lead).reshape(-1)


def _jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """``[n]``; of logarithms ``[n, M]`` of any two masses."""

    def weighted(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(1)

    if beta == 0:
        return weighted(log_p, log_q)
    if beta == 1:
        return weighted(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * weighted(log_p, log_m) + (1 - beta) * weighted(log_q, log_m)


def _check_matches(matches: Tensor, sizes: tuple[int, int]) -> None:
    if not isinstance(matches, Tensor) or matches.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"matches must be an integer tensor, got {getattr(matches, 'dtype', matches)!r}")
    if matches.dim() != 2 or matches.shape[1] != 2:
        raise ValueError(f"matches must be [M, 2], (student, teacher) ids, got {tuple(matches.shape)}")
    if len(matches) == 0 or not checks_values(matches.device):
        return
    for name, ids, size in zip(("student", "teacher"), matches.unbind(1), sizes):
        if ids.min() < 0 or ids.max() >= size:
            raise ValueError(
                f"matches names the {name}'s id {ids.max().item() if ids.min() >= 0 else ids.min().item()}, "
                f"but its vocabulary has {size} entries"
            )
        if len(ids.unique()) < len(ids):
            raise ValueError(f"matches names an id of the {name} more than once")
