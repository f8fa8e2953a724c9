"""A few ids per token, brought into the order in which the kernels want them: ascending, each once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Selection:
    """Args: ids ``[n, K]`` integer, any order, repeated or not; those outside ``[0, vocab)`` are unused.

    ``ids`` ``[n, K]`` int32 has each id once, ascending, -1 in front where there are fewer than K.
    """

    def __init__(self, ids: Tensor, vocab: int) -> None:
        self._given = torch.where((ids >= 0) & (ids < vocab), ids, -1).to(torch.int32).contiguous()
        self._ordered, self._order = self._given.sort(dim=-1, stable=True)
        repeated = torch.zeros_like(self._ordered, dtype=torch.bool)
        repeated[:, :-1] = self._ordered[:, :-1] == self._ordered[:, 1:]
        # On a GPU looking would mean waiting.
        self._may_repeat = repeated.device.type != "cpu" or bool((repeated & (self._ordered >= 0)).any())
        self.ids = self._ordered
        if self._may_repeat:
            self.ids, self._again = torch.where(repeated, -1, self._ordered).sort(dim=-1, stable=True)

    def merge(self, values: Tensor, add: Callable[[Tensor, Tensor], Tensor], nothing: float) -> Tensor:
        """``values`` [n, K] of the given ids, in the order of ``ids``; those of repeated ids added up by
        ``add``, always in the same order; ``nothing`` where unused."""
        values, step = values.gather(1, self._order), 1
        while (
            self._may_repeat and step < values.shape[1]
        ):  # windows of 1, 2, 4, ... within a run of equal ids
            same = self._ordered[:, step:] == self._ordered[:, :-step]
            sums = torch.where(same, add(values[:, step:], values[:, :-step]), values[:, step:])
            values, step = torch.cat([values[:, :step], sums], 1), 2 * step
        if self._may_repeat:
            values = values.gather(1, self._again)
        return torch.where(self.ids < 0, nothing, values)

    def spread(self, values: Tensor, nothing: float) -> Tensor:
        """``values`` [n, K] in the order of ``ids``, to the given ids; ``nothing`` at those out of range."""
        if values.shape[1] == 0:
            return values
        position = torch.searchsorted(self.ids.contiguous(), self._given).clamp(max=values.shape[1] - 1)
        return torch.where(self._given < 0, nothing, values.gather(1, position))
