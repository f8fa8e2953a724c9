"""From rows to squared distances and back: what the losses between points do around their kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows whose squared distance is below this share of their squared distances from the centre are one point:
# there the Gram matrix has no digits left.
_RESOLUTION = 1e-14

Walk = Callable[..., tuple[Tensor, list[Optional[Tensor]]]]
Count = Union[int, Tensor]


def walk_rows(
    walk: Walk, rows: Sequence[Tensor], mask: Optional[Tensor], needs: Sequence[bool], power: int
) -> tuple[Tensor, list[Optional[Tensor]]]:
    """A mean and its gradients for the rows where ``needs`` says so, in float64: of ``walk(*squared)``, which
    gives a sum and the gradients of both matrices of squared distances, over the rows that count to the
    ``power``."""
    # On the device, where it has to be counted, so that nothing waits for it.
    count = max(len(rows[0]), 1) if mask is None else mask.sum().clamp(min=1).to(torch.float64)
    squared, centred = zip(*(squared_distances(x, mask, count) for x in rows))
    total, gradients = walk(*squared)
    denominator = count**power
    made = [
        rows_gradient(*parts, mask, denominator) if wanted else None
        for *parts, wanted in zip(gradients, squared, centred, needs)
    ]
    return total / denominator, made


def squared_distances(x: Tensor, mask: Optional[Tensor], count: Count) -> tuple[Tensor, Tensor]:
    """``[N, N]`` float64 from the Gram matrix of the centred rows, and these. 0 between rows that coincide,
    -1 where there is no pair: on the diagonal, and between rows of which one does not count."""
    wide = x.to(torch.float64, copy=True)
    if mask is not None:
        wide.masked_fill_(~mask[:, None], 0.0)
    wide -= wide.sum(0) / count
    gram = wide @ wide.t()
    norms = gram.diagonal()
    ends = norms[:, None] + norms
    squared = torch.sub(ends, gram, alpha=2)
    squared.masked_fill_(squared <= ends.mul_(_RESOLUTION), 0.0)  # not so for NaN
    squared.fill_diagonal_(-1.0)
    if mask is not None:
        squared.masked_fill_(~(mask[:, None] & mask), -1.0)
    return squared, wide


def rows_gradient(
    gradient: Tensor, squared: Tensor, centred: Tensor, mask: Optional[Tensor], denominator: Count
) -> Tensor:
    """Of the rows, from that of ``squared``: ``dL/dx_i = 2 sum_j (g_ij + g_ji) (x_i - x_j)``, in one product.
    That the rows were centred changes no distance, so no gradient passes through it."""
    gradient = gradient.masked_fill(squared <= 0, 0.0)
    laplacian = (gradient + gradient.t()) * (-2.0 / denominator)
    laplacian.diagonal().copy_(-laplacian.sum(1))
    made = laplacian @ centred
    return made if mask is None else made.masked_fill_(~mask[:, None], 0.0)


def padded(squared: Tensor, multiple: int, value: float) -> Tensor:
    """Its columns filled up with ``value`` to a multiple of numbers."""
    missing = -squared.shape[1] % multiple
    return (F.pad(squared, (0, missing), value=value) if missing else squared).contiguous()
