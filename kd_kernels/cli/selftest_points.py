"""The self-test of what compares points: angles between the rows of two models."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_kernels.relational import relational_angle

POINTS, WIDTHS, BETA = 29, (24, 40), 0.3
Results = list[tuple[str, Tensor]]


class TwoModels:
    """Random rows of a student and a teacher."""

    def __init__(self, kind: str, dtype: torch.dtype, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tensors = [
            torch.randn(POINTS, width, generator=g, dtype=torch.float64).to(dtype) for width in WIDTHS
        ]


def angles(models: TwoModels, where: str, dtype: torch.dtype, backend: str, plainly: bool) -> Results:
    rows = [x.to(where, dtype).requires_grad_() for x in models.tensors]
    if plainly:
        loss = F.smooth_l1_loss(*(_cosines(x) for x in rows), beta=BETA)
    else:
        loss = relational_angle(*rows, beta=BETA, teacher_grad=True, backend=backend)
    return [("loss", loss), *zip(("d student", "d teacher"), torch.autograd.grad(loss, rows))]


def _cosines(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # as a careful user does it
    unit = F.normalize(x[None] - x[:, None], dim=2)
    return unit @ unit.transpose(1, 2)


CHECKS: dict[str, dict[str, Callable[..., Results]]] = {"angle": {"relational angle": angles}}
KINDS = ("rows x rows",)
