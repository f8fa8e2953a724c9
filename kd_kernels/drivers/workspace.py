"""Memory that is reused from call to call, and fresh memory in huge pages.

A fresh buffer per call makes CPU GEMMs two to three times slower (every page is faulted in again), so
each thread keeps the buffer of its last call. Threads never share one: the store is thread-local, and a
buffer is taken out of the store while it is in use. What a caller keeps, such as a gradient, has to be
fresh: Linux gives it in pages of 2 MiB, a third to a quarter of the time, where it is asked to.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor

_LINE = 64  # bytes: a cache line, an AVX-512 register

# Bytes: below, malloc does not give memory back to the system.
_LEAST_FRESH, _MOST_LENT = 32 << 20, 256 << 20

_store = threading.local()


class Workspace:
    """Cuts one byte buffer into typed tensors.

    A walk borrows it once, for all its chunks: what still refers to the last chunk would keep a buffer of its
    own alive beside the next one's.
    """

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._used = 0

    def again(self) -> None:
        """Cut from the beginning: what was taken before may be overwritten."""
        self._used = 0

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised ``[rows, columns]`` with unit stride along columns; the caller has counted
        it with :func:`footprint`."""
        stride = row_bytes(columns, dtype.itemsize)
        size = rows * stride
        part = self._buffer[self._used : self._used + size].view(dtype)
        self._used += footprint(rows, columns, dtype.itemsize)
        return part.view(rows, stride // dtype.itemsize)[:, :columns]


def row_bytes(columns: int, itemsize: int) -> int:
    """Bytes from one row to the next: whole cache lines where a row is longer than one, so that no vector
    lies across two, but never a multiple of 1024.

    The row kernel walks down the rows. At a stride of 4096 bytes every row would fall on the same few
    sets of the cache, which then holds eight of them: measured, rows took 1.3 times as long.
    """
    size = columns * itemsize
    if size > _LINE:
        size = _whole_lines(size)
    return size + _LINE if size % 1024 == 0 else size


def footprint(rows: int, columns: int, itemsize: int) -> int:
    """Bytes that a ``[rows, columns]`` tensor takes in a workspace."""
    return _whole_lines(rows * row_bytes(columns, itemsize))


def _whole_lines(size: int) -> int:
    return -(-size // _LINE) * _LINE


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


def lend(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor whose memory this thread gets back when nothing refers to it any more: for what
    outlives a walk but no step, such as a weight gradient's accumulator. Small ones, which malloc keeps
    itself, and very large ones are not kept."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not _LEAST_FRESH <= size <= _MOST_LENT:
        return fresh(shape, dtype, device)
    # A lease may end on any thread, at any allocation of this one: each step here is one of the dict's own.
    # A lock could be held by a thread that a forked process does not have.
    home = vars(_store).setdefault("returned", {})
    owner = home.pop(size, None)
    if owner is None:
        home.clear()  # free another one before the new one is made
        owner = fresh((size,), torch.uint8, device)
    lease = _lease(size).from_address(owner.data_ptr())
    lease.owner, lease.home = owner, home
    return torch.frombuffer(lease, dtype=dtype).view(shape)


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As ``torch.empty``, for what is written from end to end: memory that comes from the system comes in
    huge pages, where those are to be had."""
    made = torch.empty(shape, dtype=dtype, device=device)
    size, advise = made.numel() * made.itemsize, _madvise()
    if device.type == "cpu" and size >= _LEAST_FRESH and advise is not None:
        start = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (made.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, stop - start, mmap.MADV_HUGEPAGE)  # advice: what became of it is no matter
    return made


@functools.cache
def _madvise() -> Optional[Callable[[int, int, int], int]]:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


@functools.lru_cache(maxsize=8)
def _lease(size: int) -> type:
    """What a lent tensor's storage refers to, and lets go of at its end."""

    def come_home(self) -> None:
        self.home.clear()  # one is enough
        self.home[size] = self.owner

    return type("Lease", (ctypes.c_byte * size,), {"__del__": come_home})


def release_workspace() -> None:
    """Free the memory that this thread keeps between calls: at most ``workspace_bytes`` of scratch memory, or
    after a Sinkhorn call with one cost for all problems up to 256 MiB whatever that is; and the last
    accumulator of a weight's gradient, if that had no more than 256 MiB."""
    _store.buffer = None
    vars(_store).pop("returned", None)
