"""Time one distillation step on this machine: kd.distill, plain torch and the bare matrix products.

All take turns in one process; each one's peak memory is measured in a process of its own. Agreement
with plain torch in float32 (float64) is checked first, and nothing is timed where it fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kd_kernels.backends import pick
from kd_kernels.cli.common import Progress, UsageError, add_case, count, emit, need_device
from kd_kernels.cli.info import device_name
from kd_kernels.cli.memory import in_subprocess, memory_of, step_of
from kd_kernels.cli.plan import predict
from kd_kernels.cli.workload import Case, Floor, Inputs, kd_step, plain_step
from kd_kernels.version import __version__

HELP = "time and weigh one step against plain torch on this machine"

LABELS = {
    "floor": "bare products",
    "torch": "plain torch",
    "torch.compile": "torch.compile",
    "kd": "kd.distill",
}
# Of loss and gradients against float32 autograd on the same rounded inputs (float64 for fp64): a few
# roundings of the results' own dtype.
BARS = {"fp64": 1e-9, "fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}
_CHECKED_TOKENS = 64


SMALL_SECONDS = 0.01


def configure(parser: argparse.ArgumentParser) -> None:
    add_case(parser, tokens=2048, vocab=32_000, student=512, teacher=1024)
    parser.add_argument("--compile", action="store_true", help="torch.compile of plain torch as well")
    parser.add_argument("--rounds", type=count, default=5, help="samples of each (default 5)")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it; needs matplotlib")


def agreement(case: Case) -> dict[str, float]:
    """Relative errors of our loss and gradients on a few of the tokens."""
    few = dataclasses.replace(case, tokens=min(case.tokens, _CHECKED_TOKENS))
    inputs = Inputs.of(few)
    wide = "fp64" if case.dtype == "fp64" else "fp32"
    leaves = [
        x.detach().to(torch.float64 if wide == "fp64" else torch.float32).requires_grad_(x.requires_grad)
        for x in inputs.tensors()
    ]
    exact = Inputs(*leaves)
    pairs = {"loss": (kd_step(few, inputs), plain_step(dataclasses.replace(few, dtype=wide), exact))}
    pairs["d_hidden"] = (inputs.student_hidden.grad, exact.student_hidden.grad)
    if not case.frozen_head:
        pairs["d_weight"] = (inputs.student_weight.grad, exact.student_weight.grad)
    return {
        name: ((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm()).item()
        for name, (a, b) in pairs.items()
    }


def _step(step: Callable[[Case, Inputs], object], case: Case, inputs: Inputs) -> None:
    inputs.clear()
    step(case, inputs)


def times(
    ways: dict[str, Callable[[], object]], rounds: int, case: Case, progress: Progress
) -> dict[str, list[float]]:
    """Seconds of each way, ``rounds`` times, in turns: a machine that gets slower hits all alike."""

    def once(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        if case.device != "cpu":
            torch.cuda.synchronize(torch.device(case.device))
        return time.perf_counter() - start

    samples: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):  # the first is a warm-up
        gc.collect()
        for name in list(ways) if index % 2 == 0 else reversed(ways):
            seconds = once(ways[name])
            if index:
                samples[name].append(seconds)
            progress.step(f"timing {LABELS[name]}")
    return samples


def spread(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    values = torch.tensor(samples, dtype=torch.float64)
    low, middle, high = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"median": middle, "p20": low, "p80": high}


def measure(case: Case, compiled: bool, rounds: int, memory: bool) -> dict[str, Any]:
    """Everything that ``bench`` prints, as plain data."""
    found: dict[str, Any] = {
        "case": dataclasses.asdict(case),
        "environment": {
            "kd_kernels": __version__,
            "torch": torch.__version__,
            "device": device_name(torch.device(case.device)),
            "threads": torch.get_num_threads(),
            "backend": pick("row_divergence", torch.device(case.device), case.backend)[0],
        },
        "errors": agreement(case),
    }
    found["agrees"] = all(error <= BARS[case.dtype] for error in found["errors"].values())
    if not found["agrees"]:
        return found
    inputs = Inputs.of(case)
    names = ["torch", *(["torch.compile"] if compiled else []), "kd"]
    ways: dict[str, Callable[[], object]] = {"floor": Floor(case, inputs)}
    for name in names:
        ways[name] = functools.partial(_step, step_of(name, case), case, inputs)
    if compiled:
        try:
            ways["torch.compile"]()
        except Exception as error:  # a compiler may be missing, or fail, in any way
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UsageError(f"--compile: torch.compile does not work here ({reason})") from None
    with Progress("bench", len(ways) * (rounds + 1) + memory * len(names)) as progress:
        samples = times(ways, rounds, case, progress)
        floor = samples["floor"]
        found["ways"] = {
            name: {
                "seconds": {**spread(taken), "samples": taken},
                "times_floor": spread([a / b for a, b in zip(taken, floor)]),
            }
            for name, taken in samples.items()
        }
        ways.clear()
        inputs.clear()
        for name in names if memory else []:
            found["ways"][name]["memory"] = in_subprocess(name, case)
            progress.step(f"weighing {LABELS[name]}")
    return found


def need_memory(case: Case) -> None:
    """Raise where the planned steps do not fit this machine, before anything is allocated."""
    found = predict(case)
    inputs = Inputs.of(case, "meta")
    floor = Floor(case, inputs)
    held = [*inputs.tensors(), floor.student, floor.teacher, floor.d_hidden, floor.d_weight]
    step = max(found["plain"]["peak_bytes"], found["kd"]["peak_bytes"])
    needed, there = sum(x.nbytes for x in held if x is not None) + step, memory_of(torch.device(case.device))
    if needed > there:
        raise UsageError(
            f"{case.label}: inputs, bare products and plain torch need {needed / 2**30:.1f} GiB, and "
            f"{case.device} has {there / 2**30:.1f}; give fewer --tokens or a smaller --vocab "
            f"(python -m kd_kernels plan predicts a step without running it)"
        )


def show(case: Case, found: dict[str, Any]) -> None:
    where = found["environment"]
    print(case.label)
    print(
        f"{where['device']}, {where['threads']} threads, backend {where['backend']}, torch {where['torch']}, "
        f"kd_kernels {where['kd_kernels']}"
    )
    errors = ", ".join(f"{name.replace('_', ' ')} {error:.1e}" for name, error in found["errors"].items())
    print(f"errors against float32 autograd (float64 for fp64): {errors}")
    if not found["agrees"]:
        print(f"NOT EQUAL: the bar is {BARS[case.dtype]:.0e}; nothing was timed")
        return
    print(f"\n{'':15s} {'median':>9s} {'p20 .. p80':>21s} {'x products':>11s} {'peak above inputs':>18s}")
    for name, row in found["ways"].items():
        s, memory = row["seconds"], row.get("memory", {})
        range_ = f"{s['p20'] * 1e3:.1f} .. {s['p80'] * 1e3:.1f} ms"
        peak = f"{memory['peak_bytes'] / 2**20:.0f} MiB" if _weighed(row) else ""
        print(
            f"{LABELS[name]:15s} {s['median'] * 1e3:6.1f} ms {range_:>21s} "
            f"{row['times_floor']['median']:11.2f} {memory.get('failure', peak):>18s}"
        )
    plain, ours = found["ways"]["torch"], found["ways"]["kd"]
    # Formed within rounds, as the column is: not the ratio of the medians.
    ratio = spread([a / b for a, b in zip(plain["seconds"]["samples"], ours["seconds"]["samples"])])["median"]
    text = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
    if _weighed(plain) and _weighed(ours):
        share = ours["memory"]["peak_bytes"] / max(plain["memory"]["peak_bytes"], 1)
        text += f", with {100 * share:.0f}% of its memory"
    print(f"\nkd.distill against plain torch: {text}")
    if ours["seconds"]["median"] < SMALL_SECONDS:
        print("At this size mostly the fixed cost of a call is measured.")


def _weighed(row: dict[str, Any]) -> bool:
    return "peak_bytes" in row.get("memory", {})


def plot(case: Case, found: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = found["ways"]
    names = [LABELS[name] for name in rows]
    peaks = {LABELS[n]: row["memory"]["peak_bytes"] / 2**20 for n, row in rows.items() if _weighed(row)}
    figure, axes = plt.subplots(1, 2 if peaks else 1, figsize=(10, 4), layout="constrained", squeeze=False)
    left = axes[0, 0]
    middle = [row["seconds"]["median"] * 1e3 for row in rows.values()]
    low = [m - row["seconds"]["p20"] * 1e3 for m, row in zip(middle, rows.values())]
    high = [row["seconds"]["p80"] * 1e3 - m for m, row in zip(middle, rows.values())]
    left.bar(names, middle, yerr=[low, high], capsize=4)
    left.set_ylabel("milliseconds (median, p20 .. p80)")
    if peaks:
        axes[0, 1].bar(list(peaks), list(peaks.values()))
        axes[0, 1].set_ylabel("peak MiB above inputs")
    figure.suptitle(case.label, fontsize=9)
    figure.savefig(file, dpi=120)


def run(args: argparse.Namespace) -> int:
    need_device(args.device)
    if args.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib, which is not installed: pip install matplotlib")
        if not args.plot.absolute().parent.is_dir():
            raise UsageError(f"--plot: there is no folder {args.plot.absolute().parent}")
        if args.plot.is_dir() or args.plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UsageError(f"--plot takes a file ending in .png, .pdf or .svg, got {args.plot}")
        if not os.access(args.plot.absolute().parent, os.W_OK):
            raise UsageError(f"--plot: {args.plot.absolute().parent} cannot be written to")
    case = Case.of(args)
    try:
        need_memory(case)
        found = measure(case, args.compile, args.rounds, not args.no_memory)
    except ValueError as error:  # a workspace that holds no row, a step that no memory does
        raise UsageError(str(error)) from None
    if args.json:
        emit(found)
    else:
        show(case, found)
    if args.plot is not None and found["agrees"]:
        plot(case, found, args.plot)
        print(f"drawn in {args.plot}", file=sys.stderr)
    return 0 if found["agrees"] else 1
