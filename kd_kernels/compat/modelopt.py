"""NVIDIA ModelOpt's distillation losses (``modelopt.torch.distill``, as of 0.47)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kd_kernels.distill import distill, next_token_labels
from kd_kernels.objectives import ForwardKL, ReverseKL
from kd_kernels.sources import Source, as_source

__all__ = ["LogitsDistillationLoss", "LogitsKLLoss", "standard_kd_loss"]


class LogitsKLLoss(torch.nn.Module):
    """ModelOpt's Megatron ``LogitsKLLoss``: per-token KL, *without* temperature squared.

    Differs: tensor parallelism above 1 is refused; each rank would see a part of the vocabulary.

    Args:
        model_config: its ``tensor_model_parallel_size``, where it has one, must be 1.
        temperature: > 0, of both models.
        reverse: ``KL(q || p)`` instead of ``KL(p || q)``, teacher ``p``.
    """

    def __init__(self, model_config: object, temperature: float = 1.0, reverse: bool = False) -> None:
        super().__init__()
        size = getattr(model_config, "tensor_model_parallel_size", 1)
        if size != 1:
            raise ValueError(
                f"LogitsKLLoss: model_config.tensor_model_parallel_size is {size}; vocabulary-parallel "
                f"logits are not covered here: kd.distill takes each rank's part with vocab_group=, or use "
                f"ModelOpt's own LogitsKLLoss, or gather the logits"
            )
        self._temperature = temperature
        self._reverse = reverse

    def forward(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, bool, bool]:
        """Student's and teacher's logits ``[s, b, V]`` (or both as tuples that begin with them, as a
        ``ColumnParallelLinear`` returns); ``(loss [b, s], tp_reduce=True, is_sequence_parallel=False)``."""
        if isinstance(predictions, tuple) != isinstance(targets, tuple):
            raise TypeError(
                f"LogitsKLLoss: predictions is a {type(predictions).__name__} and targets a "
                f"{type(targets).__name__}; give both as logits, or both as tuples that begin with them"
            )
        if isinstance(predictions, tuple):
            predictions, targets = predictions[0], targets[0]
        loss = distill(
            predictions,
            targets,
            ReverseKL() if self._reverse else ForwardKL(),
            temperature=self._temperature,
            reduction="none",
        )
        return loss.transpose(0, 1).contiguous(), True, False


class LogitsDistillationLoss(torch.nn.Module):
    """``modelopt.torch.distill.LogitsDistillationLoss``: ``KL(p || q) T^2`` over all tokens.

    Differs: softmax is float32, not the logits' dtype. (Releases before 0.47 reduced otherwise.)

    Args:
        temperature: > 0, of both models; the loss is multiplied by its square.
        reduction: ``"mean"``: sum / (tokens V); ``"batchmean"``: sum / size of the first dimension;
            ``"sum"``; ``"none"``: per token.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "batchmean", "sum", "none"):
            raise ValueError(
                f"LogitsDistillationLoss: reduction must be mean, batchmean, sum or none, got {reduction!r}"
            )
        self._temperature = temperature
        self._reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """Student's and teacher's logits ``[..., V]``; a 0-d loss, or ``[...]``."""
        loss = distill(
            logits_s,
            logits_t,
            ForwardKL(),
            temperature=self._temperature,
            temperature_squared=True,
            reduction=self._reduction,
        )
        return loss / logits_s.shape[-1] if self._reduction == "mean" else loss


def standard_kd_loss(
    student: Tensor | Source,
    teacher: Tensor | Source,
    labels: Optional[Tensor] = None,
    temperature: float = 1.0,
) -> Tensor:
    """The loss of ``modelopt.torch.distill.plugins.huggingface.KDTrainer`` (``_standard_kd_loss``):
    ``KL(p || q) T^2``, the mean over tokens whose *next* label is not -100.

    Differs: takes :class:`kd_kernels.Head` too; whatever masked tokens hold, NaN included, stays out.

    Args:
        student, teacher: logits ``[..., T, V]``, or heads on ``[..., T, D]``, not shifted.
        labels: ``[..., T]``, not shifted; None: every token but the last of each sequence counts.
        temperature: > 0, of both models.

    Returns:
        0-d.
    """
    student = as_source("student", student)
    if labels is None:
        labels = torch.zeros(student.leading_shape, dtype=torch.int64, device=student.tensors()[0].device)
    return distill(
        student,
        teacher,
        ForwardKL(),
        labels=next_token_labels(labels),
        temperature=temperature,
        temperature_squared=True,
    )
