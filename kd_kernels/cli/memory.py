"""Peak memory of one step, in a process of its own.

On the CPU the peak is the kernel's own high-water mark of resident memory, reset just before the step;
on CUDA it is the allocator's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kd_kernels.cli.workload import Case, Inputs, compiled_step, kd_step, plain_step
from kd_kernels.drivers.workspace import release_workspace

_WARMUP_TOKENS = 16
_TIMEOUT = 1800.0  # seconds
_CHILD = "import sys; from kd_kernels.cli.memory import main; main(sys.argv[1])"


def step_of(way: str, case: Case) -> Callable[[Case, Inputs], torch.Tensor]:
    """The step of ``"torch"``, ``"torch.compile"`` or ``"kd"``."""
    return compiled_step(case) if way == "torch.compile" else {"torch": plain_step, "kd": kd_step}[way]


def measure(way: str, case: Case) -> int:
    """Bytes that one forward and backward needs above what was there before it."""
    step = step_of(way, case)
    if way != "torch.compile":  # a compiler would take the other shapes for a sign that they vary
        small = dataclasses.replace(case, tokens=4, vocab=64, student=16, teacher=16, workspace_bytes=None)
        step(small, Inputs.of(small))  # libraries load and make their pools
    inputs = Inputs.of(case)
    step(case, inputs if way == "torch.compile" else inputs.first(_WARMUP_TOKENS))
    inputs.clear()
    release_workspace()
    gc.collect()
    if case.device != "cpu":
        return _cuda_peak(lambda: step(case, inputs), torch.device(case.device))
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps freed pages resident; they are not the step's
    except (OSError, AttributeError):
        pass
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    step(case, inputs)
    return _resident("VmHWM") - before


def _cuda_peak(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has in all, in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_subprocess(way: str, case: Case) -> dict[str, Any]:
    """``{"peak_bytes": ...}`` of a fresh process, or ``{"failure": ...}``."""
    request = {"way": way, "threads": torch.get_num_threads(), "case": dataclasses.asdict(case)}
    command = [sys.executable, "-c", _CHILD, json.dumps(request)]
    # Freed tensors go back to the system: in glibc's heap their fragments would count as resident.
    environment = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, env=environment)
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer within {_TIMEOUT:.0f} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    reason = lines[-1][:200] if lines else f"exit status {done.returncode}"
    return {"failure": reason + (" (killed: out of memory?)" if done.returncode == -9 else "")}


def main(argument: str) -> None:
    """The child's part: measures what :func:`in_subprocess` asked for and prints one JSON object."""
    request = json.loads(argument)
    torch.set_num_threads(request["threads"])
    print(json.dumps({"peak_bytes": measure(request["way"], Case(**request["case"]))}))
