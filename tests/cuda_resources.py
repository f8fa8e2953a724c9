"""What the compiler made of the CUDA kernels, read from the library without a GPU.

    python tests/cuda_resources.py LIBRARY            # one line per kernel, as JSON
    python tests/cuda_resources.py LIBRARY --write    # into tests/cuda_resources.json

cuobjdump comes from the CUDA toolkit or, where that has none, from Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
THREADS = 256  # of a block: csrc/cuda/device_thread.cuh
REGISTERS = 65536  # of a multiprocessor, on every target
_KERNEL = re.compile(
    r"row_kernelINS\w*?_\d+(Float32|Bfloat16|Float16|Mixed|Wide)E?NS_\d+(\w+?)ELb([01])ELb([01])EEEv"
)


def _tools() -> Path:
    if found := shutil.which("cuobjdump"):
        return Path(found).parent
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def cuobjdump(*arguments: str) -> str:
    folder = _tools()
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    command = [str(folder / "cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def label(mangled: str) -> str | None:
    """ "JensenShannon Bfloat16 both held", or None for another function."""
    if (found := _KERNEL.search(mangled)) is None:
        return None
    storage, objective, teacher, held = found.groups()
    direction, path = "both" if teacher == "1" else "student", "held" if held == "1" else "reread"
    return f"{objective} {storage} {direction} {path}"


def compiled(library: Path) -> dict[str, dict[str, dict]]:
    """target -> kernel -> registers, bytes spilled, static shared memory, blocks whose registers fit."""
    table: dict[str, dict[str, dict]] = {}
    target = kernel = None
    for line in cuobjdump("--dump-resource-usage", str(library)).splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            target = table.setdefault(found[1], {})
        elif found := re.match(r"\s*Function (\S+?):?$", line):
            kernel = label(found[1])
        elif kernel is not None and target is not None and "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            target[kernel] = {
                "registers": usage["REG"],
                "spills": usage["STACK"] + usage["LOCAL"],
                "shared": usage["SHARED"],
                "blocks": REGISTERS // (THREADS * -(-usage["REG"] // 8) * 8),
            }
            kernel = None
    return table


def mangled(library: Path, wanted: str) -> str:
    """The name in the library of the kernel that ``label`` calls ``wanted``."""
    names = set(re.findall(r"Function (\S+?):?\n", cuobjdump("--dump-resource-usage", str(library))))
    (name,) = (name for name in names if label(name) == wanted)
    return name


def instructions(library: Path, target: str, wanted: str) -> Counter[str]:
    """How often each instruction, with its modifiers, stands in a kernel."""
    text = cuobjdump("-sass", "-arch", target, "-fun", mangled(library, wanted), str(library))
    return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text, re.M))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    tables = compiled(options.library)
    if not options.write:
        json.dump(tables, sys.stdout)
        return
    entries = [
        f'  "{target}": {{\n'
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table.items()))
        + "\n  }"
        for target, table in tables.items()
    ]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\S+),", version)
    entries.insert(0, f'  "nvcc": {json.dumps(release[1] if release else "")}')
    TABLE.write_text("{\n" + ",\n".join(entries) + "\n}\n")


if __name__ == "__main__":
    main()
