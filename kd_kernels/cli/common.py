"""What the commands share: arguments, devices, progress."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Optional

import torch

from kd_kernels.objectives import CATALOGUE

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class UsageError(ValueError):
    """Arguments that each are fine but do not go together; the message says what would do."""


def count(text: str) -> int:
    """A positive integer, for argparse; ``1_000`` is one."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 0 < value < 1 << 40:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def device(text: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``, for argparse; whether it is there is not asked."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:<index>, got {text!r}")
    return found


def need_device(found: torch.device) -> None:
    """Raise where ``found`` is not on this machine."""
    available = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= available:
        raise UsageError(f"--device {found}: torch sees {available} CUDA devices here; use --device cpu")


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def add_case(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """The arguments that describe one distillation step; those without a default are required."""
    for name, meaning in (
        ("tokens", "tokens of a step that count"),
        ("vocab", "vocabulary entries"),
        ("student", "hidden size of the student"),
        ("teacher", "hidden size of the teacher"),
    ):
        default = defaults.get(name)
        shown = meaning if default is None else f"{meaning} (default {default})"
        parser.add_argument(f"--{name}", type=count, default=default, required=default is None, help=shown)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of hidden states and heads (default fp32; cuda bf16)"
    )
    parser.add_argument("--objective", choices=CATALOGUE, default="forward_kl", help="default forward_kl")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="default cpu")
    parser.add_argument("--frozen-head", action="store_true", help="the student's head does not train")
    parser.add_argument("--workspace-bytes", type=count, help="scratch memory (default: the package's)")
    parser.add_argument("--backend", help="as in kd.distill; default: the first that serves the device")


def emit(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))


class Progress:
    """Says on stderr how far a long command is: from two seconds on, often on a terminal, seldom in a log."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.next = self.start + 2

    def step(self, detail: Optional[str] = None) -> None:
        self.done += 1
        now = time.monotonic()
        if now < self.next and not (self.terminal and self.done == self.total and self._shown):
            return
        self.next = now + (0.3 if self.terminal else 10)
        text = f"{self.what}: {self.done} of {self.total}, {now - self.start:.0f} s"
        text += f" ({detail})" if detail else ""
        print(f"\r{text:<100}" if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    @property
    def _shown(self) -> bool:
        return self.next > self.start + 2

    def close(self) -> None:
        if self.terminal and self._shown:
            print(f"\r{'':<100}\r", end="", file=sys.stderr)
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
