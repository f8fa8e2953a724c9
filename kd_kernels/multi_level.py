"""Multi-Level OT: a student and a teacher of any two vocabularies, token by token and by whole sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_kernels.arguments import (
    check_per_token,
    check_positive,
    check_source,
    detached,
    outside_graphs,
    refuse_transforms,
    saveable_source,
)
from kd_kernels.sources import Source, as_source, result_dtype
from kd_kernels.standardised import Standardised
from kd_kernels.transport import sequence_transport

MATCHES, LOGARITHMS = ("order", "nearest"), ("student", "teacher")


@dataclass(frozen=True, eq=False)
class MultiLevelParts:
    """The three terms before their weights, 0-d, and what to look at beside them; all detached."""

    absolute: Tensor
    logarithmic: Tensor
    sinkhorn: Tensor
    product_gap: Tensor
    """``[B]``, nats: see :class:`kd_kernels.TransportParts`. Near 0 the third term is a mean of distances."""


@outside_graphs
def multi_level_transport(
    student: Source | Tensor,
    teacher: Source | Tensor,
    *,
    student_mask: Tensor,
    teacher_mask: Tensor,
    top_k: int = 50,
    match: str = "order",
    temperature: float = 1.0,
    teacher_temperature: Optional[float] = None,
    logarithmic_weight: float = 0.1,
    log_of: str = "student",
    sinkhorn_weight: float = 1e-4,
    sinkhorn_temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 10,
    padding: bool = False,
    teacher_grad: bool = False,
    return_parts: bool = False,
    backend: Optional[str] = None,
    workspace_bytes: Optional[int] = None,
) -> Tensor | tuple[Tensor, MultiLevelParts]:
    """Multi-Level OT (Cui et al. 2025): probabilities of a few entries of each vocabulary, compared position
    by position and by transport between the positions of a sequence.

    Each token's logits are divided by their own standard deviation over the vocabulary (+ 1e-4) and the
    temperature, and softmaxed. ``top_k`` entries of either vocabulary are kept, the same ones for all tokens
    (``match``): call their probabilities q and p, the i-th position of one answer beside the i-th of the
    other. With s and t the softmaxes *of those probabilities*, the terms are

    * absolute: ``sum_k |q_k - p_k|``, mean over the positions that both answers have, mean over the samples;
    * logarithmic: ``-sum_k t_k log s_k``, likewise;
    * Sinkhorn: :func:`kd_kernels.sequence_transport` per sample with the L1 cost between the softmaxes at
      ``sinkhorn_temperature``, each student position of mass 1; a *sum* over the samples, as published.

    The loss is ``absolute + logarithmic_weight * logarithmic + sinkhorn_weight * sinkhorn``; published code
    multiplies it by 1.5 and adds the cross-entropy. docs/transport.md has the table of conventions, and says
    by how little the last two terms can change.

    Args:
        student, teacher: :class:`Head`, :class:`Logits` or logits ``[B, T, V]`` and ``[B, S, W]``. Logits of
            -inf have no standard deviation: leave such entries out of the vocabulary.
        student_mask, teacher_mask: bool ``[B, T]`` and ``[B, S]``: the rows that predict the answer's tokens,
            such as ``kd.next_token_labels(labels) != -100``. Other rows are not projected and may hold
            anything.
        top_k: entries kept of each vocabulary, or all where it has fewer.
        match: "order": the largest sums of probabilities over the whole batch, largest first, on both sides.
            "nearest": the teacher's so, and for each of these in turn the student's entry, not yet taken,
            that is nearest in L1 over the positions of the sample; holds ``[B, top_k, V]`` distances.
        temperature, teacher_temperature: > 0; the teacher's is the student's where it is None.
        log_of: whose softmax stands in the logarithm; "teacher", the roles exchanged, is what published code
            computes.
        epsilon, iterations: of the Sinkhorn term, whose gradient goes back through the iterations.
        padding: True fills all answers of both sides up with zeros to the longest one and counts these
            positions in the last two terms, as published code does.
        teacher_grad: also differentiate the teacher, which is a constant otherwise.
        return_parts: also :class:`MultiLevelParts`.
        backend: of :func:`kd_kernels.sinkhorn`; the rest is plain torch on the sources' device.
        workspace_bytes: what the logits of a chunk of tokens and the work on them may take.

    Returns:
        0-d float32 (float64 for float64 inputs); 0 where no sample has positions on both sides.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.

    Waits for a GPU, to know how long the answers are. The logits are made a few tokens at a time, once, and
    again in the backward pass (and for ``match="nearest"``). Double backward raises; ``torch.func``
    transforms are refused. ``torch.compile`` leaves a call as it stands, between two graphs.

    Source: Cui et al. 2025, "Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge
    Distillation on Language Models" (AAAI), and its code, 2018cx/Multi-Level-OT.
    """
    student, teacher = as_source("student", student), as_source("teacher", teacher)
    refuse_transforms("kd_kernels.multi_level_transport", *student.tensors(), *teacher.tensors())
    _check(student, teacher, student_mask, teacher_mask, top_k, match, log_of)
    hot = temperature if teacher_temperature is None else teacher_temperature
    for name, value in (
        ("temperature", temperature),
        ("teacher_temperature", hot),
        ("sinkhorn_temperature", sinkhorn_temperature),
    ):
        check_positive(name, value)
    student, teacher = saveable_source(student), saveable_source(teacher)
    dtype = result_dtype(*(x for x in (*student.tensors(), *teacher.tensors()) if x is not None))
    own = _Side(student, student_mask, temperature, dtype, workspace_bytes)
    other = _Side(teacher if teacher_grad else detached(teacher), teacher_mask, hot, dtype, workspace_bytes)
    longest = max(own.longest, other.longest)

    teacher_ids = other.most_probable(top_k)
    p = other.at(teacher_ids, longest)
    if match == "order":
        student_ids = own.most_probable(top_k)
    else:
        student_ids = own.nearest(p.detach())
    q = own.at(student_ids, longest)
    width = max(q.shape[2], p.shape[2])
    q, p = (F.pad(x, (0, width - x.shape[2])) for x in (q, p))

    both = own.present(longest) & other.present(longest)
    samples = both.any(1).sum().clamp(min=1)

    def mean(each: Tensor, positions: Tensor) -> Tensor:
        each = torch.where(positions, each, 0.0).sum(1) / positions.sum(1).clamp(min=1)
        return each.sum() / samples

    absolute = mean((q - p).abs().sum(2), both)
    inside, outside = (q, p) if log_of == "student" else (p, q)
    logarithmic = -(outside.softmax(2) * inside.log_softmax(2)).sum(2)
    if padding:
        logarithmic = logarithmic.sum() / max(logarithmic.shape[0] * logarithmic.shape[1], 1)
    else:
        logarithmic = mean(logarithmic, both)
    transport, found = sequence_transport(
        *((x / sinkhorn_temperature).softmax(2) for x in (q, p)),
        student_mask=None if padding else own.present(longest),
        teacher_mask=None if padding else other.present(longest),
        cost="l1", epsilon=epsilon, iterations=iterations, gradient="unrolled", order="columns_rows",
        reduction="none", teacher_grad=teacher_grad, return_parts=True, backend=backend,
    )  # fmt: skip
    sizes = transport.new_full(transport.shape, longest) if padding else own.lengths.to(transport)
    sinkhorn = (transport * sizes).sum()
    loss = absolute + logarithmic_weight * logarithmic + sinkhorn_weight * sinkhorn
    if not return_parts:
        return loss
    terms = (x.detach() for x in (absolute, logarithmic, sinkhorn))
    return loss, MultiLevelParts(*terms, found.product_gap)


class _Side:
    """The answers' rows of one model, sample after sample."""

    def __init__(
        self, source: Source, mask: Tensor, temperature: float, dtype: torch.dtype, workspace: Optional[int]
    ) -> None:
        self.rows = Standardised(source, mask.reshape(-1).nonzero()[:, 0], temperature, dtype, workspace)
        self.sums = self.rows.measure()
        self.lengths = mask.sum(1)
        self.lengths_on_host = self.lengths.tolist()
        self.longest = max(self.lengths_on_host, default=0)

    def present(self, longest: int) -> Tensor:
        return torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]

    def most_probable(self, count: int) -> Tensor:
        """``[B, K]``, the same ids for all samples, largest sum first; among equal ones the smallest id."""
        ids = self.sums.sort(descending=True, stable=True).indices[:count]
        return ids.expand(len(self.lengths), -1)

    @torch.no_grad()
    def nearest(self, wanted: Tensor) -> Tensor:
        """``[B, K]``: for each column of ``wanted`` ``[B, L, K]`` the nearest one not yet taken."""
        vocab = len(self.sums)
        ids = self.lengths.new_zeros(len(wanted), min(wanted.shape[2], vocab))
        distance = wanted.new_zeros(*ids.shape, vocab)
        sample, position = self.present(wanted.shape[1]).nonzero().unbind(1)
        for rows, q in self.rows.probabilities():
            of_each = wanted[sample[rows], position[rows], : ids.shape[1]]
            for one in sample[rows].unique():
                here = sample[rows] == one
                distance[one] += torch.cdist(of_each[here].t(), q[here].t(), p=1.0)
        for k in range(ids.shape[1]):
            ids[:, k] = distance[:, k].argmin(1)
            distance.scatter_(2, ids[:, k, None, None].expand(-1, ids.shape[1], 1), torch.inf)
        return ids

    def at(self, ids: Tensor, longest: int) -> Tensor:
        """``[B, longest, K]``: probabilities of a sample's ids ``[B, K]`` at its positions, then zeros."""
        found = self.rows.kept(ids, self.lengths_on_host)
        present = self.present(longest)
        return found.new_zeros(*present.shape, ids.shape[1]).index_put((present,), found)


# --- checks -------------------------------------------------------------------------------------------


def _check(
    student: Source, teacher: Source, student_mask: Tensor, teacher_mask: Tensor,
    top_k: int, match: str, log_of: str,
) -> None:  # fmt: skip
    device = student.tensors()[0].device
    for name, source, mask in (("student", student, student_mask), ("teacher", teacher, teacher_mask)):
        check_source(name, source, device, "the student's values")
        lead = source.leading_shape
        if len(lead) != 2:
            raise ValueError(f"{name} must have the tokens [B, T], got the leading shape {tuple(lead)}")
        check_per_token(f"{name}_mask", mask, lead, device)
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}_mask must be a bool tensor (True = counts), got {mask.dtype}")
    if len(student_mask) != len(teacher_mask):
        raise ValueError(
            f"student and teacher must have the same B, got {len(student_mask)} and {len(teacher_mask)}"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k must be an int >= 1, got {top_k!r}")
    for name, value, known in (("match", match, MATCHES), ("log_of", log_of, LOGARITHMS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
