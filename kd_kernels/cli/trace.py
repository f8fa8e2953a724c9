"""Memory and products of torch code, from a run on ``meta`` tensors: shapes are computed, nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Trace:
    peak_bytes: int  # of tensors made during the run and alive at the same time
    flops: int  # of matrix products


class _Alive(TorchDispatchMode):
    """Adds up the storages that operators return, until they are freed."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {x.untyped_storage()._cdata for x in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:  # a view, or written in place
            return
        self.known.add(key)
        weakref.finalize(storage, self._free, key, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def trace(function: Callable[[], object], held: Iterable[Tensor]) -> Trace:
    """Run ``function`` on meta tensors; ``held`` exist already and are not counted."""
    held = list(held)
    with _Alive(held) as alive, FlopCounterMode(display=False) as flops:
        result = function()
    del result
    return Trace(alive.peak, flops.get_total_flops())
