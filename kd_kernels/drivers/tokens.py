"""Which tokens a walk goes through: those that count; others dropped (``rows``) or silenced (``kept``)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

Index = Optional[Tensor]


def counted(valid: Index, compact: bool) -> tuple[Index, Index]:
    """(``rows`` [n] int64, ``kept`` [N] bool) of ``valid`` [N] bool, None where every token counts.

    One at most is not None. ``compact`` drops, which waits for the device; otherwise nothing is looked at.
    """
    if valid is None or not compact:
        return None, valid
    rows = valid.nonzero().squeeze(1)
    return (None if rows.numel() == valid.numel() else rows), None


def spread(values: Tensor, rows: Index, kept: Index, tokens: int) -> Tensor:
    """``[n, k]`` of the tokens walked to ``[N, k]`` of all, zeros at those that do not count."""
    if kept is not None:
        return torch.where(kept[:, None], values, 0.0)
    if rows is None:
        return values
    return values.new_zeros(tokens, *values.shape[1:]).index_copy_(0, rows, values)
