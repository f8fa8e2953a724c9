"""Draws without their unused places: of fifty, a dozen are distinct."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """What was drawn at tokens of leading shape ``[...]``, one token after the other, as it lies on disk:
    reading it is a copy, and it is a sixth of what :meth:`padded` takes to move to a device."""

    ids: Tensor
    """``[n]`` int32: the distinct tokens drawn, those of every token together."""
    counts: Tensor
    """``[n]`` uint8 or int32: how often each."""
    per_token: Tensor
    """``[...]`` int32: how many of them are each token's."""
    samples: int
    """Draws at each token; no token has more distinct ones."""

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids and counts ``[..., samples]`` int32, filled up with -1 and 0. No synchronisation on CUDA."""
        per_token = self.per_token.flatten().to(torch.int64)
        tokens, n, device = len(per_token), len(self.ids), self.ids.device
        # From where a token's draws begin here to where its row begins there.
        shift = torch.arange(tokens, device=device) * self.samples - (per_token.cumsum(0) - per_token)
        places = torch.arange(n, device=device) + shift.repeat_interleave(per_token, output_size=n)
        ids = torch.full((tokens * self.samples,), -1, dtype=torch.int32, device=device)
        counts = torch.zeros_like(ids)
        ids.scatter_(0, places, self.ids)
        counts.scatter_(0, places, self.counts.to(torch.int32))
        shape = (*self.per_token.shape, self.samples)
        return ids.view(shape), counts.view(shape)
