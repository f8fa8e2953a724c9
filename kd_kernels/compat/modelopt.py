"""NVIDIA ModelOpt's distillation losses (``modelopt.torch.distill``, as of 0.47)."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels.compat._shared import check_reduction, reduced, refuse_sharded
from kd_kernels.distill import distill
from kd_kernels.objectives import ForwardKL, ReverseKL

__all__ = ["LMLogitsLoss", "LogitsDistillationLoss", "LogitsKLLoss"]


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
                f"LogitsKLLoss: model_config.tensor_model_parallel_size is {size}; vocabulary-parallel logits "
                f"are not covered: use ModelOpt's own LogitsKLLoss, or gather the logits"
            )
        self._temperature = temperature
        self._reverse = reverse

    def forward(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, bool, bool]:
        """Student's and teacher's logits ``[s, b, V]`` (or tuples that begin with them, as a
        ``ColumnParallelLinear`` returns); ``(loss [b, s], tp_reduce=True, is_sequence_parallel=False)``."""
        if isinstance(predictions, tuple):
            predictions, targets = predictions[0], targets[0]
        refuse_sharded("LogitsKLLoss", predictions=predictions, targets=targets)
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

    Differs: ``reduction="none"`` (``[tokens, V]`` terms) is refused; softmax is float32, not the logits'
    dtype.

    Args:
        temperature: > 0, of both models; the loss is multiplied by its square.
        reduction: ``"batchmean"`` (sum / tokens), ``"mean"`` (sum / (tokens V)) or ``"sum"``.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "batchmean") -> None:
        super().__init__()
        check_reduction(type(self).__name__, reduction)
        self._temperature = temperature
        self._reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """Student's and teacher's logits ``[..., V]``; a 0-d loss."""
        refuse_sharded(type(self).__name__, logits_s=logits_s, logits_t=logits_t)
        return reduced(
            type(self).__name__,
            self._reduction,
            logits_s,
            logits_t,
            ForwardKL(),
            temperature=self._temperature,
            temperature_squared=True,
        )


class LMLogitsLoss(LogitsDistillationLoss):
    """``modelopt.torch.distill.plugins.huggingface.LMLogitsLoss``: :class:`LogitsDistillationLoss` of two
    model outputs' ``.logits``. Differs: as that does."""

    def forward(self, out_student: object, out_teacher: object) -> Tensor:
        """Outputs with ``.logits`` ``[..., V]``; a 0-d loss."""
        return super().forward(out_student.logits, out_teacher.logits)
