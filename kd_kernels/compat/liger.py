"""Liger-Kernel's distillation losses (signatures of liger-kernel 0.8.5).

Constructor, call and positional order are Liger's; ``chunk_size`` and ``compiled`` are accepted and do
nothing, because chunks follow from ``kd.distill``'s workspace. Logits stay in float32 where Liger rounds
them to the inputs' dtype, a second ``backward(retain_graph=True)`` is right, and losses are float32.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kd_kernels.compat._shared import check_reduction, reduced
from kd_kernels.distill import distill
from kd_kernels.objectives import ForwardKL, JensenShannon, TotalVariation
from kd_kernels.ops.checks import checks_values
from kd_kernels.sources import Head, Source, as_source

__all__ = [
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivLoss",
    "LigerJSD",
    "LigerKLDIVLoss",
    "LigerTVDLoss",
]

_EPS_LIMIT = 1e-8  # a clamp below this moves a loss by less than float32 shows


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``: weighted cross-entropy and JSD from hidden
    states, each a sum / max(tokens that count, 1).

    Differs: a teacher with a larger vocabulary is refused (Liger gives the missing student entries the
    logit 0, which takes probability from the real ones); log-softmax is float32, not the inputs' dtype.

    Args:
        weight_hard_loss: weight of the cross-entropy, at temperature 1.
        weight_soft_loss: weight of the JSD; not scaled by temperature squared.
        beta: share of the teacher in the mixture, 0 forward KL, 1 reverse KL.
        ignore_index: tokens with this label do not count.
        temperature: > 0, of both models.
        compiled, chunk_size: accepted, without effect.
        return_soft_hard_loss: also return the two terms, unweighted and detached.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        JensenShannon(beta)
        _check_temperature(type(self).__name__, temperature)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Optional[Tensor] = None,
        teacher_bias: Optional[Tensor] = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Hidden ``[N, H]`` and ``[N, H']``, weights ``[V, H]`` and ``[V, H']``, labels ``[N]``, biases
        ``[V]``; returns the loss, or ``(loss, soft, hard)``."""
        _check_vocabularies(type(self).__name__, student_weight, teacher_weight)
        result = distill(
            Head(student_input, student_weight, student_bias),
            Head(teacher_input, teacher_weight, teacher_bias),
            JensenShannon(self.beta),
            labels=true_labels,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            hard_weight=self.weight_hard_loss,
            soft_weight=self.weight_soft_loss,
            return_parts=self.return_soft_hard_loss,
        )
        if not self.return_soft_hard_loss:
            return result
        loss, parts = result
        count = parts.valid_tokens.clamp(min=1)
        return loss, parts.soft.sum() / count, parts.hard.sum() / count


class LigerFusedLinearJSD(torch.nn.Module):
    """``liger_kernel.transformers.LigerFusedLinearJSD``: JSD from hidden states, sum / tokens that count.

    Differs: without any token that counts the result is 0; ``accum_dtype=None`` accumulates the weight's
    gradient in float32 too, where Liger takes the weight's dtype.

    Args:
        jsd_beta, ignore_index, temperature: as in :class:`LigerFusedLinearJSDLoss`.
        accum_dtype: accumulation is always float32 (float64 for float64 inputs); more is refused.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        JensenShannon(jsd_beta)
        _check_temperature(type(self).__name__, temperature)
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Optional[Tensor],
    ) -> Tensor:
        """Hidden ``[N, H]`` and ``[N, H']``, weights ``[V, H]`` and ``[V, H']``, labels ``[N]`` or None."""
        _check_vocabularies(type(self).__name__, student_weight, teacher_weight)
        _check_accumulation(type(self).__name__, self.accum_dtype, student_weight)
        return distill(
            Head(student_input, student_weight),
            Head(teacher_input, teacher_weight),
            JensenShannon(self.jsd_beta),
            labels=shift_labels,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
        )


class LigerFusedLinearKLDivLoss(torch.nn.Module):
    """``liger_kernel.transformers.LigerFusedLinearKLDivLoss``: forward KL of given target probabilities
    and the student's from hidden states; the temperature is the student's only.

    Differs: ``0 log 0`` is 0 instead of going through a clamp at ``eps``; ``eps`` above 1e-8, which would
    change the loss, is refused.

    Args:
        reduction: ``"batchmean"`` (sum / tokens that count), ``"mean"`` (that / V) or ``"sum"``.
        ignore_index, temperature, accum_dtype: as in :class:`LigerFusedLinearJSD`.
        eps: at most 1e-8, without effect.
    """

    def __init__(
        self,
        reduction: Optional[str] = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_reduction(owner, reduction)
        _check_temperature(owner, temperature)
        _check_eps(owner, eps)
        self.reduction = reduction
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.eps = eps
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Optional[Tensor] = None,
    ) -> Tensor:
        """Hidden ``[N, H]``, weight ``[V, H]``, target probabilities ``[N, V]``, labels ``[N]`` or None.

        Rows of ``target`` need not sum to 1: as in Liger, each counts with the mass it has.
        """
        _check_accumulation(type(self).__name__, self.accum_dtype, student_weight)
        return _kl_of_target(
            type(self).__name__,
            Head(student_input, student_weight),
            target,
            log_target=False,
            reduction=self.reduction,
            temperature=self.temperature,
            labels=shift_labels,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"temperature={self.temperature}, eps={self.eps}, accum_dtype={self.accum_dtype}"
        )


class LigerJSD(torch.nn.Module):
    """``liger_kernel.transformers.LigerJSD``: JSD of log-probabilities, sum / tokens that count.

    Differs: rows are normalised here (Liger trusts them), so the gradient at ``log_q`` already lies in
    the softmax's tangent space; behind ``log_softmax``, any model's gradient is the same as Liger's.

    Args:
        beta, ignore_index: as in :class:`LigerFusedLinearJSDLoss`.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        JensenShannon(beta)
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Optional[Tensor] = None) -> Tensor:
        """Student's and teacher's log-probabilities ``[N, V]``, labels ``[N]`` or None."""
        return distill(
            log_q, log_p, JensenShannon(self.beta), labels=shift_labels, ignore_index=self.ignore_index
        )


class LigerKLDIVLoss(torch.nn.KLDivLoss):
    """``liger_kernel.transformers.LigerKLDIVLoss``: ``torch.nn.KLDivLoss`` of log-probabilities.

    Differs: ``y_pred`` is normalised here, with the consequence :class:`LigerJSD` names; ``eps`` as in
    :class:`LigerFusedLinearKLDivLoss`; ``reduction="none"`` (``[N, V]`` terms) is refused.

    Args:
        eps: at most 1e-8, without effect.
        size_average, reduce, reduction, log_target: of ``torch.nn.KLDivLoss``; the default reduction,
            ``"mean"``, divides by N V.
    """

    def __init__(self, eps: float = 1e-10, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        check_reduction(type(self).__name__, self.reduction)
        _check_eps(type(self).__name__, eps)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Student's log-probabilities ``[N, V]``, target probabilities (or log-probabilities) ``[N, V]``."""
        if y_pred.dim() != 2:  # Liger's too: what a mean divides by would be in doubt
            raise ValueError(f"{type(self).__name__}: y_pred must be [N, V], got {tuple(y_pred.shape)}")
        return _kl_of_target(
            type(self).__name__,
            as_source("y_pred", y_pred),
            y_true,
            log_target=self.log_target,
            reduction=self.reduction,
        )


class LigerTVDLoss(torch.nn.Module):
    """``liger_kernel.transformers.LigerTVDLoss``: ``1/2 sum |p - q|`` of probabilities.

    Differs: rows are normalised here, with the consequence :class:`LigerJSD` names (behind ``softmax``);
    0 without any token that counts, where Liger divides by zero; ``reduction="none"`` is refused.

    Args:
        reduction: ``"batchmean"`` (sum / tokens that count), ``"mean"`` (that / V) or ``"sum"``.
        ignore_index: tokens with this label do not count.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        check_reduction(type(self).__name__, reduction)
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Optional[Tensor] = None) -> Tensor:
        """Student's probabilities ``p`` and teacher's ``q``, ``[N, V]``; labels ``[N]`` or None."""
        return reduced(
            type(self).__name__,
            self.reduction,
            _log(p),
            _log(q),
            TotalVariation(),
            labels=shift_labels,
            ignore_index=self.ignore_index,
        )


def _kl_of_target(
    owner: str,
    student: Source,
    target: Tensor,
    *,
    log_target: bool,
    reduction: str,
    temperature: float = 1.0,
    labels: Optional[Tensor] = None,
    ignore_index: int = -100,
) -> Tensor:
    check_reduction(owner, reduction)
    target = _wide(target.detach())
    log_p, mass = (target, target.exp().sum(-1)) if log_target else (target.log(), target.sum(-1))
    counts = torch.ones_like(mass, dtype=torch.bool) if labels is None else labels != ignore_index
    if checks_values(mass.device) and not mass[counts].isfinite().all():
        raise ValueError(f"{owner}: a row of the target has no finite mass (a NaN, or entries too large?)")
    # sum p log(p / q) over a row p of mass M is M KL(p / M || q) + M log M. A row of weight 0 counts as 0.
    total = distill(
        student,
        log_p,
        ForwardKL(),
        labels=labels,
        ignore_index=ignore_index,
        token_weight=mass,
        temperature=temperature,
        teacher_temperature=1.0,
        reduction="sum",
    )
    total = total + torch.where(counts, torch.special.xlogy(mass, mass), 0.0).sum()
    if reduction == "sum":
        return total
    return total / counts.sum().clamp(min=1) / (student.vocab_size if reduction == "mean" else 1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _log(probabilities: Tensor) -> Tensor:
    """``log p``, with a gradient of 0 instead of NaN at an entry that has underflowed to 0."""
    wide = _wide(probabilities)
    return wide.clamp(min=torch.finfo(wide.dtype).tiny).log()


def _check_temperature(owner: str, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"{owner}: temperature must be > 0, got {temperature}")


def _check_eps(owner: str, eps: float) -> None:
    if not 0 <= eps <= _EPS_LIMIT:
        raise ValueError(
            f"{owner}: eps must be in [0, {_EPS_LIMIT}], got {eps}; nothing is clamped here, and a larger "
            f"eps would have changed the loss"
        )


def _check_vocabularies(owner: str, student_weight: Tensor, teacher_weight: Tensor) -> None:
    for name, weight in (("student_weight", student_weight), ("teacher_weight", teacher_weight)):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{owner}: {name} must be a tensor [V, D], got {type(weight).__name__}")
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"{owner}: student_weight has {student_weight.shape[0]} vocabulary entries and teacher_weight "
            f"{teacher_weight.shape[0]}; padding the student's logits with 0, as Liger does, takes "
            f'probability from real entries: use kd.distill(..., vocab="truncate"), or cut the larger weight'
        )


def _check_accumulation(owner: str, accum_dtype: Optional[torch.dtype], weight: Tensor) -> None:
    if accum_dtype == torch.float64 and weight.dtype != torch.float64:
        raise ValueError(
            f"{owner}: accum_dtype=torch.float64 with a {weight.dtype} weight; gradients accumulate in "
            f"float32 here (in float64 for float64 inputs): pass accum_dtype=torch.float32 or None"
        )
