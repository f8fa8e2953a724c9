"""Objectives whose tokens are coupled: one number for a group of tokens, not one for each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.arguments import check_per_token, outside_graphs, saveable
from kd_kernels.logprobs import linear_logprobs
from kd_kernels.objectives import Objective, SinkhornBatch
from kd_kernels.ops.checks import IGNORED, check_range, checks_values
from kd_kernels.ops.pairwise_l1 import pairwise_l1
from kd_kernels.ops.row_divergence import ARGUMENTS
from kd_kernels.regather import Gather, regathering_pairwise_l1
from kd_kernels.sinkhorn import apart_from_nan, sinkhorn
from kd_kernels.sources import Head, Source, SparseTarget, Teacher, result_dtype


def check_batch_options(
    objective: Objective,
    teacher: Teacher,
    reduction: str,
    groups: Optional[Tensor],
    token_weight: object,
    lead: torch.Size,
    device: torch.device,
) -> None:
    """Refuse what an objective of coupled tokens, or of single ones, has no meaning for."""
    if not isinstance(objective, SinkhornBatch):
        if groups is not None:
            raise ValueError(
                f"groups goes with objectives of coupled tokens (SinkhornBatch); {type(objective).__name__} "
                f"is a sum over single tokens"
            )
        return
    name = type(objective).__name__
    if reduction == "none":
        raise ValueError(
            f'{name} has one value for a group of tokens, not one for each: reduction must be "mean", "sum" '
            f'or "batchmean", got "none"'
        )
    if isinstance(teacher, SparseTarget):
        raise TypeError(
            f"{name} needs the teacher's probabilities of the whole vocabulary: a Head, Logits or a tensor "
            f"of logits, not a SparseTarget"
        )
    if token_weight is not None:
        raise ValueError(
            f"{name} couples its tokens: token_weight has no meaning for it; leave tokens out by mask"
        )
    if groups is not None:
        check_per_token("groups", groups, lead, device)
        if groups.dtype.is_floating_point or groups.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise TypeError(f"groups must be integers, got {groups.dtype}")


def sinkhorn_batch(
    objective: SinkhornBatch,
    student: Source,
    teacher: Source,
    gathers: Sequence[Optional[Gather]],
    groups: Optional[Tensor],
    weights: tuple[float, float],
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """The sum over all groups, 0-d, and ``[N, 4]`` terms: what ``row_divergence`` gives for ``arguments``.

    The terms' soft column is each row's share ``sum_j P_ij C_ij``; zeros where the call wants no parts.

    Args:
        objective: what is minimised.
        student, teacher: as in the arguments.
        gathers: of both, see :mod:`kd_kernels.regather`.
        groups: integers in the leading shape, or None.
        weights: of the transport cost, of the cross-entropy.
        arguments: see ``ops/row_divergence.py``.
    """
    call = dict(zip(ARGUMENTS, arguments))
    if call["temperature_squared"] and call["student_temperature"].dim():
        raise ValueError("SinkhornBatch: temperature_squared needs one temperature, not one for each token")
    soft_weight, hard_weight = weights
    hard = call["labels"] is not None and (hard_weight != 0 or call["parts"])
    _check_labels(call, min(student.vocab_size, teacher.vocab_size) if hard else student.vocab_size)
    members = _members(call, None if groups is None else groups.reshape(-1), student.leading_shape.numel())
    cost = _costs(call, gathers, members, exact=groups is not None)
    transport, share = _transport(objective, cost, (members >= 0).to(cost.dtype), call, soft_weight != 0)
    loss = soft_weight * transport if soft_weight != 0 else 0.0 * transport
    if call["temperature_squared"]:
        loss = loss * (call["student_temperature"] ** 2).to(loss.dtype)
    terms = torch.zeros(
        student.leading_shape.numel(), R.TERM_COLUMNS, dtype=torch.float64, device=cost.device
    )
    read = _Reader(call, student, teacher)
    if hard:
        nll = 0.0 - read.logprobs(call["labels"])
        terms[:, R.HARD] = nll.detach()
        if hard_weight != 0:
            loss = loss + hard_weight * nll.sum()
    if share is not None:
        rows = torch.where(members >= 0, share, 0.0).to(torch.float64)
        terms[:, R.SOFT].index_put_((members.clamp(min=0),), rows, accumulate=True)
        terms[:, R.STUDENT_ENTROPY] = read.entropy(read.student, call["student_temperature"])
        terms[:, R.TEACHER_ENTROPY] = read.entropy(read.teacher, call["teacher_temperature"])
    return loss, terms.to(loss.dtype)


# How many groups there are, and how long, is for their values to say.
grouped_sinkhorn_batch = outside_graphs(sinkhorn_batch)


def _check_labels(call: dict, vocab: int) -> None:
    """As the objectives of single tokens do; theirs is in an op, which a compiler does not look into."""
    labels, valid = call["labels"], call["valid"]
    if labels is not None and not torch.compiler.is_compiling() and checks_values(labels.device):
        check_range("labels", labels[valid], vocab, otherwise=IGNORED)


class _Reader:
    """What is known token by token, over the vocabulary that both models have."""

    def __init__(self, call: dict, student: Source, teacher: Source) -> None:
        vocab = min(student.vocab_size, teacher.vocab_size)
        self.student, self.teacher = (_cut(source, vocab) for source in (student, teacher))
        self.lead, self.valid = student.leading_shape, call["valid"]
        self.resources = {
            name: call[name] for name in ("backend", "logits_dtype", "workspace_bytes", "compact")
        }

    def _counted(self, ids: Tensor) -> Tensor:
        ids = ids if self.valid is None else torch.where(self.valid, ids, -1)
        return ids.reshape(self.lead)

    def logprobs(self, labels: Tensor) -> Tensor:
        """``[N]``, 0 at tokens that do not count."""
        labels = labels.to(torch.int64)
        # A negative one would mean an unused id there: out of range it is refused, or NaN.
        labels = self._counted(torch.where(labels < 0, self.student.vocab_size, labels))
        return linear_logprobs(self.student, labels, **self.resources).reshape(-1)

    def entropy(self, source: Source, temperature: Tensor) -> Tensor:
        any_id = self._counted(
            torch.zeros(self.lead.numel(), dtype=torch.int64, device=source.tensors()[0].device)
        )
        temperature = temperature.reshape(self.lead) if temperature.dim() else temperature
        options = {**self.resources, "temperature": temperature, "entropy": True}
        with torch.no_grad():  # as a decorator it would end a compiled graph
            return linear_logprobs(source, any_id, **options)[1].reshape(-1)


def _cut(source: Source, vocab: int) -> Source:
    """``source`` with the first ``vocab`` entries of its vocabulary."""
    if source.vocab_size == vocab:
        return source
    if isinstance(source, Head):
        bias = None if source.bias is None else source.bias[:vocab]
        return replace(source, weight=source.weight[:vocab], bias=bias)
    return replace(source, values=source.values[..., :vocab])


def _transport(
    objective: SinkhornBatch, cost: Tensor, marginal: Tensor, call: dict, counts: bool
) -> tuple[Tensor, Optional[Tensor]]:
    """``<P, C>`` of all groups together, and ``[G, L]`` the rows' shares of it where parts are wanted."""
    present = marginal[:, :, None] * marginal[:, None, :] > 0
    solvable, lost = apart_from_nan(cost, present)
    steps = objective.iterations
    if steps is None and objective.tolerance is None:
        steps = objective.published_iterations
    solution = sinkhorn(
        solvable,  # float64: small beside the distances
        marginal,
        marginal,
        epsilon=objective.epsilon,
        iterations=steps,
        tolerance=objective.tolerance,
        order="rows_columns",
        gradient="unrolled" if objective.tolerance is None else "implicit",
        return_plan=call["parts"],
        backend=call["backend"],
    )
    transport = solution.transport_cost
    if counts:  # a NaN in a row is its whole group's
        transport = transport + lost
    share = None
    if call["parts"]:
        share = torch.where(present, solution.plan * cost, 0.0).sum(2).detach()
        share = share + lost.detach()[:, None]
    dtype = result_dtype(call["student"], call["teacher"])
    return transport.sum().to(dtype), share


def _members(call: dict, groups: Optional[Tensor], tokens: int) -> Tensor:
    """``[G, L]``: see :func:`kd_kernels.ops.pairwise_l1.pairwise_l1`."""
    device, valid = call["student"].device, call["valid"]
    token = torch.arange(tokens, device=device)
    if groups is None:
        if valid is None:
            return token[None]
        return (token[valid] if call["compact"] else torch.where(valid, token, -1))[None]
    if valid is not None:
        token, groups = token[valid], groups[valid]
    _, group, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    order = torch.argsort(group, stable=True)
    group = group[order]
    place = torch.arange(group.numel(), device=device) - (sizes.cumsum(0) - sizes)[group]
    longest = int(sizes.max()) if sizes.numel() else 0
    members = torch.full((sizes.numel(), longest), -1, device=device)
    members[group, place] = token[order]
    return members


def _costs(call: dict, gathers: Sequence[Optional[Gather]], members: Tensor, exact: bool) -> Tensor:
    run = pairwise_l1
    if any(call["needs"]) and any(gathers):
        run = functools.partial(regathering_pairwise_l1, gathers)
    names = (
        *("student", "student_weight", "student_bias", "teacher", "teacher_weight", "teacher_bias"),
        *("student_temperature", "teacher_temperature"),
    )
    tensors = [saveable(call[name]) for name in names]
    cost, *_ = run(
        *tensors[:6],
        members,
        *tensors[6:],
        call["scalars"][:4],
        *(call[name] for name in ("compute_dtype", "logits_dtype", "backend", "workspace_bytes")),
        call["compact"] or exact,
        call["needs"],
    )
    return cost
