"""Make an environment for the Makefile: a virtual environment with torch, the package and extras.

    python scripts/make_env.py DIR [extra ...]

* An installed torch >= 2.6 of the running Python is reused (the environment then sees the system's
  packages). Otherwise ``TORCH`` (a requirement or the path of a wheel) is installed.
* Without ``TORCH``, what pip would install is looked at first: if it brings the CUDA libraries (several
  GB), nothing is installed and the message says how to choose.
* Nothing that is installed after it replaces that torch.
* pip's own variables and configuration (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured throughout.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TORCH = "torch==2.13.0"
TRITON = "triton<3.8"  # that of the default, whose CPU build names none
MINIMUM = (2, 6)
CHOOSE = """
`pip install {torch}` would bring {count} CUDA packages (several GB) on this machine. Nothing was installed.
Choose one:
  make ... TORCH=/path/to/torch-cpu.whl       a wheel you have
  make ... PIP_INDEX_URL=<index of CPU wheels>  see pytorch.org, "Get started", CPU
  make ... TORCH={torch}                  this one, CUDA and all
or install torch >= 2.6 for this Python yourself: it is reused.
"""


def fits(python: str) -> bool:
    """Whether ``python`` can import a torch that is new enough."""
    code = "import torch; print(*torch.__version__.split('.')[:2])"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return found.returncode == 0 and tuple(int(x) for x in found.stdout.split()) >= MINIMUM


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "install", "-q", *arguments], check=True)


def cuda_packages(python: Path, requirement: str) -> int:
    """How many CUDA packages ``pip install requirement`` would bring."""
    command = [str(python), "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*command, requirement], check=True, capture_output=True, text=True).stdout
    names = [item["metadata"]["name"].lower() for item in json.loads(report[report.index("{") :])["install"]]
    return sum(name.startswith(("nvidia-", "cuda-")) for name in names)


def install_torch(python: Path) -> None:
    torch = os.environ.get("TORCH")
    if not torch:
        torch = DEFAULT_TORCH
        count = cuda_packages(python, torch)
        if count:
            sys.exit(CHOOSE.format(torch=torch, count=count))
    print(f"installing {torch}", flush=True)
    pip(python, torch)


def constraints_of_torch(python: Path) -> list[str]:
    """Itself, as it is installed; and on Triton where it asks for none."""
    code = """
from importlib.metadata import distribution
torch = distribution("torch")
print(torch.version, any(name.startswith("triton") for name in torch.requires or ()))
"""
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    version, names_triton = found.stdout.split()
    return [f"torch=={version}", *([] if names_triton == "True" else [TRITON])]


def sources_digest(extras: list[str]) -> str:
    """Changes with the native part or the packaging: an old environment is then brought up to date."""
    digest = hashlib.sha256(" ".join(extras).encode())
    files = [ROOT / name for name in ("setup.py", "pyproject.toml", "CMakeLists.txt")]
    for file in sorted([*files, *(ROOT / "csrc").rglob("*.*")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    folder, extras = Path(sys.argv[1]).resolve(), sorted(sys.argv[2:])
    python, stamp = folder / "bin" / "python", folder / "kd-kernels.stamp"
    done = stamp.read_text().split("\n") if stamp.exists() else ["", ""]
    extras = sorted({*extras, *filter(None, done[0].split(","))})
    digest = sources_digest(extras)
    if python.exists() and done[1:2] == [digest]:
        return
    if not python.exists():
        shared = ["--system-site-packages"] if fits(sys.executable) else []
        print(f"making {folder}" + (" on the installed torch" if shared else ""), flush=True)
        subprocess.run([sys.executable, "-m", "venv", *shared, str(folder)], check=True)
    if not fits(str(python)):
        install_torch(python)
    print(f"building and installing the package [{','.join(extras)}]", flush=True)
    package = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(constraints_of_torch(python)) + "\n")
    pip(python, "-c", str(constraints), "-e", package)
    stamp.write_text(f"{','.join(extras)}\n{digest}\n")


if __name__ == "__main__":
    main()
