"""Scratch memory that is reused from call to call.

A fresh buffer per call makes CPU GEMMs two to three times slower (every page is faulted in again), so
each thread keeps the buffer of its last call. Threads never share one: the store is thread-local, and a
buffer is taken out of the store while it is in use.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a cache line, an AVX-512 register

_store = threading.local()


class Workspace:
    """Cuts one byte buffer into typed tensors."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor; the caller has counted it with :func:`footprint`."""
        size = math.prod(shape) * dtype.itemsize
        part = self._buffer[self._used : self._used + size]
        self._used += _padded(size)
        return part.view(dtype).view(shape)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def footprint(sizes: list[int]) -> int:
    """Bytes that tensors of these sizes (in bytes) take in a workspace."""
    return sum(_padded(size) for size in sizes)


@contextmanager
def borrow(size: int, device: torch.device) -> Iterator[Workspace]:
    """A workspace of at least ``size`` bytes on ``device``, handed back at the end of the block."""
    buffer: Optional[Tensor] = None
    if device.type == "cpu":
        buffer = getattr(_store, "buffer", None)
        _store.buffer = None
    if buffer is None or buffer.numel() < size:
        buffer = None  # free the old one before the new one is made
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
    try:
        yield Workspace(buffer)
    finally:
        if device.type == "cpu":
            _store.buffer = buffer


def release_workspace() -> None:
    """Free the scratch memory that this thread keeps between calls (at most ``workspace_bytes``)."""
    _store.buffer = None
