"""Peak memory of one step, each in a process of its own.

``python benchmarks/memory.py '{"provider": ..., ...}'`` prints one JSON object. On Linux the peak is the
kernel's own high-water mark of resident memory (``VmHWM``), reset just before the step; so workspaces of
the math libraries and pages that no allocator reports are in it.

Warm-up: a step on a tiny problem loads the code, then one of 16 tokens on the real heads sets up what
libraries keep; a workspace that grows with the tokens is left to the measured step. Providers that
compile run one full step instead, or the compiler's memory would be taken for theirs. What the second
warm-up (or the full step) leaves behind after its gradients are dropped and the heap is trimmed is
reported as ``retained``: nothing of it is in the peak.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from providers import Provider, Unavailable, by_name, workspace
from workloads import DTYPES, Inputs, Objective, Shape, make_inputs

WARMUP_TOKENS = 16
TINY = Shape(4, 64, 16, 16)


def gradient_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """d hidden and d weight as returned, and the float32 accumulator of d weight."""
    weight = shape.vocab * shape.d_student
    hidden = shape.tokens * shape.d_student
    return (weight + hidden) * dtype.itemsize + weight * 4


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _settle() -> None:
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps freed pages resident; they are not the step's
    except (OSError, AttributeError):
        pass


def _small(inputs: Inputs) -> Inputs:
    few = slice(0, WARMUP_TOKENS)
    h_s = inputs.h_s.detach()[few].clone().requires_grad_()
    return Inputs(h_s, inputs.w_s, inputs.h_t[few], inputs.w_t, inputs.labels[few])


def measure(provider: str, objective: Objective, shape: Shape, dtype: str, threads: int) -> dict[str, Any]:
    """Bytes that one forward and backward needs above what was there before it."""
    torch.set_num_threads(threads)
    chosen = by_name(provider)
    if not chosen.compiles:  # a compiler would take the second shape for a sign that shapes vary
        chosen.step(make_inputs(TINY, DTYPES[dtype]), objective)  # imports, threads
    inputs = make_inputs(shape, DTYPES[dtype])
    _settle()
    start = _status("VmRSS")
    warm = inputs if chosen.compiles else _small(inputs)
    loss = chosen.step(warm, objective)
    del loss, warm
    inputs.clear_gradients()
    _settle()
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # VmHWM := VmRSS
    loss = chosen.step(inputs, objective)
    peak = _status("VmHWM") - before
    del loss
    gradients = gradient_bytes(shape, DTYPES[dtype])
    return {
        "above_inputs": peak,
        "gradients": gradients,
        "above_gradients": peak - gradients,
        "retained": before - start,
        "warmup": "full step" if chosen.compiles else f"{WARMUP_TOKENS} tokens",
    }


def on_device(
    provider: Provider, objective: Objective, inputs: Inputs, shape: Shape, dtype: str, device: str
) -> dict[str, Any]:
    """The same on a GPU, by the allocator's own high-water mark, after a step that warmed up."""
    inputs.clear_gradients()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        provider.step(inputs, objective)
        torch.cuda.synchronize()
    except Exception as error:  # a peer may run out of memory; its row says so
        return {"failure": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        inputs.clear_gradients()
    peak, gradients = torch.cuda.max_memory_allocated() - before, gradient_bytes(shape, DTYPES[dtype])
    allowed = {"workspace": workspace(provider, device), "device": "cuda"} if provider.ours else {}
    return {"above_inputs": peak, "gradients": gradients, "above_gradients": peak - gradients, **allowed}


def in_subprocess(
    provider: str, objective: Objective, shape: Shape, dtype: str, threads: int, timeout: float = 900.0
) -> dict[str, Any]:
    """:func:`measure` in a fresh process; ``{"failure": ...}`` where that did not work."""
    request = {
        "provider": provider,
        "objective": [objective.name, list(objective.parameters)],
        "shape": [shape.tokens, shape.vocab, shape.d_student, shape.d_teacher],
        "dtype": dtype,
        "threads": threads,
    }
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer within {timeout:.0f} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"failure": lines[-1][:200] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argument: str) -> None:
    request = json.loads(argument)
    name, parameters = request["objective"]
    objective = Objective(name, tuple((key, value) for key, value in parameters))
    shape = Shape(*request["shape"])
    try:
        result = measure(request["provider"], objective, shape, request["dtype"], request["threads"])
    except Unavailable as error:
        result = {"failure": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
