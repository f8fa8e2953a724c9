"""Random numbers that are a function of (seed, token, slot): no state, so the same whatever the chunk, the
order or the device."""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


# SplitMix64: Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators".
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Without the sign, which torch's shift would carry along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST  # int64 products wrap around
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def uniforms(seed: Tensor, tokens: Tensor, slots: int) -> Tensor:
    """``[n, slots]`` float64 in [0, 1), 53 bits, for a 0-d int64 ``seed``, there or on the host, and ``[n]``
    int64 ``tokens``."""
    slot = torch.arange(1, slots + 1, device=tokens.device)
    key = _mixed(_mixed(seed + _GOLDEN) + tokens * _GOLDEN)
    return _shifted(_mixed(key[:, None] + slot * _GOLDEN), 11).to(torch.float64) * 2.0**-53
