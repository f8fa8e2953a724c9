"""Which tokens a walk goes through, what it takes for them, and how what it finds goes back to all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

Index = Optional[Tensor]
_FEW = 16


@dataclass(frozen=True)
class Tokens:
    """The n of N tokens that are walked. Those that do not count are dropped, or walked and silenced: one of
    ``rows`` and ``kept`` is None at least."""

    count: int  # N
    rows: Index = None  # [n] int64: the tokens walked, in this order; None: all N
    kept: Index = None  # [N] bool: the tokens that count, where all are walked; None: all walked do

    @classmethod
    def that_count(cls, valid: Index, count: int, compact: bool) -> Tokens:
        """``valid`` [N] bool, None where every token counts. To drop the others, as ``compact`` does, waits
        for the device; otherwise nothing is looked at."""
        if valid is None or not compact:
            return cls(count, kept=valid)
        rows = valid.nonzero().squeeze(1)
        return cls(count) if rows.numel() == count else cls(count, rows)

    @property
    def walked(self) -> int:
        return self.count if self.rows is None else self.rows.numel()

    def take(self, x: Tensor) -> Tensor:
        """``[N, ...]`` to ``[n, ...]``."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def part(self, start: int, stop: int) -> slice | Tensor:
        """What picks a chunk of those walked out of all."""
        return slice(start, stop) if self.rows is None else self.rows[start:stop]

    def silenced(self, x: Tensor, silence: float = 0.0) -> Tensor:
        """``[N, ...]`` floating, ``silence`` at silenced tokens."""
        if self.kept is None:
            return x
        return torch.where(self.kept.view(-1, *(1,) * (x.dim() - 1)), x, silence)

    def numbers(self, value: Tensor, device: torch.device, silence: float) -> Tensor:
        """0-d or ``[N]`` to ``[n]`` float64 on ``device``, ``silence`` at silenced tokens."""
        value = moved(value.to(torch.float64), device).reshape(-1).expand(self.count)
        return self.take(self.silenced(value, silence)).contiguous()

    def counted(self, x: Tensor) -> Tensor:
        """``[N, ...]`` of the tokens that count alone, for checks: this may wait for the device."""
        index = self.rows if self.kept is None else self.kept
        return x if index is None else x[index.to(x.device)]

    def put_back(self, found: Tensor) -> Tensor:
        """``[n, ...]`` to ``[N, ...]``, zeros at dropped tokens."""
        if self.rows is None:
            return found
        return found.new_zeros(self.count, *found.shape[1:]).index_copy_(0, self.rows, found)

    def spread(self, found: Tensor) -> Tensor:
        """``[n, ...]`` to ``[N, ...]``, zeros at all that do not count; floating if any is silenced."""
        return self.put_back(self.silenced(found))


def moved(numbers: Tensor, device: torch.device) -> Tensor:
    """``numbers`` on ``device``. A few of the host's are filled in one by one: unlike a copy, that waits for
    nobody."""
    if numbers.device == device or numbers.device.type != "cpu" or numbers.numel() > _FEW:
        return numbers.to(device)
    made = torch.empty(numbers.shape, dtype=numbers.dtype, device=device)
    for place, number in zip(made.view(-1), numbers.reshape(-1).tolist()):
        place.fill_(number)
    return made
