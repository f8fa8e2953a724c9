"""What a computation holds meanwhile: the largest tensor it makes, the memory of its process; and the chunks
that its walks take."""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kd_kernels.drivers import chunked_head

# Bytes of "VmRSS" now, or of "VmHWM", the most since ``Path("/proc/self/clear_refs").write_text("5")``.
_STATUS = """
from pathlib import Path

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
"""


def in_a_process(script: str, *arguments: str) -> int:
    """The number that a script prints, in a process of its own; it has ``status("VmRSS")`` and ``Path``."""
    command = [sys.executable, "-c", _STATUS + script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@contextmanager
def chunks() -> Iterator[list[list[int]]]:
    """The sizes of the chunks of every walk of two models, in the order of the walks."""
    seen, cut = [], chunked_head.cut

    def watched(sides, n, *arguments, **options):
        rows, size = cut(sides, n, *arguments, **options)
        seen.append([min(rows, n - start) for start in range(0, n, rows)])
        return rows, size

    with patch.object(chunked_head, "cut", watched):
        yield seen


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile holds; what is expanded holds them once."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                held = math.prod(size for size, step in zip(x.shape, x.stride()) if step)
                self.numel = max(self.numel, held if x.numel() else 0)
        return out
