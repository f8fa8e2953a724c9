"""Compile every Triton kernel for GPUs that are not here, and report what each configuration takes.

    python tests/triton_resources.py sm_90          # one line per kernel, as JSON
    python tests/triton_resources.py --serve        # the same, many times: a test's requests, a line each
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
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from kd_kernels.triton_kernels import angle, distance, gather, half_step, pairwise_l1, scale, sinkhorn, topk
from kd_kernels.triton_kernels import row_divergence as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kd_kernels import triton_runtime, triton_topk, triton_transport
from kd_kernels.objectives import CATALOGUE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = (*CATALOGUE, "gather", "topk", "angle", "distance", "pairwise_l1", "half_step", "sinkhorn", "scale")
SIZES = {"small": 1000, "large": 128256}
IDS = (16, 64, 1024)  # what the kernels that take K ids are compiled for
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
# Integers that are no pointers; and those that a launch usually finds divisible by 16.
COUNTS = (
    *("vocab", "k", "draws", "stride", "width", "lines", "begin", "share", "shares", "longest", "tiles"),
    *("groups", "own_step", "other_step"),
)
MULTIPLES_OF_16 = ("vocab", "stride", "width")
# Pointers to numbers in the type of the arithmetic.
SCRATCH = (
    *("own", "others", "weights", "balance", "gradient", "out", "sums", "cost", "signs"),
    *("tops", "masses", "means"),
)
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
        "STUDENT_SCALED": everything,
        "TEACHER_SCALED": everything,
        "STUDENT_GRAD": True,
        "TEACHER_GRAD": everything,
        "STUDENT_SUM": not zero_student,
        "TEACHER_SUM": everything and not zero_teacher,
        "FUSED": zero_student and (zero_teacher or not everything),
        "ALIGNMENT": 8,
        "F": kernels.tl.float64 if wide else kernels.tl.float32,
        **triton_runtime.row_tile(block, wide),
    }
    return _ast(kernels.row_divergence, constants, dtype), num_warps


def gather_source(k: int, dtype: str, vocab: int, everything: bool) -> tuple[ASTSource, int]:
    """The gather kernel for K ids: the gradient of a training step, or ``everything`` at once."""
    wide = dtype == "float64"
    block, num_warps = triton_runtime.configuration(vocab, wide)
    constants = {
        "STATISTICS": everything,
        "GRADIENT": True,
        "HARD": everything,
        "MEANS": everything,
        "SLOPE": everything,
        "CAPPED": everything,
        "SCALED": everything,
        "ALIGNMENT": 8,
        "KP": k,
        "F": kernels.tl.float64 if wide else kernels.tl.float32,
        **triton_runtime.row_tile(block, wide),
    }
    return _ast(gather.gather, constants, dtype), num_warps


def topk_sources(k: int, dtype: str, vocab: int, everything: bool) -> Iterator[tuple[str, ASTSource, int]]:
    """The topk kernels for K entries: for a teacher's cache, or ``everything`` they can do at once."""
    wide = dtype == "float64"
    walk = triton_topk.walk_launch(
        vocab, 3 if everything and k == IDS[0] else 1, 8 if everything else 1, wide
    )
    group = triton_topk.group_of(walk)
    launches = {"largest": triton_topk.largest_launch(vocab, k, group, wide)}
    if k == IDS[0]:
        launches |= {"walk": walk, "draw": triton_topk.draw_launch(group)}
    for name, launch in launches.items():
        constants = launch.constants | {
            "CAPPED": everything,
            "ALIGNMENT": 8,
            "F": topk.tl.float64 if wide else topk.tl.float32,
        }
        if name == "walk":
            constants["SCALED"] = everything
        yield name, _ast(getattr(topk, name), constants, dtype), launch.num_warps


def angle_source(gradients: tuple[bool, bool]) -> tuple[ASTSource, int]:
    constants = dict(zip(("STUDENT_GRAD", "TEACHER_GRAD"), gradients)) | triton_runtime.ANGLE_TILES
    return _points_source(angle.angle, constants), triton_runtime.ANGLE_WARPS


def distance_source(phase: str, gradients: tuple[bool, bool] = (False, False)) -> tuple[ASTSource, int]:
    constants = {name: name == phase for name in ("STATISTICS", "TERMS")}
    constants |= dict(zip(("STUDENT_GRAD", "TEACHER_GRAD"), gradients))
    constants["BLOCK"] = triton_runtime.DISTANCE_BLOCK
    return _points_source(distance.distance, constants), triton_runtime.DISTANCE_WARPS


def _points_source(kernel, constants: dict) -> ASTSource:
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else "i32" if name in ("n", "ld") else "*fp64"
        for name in names
    }
    divisible = [[i] for i, name in enumerate(names) if signature[name] == "*fp64"]
    attributes = {tuple(index): [["tt.divisibility", 16]] for index in divisible}
    return ASTSource(kernel, signature, constants, attributes)


def scale_source(dtype: str) -> tuple[ASTSource, int]:
    """From the dtype of the sums, float32 or float64."""
    wide = dtype == "float64"
    constants = {
        "BLOCK": triton_runtime.SCALE_BLOCK,
        "F": kernels.tl.float64 if wide else kernels.tl.float32,
    }
    signature = {"source": "*fp64" if wide else "*fp32", "factor": "*fp64", "out": f"*{DTYPES[dtype]}"}
    signature |= {"count": "i32", "BLOCK": "constexpr", "F": "constexpr"}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    return ASTSource(scale.scale, signature, constants, attributes), triton_runtime.SCALE_WARPS


def half_step_source(dtype: str, transposed: bool, divide: bool) -> tuple[ASTSource, int]:
    """One of the kernel's strides is 1, which a launch compiles for."""
    wide = dtype == "float64"
    constants = {"DIVIDE": divide, "EXTRA": divide, "F": kernels.tl.float64 if wide else kernels.tl.float32}
    constants |= triton_transport.half_step_tile(wide) | {"outer_stride" if transposed else "inner_stride": 1}
    strides = ("x_stride", "weight_stride", "out_stride", "outer_stride", "inner_stride")
    kinds = dict.fromkeys(("count", "outer", "inner", *strides), "i32")
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, f"*{DTYPES[dtype]}")
        for name in half_step.half_step.arg_names
    }
    divisible = [[i] for i, kind in enumerate(signature.values()) if kind[0] == "*"]
    attributes = {tuple(index): [["tt.divisibility", 16]] for index in divisible}
    return ASTSource(half_step.half_step, signature, constants, attributes), triton_transport.HALF_STEP_WARPS


def sinkhorn_source(phase: str, dtype: str, columns: int, everything: bool) -> tuple[ASTSource, int]:
    """A Sinkhorn kernel for costs of ``dtype``; float32 states, float64 ones for float64."""
    wide = dtype == "float64"
    tile, num_warps = triton_transport.sinkhorn_tile(columns, columns, wide or phase == "implicit")
    constants = dict(tile)
    if phase == "solve":
        constants |= {"TOLERANCE": everything, "HISTORY": everything, "SCALING": everything, "ROOM": 87.0}
    else:
        constants["PLAN"] = everything
    if phase != "implicit":
        constants["F"] = kernels.tl.float64 if wide else kernels.tl.float32
    kernel = getattr(sinkhorn, phase)
    state = "*fp64" if wide else "*fp32"
    kinds = {"cost": f"*{DTYPES[dtype]}", "cost_batch": "i32", "cost_row": "i32"}
    kinds |= dict.fromkeys(("n", "m", "iterations", "steps"), "i32")
    kinds |= dict.fromkeys(("epsilons", "tolerance", "numbers", "plan", "row_sums"), "*fp64")
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, state) for name in kernel.arg_names
    }
    divisible = [[i] for i, kind in enumerate(signature.values()) if kind[0] == "*"]
    attributes = {tuple(index): [["tt.divisibility", 16]] for index in divisible}
    return ASTSource(kernel, signature, constants, attributes), num_warps


def pairwise_sources(dtype: str, everything: bool) -> Iterator[tuple[str, ASTSource, int]]:
    """Its kernels for the distances alone, or ``everything``: signs and softcaps."""
    wide = dtype == "float64"
    number = kernels.tl.float64 if wide else kernels.tl.float32
    rows = {"CAPPED": everything, "ALIGNMENT": 8, "F": number}
    granule = {"GRANULE": triton_transport.PAIR_GRANULE}
    warps = triton_transport.PAIR_WARPS
    for transposed in (True, False):
        constants = {"TRANSPOSED": transposed, **rows, **granule}
        constants |= triton_transport.pair_probability_tiles(wide)
        layout = "transposed" if transposed else "rows"
        yield f"probabilities {layout}", _ast(pairwise_l1.probabilities, constants, dtype), warps
    for vocab in SIZES.values():
        block, num_warps = triton_runtime.configuration(vocab, wide)
        constants = {**rows, "BLOCK": block}
        yield f"logit_gradient {block}", _ast(pairwise_l1.logit_gradient, constants, dtype), num_warps
    if dtype not in ("float32", "float64"):  # the others see no logits
        return
    if everything:
        for longest in (16, 256):
            tiles = triton_transport.gradient_tiles(longest, wide)
            constants = {"F": number, **tiles._asdict()}
            yield f"pair_gradient {tiles.rows}", _ast(pairwise_l1.pair_gradient, constants, dtype), warps
        constants = {"F": number, **triton_transport.PAIR_WEIGHTS}
        yield "pair_weights", _ast(pairwise_l1.pair_weights, constants, dtype), warps
    for longest in (32,) if wide else (32, 256):
        tiles = triton_transport.pair_tiles(longest, wide)
        constants = {"SIGNS": everything, "UNROLL": triton_transport.PAIR_UNROLL, "F": number}
        constants |= granule | tiles._asdict()
        ast = _ast(pairwise_l1.pair_sums, constants, dtype)
        yield f"pair_sums {tiles.TILE}", ast, tiles.THREADS // 32
        if everything:
            constants = tiles._asdict() | triton_transport.PAIR_ADDITION
            yield f"add_sums {tiles.TILE}", _ast(pairwise_l1.add_sums, constants, dtype), warps


def _ast(kernel, constants: dict, dtype: str) -> ASTSource:
    logits, grad = f"*{DTYPES[dtype]}", f"*{'bf16' if dtype == 'float32' else DTYPES[dtype]}"
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCRATCH:
            signature[name] = "*fp64" if dtype == "float64" else "*fp32"
        elif name in ("student", "teacher", "logits"):
            signature[name] = logits
        elif name in ("student_grad", "teacher_grad", "grad"):
            signature[name] = grad
        elif name.endswith("offsets") or name in ("labels", "targets", "starts"):
            signature[name] = "*i64"
        elif name in ("ids", "samples", "chosen", "candidates", "target_ranks"):
            signature[name] = "*i32"
        elif re.search("scale|softcap", name):
            signature[name] = "fp32"
        elif name in COUNTS or name.endswith("_count"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp64"
    divisible = [
        [i] for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name in MULTIPLES_OF_16
    ]
    attributes = {tuple(index): [["tt.divisibility", 16]] for index in divisible}
    return ASTSource(kernel, signature, constants, attributes)


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


def sources(kernel: str) -> Iterator[tuple[str, ASTSource, int]]:
    """(label, source, warps) of every configuration of a kernel, or of the row kernel for an objective."""
    if kernel == "angle":
        for gradients in ((False, False), (True, False), (False, True), (True, True)):
            yield f"angle {gradients}", *angle_source(gradients)
        return
    if kernel == "distance":
        for phase in ("STATISTICS", "TERMS"):
            yield f"distance {phase}", *distance_source(phase)
        for gradients in ((True, False), (False, True), (True, True)):
            yield f"distance GRADIENT {gradients}", *distance_source("GRADIENT", gradients)
        return
    if kernel == "scale":
        for dtype in DTYPES:
            yield f"scale {dtype}", *scale_source(dtype)
        return
    if kernel == "half_step":
        for dtype in ("float32", "float64"):
            for transposed in (False, True):
                for divide in (False, True):
                    yield (
                        f"half_step {dtype} {transposed} {divide}",
                        *half_step_source(dtype, transposed, divide),
                    )
        return
    if kernel == "sinkhorn":
        for dtype in ("float32", "bfloat16", "float64"):
            for columns in (64, 1024):
                yield f"solve {dtype} {columns}", *sinkhorn_source("solve", dtype, columns, False)
                for phase in ("solve", "unrolled", "implicit"):
                    label = f"{phase} {dtype} {columns} everything"
                    yield label, *sinkhorn_source(phase, dtype, columns, True)
        return
    if kernel == "pairwise_l1":
        for dtype in DTYPES:
            for everything in (False, True):
                for label, *launch in pairwise_sources(dtype, everything):
                    what = "everything" if everything else "step"
                    yield f"pairwise_l1 {label} {dtype} {what}", *launch
        return
    for dtype in DTYPES:
        for size, vocab in SIZES.items():
            for everything in (False, True):
                what = "everything" if everything else "step"
                if kernel in CATALOGUE:
                    yield f"{kernel} {dtype} {size} {what}", *source(kernel, dtype, vocab, everything)
                    continue
                for k in IDS:
                    if (k, size) == (1024, "small"):
                        continue
                    label = f"{k} {dtype} {size} {what}"
                    if kernel == "gather":
                        yield f"gather {label}", *gather_source(k, dtype, vocab, everything)
                    else:
                        for name, *launch in topk_sources(k, dtype, vocab, everything):
                            yield f"{name} {label}", *launch


def is_quick(target: str, kernel: str, position: int, label: str) -> bool:
    """Whether ``make test`` compiles this entry of a kernel; ``make test-all`` compiles all.

    A training step is compiled for one target, the next for the next; everything at once for all of them: for
    each dtype and size. Only the objectives of the row kernel, one source, take turns in both: each has every
    dtype and both sizes at every target, as a step or everything at once, and each target every dtype and
    size of either kind.
    """
    turn = list(TARGETS).index(target)
    if kernel in CATALOGUE:
        mine = (list(CATALOGUE).index(kernel) + turn) % 4
        return position // 2 % 4 == (mine if label.endswith("everything") else 3 - mine)
    in_turn = kernel in ("gather", "topk", "pairwise_l1", "sinkhorn") and not label.endswith("everything")
    return not in_turn or position % 4 == turn


def quick_labels(target: str) -> list[str]:
    listed = ((kernel, i, entry[0]) for kernel in KERNELS for i, entry in enumerate(sources(kernel)))
    return [label for kernel, i, label in listed if is_quick(target, kernel, i, label)]


def registers_of(kernel: str, label: str) -> int:
    """A thread's at most, as a launch asks for."""
    if kernel == "sinkhorn":
        return triton_transport.SINKHORN_REGISTERS
    if kernel == "half_step":
        return triton_transport.HALF_STEP_REGISTERS
    if kernel == "topk":
        name, k, dtype, *_ = label.split()
        return triton_topk.registers(name, int(k), dtype == "float64")
    everything = label.endswith("everything")
    return triton_runtime.row_registers(kernel, everything, everything)


def compile_all(name: str, kernels: tuple[str, ...] = KERNELS, quick: bool | None = None) -> dict[str, dict]:
    """Of the entries that are ``quick``, of those that are not, or of all."""
    target, table = TARGETS[name], {}
    for kernel in kernels:
        for position, (label, ast, num_warps) in enumerate(sources(kernel)):
            if quick is not None and is_quick(name, kernel, position, label) != quick:
                continue
            registers = registers_of(kernel, label)
            options = triton_runtime.options(num_warps, target.backend == "hip", registers)
            table[label] = resources(triton.compile(ast, target=target, options=options), target)
    return table


def serve() -> None:
    """Importing takes longer than compiling some of the kernels: a process for all that one tester asks."""
    answers, sys.stdout = sys.stdout, sys.stderr  # Triton prints what it cannot compile
    for line in sys.stdin:
        target, kernel, quick = json.loads(line)
        try:
            answer = compile_all(target, (kernel,), quick)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("--kernel", action="append", choices=KERNELS)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--list", action="store_true", help="what make test compiles")
    options = parser.parse_args()
    if options.serve:
        serve()
    elif options.list:
        json.dump({target: quick_labels(target) for target in TARGETS}, sys.stdout)
    elif options.write:
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
        json.dump(compile_all(options.target, tuple(options.kernel or KERNELS)), sys.stdout)


if __name__ == "__main__":
    main()
