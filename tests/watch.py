"""What a computation holds meanwhile: the largest tensor it makes, the memory of its process."""

import math
import subprocess
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
