"""One sequence of a teacher, as a cache takes it and gives it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor

from kd_kernels.sources import SparseTarget


@dataclass(frozen=True)
class TeacherRecord:
    """What is known of a teacher on a sequence of L tokens, or on a batch ``[B, L]``: the part of
    :class:`kd_kernels.TopK` that is saved, under the same names. Row j is the teacher's distribution after
    token j, of token j + 1. None where the cache has none."""

    ids: Optional[Tensor]
    """``[L, k]`` int32, -1 where unused."""
    logits: Optional[Tensor]
    """``[L, k]``, up to a constant of each token: ``logits / temperature - lse`` are log-probabilities."""
    lse: Tensor
    """``[L]``, or ``[L, M]`` for M temperatures."""
    log_tail_mass: Tensor
    """Logarithm of the probability outside the k; shaped as ``lse``."""
    sample_ids: Optional[Tensor]
    """``[L, samples]`` int32, -1 where unused."""
    sample_counts: Optional[Tensor]
    """``[L, samples]`` int32, 0 where unused."""
    temperature: Union[float, tuple[float, ...]]

    def __len__(self) -> int:
        return self.lse.shape[0]

    def target(self, missing: str = "tail", index: int = 0) -> SparseTarget:
        """The top-K as a teacher for :func:`kd_kernels.distill`, at the ``index``-th temperature.

        Raises:
            ValueError: no such temperature, an unknown ``missing``, or a cache of draws alone.
        """
        if self.ids is None:
            raise ValueError("this cache holds draws and no top-K (k = 0): use sampled()")
        many = isinstance(self.temperature, tuple)
        temperatures = self.temperature if many else (self.temperature,)
        if not 0 <= index < len(temperatures):
            raise ValueError(
                f"index must be one of the cache's {len(temperatures)} temperatures, counted from 0; got "
                f"{index}"
            )
        lse, tail = (x[..., index] if many else x for x in (self.lse, self.log_tail_mass))
        logprobs = self.logits.to(lse.dtype) / temperatures[index] - lse[..., None]
        return SparseTarget(
            self.ids, logprobs, missing, temperatures[index], tail if missing == "tail" else None
        )

    def sampled(self) -> SparseTarget:
        """The draws as a teacher for :func:`kd_kernels.distill`, at the first temperature.

        Raises:
            ValueError: the cache holds no draws.
        """
        if self.sample_ids is None:
            raise ValueError("this cache holds no draws (samples = 0): use target()")
        many = isinstance(self.temperature, tuple)
        temperature = self.temperature[0] if many else self.temperature
        return SparseTarget.from_samples(self.sample_ids, self.sample_counts, temperature)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherRecord:
        moved = (
            None if x is None else x.to(device, non_blocking=non_blocking)
            for x in (
                self.ids,
                self.logits,
                self.lse,
                self.log_tail_mass,
                self.sample_ids,
                self.sample_counts,
            )
        )
        return TeacherRecord(*moved, self.temperature)

    def pin_memory(self) -> TeacherRecord:
        """What a DataLoader with ``pin_memory=True`` asks of a batch."""
        pinned = (
            None if x is None else x.pin_memory()
            for x in (
                self.ids,
                self.logits,
                self.lse,
                self.log_tail_mass,
                self.sample_ids,
                self.sample_counts,
            )
        )
        return TeacherRecord(*pinned, self.temperature)
