"""The row kernel's contract, as csrc/row_divergence.h states it for the compiled backends.

A driver fills these; every backend's ``row_divergence(job, phases)`` reads and writes the tensors in
place and returns nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

STATISTICS, TERMS, GRADIENT = 1, 2, 4  # phases; a call runs consecutive ones, fused

# Columns of ``statistics`` [n, 10] float64; z = logit after scale and softcap, u = z / temperature.
MAX_STUDENT, LOGZ_STUDENT, MAX_TEACHER, LOGZ_TEACHER, LOGZ_HARD, SUM_STUDENT, SUM_TEACHER, LABEL_LOGIT = (
    range(8)
)
# Sums of q and of p as computed: 1 up to rounding, which the gradient divides out of SUM_*.
MASS_STUDENT, MASS_TEACHER = 8, 9
STATISTIC_COLUMNS = 10
# Columns of ``terms`` [n, 4] float64, unweighted.
SOFT, HARD, STUDENT_ENTROPY, TEACHER_ENTROPY = range(4)
TERM_COLUMNS = 4


@dataclass
class Rows:
    """One model's logits, in one of two layouts.

    Row-major: ``logits`` is any tensor whose memory holds the rows, ``offsets`` [n] int64 gives the
    element offset of each row from its first element, the vocabulary is contiguous.
    Vocabulary-major: ``offsets`` is None and ``logits`` is ``[vocab, n]`` with unit stride along tokens.

    ``grad`` has the same layout; it may be ``logits`` itself.
    """

    logits: Tensor
    offsets: Optional[Tensor]
    temperature: Tensor  # [n] float64
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    grad: Optional[Tensor] = None
    grad_offsets: Optional[Tensor] = None
    # Row-major: what divides every offset, known without looking at them. Wide loads need it.
    multiple: int = 1
    grad_multiple: int = 1

    def read(self, n: int, vocab: int) -> Tensor:
        """The raw logits as ``[n, vocab]`` (a copy in the row-major layout)."""
        if self.offsets is None:
            return self.logits[:vocab, :n].t()
        return _flat(self.logits)[_entries(self.offsets, vocab)]

    def write_grad(self, values: Tensor) -> None:
        """Store ``values`` [n, vocab] as the gradient."""
        n, vocab = values.shape
        assert self.grad is not None
        if self.offsets is None:
            self.grad[:vocab, :n].copy_(values.t())
        else:
            assert self.grad_offsets is not None
            _flat(self.grad)[_entries(self.grad_offsets, vocab)] = values.to(self.grad.dtype)


@dataclass
class RowJob:
    """One call of a row kernel over ``n`` rows."""

    objective: str
    n: int
    vocab: int
    student: Rows
    teacher: Rows
    parameter0: Tensor  # [n] float64
    parameter1: Tensor  # [n] float64
    labels: Optional[Tensor]  # [n] int64; None: no cross-entropy
    soft_weight: Tensor  # [n] float64: the gradient is soft_weight dSoft + hard_weight dHard;
    hard_weight: Tensor  # [n] float64: a row with both 0 gets gradient 0, whatever it holds
    statistics: Tensor  # [n, 10] float64
    terms: Tensor  # [n, 4] float64
    entropies: bool


def _flat(tensor: Tensor) -> Tensor:
    """All of the tensor's memory from its first element on, as one dimension."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((length,), (1,), tensor.storage_offset())


def _entries(offsets: Tensor, vocab: int) -> Tensor:
    return offsets[:, None] + torch.arange(vocab, device=offsets.device)
