"""Products of float32 as float32: without autocast, and without TF32 or bfloat16 in their place, in which
Sinkhorn's scalings would stop converging at 1e-3."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


def _library(kind: str) -> Any:
    """What has a setting of its own since torch 2.9, whose older one refuses to be mixed with it; or None."""
    backend = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
    library = getattr(backend, "matmul", None)
    return library if hasattr(library, "fp32_precision") else None


class _Guard:
    """The setting is the process's: the last thread to leave restores what the first one found."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before: object = None

    @contextmanager
    def on(self, device: torch.device, library: Any) -> Iterator[None]:
        with self.lock:
            if self.inside == 0 and library is not None:
                self.before, library.fp32_precision = library.fp32_precision, "ieee"
            elif self.inside == 0:
                self.before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("highest")
            self.inside += 1
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0 and library is not None:
                    library.fp32_precision = self.before
                elif self.inside == 0:
                    torch.set_float32_matmul_precision(self.before)


# The older setting is one for both kinds of device.
_guards = {name: _Guard() for name in ("cpu", "cuda", "older")}


def _start_afresh() -> None:
    """A forked process has none of the threads that may be inside."""
    for name in _guards:
        _guards[name] = _Guard()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)


def ieee_products(device: torch.device) -> AbstractContextManager:
    kind = "cuda" if device.type == "cuda" else "cpu"
    library = _library(kind)
    return _guards["older" if library is None else kind].on(device, library)
