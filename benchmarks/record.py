"""Result files: one JSON line per (case, provider), stamped with what it takes to judge the figure."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any, Optional

import torch

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
Row = dict[str, Any]

DISTRIBUTIONS = ("torch", "triton", "liger-kernel", "trl", "transformers", "kd-kernels", "numpy")


def versions() -> dict[str, Optional[str]]:
    found: dict[str, Optional[str]] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state() -> dict[str, Any]:
    """Commit, and whether anything but the results themselves differs from it."""

    def git(*arguments: str) -> Optional[str]:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    status = git(
        "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results", ":(exclude,top)README.md"
    )
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(status) if status is not None else None}


@functools.cache
def processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were taken on. No host names: the slug names a kind of machine, not one."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        slug = f"cuda-{name}"
    else:
        name = processor()
        slug = f"cpu-{name}-{os.cpu_count()}c-{torch.backends.cpu.get_cpu_capability()}"
    slug = re.sub(r"\([^)]*\)|@.*?GHz|\bCPU\b|\bProcessor\b", " ", slug)
    slug = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")
    found = {
        "slug": slug,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    return {**found, "gpu": clocks()} if device.startswith("cuda") else found


def clocks() -> str:
    """Driver, clocks and power of the GPU, ten seconds ago at most."""
    return _clocks(int(time.monotonic()) // 10)


@functools.cache
def _clocks(moment: int) -> str:
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()[0].split(",")  # fmt: skip
        driver, sm, memory, most, power, celsius = (x.strip() for x in told[:6])
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError) as error:
        return f"clocks not known ({error})"
    return f"driver {driver}, {sm} of {most}, memory {memory}, {power}, {celsius} C"


@functools.cache
def _here() -> Row:
    return {"versions": versions(), "git": git_state()}


def _stamp(device: str) -> Row:
    return {
        **_here(),
        "machine": machine(device),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def _key(row: Row) -> tuple[str, str]:
    return row["case_id"], row["provider"]


class Writer:
    """Collects rows and keeps ``<results>/<machine>/<name>.jsonl`` up to date after each.

    Rows of the same (case, provider) replace older ones, others stay: a run of part of the cases
    refreshes that part. Every line carries its own commit, so a mixture is visible.
    """

    def __init__(self, name: str, results: Optional[Path], device: str = "cpu") -> None:
        self.device = device
        self.rows: list[Row] = []
        self.path: Optional[Path] = None
        self.kept: dict[tuple[str, str], Row] = {}
        if results is not None:
            self.path = results / _stamp(device)["machine"]["slug"] / f"{name}.jsonl"
            self.kept = {_key(row): row for row in read(self.path)}

    def add(self, row: Row) -> Row:
        return self.keep({**row, **_stamp(self.device)})

    def keep(self, row: Row) -> Row:
        """``row`` with the stamp that it already has."""
        self.rows.append(row)
        self.kept[_key(row)] = row
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".part")
            partial.write_text("".join(json.dumps(r) + "\n" for r in self.kept.values()))
            partial.replace(self.path)
        return row


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def read_all(results: Path = RESULTS) -> dict[str, dict[str, list[Row]]]:
    """All rows by machine and by file name, in a stable order."""
    found: dict[str, dict[str, list[Row]]] = {}
    for path in sorted(results.glob("*/*.jsonl")):
        found.setdefault(path.parent.name, {})[path.stem] = read(path)
    return found


def rounded(value: Optional[float]) -> Optional[float]:
    """As many digits as a measurement has; keeps the files and their diffs small."""
    return None if value is None else float(f"{value:.5g}")
