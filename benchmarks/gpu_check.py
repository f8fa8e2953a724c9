"""Everything that only a GPU can prove, in one command that runs unattended:

    python benchmarks/gpu_check.py --out DIR [--budget SECONDS]

Tests marked ``gpu`` first, then the row kernels and the head against their floors and peers; JSON lines
under ``DIR/<machine>/``, logs beside them, a short table last. What is missing (a peer, a compiler, time)
leaves its section out and says so. The result files belong under ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_head  # noqa: E402
import bench_rows  # noqa: E402
import gpu_cuda  # noqa: E402
import gpu_profile  # noqa: E402
import gpu_transport  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from harness import Timed, run_rounds  # noqa: E402
from processes import within  # noqa: E402
from record import Row, git_state, versions  # noqa: E402
from workloads import Shape  # noqa: E402

import kd_kernels as kd  # noqa: E402
from kd_kernels import native_cuda  # noqa: E402

# Most telling first: what the time does not reach is left out.
HEAD_CASES = [
    (Shape(8192, 128256, 2048, 4096), ("forward_kl", "jensen_shannon", "reverse_kl")),
    (Shape(1024, 128256, 2048, 4096), ("forward_kl",)),
    (Shape(8192, 32000, 2048, 4096), ("forward_kl", "jensen_shannon")),
    (Shape(8192, 151936, 4096, 4096), ("forward_kl",)),
    (Shape(8192, 262144, 1024, 8192), ("forward_kl",)),
    (Shape(32768, 128256, 2048, 4096), ("forward_kl",)),
]
ROW_CASES = [Shape(4096, vocab) for vocab in (128256, 32000, 151936, 262144)]
TOPK_SHAPE, TOPK_K = Shape(8192, 151936, 4096, 4096), gpu_profile.TOPK_K
FOR_THE_REST = 100.0  # seconds that the tests leave to what comes after them
PER_CASE = 25.0  # seconds that a case may take: none is begun with less left


class Clock:
    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def build(log: Path) -> Optional[str]:
    """Compile the native parts in place with what is installed, CUDA's for this GPU; the reason where that
    cannot be done. Without nvcc a CUDA library that was brought along stays."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-q", "-e", str(ROOT)]
    major, minor = torch.cuda.get_device_capability()
    environment = {"KD_KERNELS_CUDA": "auto", "KD_KERNELS_CUDA_ARCHS": f"{major}{minor}", **os.environ}
    library = native_cuda.LIBRARY
    brought = library.read_bytes() if library.exists() and shutil.which("nvcc") is None else None
    with log.open("w") as out:
        done = subprocess.run(pip, stdout=out, stderr=subprocess.STDOUT, env=environment)
    if brought is not None:
        library.write_bytes(brought)
    return None if done.returncode == 0 else f"the native parts were not built, see {log.name}"


def tests(log: Path, seconds: float) -> str:
    """The last line that pytest says; the log names what failed as it fails, also where time runs out."""
    # The quick ones first.
    files = ("tests/test_waits.py", "tests/test_gpu_points.py", "tests/test_gpu.py")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rs", "--tb=short", *files]
    if importlib.util.find_spec("xdist") is not None:  # most of the time is spent compiling
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    with log.open("w") as out:
        returned = within(seconds, command, stdout=out, stderr=subprocess.STDOUT)
        if returned is None:
            failed = re.findall(r"^.*FAILED.*::(.+)$|^.*::(.+) FAILED", log.read_text(), re.MULTILINE)
            failed = sorted({(first or second).strip() for first, second in failed})
            return f"stopped for lack of time; failed until then: {', '.join(failed) or 'none'}"
    lines = log.read_text().strip().splitlines()
    return f"exit {returned}: {lines[-1] if lines else 'no output'}"


def clocks() -> str:
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        return subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not known ({error})"


def measurements(out: Path, device: str) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """(what, how) of every case, most telling first."""
    common = {"threads": torch.get_num_threads(), "reject": False, "device": device}

    def rows_case(shape: Shape, objectives: tuple[str, ...]) -> Callable[[], list[Row]]:
        return lambda: bench_rows.run(
            out, shape=shape, dtypes=("bf16", "fp32"), only=objectives, rounds=20, **common
        )

    def head_case(shape: Shape, objective: str) -> Callable[[], list[Row]]:
        return lambda: bench_head.run(
            out, shape=shape, dtypes=("bf16",), only=(objective,), rounds=10, memory_for=None, **common
        )

    shape, objectives = HEAD_CASES[0]
    yield f"head {shape.label} {objectives[0]}", head_case(shape, objectives[0])
    yield f"rows {ROW_CASES[0].label}", rows_case(ROW_CASES[0], ("forward_kl", "jensen_shannon"))
    for shape, objectives in HEAD_CASES:
        for objective in objectives:
            if (shape, objective) != (HEAD_CASES[0][0], HEAD_CASES[0][1][0]):
                yield f"head {shape.label} {objective}", head_case(shape, objective)
    for shape in ROW_CASES[1:]:
        yield f"rows {shape.label}", rows_case(shape, ("forward_kl",))


def topk_times(rounds: int = 20) -> dict[str, object]:
    """Median milliseconds of a teacher cache's write side and of a training step on it, of the bare products
    that each needs, and of ``torch.topk`` on the same logits."""
    tokens, vocab, width = TOPK_SHAPE.tokens, TOPK_SHAPE.vocab, TOPK_SHAPE.d_teacher
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    head = kd.Head(hidden, weight)
    top = kd.linear_topk(head, TOPK_K)
    target = kd.SparseTarget(top.ids, logprobs=top.logits - top.lse.reshape(-1, 1), missing="tail")
    student = kd.Head(torch.randn_like(hidden).requires_grad_(), weight.clone().requires_grad_())
    logits = hidden @ weight.t()

    def three_products() -> None:
        projected = hidden @ weight.t()
        projected @ weight
        projected.t() @ hidden

    timed = [
        Timed("product", lambda: torch.mm(hidden, weight.t(), out=logits)),
        Timed("linear_topk", lambda: kd.linear_topk(head, TOPK_K)),
        Timed("torch.topk of the logits", lambda: logits.topk(TOPK_K)),
        Timed("three products", three_products),
        Timed("sparse step", lambda: kd.distill(student, target, kd.ForwardKL()).backward()),
    ]
    run_rounds(timed, rounds=rounds, device="cuda", reject=False)
    times: dict[str, object] = {}
    for provider in timed:
        spread = provider.spread()
        times[provider.name] = round(1e3 * spread.median, 3) if spread else provider.failure
    return times


def write(out: Path, summary: dict[str, object]) -> None:
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where results and logs go")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for everything (default 450)")
    parser.add_argument("--no-tests", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing here can be proved", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    clock, summary = Clock(options.budget), {}
    summary["machine"] = {
        "gpu": clocks(),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "git": git_state(),
    }
    if (reason := build(options.out / "build.log")) is not None:
        summary["build"] = reason
    if not options.no_tests:
        summary["tests"] = tests(options.out / "tests.log", clock.left - FOR_THE_REST)
        print(f"pytest -m gpu: {summary['tests']}", flush=True)
    head: list[Row] = []
    rows: list[Row] = []
    left_out = []
    for what, measure in measurements(options.out, "cuda"):
        if clock.left < PER_CASE:
            left_out.append(f"{what}: no time left")
            continue
        try:
            found = measure()
        except Exception as error:  # the other sections must still run
            left_out.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0][:300])
            continue
        (head if what.startswith("head") else rows).extend(found)
    sections = {"profile": gpu_profile.check, "topk ms": topk_times, "transport ms": gpu_transport.check}
    for what, section in sections.items():
        try:
            summary[what] = section() if clock.left > PER_CASE else "no time left"
        except Exception as error:
            left_out.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0][:300])
    summary["left out"] = left_out
    write(options.out, summary)  # should what follows be stopped from outside
    try:
        summary["cuda"] = gpu_cuda.check(options.out, lambda: clock.left)
    except Exception as error:
        summary["cuda"] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    summary["clocks after"] = clocks()
    write(options.out, summary)
    if head:
        print(report.head_text(head))
    if rows:
        print(report.rows_text(rows))
    print(json.dumps(summary, indent=1))
    passed = str(summary.get("tests", "exit 0")).startswith("exit 0") and not summary["cuda"].get("failed")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
