"""torchtune's distillation losses (``torchtune.modules.loss.kd_losses``, as of 0.6).

Losses and gradients are float32 sums over tokens whose label is not ``ignore_index``, divided by their
number. Differs, everywhere: without any such token the result is 0 and stays connected to the graph; a
``-inf`` logit is an honest probability of 0, where torchtune drops its term from the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels.distill import distill
from kd_kernels.objectives import ForwardKL, Objective, ReverseKL, WeightedKL

__all__ = [
    "ForwardKLLoss",
    "ForwardKLWithChunkedOutputLoss",
    "ReverseKLLoss",
    "ReverseKLWithChunkedOutputLoss",
    "SymmetricKLLoss",
    "SymmetricKLWithChunkedOutputLoss",
]


class _Loss(torch.nn.Module):
    """Mean of ``objective`` plus ``entropy`` times the teacher's entropy over tokens that count."""

    def __init__(self, objective: Objective, entropy: float, ignore_index: int) -> None:
        super().__init__()
        self._objective = objective
        self._entropy = entropy
        self.ignore_index = ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        """Logits ``[..., V]``, one label for each token, in any shape; a 0-d loss, the mean over
        tokens that count, or with ``normalize=False`` their sum."""
        if not isinstance(student_logits, Tensor):
            owner, found = type(self).__name__, type(student_logits).__name__
            raise TypeError(
                f"{owner}: student_logits must be a tensor [..., V], got {found}; chunks go to the "
                f"WithChunkedOutput form"
            )
        loss, parts = distill(
            student_logits,
            teacher_logits,
            self._objective,
            labels=labels.reshape(student_logits.shape[:-1]),
            ignore_index=self.ignore_index,
            reduction="sum",
            return_parts=True,
        )
        # The cross-entropy form: the teacher's entropy is a constant, and moves the value only.
        loss = loss + self._entropy * parts.teacher_entropy.sum()
        return loss / parts.valid_tokens.clamp(min=1) if normalize else loss


class ForwardKLLoss(_Loss):
    """``-sum_v p log q``, the cross-entropy form of forward KL: larger than KL by the teacher's entropy,
    with the same gradient.

    Args:
        ignore_index: tokens with this label do not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ForwardKL(), 1.0, ignore_index)


class ReverseKLLoss(_Loss):
    """``KL(q || p)``, teacher ``p``, student ``q``.

    Args:
        ignore_index: tokens with this label do not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ReverseKL(), 0.0, ignore_index)


class SymmetricKLLoss(_Loss):
    """``ratio`` times :class:`ForwardKLLoss` (the cross-entropy form) plus ``1 - ratio`` times
    :class:`ReverseKLLoss`, in one pass.

    Args:
        sym_kd_ratio: in [0, 1]; 1 is forward, 0 reverse.
        ignore_index: tokens with this label do not count.
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        if not 0.0 <= sym_kd_ratio <= 1.0:
            raise ValueError(f"SymmetricKLLoss: sym_kd_ratio must be in [0, 1], got {sym_kd_ratio}")
        super().__init__(WeightedKL(sym_kd_ratio, 1 - sym_kd_ratio), sym_kd_ratio, ignore_index)
        self.sym_kd_ratio = sym_kd_ratio


class _ChunkedLoss(torch.nn.Module):
    """A loss over logits that come as a list of chunks along the sequence."""

    def __init__(self, loss: _Loss, num_output_chunks: int) -> None:
        super().__init__()
        self.loss = loss
        self.ignore_index = loss.ignore_index
        self.num_output_chunks = num_output_chunks

    def apply_compile_strategy(self, *args, **kwargs) -> _ChunkedLoss:
        """Nothing to compile; returns itself, as torchtune's recipes expect."""
        return self

    def forward(self, student_logits: list[Tensor], teacher_logits: list[Tensor], labels: Tensor) -> Tensor:
        """Lists of ``num_output_chunks`` logits ``[B, t, V]``, labels ``[B, T]`` with ``T`` the sum of
        all ``t``; a 0-d loss, the mean over tokens that count.

        Raises:
            ValueError: other numbers of chunks, or chunks that do not add up to the labels.
        """
        owner = type(self).__name__
        for name, chunks in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if isinstance(chunks, Tensor):
                raise TypeError(f"{owner}: {name} must be a list of chunks [B, t, V], got a tensor")
        counts = (len(student_logits), len(teacher_logits))
        if counts != (self.num_output_chunks,) * 2:
            raise ValueError(
                f"{owner}: num_output_chunks={self.num_output_chunks}, but student_logits has {counts[0]} "
                f"chunks and teacher_logits {counts[1]}"
            )
        lengths = [chunk.shape[1] for chunk in student_logits]
        if sum(lengths) != labels.shape[1]:
            raise ValueError(
                f"{owner}: the chunks hold {sum(lengths)} positions and labels {labels.shape[1]}; chunk both "
                f"along dimension 1"
            )
        chunks = zip(student_logits, teacher_logits, labels.split(lengths, dim=1))
        total = sum(self.loss(*chunk, normalize=False) for chunk in chunks)
        return total / (labels != self.ignore_index).sum().clamp(min=1)


class ForwardKLWithChunkedOutputLoss(_ChunkedLoss):
    """:class:`ForwardKLLoss` (the cross-entropy form) over lists of chunks.

    Args:
        num_output_chunks: length of the lists.
        ignore_index: tokens with this label do not count.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ForwardKLLoss(ignore_index), num_output_chunks)


class ReverseKLWithChunkedOutputLoss(_ChunkedLoss):
    """:class:`ReverseKLLoss` over lists of chunks.

    Args:
        num_output_chunks: length of the lists.
        ignore_index: tokens with this label do not count.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ReverseKLLoss(ignore_index), num_output_chunks)


class SymmetricKLWithChunkedOutputLoss(_ChunkedLoss):
    """:class:`SymmetricKLLoss` (cross-entropy form of its forward part) over lists of chunks.

    Args:
        num_output_chunks: length of the lists.
        sym_kd_ratio: in [0, 1]; 1 is forward, 0 reverse.
        ignore_index: tokens with this label do not count.
    """

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        super().__init__(SymmetricKLLoss(sym_kd_ratio, ignore_index), num_output_chunks)
        self.sym_kd_ratio = sym_kd_ratio
