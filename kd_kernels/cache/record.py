"""One sequence of a teacher, as a cache takes it and gives it back."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Optional, Union

import torch
from torch import Tensor

from kd_kernels.cache.draws import Draws
from kd_kernels.sources import Shown, SparseTarget, sampled_of, target_of


@dataclass(frozen=True, repr=False)
class TeacherRecord(Shown):
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
    draws: Optional[Draws]
    """Without their unused places; ``sample_ids`` and ``sample_counts`` are made of them when asked for."""
    temperature: Union[float, tuple[float, ...]]

    def __len__(self) -> int:
        return self.lse.shape[0]

    @property
    def sample_ids(self) -> Optional[Tensor]:
        """``[L, samples]`` int32, -1 where unused."""
        return None if self.draws is None else self.draws.padded()[0]

    @property
    def sample_counts(self) -> Optional[Tensor]:
        """``[L, samples]`` int32, 0 where unused."""
        return None if self.draws is None else self.draws.padded()[1]

    def target(self, missing: str = "tail", index: int = 0) -> SparseTarget:
        """The top-K as a teacher for :func:`kd_kernels.distill`, at the ``index``-th temperature.

        Raises:
            ValueError: no such temperature, an unknown ``missing``, or a cache of draws alone.
        """
        if self.ids is None:
            raise ValueError("this cache holds draws and no top-K (k = 0): use sampled()")
        return target_of(self, missing, index)

    def sampled(self) -> SparseTarget:
        """The draws as a teacher for :func:`kd_kernels.distill`, at the first temperature.

        Raises:
            ValueError: the cache holds no draws.
        """
        if self.draws is None:
            raise ValueError("this cache holds no draws (samples = 0): use target()")
        return sampled_of(*self.draws.padded(), self.temperature)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherRecord:
        return _each(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TeacherRecord:
        """What a DataLoader with ``pin_memory=True`` asks of a batch."""
        return _each(self, Tensor.pin_memory)


def name_of(sequence_id: object) -> str:
    """The string that a sequence is filed under.

    Raises:
        TypeError: neither a string nor an integer (of Python, numpy or torch).
    """
    if isinstance(sequence_id, str):
        return sequence_id
    try:
        if isinstance(sequence_id, bool):
            raise TypeError
        return str(operator.index(sequence_id))
    except TypeError:
        raise TypeError(f"sequence_id must be a string or an int, got {type(sequence_id).__name__}") from None


def _each(record: Union[TeacherRecord, Draws], change: Callable[[Tensor], Tensor]) -> TeacherRecord:
    """The same with every tensor changed."""
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {name: change(x) for name, x in found.items() if isinstance(x, Tensor)}
    parts = {name: _each(x, change) for name, x in found.items() if isinstance(x, Draws)}
    return replace(record, **tensors, **parts)
