"""What this installation can do on this machine: versions, instruction set, backends and why not."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

from kd_kernels import native, native_cuda
from kd_kernels.backends import TABLE
from kd_kernels.cli.common import devices, emit
from kd_kernels.gemm import route
from kd_kernels.version import __version__

HELP = "versions, instruction set, threads, backends and why not"

_ROUTES = {
    "native": "own AVX512_BF16 kernel",
    "mkl": "MKL's mixed product, from the library that torch brings",
    "upcast": "cast up, float32 product",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as plain data."""
    missing = native.why_not()
    return {
        "kd_kernels": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": {
            "instruction_set": None if missing else native.module().instruction_set(),
            "missing": missing,
        },
        "cuda": {"built": native_cuda.LIBRARY.exists(), "standing": native_cuda.STANDING},
        "float32_logits": {str(dtype)[6:]: route(dtype) for dtype in (torch.bfloat16, torch.float16)},
        "devices": [
            {
                "device": str(device),
                "name": device_name(device),
                # no reasons: available
                "backends": {
                    op: {name: objections(device) for name, (_, objections) in offers.items()}
                    for op, offers in TABLE.items()
                },
            }
            for device in devices()
        ],
    }


def show(found: dict[str, Any]) -> None:
    print(f"kd_kernels {found['kd_kernels']}")
    print(f"python     {found['python']} ({found['machine']})")
    print(f"torch      {found['torch']}, {found['threads']} threads")
    print(f"native     {found['native']['missing'] or found['native']['instruction_set']}")
    print(f"cuda       {'built' if found['cuda']['built'] else 'not built'}; {found['cuda']['standing']}")
    for dtype, way in found["float32_logits"].items():
        print(f"{dtype + ' -> float32 logits on CPU':34s} {_ROUTES[way]}")
    for device in found["devices"]:
        print(f"\n{device['device']} ({device['name']})")
        for op, backends in device["backends"].items():
            for backend, reasons in backends.items():
                print(f"  {op:16s} {backend:10s} {'; '.join(reasons) if reasons else 'available'}")


def run(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        emit(found)
    else:
        show(found)
    return 0
