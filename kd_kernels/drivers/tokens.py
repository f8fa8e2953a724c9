"""Which tokens a walk goes through: those that count; others dropped (``rows``) or silenced (``kept``)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

Index = Optional[Tensor]
_FEW = 16


def counted(valid: Index, compact: bool) -> tuple[Index, Index]:
    """(``rows`` [n] int64, ``kept`` [N] bool) of ``valid`` [N] bool, None where every token counts.

    One at most is not None. ``compact`` drops, which waits for the device; otherwise nothing is looked at.
    """
    if valid is None or not compact:
        return None, valid
    rows = valid.nonzero().squeeze(1)
    return (None if rows.numel() == valid.numel() else rows), None


def moved(numbers: Tensor, device: torch.device) -> Tensor:
    """``numbers`` on ``device``. A few of the host's are filled in one by one: unlike a copy, that waits for
    nobody."""
    if numbers.device == device or numbers.device.type != "cpu" or numbers.numel() > _FEW:
        return numbers.to(device)
    made = torch.empty(numbers.shape, dtype=numbers.dtype, device=device)
    for place, number in zip(made.view(-1), numbers.reshape(-1).tolist()):
        place.fill_(number)
    return made


def of_tokens(
    value: Tensor, device: torch.device, tokens: int, rows: Index, kept: Index, silenced: float
) -> Tensor:
    """0-d or ``[N]`` to ``[n]`` float64 of the tokens walked, ``silenced`` at silenced ones."""
    value = moved(value.to(torch.float64), device).reshape(-1).expand(tokens)
    if kept is not None:
        value = torch.where(kept, value, silenced)
    return (value if rows is None else value[rows]).contiguous()


def spread(values: Tensor, rows: Index, kept: Index, tokens: int) -> Tensor:
    """``[n, k]`` of the tokens walked to ``[N, k]`` of all, zeros at those that do not count."""
    if kept is not None:
        return torch.where(kept[:, None], values, 0.0)
    if rows is None:
        return values
    return values.new_zeros(tokens, *values.shape[1:]).index_copy_(0, rows, values)
