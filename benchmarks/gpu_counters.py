"""Bytes that row kernels move to and from a GPU's memory, for gpu_check.py: what ncu counts, over the least.

    python benchmarks/gpu_counters.py BACKEND     # the step that is watched

A step of two heads, whose logits are read as float32 and whose gradient is written in bfloat16.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_profile import head_step, heads  # noqa: E402
from processes import within  # noqa: E402

import kd_kernels as kd  # noqa: E402

BACKENDS = ("cuda", "triton")
TOKENS, VOCAB = 2048, 128256
LEAST = {"dram__bytes_read.sum": 8 * TOKENS * VOCAB, "dram__bytes_write.sum": 2 * TOKENS * VOCAB}
KERNELS = "regex:row_kernel|row_divergence"  # CUDA's and Triton's


def counted(report: str) -> dict[str, float]:
    """Each metric, added up over all kernels of a report in CSV; over the least."""
    lines = [line for line in report.splitlines() if line.startswith('"')]
    totals = dict.fromkeys(LEAST, 0.0)
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        totals[row["Metric Name"]] += float(row["Metric Value"].replace(",", ""))
    return {name: round(total / LEAST[name], 3) for name, total in totals.items()}


def check(out: Path, left: Callable[[], float], least: float = 25.0) -> dict[str, object]:
    """By backend: bytes over the least, or why they were not counted."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"left out": "ncu is not installed"}
    found: dict[str, object] = {}
    for backend in BACKENDS:
        if left() < least:
            found[backend] = "left out: no time"
            continue
        command = [
            tool,
            "--csv",
            "--print-units",
            "base",
            "--clock-control",
            "none",
            "--kernel-name",
            KERNELS,
        ]
        command += ["--metrics", ",".join(LEAST), sys.executable, str(Path(__file__).resolve()), backend]
        log = out / f"counters_{backend}.log"
        with log.open("w") as told:
            status = within(min(90.0, left()), command, stdout=told, stderr=subprocess.STDOUT)
        ratios = counted(log.read_text())
        counts = status == 0 and all(ratios.values())
        found[backend] = ratios if counts else f"not counted: exit {status}, see {log.name}"
    return found


def main(backend: str) -> int:
    student, teacher = heads(TOKENS, VOCAB, 64, 64)
    head_step(student, teacher, kd.ForwardKL(), backend=backend, workspace_bytes=8 << 30)  # one chunk
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
