"""NeMo Automodel's distillation loss (``nemo_automodel.components.loss.kd_loss``, as of 0.7)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kd_kernels.distill import Scalar, distill
from kd_kernels.objectives import ForwardKL

__all__ = ["KDLoss"]


class KDLoss(torch.nn.Module):
    """``KL(p || q) T^2``, the sum over tokens that count / ``num_batch_labels``, or their mean.

    Differs: arithmetic is float32 also with ``fp32_upcast=False``, where Automodel divides by the
    temperature in the logits' dtype.

    Args:
        ignore_index: tokens with this label do not count.
        temperature: > 0, of both models; the loss is multiplied by its square.
        fp32_upcast: accepted, without effect.
        tp_group: None; vocabulary-parallel logits are refused.
        chunk_size: accepted, without effect: nothing of size ``[tokens, vocab]`` is formed.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Optional[object] = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        if tp_group is not None:
            raise ValueError(
                "KDLoss: tp_group must be None; vocabulary-parallel logits are not covered here: kd.distill "
                "takes each rank's part with vocab_group=; or gather them, or use Automodel's own KDLoss"
            )
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.fp32_upcast = fp32_upcast
        self.tp_group = tp_group
        self.chunk_size = chunk_size

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: Optional[Scalar] = None,
    ) -> Tensor:
        """Logits ``[..., V]``, one label for each token, ``num_batch_labels`` the tokens of all accumulated
        batches; a 0-d loss."""
        return distill(
            student_logits,
            teacher_logits,
            ForwardKL(),
            labels=labels.reshape(student_logits.shape[:-1]),
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            temperature_squared=True,
            num_items=num_batch_labels,
        )
