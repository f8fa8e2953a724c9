"""Draws without their unused places: of fifty, a dozen are distinct."""

from __future__ import annotations

from collections.abc import Sequence
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
    ends: Tensor
    """``[tokens + 1]`` int32, from any beginning: token j has ``ends[j + 1] - ends[j]`` of them."""
    shape: tuple[int, ...]
    """Leading shape of the tokens."""
    samples: int
    """Draws at each token; no token has more distinct ones."""

    @property
    def per_token(self) -> Tensor:
        """``[...]`` int32: how many distinct ones each token has."""
        return self.ends.diff().view(self.shape)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids and counts ``[..., samples]`` int32, filled up with -1 and 0. No synchronisation on CUDA."""
        ends = self.ends.to(torch.int64)
        tokens, n, device = len(ends) - 1, len(self.ids), ends.device
        # From where a token's draws begin here to where its row begins there.
        shift = torch.arange(tokens, device=device) * self.samples - (ends[:-1] - ends[0])
        places = torch.arange(n, device=device) + shift.repeat_interleave(ends.diff(), output_size=n)
        ids = torch.full((tokens * self.samples,), -1, dtype=torch.int32, device=device)
        counts = torch.zeros_like(ids)
        ids.scatter_(0, places, self.ids)
        counts.scatter_(0, places, self.counts.to(torch.int32))
        shape = (*self.shape, self.samples)
        return ids.view(shape), counts.view(shape)


def stack_draws(draws: Sequence[Draws]) -> Draws:
    """Those of sequences ``[L]`` as of a batch ``[B, longest L]``; nothing is drawn at its padding."""
    per_token = torch.nn.utils.rnn.pad_sequence([x.per_token for x in draws], batch_first=True)
    ends = torch.nn.functional.pad(per_token.flatten().cumsum(0), (1, 0)).to(torch.int32)
    ids, counts = torch.cat([x.ids for x in draws]), torch.cat([x.counts for x in draws])
    return Draws(ids, counts, ends, tuple(per_token.shape), draws[0].samples)
