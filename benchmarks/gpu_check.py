"""Everything that only a GPU can prove, in one command that runs unattended:

    python benchmarks/gpu_check.py --out DIR [--budget SECONDS]

Tests marked ``gpu`` first, then the benchmarks at a GPU's sizes against their floors and peers, each with its
promise; JSON lines under ``DIR/<machine>/``, logs beside them, short tables last. What is missing (a peer, a
compiler, time) leaves its section out and says so. The result files belong under ``benchmarks/results/``,
from where ``table.py`` puts them into the README.
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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_head  # noqa: E402
import bench_relational  # noqa: E402
import bench_rows  # noqa: E402
import bench_sinkhorn  # noqa: E402
import bench_sinkhorn_batch  # noqa: E402
import bench_sorted  # noqa: E402
import bench_sparse  # noqa: E402
import gpu_counters  # noqa: E402
import gpu_cuda  # noqa: E402
import gpu_profile  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from benches import BENCHES, TITLES  # noqa: E402
from processes import within  # noqa: E402
from record import Row, clocks, git_state, read_all, versions  # noqa: E402
from registry import Bench  # noqa: E402
from workloads import GPU_HEAD, GPU_ROWS, Shape  # noqa: E402

from kd_kernels import native_cuda  # noqa: E402

FOR_THE_REST = 200.0  # seconds that the tests leave to what comes after them


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
    where = ROOT / "tests"
    first = (where / f"test_{name}.py" for name in ("waits", "gpu", "vocabulary_parallel"))
    files = map(str, (*first, *sorted(where.glob("test_gpu_*.py"))))
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


@dataclass(frozen=True)
class Measurement:
    name: str  # of its result file
    what: str
    run: Callable[..., list[Row]]  # (results, rounds=, ...)
    seconds: float = 25.0  # that it may take: it is not begun with less left
    rounds: int = 10


def head(shape: Shape, objective: str) -> Measurement:
    chosen = {"shape": shape, "dtypes": ("bf16",), "only": (objective,), "memory_for": None}
    return Measurement("head", f"head {shape.label} {objective}", partial(bench_head.run, **chosen))


def rows(shape: Shape, *objectives: str) -> Measurement:
    run = partial(bench_rows.run, shape=shape, dtypes=("bf16", "fp32"), only=objectives)
    return Measurement("rows", f"rows {shape.label} {', '.join(objectives)}", run, rounds=20)


def bench(chosen: Bench, seconds: float, dtype: str = "fp32") -> Measurement:
    run = partial(chosen.run, sizes="gpu", dtypes=(dtype,))
    return Measurement(chosen.name, f"{chosen.name} {dtype}", run, seconds)


# Most telling first.
MEASUREMENTS = (
    head(*GPU_HEAD[0]),
    rows(GPU_ROWS[0], "forward_kl", "jensen_shannon"),
    bench(bench_sparse.BENCH, 50.0, "bf16"),
    bench(bench_sinkhorn.BENCH, 50.0),
    bench(bench_sinkhorn_batch.BENCH, 40.0),
    *(head(shape, objective) for shape, objective in GPU_HEAD[1:]),
    *(rows(shape, "forward_kl") for shape in GPU_ROWS[1:]),
    bench(bench_relational.BENCH, 80.0),
    bench(bench_sorted.BENCH, 40.0),
)


def text(name: str, found: list[Row]) -> str:
    if name == "head":
        return report.head_text(found)
    if name == "rows":
        return report.rows_text(found)
    (chosen,) = (one for one in BENCHES if one.name == name)
    return report.aligned(chosen.header, chosen.lines(found))


def tried(section: Callable[[], object]) -> tuple[object, Optional[str]]:
    """What it gives, and what it died of: the other sections must still run."""
    try:
        return section(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:300]


def write(out: Path, summary: dict[str, object]) -> None:
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where results and logs go")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for everything (default 450)")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--only", metavar="REGEX", help="measurements whose names it is found in")
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
    left_out = []
    common = {"threads": torch.get_num_threads(), "reject": False, "device": "cuda"}
    for one in MEASUREMENTS:
        if options.only is not None and not re.search(options.only, one.what):
            continue
        if clock.left < one.seconds:
            left_out.append(f"{one.what}: no time left")
            continue
        _, reason = tried(partial(one.run, options.out, rounds=one.rounds, **common))
        if reason is not None:
            left_out.append(f"{one.what}: {reason}")
    summary["left out"] = left_out
    write(options.out, summary)  # should what follows be stopped from outside
    sections = {
        "profile": lambda: gpu_profile.check() if clock.left > 25.0 else "no time left",
        "cuda": lambda: gpu_cuda.check(options.out, lambda: clock.left),
        "bytes moved, over the least": lambda: gpu_counters.check(options.out, lambda: clock.left),
    }
    for what, section in sections.items():
        found, reason = tried(section)
        summary[what] = found if reason is None else {"failed": reason}
        write(options.out, summary)
    summary["clocks after"] = clocks()
    write(options.out, summary)
    for files in read_all(options.out).values():
        for name, found in files.items():
            print(f"\n{TITLES[name]}\n\n{text(name, found)}\n")
    print(json.dumps(summary, indent=1))
    passed = str(summary.get("tests", "exit 0")).startswith("exit 0") and not summary["cuda"].get("failed")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
