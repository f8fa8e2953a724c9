"""Compile every Triton kernel for GPUs that are not here, and report what each configuration takes.

    python tests/triton_resources.py sm_90          # one line per kernel, as JSON
    python tests/triton_resources.py --write        # all targets into tests/triton_resources.json

Run without TRITON_INTERPRET: an interpreted kernel has nothing to compile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from kd_kernels.triton_kernels import row_divergence as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kd_kernels import triton_runtime
from kd_kernels.objectives import CATALOGUE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
TABLE = Path(__file__).with_suffix(".json")


def source(objective: str, dtype: str, vocab: int, everything: bool) -> tuple[ASTSource, int]:
    """The kernel as a launch would specialise it: a training step, or ``everything`` it can do at once."""
    wide = dtype == "float64"
    block, num_warps = triton_runtime.configuration(vocab, wide)
    zero_student = objective in kernels.objectives.STUDENT_SUMS_TO_ZERO
    zero_teacher = objective in kernels.objectives.TEACHER_SUMS_TO_ZERO
    constants = {
        "OBJECTIVE": objective,
        "STATISTICS": True,
        "TERMS": True,
        "GRADIENT": True,
        "LABELS": everything,
        "ENTROPIES": everything,
        "STUDENT_CAPPED": everything,
        "TEACHER_CAPPED": everything,
        "STUDENT_GRAD": True,
        "TEACHER_GRAD": everything,
        "STUDENT_SUM": not zero_student,
        "TEACHER_SUM": everything and not zero_teacher,
        "FUSED": zero_student and (zero_teacher or not everything),
        "ALIGNMENT": 8,
        "BLOCK": block,
        "F": kernels.tl.float64 if wide else kernels.tl.float32,
    }
    logits, grad = f"*{DTYPES[dtype]}", f"*{'bf16' if dtype == 'float32' else DTYPES[dtype]}"
    signature = {}
    for name in kernels.row_divergence.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("student", "teacher"):
            signature[name] = logits
        elif name in ("student_grad", "teacher_grad"):
            signature[name] = grad
        elif name.endswith("offsets") or name == "labels":
            signature[name] = "*i64"
        elif re.search("scale|softcap", name):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if name == "vocab" else "*fp64"
    divisible = [[i] for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"]
    attributes = {tuple(index): [["tt.divisibility", 16]] for index in divisible}
    return ASTSource(kernels.row_divergence, signature, constants, attributes), num_warps


def resources(compiled, target: GPUTarget) -> dict:
    """Registers, shared memory and what is spilled to memory, from the compiler's own report. On AMD scalar
    registers spill into lanes of vector registers, not to memory: those are counted apart."""
    found = {"shared": compiled.metadata.shared}
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        for key in ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count"):
            found[key] = int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
        found["spills"] = found.pop("vgpr_spill_count")
        return found
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout))
    return {**found, "registers": int(usage["REG"]), "spills": int(usage["STACK"]) + int(usage["LOCAL"])}


def compile_all(name: str, objectives: tuple[str, ...] = tuple(CATALOGUE)) -> dict[str, dict]:
    target, table = TARGETS[name], {}
    for objective in objectives:
        for dtype in DTYPES:
            for size, vocab in (("small", 1000), ("large", 128256)):
                for everything in (False, True):
                    ast, num_warps = source(objective, dtype, vocab, everything)
                    options = triton_runtime.options(num_warps, target.backend == "hip")
                    compiled = triton.compile(ast, target=target, options=options)
                    label = f"{objective} {dtype} {size} {'everything' if everything else 'step'}"
                    table[label] = resources(compiled, target)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("--objective", action="append", choices=list(CATALOGUE))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write:
        with ProcessPoolExecutor(2) as pool:
            tables = dict(zip(TARGETS, pool.map(compile_all, TARGETS)))
        lines = [
            f'  "{target}": {{\n'
            + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items())
            + "\n  }"
            for target, table in tables.items()
        ]
        version = f'  "triton": "{triton.__version__}"'
        TABLE.write_text("{\n" + ",\n".join([version, *lines]) + "\n}\n")
    else:
        json.dump(compile_all(options.target, tuple(options.objective or CATALOGUE)), sys.stdout)


if __name__ == "__main__":
    main()
