"""The CUDA row kernels on a GPU, for gpu_check.py: parity with Triton's, times of both, compute-sanitizer.

    python benchmarks/gpu_cuda.py     # the three small cases that the sanitizer watches

They were written where there was no GPU: until this has passed on one, nothing is known of their speed, and
of their results only what the host's threads show (csrc/tests/test_cuda_row_divergence.cpp). Where the
machine has no nvcc, the library that was built elsewhere (kd_kernels/libkd_kernels_cuda.so) is used as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from harness import Timed, run_rounds  # noqa: E402
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
ROWS = 4096
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the gradient, relative to its largest entry
# A block alone; a cluster with rows at odd addresses; one beyond what a cluster holds.
WATCHED = ((7, 4096, torch.bfloat16), (3, 128257, torch.float32), (2, 500000, torch.float32))
SUMMARIES = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    "initcheck": "ERROR SUMMARY: 0 errors",
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


def times(vocab: int, dtype: torch.dtype) -> dict[str, object]:
    """Median milliseconds of forward and backward on logits, and of a copy of as many bytes as must move."""
    student, teacher = pair(ROWS, vocab, dtype)
    least = torch.empty(3 * student.numel() // 2, device="cuda", dtype=dtype)  # read once and written once
    target = torch.empty_like(least)
    timed = [Timed("copy", lambda: target.copy_(least))]
    for backend in ("cuda", "triton"):
        for objective in (kd.ForwardKL(), kd.JensenShannon()):
            call = lambda b=backend, o=objective: step(student, teacher, o, b)  # noqa: E731
            timed.append(Timed(f"{backend} {objective.name}", call))
    run_rounds(timed, rounds=20, device="cuda", reject=False)
    found: dict[str, object] = {}
    for provider in timed:
        spread = provider.spread()
        found[provider.name] = round(1e3 * spread.median, 3) if spread else provider.failure
    return found


def sanitized(out: Path) -> dict[str, str]:
    """What compute-sanitizer says of the three cases; no summary line is a failure too."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"left out": "compute-sanitizer is not installed"}
    found = {}
    for name, passed in SUMMARIES.items():
        command = [tool, "--tool", name, sys.executable, str(Path(__file__).resolve())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=180)
        except subprocess.TimeoutExpired:
            found[name] = "failed: took longer than 180 s"
            continue
        text = done.stdout + done.stderr
        (out / f"sanitizer-{name}.log").write_text(text)
        found[name] = (
            "passed" if done.returncode == 0 and passed in text else f"failed: exit {done.returncode}"
        )
    return found


def check(out: Path, left: Callable[[], float], least: float = 25.0) -> dict[str, object]:
    """Everything that the time reaches; "failed" holds what did."""
    if reasons := native_cuda.why_not(torch.device("cuda")):
        return {"left out": "; ".join(reasons)}
    failed: list[str] = []
    found: dict[str, object] = {}
    for vocab in VOCABULARIES:
        for dtype in TOLERANCE:
            if left() < least:
                return {**found, "failed": failed, "left out": f"no time from V = {vocab} {dtype} on"}
            failed += differences(256, vocab, dtype)
            found[f"{vocab} {str(dtype)[6:]} ms"] = times(vocab, dtype)
    if left() < 3 * least:
        return {**found, "failed": failed, "left out": "no time for compute-sanitizer"}
    found["compute-sanitizer"] = watched = sanitized(out)
    failed += [f"{tool} {said}" for tool, said in watched.items() if said.startswith("failed")]
    return {**found, "failed": failed}


def main() -> int:
    for rows, vocab, dtype in WATCHED:
        student, teacher = pair(rows, vocab, dtype)
        step(student, teacher, kd.JensenShannon(), "cuda")
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
