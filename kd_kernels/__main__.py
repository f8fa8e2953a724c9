"""``python -m kd_kernels info``: what this installation can do on this machine."""

from __future__ import annotations

import argparse
import platform
import signal
import sys

import torch

from kd_kernels import native
from kd_kernels.backends import TABLE
from kd_kernels.gemm import route
from kd_kernels.version import __version__

_ROUTES = {
    "native": "own AVX512_BF16 kernel",
    "mkl": "MKL's mixed product, from the library that torch brings",
    "upcast": "cast up, float32 product",
}


def info() -> None:
    """Print versions, instruction set, threads, and every op x backend with reasons."""
    missing = native.why_not()
    print(f"kd_kernels {__version__}")
    print(f"python     {platform.python_version()} ({platform.machine()})")
    print(f"torch      {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"native     {missing or native.module().instruction_set()}")
    for dtype in (torch.bfloat16, torch.float16):
        print(f"{str(dtype)[6:] + ' -> float32 logits on CPU':34s} {_ROUTES[route(dtype)]}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        print(f"\n{device} ({name})")
        for op, offers in TABLE.items():
            for backend, (_, objections) in offers.items():
                reasons = objections(device)
                print(f"  {op:16s} {backend:10s} {'; '.join(reasons) if reasons else 'available'}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kd_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction set, threads, backends and why not")
    parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends quietly
    info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
