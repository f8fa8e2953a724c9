"""What several shims need."""

from __future__ import annotations

from torch import Tensor

from kd_kernels.distill import distill
from kd_kernels.objectives import Objective
from kd_kernels.sources import Source, as_source

KL_DIV_REDUCTIONS = ("batchmean", "mean", "sum")


def check_reduction(owner: str, reduction: str) -> None:
    """The reductions of ``torch.nn.KLDivLoss`` that give a number.

    Raises:
        ValueError: ``"none"``, the ``[tokens, vocab]`` terms, which are never formed; anything else.
    """
    if reduction == "none":
        raise ValueError(
            f'{owner}: reduction="none" asks for the [tokens, vocab] terms, which kd_kernels never forms; '
            f'kd.distill(..., reduction="none") gives the loss of each token'
        )
    if reduction not in KL_DIV_REDUCTIONS:
        raise ValueError(
            f"{owner}: reduction must be one of {', '.join(KL_DIV_REDUCTIONS)}, got {reduction!r}"
        )


def reduced(
    owner: str,
    reduction: str,
    student: Source | Tensor,
    teacher: Source | Tensor,
    objective: Objective,
    **options,
) -> Tensor:
    """:func:`kd_kernels.distill` with the reductions of ``torch.nn.KLDivLoss``: ``"batchmean"`` is
    sum / tokens that count, ``"mean"`` that / vocabulary entries, ``"sum"``."""
    check_reduction(owner, reduction)
    student = as_source("student", student)
    loss = distill(student, teacher, objective, reduction="sum" if reduction == "sum" else "mean", **options)
    return loss / student.vocab_size if reduction == "mean" else loss
