"""The CUDA row kernels on a GPU, for gpu_check.py: parity with Triton's, and what compute-sanitizer says.
Their times are those of the provider ``kd cuda``.

    python benchmarks/gpu_cuda.py     # the small cases that the sanitizer watches

Where the machine has no nvcc, the library that was built elsewhere (kd_kernels/libkd_kernels_cuda.so) is used
as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from processes import within  # noqa: E402
from torch import Tensor  # noqa: E402

import kd_kernels as kd  # noqa: E402
from kd_kernels import native_cuda  # noqa: E402

OBJECTIVES = (
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.JensenShannon(),
    kd.SkewKL(),
    kd.SkewReverseKL(),
    kd.TotalVariation(),
    kd.WeightedKL(0.7, 0.4),
)
VOCABULARIES = (32000, 128256, 151936, 262144)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the gradient, relative to its largest entry
# A block alone; a cluster with rows at odd addresses; one beyond what a cluster holds.
WATCHED = ((7, 4096, torch.bfloat16), (3, 128257, torch.float32), (2, 500000, torch.float32))
SUMMARIES = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    "initcheck": "ERROR SUMMARY: 0 errors",
    "synccheck": "ERROR SUMMARY: 0 errors",
}


def pair(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(vocab)
    student, teacher = (
        3 * torch.randn(rows, vocab, device="cuda", generator=generator, dtype=dtype) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def step(student: Tensor, teacher: Tensor, objective: kd.Objective, backend: str) -> tuple[Tensor, Tensor]:
    loss = kd.distill(student, teacher, objective, temperature=1.5, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def differences(rows: int, vocab: int, dtype: torch.dtype) -> list[str]:
    """Where the two backends disagree."""
    student, teacher = pair(rows, vocab, dtype)
    found = []
    for objective in OBJECTIVES:
        (loss, grad), (loss_t, grad_t) = (step(student, teacher, objective, b) for b in ("cuda", "triton"))
        apart = ((grad - grad_t).abs().max() / grad_t.abs().max()).item()
        if not (abs(loss - loss_t) <= 1e-5 * abs(loss_t) and apart <= TOLERANCE[dtype]):
            found.append(
                f"{objective.name} {vocab} {dtype}: loss {loss} {loss_t}, gradient {apart:.1e} apart"
            )
    return found


def sanitized(out: Path, left: Callable[[], float]) -> dict[str, str]:
    """What compute-sanitizer says of the watched cases; no summary line is a failure too."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"left out": "compute-sanitizer is not installed"}
    # Memory that torch keeps hides what goes beyond a tensor, and what nobody has written.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = {}
    with (out / "sanitizer.log").open("w+") as log:
        for name, passed in SUMMARIES.items():
            if left() < 10:
                found[name] = "left out: no time"
                continue
            # Calls that ask what a driver offers fail by design.
            command = [tool, "--tool", name, "--report-api-errors", "no"]
            command += [sys.executable, str(Path(__file__).resolve())]
            log.write(f"== {name}\n")
            log.flush()
            start = log.tell()
            status = within(
                min(180.0, left()), command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            log.seek(start)
            clean = status == 0 and passed in log.read()
            reason = "stopped for lack of time" if status is None else f"exit {status}"
            found[name] = "passed" if clean else f"failed: {reason}"
    return found


def check(out: Path, left: Callable[[], float], least: float = 25.0) -> dict[str, object]:
    """Everything that the time reaches; "failed" holds what did."""
    if reasons := native_cuda.why_not(torch.device("cuda")):
        return {"left out": "; ".join(reasons), "failed": reasons if shutil.which("nvcc") else []}
    failed: list[str] = []
    found: dict[str, object] = {}
    for vocab in VOCABULARIES:
        for dtype in TOLERANCE:
            if left() < least:
                return {**found, "failed": failed, "left out": f"no time from V = {vocab} {dtype} on"}
            failed += differences(256, vocab, dtype)
    if left() < 3 * least:
        return {**found, "failed": failed, "left out": "no time for compute-sanitizer"}
    found["compute-sanitizer"] = watched = sanitized(out, left)
    failed += [f"{tool} {said}" for tool, said in watched.items() if said.startswith("failed")]
    return {**found, "failed": failed}


def main() -> int:
    for rows, vocab, dtype in WATCHED:
        student, teacher = pair(rows, vocab, dtype)
        step(student, teacher, kd.JensenShannon(), "cuda")
    # Gradients of both models over bf16 logits of their own, labels, a softcap, the phases apart.
    student, teacher = (
        kd.Head(
            torch.randn(3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True),
            torch.randn(128257, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True),
            softcap=5.0,
        )
        for _ in range(2)
    )
    labels = torch.tensor([5, 100000, 128256], device="cuda")
    loss = kd.distill(
        student, teacher, kd.SkewKL(), labels=labels, hard_weight=0.5, teacher_grad=True, reduction="none",
        logits_dtype=torch.bfloat16, backend="cuda",
    )  # fmt: skip
    loss.backward(torch.rand_like(loss))
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
