"""What the commands share: arguments, devices, progress."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from kd_kernels.objectives import CATALOGUE
from kd_kernels.progress import Progress

__all__ = [
    "DTYPES",
    "Progress",
    "UsageError",
    "add_case",
    "count",
    "device",
    "devices",
    "emit",
    "need_device",
]

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
