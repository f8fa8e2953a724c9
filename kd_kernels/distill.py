"""The public call: checks, masks, defaults, reduction. Everything below it works on flat tokens."""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.arguments import (
    Scalar,
    autocast_dtype,
    check_resources,
    check_sources,
    check_vocab,
    count,
    detached,
    is_number,
    number,
    per_token,
    refuse_transforms,
    saveable,
    shaping,
    valid_tokens,
)
from kd_kernels.backends import BackendUnavailable
from kd_kernels.batch_objectives import check_batch_options, grouped_sinkhorn_batch, sinkhorn_batch
from kd_kernels.objectives import Objective, SinkhornBatch, SortedWasserstein
from kd_kernels.ops.known_gradient import known_gradient
from kd_kernels.ops.row_divergence import row_divergence
from kd_kernels.reductions import check_num_items, check_reduction, reduced
from kd_kernels.regather import gathers_of, regathering_row_divergence
from kd_kernels.sources import Head, Source, SparseTarget, Teacher, as_source, as_teacher, result_dtype

__all__ = ["BackendUnavailable", "DistillationLoss", "Parts", "distill", "next_token_labels"]


class Parts(NamedTuple):
    """What the loss is made of; detached. Per-token tensors have the leading shape of the tokens and
    are 0 at tokens that do not count."""

    soft: Tensor
    """The divergence in nats, unweighted (without temperature squared)."""
    hard: Tensor
    """The cross-entropy with the labels at temperature 1, unweighted; 0 without labels."""
    student_entropy: Tensor
    """Entropy in nats of the student's distribution at its temperature."""
    teacher_entropy: Tensor
    """Entropy in nats of the teacher's distribution at its temperature."""
    valid_tokens: Tensor
    """0-d int64: how many tokens count."""
    error_bound: Tensor
    """By how much ``soft`` may be too small, of ``SortedWasserstein(top_k=)``; 0 for all else."""


def distill(
    student: Source | Tensor,
    teacher: Teacher | Tensor,
    objective: Objective,
    *,
    labels: Optional[Tensor] = None,
    ignore_index: int = -100,
    mask: Optional[Tensor] = None,
    token_weight: Optional[Tensor] = None,
    temperature: Scalar = 1.0,
    teacher_temperature: Optional[Scalar] = None,
    temperature_squared: bool = False,
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    reduction: str = "mean",
    num_items: Optional[Scalar] = None,
    vocab: str = "error",
    teacher_grad: bool = False,
    groups: Optional[Tensor] = None,
    compact: bool = True,
    return_parts: bool = False,
    backend: Optional[str] = None,
    logits_dtype: Optional[torch.dtype] = None,
    workspace_bytes: Optional[int] = None,
    vocab_group: Optional[torch.distributed.ProcessGroup] = None,
) -> Tensor | tuple[Tensor, Parts]:
    """Distillation loss of two models' next-token distributions, without ``[tokens, vocab]`` logits.

    Per token: ``hard_weight * CE(labels) + soft_weight * objective(p, q)``.

    Args:
        student: :class:`Head`, :class:`Logits` or a tensor of logits; leading dimensions are tokens.
        teacher: likewise, with the same leading shape; its hidden size may differ. A constant unless
            ``teacher_grad``. Or a :class:`SparseTarget`, which is a constant.
        objective: an entry of :mod:`kd_kernels.objectives`.
        labels: integer, leading shape, as they stand beside the hidden states (see
            :func:`next_token_labels`).
        ignore_index: tokens with this label do not count.
        mask: bool, leading shape; True = counts. Combines with ``labels``.
        token_weight: leading shape; multiplies each token's loss (the sum, not the denominator).
        temperature: > 0, number or leading shape; divides the student's logits, and the teacher's too
            unless it has its own. A :class:`SparseTarget` says which ones it can be brought to.
        teacher_temperature: > 0, number or leading shape; None: as ``temperature``.
        temperature_squared: multiply value and gradient of the divergence by the student's
            temperature squared.
        hard_weight: weight of the cross-entropy (at temperature 1); needs ``labels`` unless 0.
        soft_weight: weight of the divergence.
        reduction: ``"mean"``: sum / max(tokens that count, 1), or / ``num_items``; ``"sum"``;
            ``"batchmean"``: sum / size of the first dimension; ``"none"``: per token. The sum of an
            objective that couples tokens is that over its groups.
        num_items: > 0, denominator of ``"mean"``, number or 0-d tensor, on any device (gradient
            accumulation). 0 is taken where no token counts.
        vocab: ``"error"`` refuses unequal vocabularies, ``"truncate"`` restricts both models to the
            common prefix before any normaliser.
        teacher_grad: also compute the teacher's gradients.
        groups: integer, leading shape: which tokens form one problem of an objective that couples them
            (:class:`SinkhornBatch`); None: all that count. On CUDA it takes host synchronisations.
        compact: drop tokens that do not count before any projection. On CUDA that takes one host
            synchronisation; False keeps every row, silences those that do not count, and never
            synchronises. Same result.
        return_parts: also return :class:`Parts`.
        backend: name of a backend, or None for the first that serves the call.
        logits_dtype: None keeps logits of a head in float32 (float64 for float64); the input's own
            dtype trades accuracy for speed.
        workspace_bytes: scratch memory for logits, reused between calls. Default on CPU 256 MiB, on a GPU a
            32nd of its memory, 256 MiB to 4 GiB. Every chunk that it holds reads and writes all of the
            weight's gradient, so at vocabularies beyond 100,000 more is faster.
        vocab_group: the ranks that share the vocabulary of both models, each holding the part of weights,
            biases and logits that follows on that of the rank before; all else, and the loss, is the same on
            every rank. Gradients of weights and logits are of the rank's part, those of hidden states are
            summed over the ranks. Takes a host synchronisation. docs/vocabulary_parallel.md.

    Returns:
        float32 (float64 for float64 inputs): 0-d, or the leading shape for ``reduction="none"``, 0 at
        tokens that do not count. With ``return_parts`` a pair of that and :class:`Parts`.
        Without any token that counts: 0, connected to the graph.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.

    Inference-mode tensors are taken; they carry no version counter, so do not change one before the
    backward pass. Double backward is not implemented and raises; ``kd_kernels.reference.dense_distill`` has
    it, with all logits in memory. ``torch.func`` transforms are refused.
    """
    student, teacher = as_source("student", student), as_teacher(teacher)
    refuse_transforms("kd_kernels.distill", *student.tensors(), *teacher.tensors())
    _check_options(objective, vocab)
    check_reduction(reduction, num_items)
    _check_types(soft_weight, hard_weight, ignore_index, backend, workspace_bytes, logits_dtype)
    lead, device = student.leading_shape, student.tensors()[0].device
    ranked = isinstance(objective, SortedWasserstein)
    check_sources(student, teacher, "truncate" if ranked else vocab)
    check_batch_options(objective, teacher, reduction, groups, token_weight, lead, device)
    _check_vocab_group(vocab_group, objective, teacher, vocab)
    gathers = gathers_of(student, teacher)  # before the sources are rebuilt without them
    sparse = isinstance(teacher, SparseTarget)
    if sparse:
        hot = temperature if teacher_temperature is None else teacher_temperature
        _check_sparse(objective, teacher, hot, teacher_grad)
        teacher = teacher.constant(result_dtype(student.tensors()[0]))
        named = (saveable(teacher.ids), saveable(teacher.log_tail_mass), teacher.missing)
    elif not teacher_grad:
        teacher = detached(teacher)

    valid = valid_tokens(labels, ignore_index, mask, lead, device)
    check_num_items(num_items, valid, lead)
    if labels is None and hard_weight != 0:
        raise ValueError(f"hard_weight={hard_weight} needs labels; pass labels=, or hard_weight=0")
    t_s = per_token("temperature", temperature, lead, device)
    t_t = t_s
    if teacher_temperature is not None:
        t_t = per_token("teacher_temperature", teacher_temperature, lead, device)
    if sparse:
        t_t = t_t / teacher.temperature  # what is recorded has that in it
    weight = None if token_weight is None else per_token("token_weight", token_weight, lead, device)
    called = [f"{type(objective).__name__}'s {name}" for name in objective.parameter_names]
    p0, p1 = (per_token(name, x, lead, device) for name, x in zip((*called, "", ""), objective.parameters()))

    unreduced = reduction == "none"
    tensors = (*student.tensors(), *teacher.tensors())
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    # Gradients of existing logits are cheapest in the backward pass: one more read of the logits
    # against a [tokens, vocab] tensor held in between. Of hidden states, they belong in the forward.
    deferred = any(needs) and (unreduced or not isinstance(student, Head) and not isinstance(teacher, Head))
    if deferred:
        tensors = tuple(saveable(x) for x in tensors)
        valid, labels, weight, t_s, t_t, p0, p1 = (
            saveable(x) for x in (valid, labels, weight, t_s, t_t, p0, p1)
        )
    run = row_divergence
    if deferred and any(gathers):
        run = functools.partial(regathering_row_divergence, gathers)
    if isinstance(objective, SinkhornBatch):
        weights = soft_weight, hard_weight
        batch = sinkhorn_batch if groups is None else grouped_sinkhorn_batch
        run = functools.partial(batch, objective, student, teacher, gathers, groups, weights)
    loss, terms, *others = run(
        *tensors,
        *(named if sparse else (None, None, "")),
        valid,
        None if labels is None else labels.reshape(-1),
        t_s,
        t_t,
        weight,
        p0,
        p1,
        _scalars(student, teacher, soft_weight, hard_weight),
        objective.name,
        temperature_squared,
        autocast_dtype(student, teacher),
        logits_dtype,
        backend,
        workspace_bytes,
        compact,
        needs,
        return_parts,
        unreduced,
        deferred,
        objective.top_k,
        None if vocab_group is None else vocab_group.group_name,
    )
    if ranked:
        per_token_weight = (x for x in (weight, t_s**2 if temperature_squared else None) if x is not None)
        loss = _through_masses(loss, objective, others[0], soft_weight, list(per_token_weight))
    loss = reduced(loss, reduction, num_items, valid, lead)
    if not return_parts:
        return loss
    bounds = None if objective.top_k is None else others[0][:, R.ERROR_BOUND]
    return loss, _parts(terms, bounds, valid, lead)


def _through_masses(
    loss: Tensor, objective: SortedWasserstein, statistics: Tensor, soft_weight: float, weights: list[Tensor]
) -> Tensor:
    """``loss``, with the way back to the log masses: the op gave their gradients with its statistics."""
    for mass, column in zip(objective.masses(), (R.SUM_STUDENT, R.SUM_TEACHER)):
        if not isinstance(mass, Tensor) or not mass.requires_grad or not torch.is_grad_enabled():
            continue
        found = statistics[:, column]
        gradient = torch.zeros_like(found) if soft_weight == 0 else soft_weight * found
        for weight in weights:
            gradient = torch.where(weight == 0, 0.0, gradient * weight)
        term = known_gradient(mass.reshape(-1).to(torch.float64), gradient).to(loss.dtype)
        loss = loss + (term if loss.dim() else term.sum())
    return loss


def _parts(terms: Tensor, bounds: Optional[Tensor], valid: Optional[Tensor], lead: torch.Size) -> Parts:
    """From the op's terms ``[N, 4]`` and, of a top-K form, its bounds ``[N]``."""
    columns = [terms[:, i].detach().reshape(lead) for i in range(R.TERM_COLUMNS)]
    bound = torch.zeros_like(columns[R.SOFT])
    if bounds is not None:
        bound = bounds.detach().to(terms.dtype).reshape(lead)
    return Parts(*columns, valid_tokens=count(valid, lead, terms.device), error_bound=bound)


def next_token_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels moved one to the left, so that each stands beside the hidden state that predicts it.

    Args:
        labels: integer ``[..., T]``; the token at each position.
        ignore_index: fills the last position, which predicts nothing; :func:`distill` must be given the same.

    Returns:
        ``[..., T]``, a new tensor.

    Raises:
        ValueError, TypeError: labels that are no integers, or of a type that cannot hold ``ignore_index``.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dim() < 1:
        raise ValueError("labels must be [..., T], got a 0-d tensor")
    whole = not labels.dtype.is_floating_point and not labels.dtype.is_complex and labels.dtype != torch.bool
    if not whole or not torch.iinfo(labels.dtype).min <= ignore_index <= torch.iinfo(labels.dtype).max:
        raise TypeError(f"labels must be integers that can hold {ignore_index}, got {labels.dtype}")
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    return shifted


class DistillationLoss(torch.nn.Module):
    """:func:`distill` as a module: the objective and any of its options fixed at construction.

    ``DistillationLoss(JensenShannon(0.5), temperature=2.0)(student, teacher, labels=labels)``; options
    given in the call win.
    """

    def __init__(self, objective: Objective, **options) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(distill.__kwdefaults__ or {}))
        if unknown:
            raise TypeError(f"DistillationLoss: unknown option {', '.join(unknown)}; see kd.distill")
        _check_options(objective, options.get("vocab", "error"))
        self.objective = objective
        self.options = options

    def forward(self, student: Source | Tensor, teacher: Teacher | Tensor, **options):
        return distill(student, teacher, self.objective, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{k}={v!r}" for k, v in self.options.items())])


# --- checks -------------------------------------------------------------------------------------------


def _check_options(objective: Objective, vocab: str) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be an instance such as kd.ForwardKL() or kd.SkewKL(0.1), got {objective!r}"
        )
    check_vocab(vocab)


def _check_vocab_group(
    group: Optional[torch.distributed.ProcessGroup], objective: Objective, teacher: Teacher, vocab: str
) -> None:
    if group is None:
        return
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"vocab_group must be a torch.distributed.ProcessGroup that this rank is in (of a DeviceMesh: "
            f"mesh.get_group()), got {type(group).__name__}"
        )
    name = type(objective).__name__
    if isinstance(objective, (SinkhornBatch, SortedWasserstein)):
        raise ValueError(
            f"{name} compares whole rows and cannot be split over vocab_group; gather the weights"
        )
    if isinstance(teacher, SparseTarget):
        raise ValueError("a SparseTarget names tokens of all ranks and cannot go with vocab_group")
    if vocab == "truncate":
        raise ValueError('vocab="truncate" cannot go with vocab_group: cut both models before they are split')


def _check_sparse(
    objective: Objective, teacher: SparseTarget, temperature: Scalar, teacher_grad: bool
) -> None:
    if isinstance(objective, SortedWasserstein):
        _check_ranked_target(objective, teacher)
    if teacher_grad:
        raise ValueError("teacher_grad=True needs a teacher with gradients; a SparseTarget is a constant")
    teacher.check_temperature(temperature)


def _check_ranked_target(objective: SortedWasserstein, teacher: SparseTarget) -> None:
    k = teacher.ids.shape[-1]
    if objective.top_k is None or objective.top_k > k:
        raise ValueError(
            f"SortedWasserstein(top_k={objective.top_k}) against a SparseTarget of {k} ids: pass a top_k of "
            f"at most {k}; the exact value (None) needs the teacher's whole distribution"
        )
    if teacher.missing != "tail":
        raise ValueError(
            f'SortedWasserstein needs a SparseTarget with missing="tail", got {teacher.missing!r}: what is '
            f"known of the other tokens is their mass"
        )


def _check_types(
    soft_weight: float,
    hard_weight: float,
    ignore_index: int,
    backend: Optional[str],
    workspace_bytes: Optional[int],
    logits_dtype: Optional[torch.dtype],
) -> None:
    for name, weight in (("soft_weight", soft_weight), ("hard_weight", hard_weight)):
        if not is_number(weight):
            raise TypeError(
                f"{name} must be a number, got {type(weight).__name__}; weights per token go in token_weight"
            )
    check_resources(ignore_index, backend, workspace_bytes, logits_dtype)


def _scalars(student: Source, teacher: Teacher, soft_weight: float, hard_weight: float) -> Tensor:
    return torch.stack([*shaping(student, teacher), number(soft_weight), number(hard_weight)])
