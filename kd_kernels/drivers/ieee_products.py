"""Products of float32 as float32: without autocast, and without TF32 or bfloat16 in their place, in which
Sinkhorn's scalings would stop converging at 1e-3."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


class _Guard:
    """The setting is the process's: the last thread to leave restores what the first one found."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before: object = None

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        library = getattr(backend, "matmul", None)  # mkldnn's came with torch 2.9
        # Since torch 2.9, whose older setting refuses to be mixed with it.
        newer = hasattr(library, "fp32_precision")
        with self.lock:
            if self.inside == 0:
                self.before = library.fp32_precision if newer else torch.get_float32_matmul_precision()
                if newer:
                    library.fp32_precision = "ieee"
                else:
                    torch.set_float32_matmul_precision("highest")
            self.inside += 1
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0 and newer:
                    library.fp32_precision = self.before
                elif self.inside == 0:
                    torch.set_float32_matmul_precision(self.before)


_guards = {kind: _Guard() for kind in ("cpu", "cuda")}


def _start_afresh() -> None:
    """A forked process has none of the threads that may be inside."""
    for kind in _guards:
        _guards[kind] = _Guard()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)


def ieee_products(device: torch.device) -> AbstractContextManager:
    return _guards["cuda" if device.type == "cuda" else "cpu"].on(device)
