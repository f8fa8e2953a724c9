"""Losses that carry one set onto another at least cost: features of a batch, states of sequences, classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.arguments import (
    check_positive,
    check_reduction,
    check_resources,
    is_number,
    refuse_transforms,
    saveable,
)
from kd_kernels.ops.backward import differentiable_once
from kd_kernels.ops.checks import IGNORED, check_range, checks_values
from kd_kernels.points import check_points, check_points_mask
from kd_kernels.sinkhorn import ORDERS, apart_from_nan, class_cost, sinkhorn
from kd_kernels.sources import result_dtype

COSTS = ("cosine", "attention", "euclidean", "l1")
GRADIENTS = ("implicit", "unrolled")


@dataclass(frozen=True, eq=False)
class TransportParts:
    """What a user looks at beside the loss; detached, one number per problem (float32 or float64)."""

    loss: Tensor
    product_gap: Tensor
    """KL in nats of the plan from the product of its marginals. Near 0 the plan says nothing: the term is
    then the mean cost, whatever the student does with its pairing."""
    marginal_error: Tensor


def feature_transport(
    student: Tensor,
    teacher: Tensor,
    *,
    cost: str = "cosine",
    epsilon: float,
    iterations: int = 100,
    order: str = "rows_columns",
    entropic: bool = False,
    gradient: str = "implicit",
    mask: Optional[Tensor] = None,
    teacher_grad: bool = False,
    return_parts: bool = False,
    backend: Optional[str] = None,
) -> Tensor | tuple[Tensor, TransportParts]:
    """Entropic transport between a batch of student features and the teacher's, with uniform marginals.

    The primal term of WCoRD (Chen et al. 2021): ``<P, C>`` with ``C_ij = 1 - cos(x_i, y_j)``.

    Args:
        student: ``[N, D]``, after the user's projector: the widths are the same.
        teacher: ``[M, D]``; a constant unless ``teacher_grad``. With ``mask``, M = N.
        cost: "cosine", "attention", "euclidean" or "l1"; see :func:`sequence_transport`.
        epsilon: > 0, in units of the cost.
        iterations: of Sinkhorn, each of both half-steps; "order" says which comes last and is exact.
        entropic: the loss is the entropic value, ``<P, C> + epsilon KL(P | a b)`` at convergence and less
            before (``value`` of :class:`kd_kernels.Transport`).
        gradient: "implicit", of the converged coupling, or "unrolled", of the number returned, back through
            the iterations: what published code with few of them has.
        mask: bool ``[N]``, True = counts, for both sides.
        return_parts: also a :class:`TransportParts`, of one problem.
        backend: of :func:`kd_kernels.sinkhorn`, by name, or None for the first that serves the device.

    Returns:
        0-d float32 (float64 for float64 inputs); 0 where no row counts.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.

    Double backward raises; ``torch.func`` transforms are refused.
    """
    _check_pair(student, teacher, "[N, D]")
    masks = None
    if mask is not None:
        if len(student) != len(teacher):
            raise ValueError(
                f"mask needs as many student rows as teacher rows, got {len(student)} and {len(teacher)}"
            )
        check_points_mask("mask", mask, student)
        masks = mask[None]
    loss, parts = _transport(
        "feature_transport",
        student[None], teacher[None], masks, masks, cost, epsilon, iterations, order, entropic, gradient,
        teacher_grad, backend,
    )  # fmt: skip
    return (loss.sum(), parts) if return_parts else loss.sum()


def sequence_transport(
    student: Tensor,
    teacher: Tensor,
    *,
    cost: str = "cosine",
    epsilon: float,
    iterations: int = 100,
    order: str = "columns_rows",
    entropic: bool = False,
    gradient: str = "implicit",
    student_mask: Optional[Tensor] = None,
    teacher_mask: Optional[Tensor] = None,
    reduction: str = "mean",
    teacher_grad: bool = False,
    return_parts: bool = False,
    backend: Optional[str] = None,
) -> Tensor | tuple[Tensor, TransportParts]:
    """Entropic transport between the states of each student sequence and its teacher's.

    One problem per sequence, between the positions that count, with uniform marginals: the two sequences may
    have different lengths (another tokenizer). CoT2Align's term is ``0.25 * sequence_transport(...,
    cost="attention", epsilon=10)`` at the first and last layer; docs/transport.md says why one would not.

    Args:
        student: ``[B, T, D]``.
        teacher: ``[B, S, D]``, of the same width (the projector is the caller's, and gets its gradient
            through ``teacher_grad=True`` where it works on the teacher's states); a constant otherwise.
        cost: between the states x_i and y_j: "cosine" ``1 - cos(x_i, y_j)``; "attention"
            ``1 - softmax_j(x_i . y_j / sqrt(D))``; "euclidean" ``|x_i - y_j|``; "l1" the sum of the
            absolute differences, for rows that are distributions.
        epsilon: > 0, in units of the cost (CoT2Align's ``1 / alpha``).
        iterations, order, entropic, gradient, backend: as for :func:`feature_transport`, but for the default
            of ``order``.
        student_mask, teacher_mask: bool ``[B, T]`` and ``[B, S]``, True = counts.
        reduction: "mean" over the sequences that have positions on both sides, "sum", or "none" for ``[B]``.
        return_parts: also a :class:`TransportParts`, ``[B]`` each.

    Returns:
        0-d, or ``[B]``; float32 (float64 for float64 inputs). A sequence without positions gives 0.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.

    Double backward raises; ``torch.func`` transforms are refused.
    """
    _check_pair(student, teacher, "[B, T, D]")
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher must have the same B, got {len(student)} and {len(teacher)}")
    check_reduction(reduction)
    for name, mask, states in (
        ("student_mask", student_mask, student),
        ("teacher_mask", teacher_mask, teacher),
    ):
        if mask is not None:
            check_points_mask(name, mask, states)
    loss, parts = _transport(
        "sequence_transport",
        student, teacher, student_mask, teacher_mask, cost, epsilon, iterations, order, entropic, gradient,
        teacher_grad, backend,
    )  # fmt: skip
    counted = _nonempty(student, student_mask) & _nonempty(teacher, teacher_mask)
    loss = _reduced(loss, counted.sum(), reduction)
    return (loss, parts) if return_parts else loss


def class_transport(
    student_logits: Tensor,
    teacher_logits: Tensor,
    cost: Tensor,
    labels: Optional[Tensor] = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 10,
    temperature: float = 2.0,
    order: str = "columns_rows",
    domain: str = "scaling",
    target_weight: float = 0.0,
    denominator_eps: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    teacher_grad: bool = False,
    return_parts: bool = False,
    backend: Optional[str] = None,
) -> Tensor | tuple[Tensor, TransportParts]:
    """Entropic transport between two distributions over classes whose distances are known (WKD-L).

    ``<P, C>`` per sample between the softmaxes at ``temperature``, the label's class removed from both
    (Lv et al. 2024). All samples share the cost, so a half-step of all of them is one matrix product; a
    removed class is a marginal of 0, so nothing is copied. The gradient is that of the number returned:
    through the iterations and both marginals, as in the published code.

    Args:
        student_logits, teacher_logits: ``[N, C]``; the teacher's are constants unless ``teacher_grad``.
        cost: ``[C, C]``; a constant. ``inf`` forbids a pair.
        labels: ``[N]`` integers: the class that is removed. None: no class is. A sample with ``ignore_index``
            does not count.
        epsilon, iterations, temperature, order: published defaults.
        domain: as in :func:`kd_kernels.sinkhorn`. ``"scaling"``, the published one: a row of the cost (if
            columns come first, a column) may span 87 epsilon, 708 in float64. ``"log"`` takes any cost, at an
            exponential per entry and sample. ``"auto"`` looks at the cost, for which it waits for a GPU.
            Wide costs need more iterations: look at ``marginal_error``.
        target_weight: adds ``target_weight * (-p_y log q_y)`` at temperature 1, the published binary term
            (which has weight 1 there, the transport 30 with a cosine decay). Needs labels.
        denominator_eps: added to every denominator of the iterations; 1e-8 in the published code. Only with
            ``domain="scaling"``.
        reduction: "mean" over the samples that count, "sum", or "none" for ``[N]``.
        return_parts: also :class:`TransportParts` per sample, of the transport alone.
        backend: name of a backend, or None for the first that serves the call.

    Returns:
        0-d or ``[N]``, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do. What
            :func:`kd_kernels.sinkhorn` refuses.
        BackendUnavailable: the named backend cannot serve the call.
    """
    _check_classes(student_logits, teacher_logits, cost, labels)
    check_resources(ignore_index, backend, None, None)
    _check_options(epsilon, iterations, order)
    check_reduction(reduction)
    check_positive("temperature", temperature)
    if not is_number(target_weight) or not -math.inf < target_weight < math.inf:
        raise ValueError(f"target_weight must be a finite number, got {target_weight!r}")
    if target_weight and labels is None:
        raise ValueError("target_weight needs labels")
    if not is_number(denominator_eps) or not 0 <= denominator_eps < math.inf:
        raise ValueError(f"denominator_eps must be a finite number >= 0, got {denominator_eps!r}")
    if denominator_eps and domain != "scaling":
        raise ValueError(f'denominator_eps needs domain="scaling", got {domain!r}')
    dtype = result_dtype(student_logits, teacher_logits)
    labels = None if labels is None else labels.to(torch.int64)  # small types would wrap in comparisons
    if labels is not None and not torch.compiler.is_compiling() and checks_values(cost.device):
        check_range("labels", labels[labels != ignore_index], len(cost), otherwise=IGNORED)
    z, y = student_logits.to(dtype), (teacher_logits if teacher_grad else teacher_logits.detach()).to(dtype)
    counts = torch.ones(len(z), dtype=torch.bool, device=z.device)
    here = torch.ones_like(z, dtype=torch.bool)
    label = counts.new_zeros(len(z), 1, dtype=torch.int64)
    if labels is not None:
        counts = labels != ignore_index
        z, y = (torch.where(counts[:, None], x, 0.0) for x in (z, y))
        label = torch.where(counts, labels, 0).to(torch.int64).clamp(0, z.shape[1] - 1)[:, None]
        here = here.scatter(1, label, False)
    # A sample without distributions is NaN, and solved as an empty one.
    held = [(x / temperature).masked_fill(~here, -torch.inf).softmax(1) for x in (z, y)]
    sound = ~(held[0] + held[1]).isnan().any(1)
    a, b = (torch.where(sound[:, None], x, 0.0) for x in held)
    lost = sum(torch.where(sound[:, None], 0.0, x).sum(1) for x in (z, y))
    lost = lost * torch.where(sound, 0.0, torch.nan).to(lost.dtype)  # in the gradients of both sides too
    transport, gap, error = class_cost(
        cost.detach().to(dtype), a, b, epsilon=epsilon, iterations=iterations, domain=domain, order=order,
        denominator=denominator_eps, backend=backend,
    )  # fmt: skip
    loss = transport + lost
    parts = TransportParts(loss.detach(), gap, error)
    if target_weight:
        p, log_q = y.softmax(1).gather(1, label), z.log_softmax(1).gather(1, label)
        loss = loss - target_weight * (p * torch.where(p == 0, 0.0, log_q))[:, 0]
    if labels is not None:
        loss = torch.where((labels == label[:, 0]) | ~counts, loss, torch.nan)  # where nothing was checked
    loss = _reduced(torch.where(counts, loss, 0.0), counts.sum(), reduction)
    return (loss, parts) if return_parts else loss


def _transport(
    function: str, student: Tensor, teacher: Tensor, student_mask: Optional[Tensor],
    teacher_mask: Optional[Tensor], cost: str, epsilon: float, iterations: int, order: str, entropic: bool,
    gradient: str, teacher_grad: bool, backend: Optional[str],
) -> tuple[Tensor, TransportParts]:  # fmt: skip
    _check_options(epsilon, iterations, order)
    if cost not in COSTS:
        raise ValueError(f"cost must be one of {', '.join(COSTS)}, got {cost!r}")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    refuse_transforms(f"kd_kernels.{function}", student, teacher)
    student, teacher, student_mask, teacher_mask = (
        saveable(x) for x in (student, teacher, student_mask, teacher_mask)
    )
    dtype = result_dtype(student, teacher)
    x, a = _states(student.to(dtype), student_mask)
    y, b = _states((teacher if teacher_grad else teacher.detach()).to(dtype), teacher_mask)
    x, y = (differentiable_once(function, states) for states in (x, y))
    empty = ~(a.any(1) & b.any(1))[:, None]
    a, b = a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)
    pairwise = {"cosine": _cosine, "attention": _attention, "euclidean": _euclidean, "l1": _l1}[cost]
    with torch.autocast(x.device.type, enabled=False):
        costs = pairwise(x, y, b > 0)
    costs, lost = apart_from_nan(costs, (a > 0)[:, :, None] & (b > 0)[:, None, :])
    found = sinkhorn(
        costs, a, b, epsilon=epsilon, iterations=iterations, order=order, backend=backend,
        gradient="envelope" if entropic and gradient == "implicit" else gradient,
    )  # fmt: skip
    loss = (found.value if entropic else found.transport_cost) + lost
    return loss, TransportParts(loss.detach(), found.product_gap, found.marginal_error)


def _states(x: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """States without what does not count, and uniform weights of those that do."""
    if mask is None:
        return x, x.new_full(x.shape[:2], 1.0 / max(x.shape[1], 1))
    weights = mask.to(x.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask[:, :, None], x, 0.0), weights


def _cosine(x: Tensor, y: Tensor, there: Tensor) -> Tensor:
    return 1.0 - _unit(x) @ _unit(y).transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    """A state of nothing but zeros stays one, without gradient: its cosines are 0."""
    if x.shape[-1] == 0:
        return x
    largest = x.detach().abs().amax(-1, keepdim=True)  # of any size, squares must not overflow or vanish
    x = x / torch.where(largest > 0, largest, 1.0)
    squared = x.square().sum(-1, keepdim=True)
    return torch.where(squared == 0, 0.0, x * torch.where(squared == 0, 1.0, squared).rsqrt())


def _attention(x: Tensor, y: Tensor, there: Tensor) -> Tensor:
    scores = x @ y.transpose(1, 2) / max(x.shape[-1], 1) ** 0.5
    # A sequence without any position would make NaN of its softmax.
    there = there | ~there.any(1, keepdim=True)
    return 1.0 - scores.masked_fill(~there[:, None, :], -torch.inf).softmax(2)


def _euclidean(x: Tensor, y: Tensor, there: Tensor) -> Tensor:
    # Not through the Gram matrix, which would lose the digits of near states.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _l1(x: Tensor, y: Tensor, there: Tensor) -> Tensor:
    return torch.cdist(x, y, p=1.0)


def _nonempty(states: Tensor, mask: Optional[Tensor]) -> Tensor:
    if mask is None:
        return torch.full(states.shape[:1], states.shape[1] > 0, device=states.device)
    return mask.any(1)


def _reduced(loss: Tensor, count: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / count.clamp(min=1) if reduction == "mean" else loss.sum()


# --- checks -------------------------------------------------------------------------------------------


def _check_pair(student: Tensor, teacher: Tensor, shape: str) -> None:
    check_points(("student", student), ("teacher", teacher), shape=shape)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student and teacher must have the same width, got {student.shape[-1]} and {teacher.shape[-1]}; "
            f"project one of them"
        )


def _check_classes(student: Tensor, teacher: Tensor, cost: Tensor, labels: Optional[Tensor]) -> None:
    check_points(("student_logits", student), ("teacher_logits", teacher), ("cost", cost), shape="[N, C]")
    refuse_transforms("kd_kernels.class_transport", student, teacher, cost)
    if teacher.shape != student.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    classes = student.shape[1]
    if cost.shape != (classes, classes):
        raise ValueError(f"cost must be [C, C] = {(classes, classes)}, got {tuple(cost.shape)}")
    if cost.requires_grad and torch.is_grad_enabled():
        raise ValueError("cost requires grad, but is not differentiated; pass cost.detach()")
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != student.shape[:1]:
        raise ValueError(f"labels must be [N] = {tuple(student.shape[:1])}, got {tuple(labels.shape)}")
    if labels.device != student.device:
        raise ValueError(f"labels is on {labels.device}, student_logits on {student.device}")
    if classes < 2:
        raise ValueError("labels remove a class: there must be at least 2")


def _check_options(epsilon: float, iterations: int, order: str) -> None:
    check_positive("epsilon", epsilon)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an int >= 1, got {iterations!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
