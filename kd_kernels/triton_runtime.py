"""The door to the Triton kernels: loading, capability, configuration, launch."""

from __future__ import annotations

import contextlib
import functools
import os
from types import ModuleType
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from kd_kernels.rows import (
    GRADIENT,
    STATISTICS,
    TERMS,
    AngleJob,
    DistanceJob,
    GatherJob,
    RowJob,
    Rows,
)

ALIGNMENT = 8  # numbers: 16 bytes of bfloat16, the widest load


class Configuration(NamedTuple):
    """How one program walks its row."""

    block: int  # vocabulary entries per step
    num_warps: int


# Fixed, not tuned on the spot: a winner that changes from run to run changes the bits of the result.
# Four numbers a thread, in float64 one: twice as many spilled. Small vocabularies have blocks of
# their own, or most lanes would idle.
SMALL, LARGE = Configuration(256, 2), Configuration(1024, 8)
SMALL_WIDE, LARGE_WIDE = Configuration(128, 4), Configuration(256, 8)  # float64 arithmetic
_SMALL_VOCABULARY = 4096


def configuration(vocab: int, wide: bool) -> Configuration:
    """The default for a vocabulary of this size; ``wide`` for float64 arithmetic."""
    if vocab <= _SMALL_VOCABULARY:
        return SMALL_WIDE if wide else SMALL
    return LARGE_WIDE if wide else LARGE


def row_tile(block: int, wide: bool) -> dict[str, int]:
    """What the row kernel takes of a row at once: in each lane numbers that one load brings, whose maximum
    and sum cost no other lane anything; two such lanes a thread. In float64 one number: more spill."""
    return {"WIDTH": 1, "LANES": block} if wide else {"WIDTH": 4, "LANES": block // 2}


# Of a thread at most: two programs of 8 warps share a multiprocessor. What would spill takes more.
REGISTERS, MANY_REGISTERS, MOST_REGISTERS = 128, 160, 255


def row_registers(objective: str, labels: bool, teacher_grad: bool) -> int:
    many = ("weighted_kl", "skew_kl", "skew_reverse_kl")
    return MANY_REGISTERS if objective in many and labels and teacher_grad else REGISTERS


_ALL_REGISTERS = 65536  # of a multiprocessor


def options(num_warps: int, hip: bool = torch.version.hip is not None, registers: int = REGISTERS) -> dict:
    """What a launch asks of the compiler; ``registers`` a thread at most."""
    # u_s - u_t must vanish where student and teacher agree: no product is fused into it.
    chosen: dict = {"num_warps": num_warps, "enable_fp_fusion": False}
    if hip:
        # Waves of 64: as many threads. More threads than numbers would each do another's work again, and a
        # gradient stored over the logits would meet the late ones.
        chosen["num_warps"] = max(1, num_warps // 2)
    else:
        # Without a word ptxas spills a few numbers for the sake of occupancy; with one it forgets that all
        # threads of a block share a multiprocessor's registers, and the block cannot be launched.
        chosen["maxnreg"] = min(registers, _ALL_REGISTERS // (32 * num_warps))
    return chosen


@functools.cache
def version() -> tuple[int, int]:
    """Triton's, major and minor."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def interpreted() -> bool:
    """Whether Triton is told to run on CPU tensors, which proves and is very slow."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _load() -> tuple[Optional[ModuleType], Optional[str]]:
    try:
        from kd_kernels import triton_kernels
        from kd_kernels.triton_kernels import (  # noqa: F401
            angle,
            distance,
            gather,
            half_step,
            pairwise_l1,
            row_divergence,
            scale,
            sinkhorn,
            topk,
        )
    except ImportError as error:
        return None, f"Triton cannot be loaded ({error}); `pip install triton`"
    return triton_kernels, None


def kernels() -> ModuleType:
    package = _load()[0]
    assert package is not None
    return package


def why_not(device: torch.device) -> list[str]:
    """Why Triton cannot serve ``device``; empty where it can."""
    if device.type == "cpu" and not interpreted():
        return ["serves GPU tensors, got cpu (TRITON_INTERPRET=1 interprets it there, slowly)"]
    if device.type not in ("cpu", "cuda"):
        return [f"serves CUDA and ROCm tensors, got {device}"]
    package, reason = _load()
    if package is None:
        return [str(reason)]
    # Triton reads the variable when a kernel is defined.
    kernel = package.row_divergence.row_divergence
    if device.type == "cpu" and not type(kernel).__name__.startswith("Interpreted"):
        return ["TRITON_INTERPRET was set after the kernels had been loaded; set it before"]
    return []


def split(value: float) -> tuple[float, float]:
    """``value`` as two numbers that survive as float32, the type in which Triton passes floats."""
    high = torch.tensor(value, dtype=torch.float32, device="cpu").item()
    return high, value - high if abs(value) < float("inf") else 0.0


def side_arguments(rows: Rows) -> tuple:
    grad, grad_offsets = (rows.logits, rows.offsets) if rows.grad is None else (rows.grad, rows.grad_offsets)
    return (
        rows.logits,
        rows.offsets,
        rows.temperature,
        grad,
        grad_offsets,
        *split(rows.scale),
        *split(rows.softcap),
    )


def aligned(*sides: Rows) -> bool:
    multiples = [side.multiple for side in sides]
    multiples += [side.grad_multiple for side in sides if side.grad is not None]
    return all(multiple % ALIGNMENT == 0 for multiple in multiples)


def row_divergence(job: RowJob, phases: int) -> None:
    """:func:`kd_kernels.reference.row_divergence` in Triton, one program a row; row-major only."""
    if job.n == 0:
        return
    module = kernels().row_divergence
    objectives = module.objectives
    wide = torch.float64 in (job.student.logits.dtype, job.teacher.logits.dtype)
    block, num_warps = configuration(job.vocab, wide)
    student_grad = bool(phases & GRADIENT) and job.student.grad is not None
    teacher_grad = bool(phases & GRADIENT) and job.teacher.grad is not None
    # Without a gradient phase in this call, a later one may want either side's sum.
    later = not phases & GRADIENT
    student_sum = job.objective not in objectives.STUDENT_SUMS_TO_ZERO and (student_grad or later)
    teacher_sum = job.objective not in objectives.TEACHER_SUMS_TO_ZERO and (teacher_grad or later)
    fused = bool(phases & TERMS) and not student_sum and not teacher_sum
    with on(job.statistics):
        module.row_divergence[(job.n,)](
            *side_arguments(job.student),
            *side_arguments(job.teacher),
            job.parameter0,
            job.parameter1,
            job.statistics if job.labels is None else job.labels,
            job.soft_weight,
            job.hard_weight,
            job.statistics,
            job.terms,
            job.vocab,
            OBJECTIVE=job.objective,
            STATISTICS=bool(phases & STATISTICS),
            TERMS=bool(phases & TERMS),
            GRADIENT=bool(phases & GRADIENT),
            LABELS=job.labels is not None,
            ENTROPIES=job.entropies,
            STUDENT_CAPPED=job.student.softcap != 0,
            TEACHER_CAPPED=job.teacher.softcap != 0,
            STUDENT_SCALED=job.student.scale != 1,
            TEACHER_SCALED=job.teacher.scale != 1,
            STUDENT_GRAD=student_grad,
            TEACHER_GRAD=teacher_grad,
            STUDENT_SUM=student_sum,
            TEACHER_SUM=teacher_sum,
            FUSED=fused,
            ALIGNMENT=ALIGNMENT if aligned(job.student, job.teacher) else 1,
            **row_tile(block, wide),
            F=module.tl.float64 if wide else module.tl.float32,
            **options(
                num_warps,
                registers=row_registers(job.objective, job.labels is not None, teacher_grad),
            ),
        )


def gather(job: GatherJob, phases: int) -> None:
    """:func:`kd_kernels.reference.gather` in Triton, one program a row; row-major only.

    STATISTICS overwrites the logits at the ids.
    """
    if job.n == 0:
        return
    module = kernels().gather
    wide = job.side.logits.dtype == torch.float64
    block, num_warps = configuration(job.vocab, wide)
    unused = job.statistics  # an address for what no phase of this call reads
    with on(job.statistics):
        module.gather[(job.n,)](
            *side_arguments(job.side),
            job.ids,
            job.gathered,
            job.statistics,
            unused if job.soft is None else job.soft,
            unused if job.slope is None else job.slope,
            unused if job.hard_weight is None else job.hard_weight,
            unused if job.at_ids is None else job.at_ids,
            job.ids.shape[1],
            job.vocab,
            STATISTICS=bool(phases & STATISTICS),
            GRADIENT=bool(phases & GRADIENT),
            HARD=job.hard,
            MEANS=job.means,
            SLOPE=job.slope is not None,
            CAPPED=job.side.softcap != 0,
            ALIGNMENT=ALIGNMENT if aligned(job.side) else 1,
            SCALED=job.side.scale != 1,
            KP=power_of_two(job.ids.shape[1]),
            **row_tile(block, wide),
            F=module.tl.float64 if wide else module.tl.float32,
            **options(num_warps),
        )


SCALE_BLOCK, SCALE_WARPS = 2048, 8


def scale(source: Tensor, factor: Tensor, out: Tensor) -> None:
    """``out = source * factor`` (0-d); both contiguous, of one shape."""
    if source.numel() == 0:
        return
    module = kernels().scale
    wide = torch.float64 in (source.dtype, out.dtype)
    with on(out):
        module.scale[(-(-source.numel() // SCALE_BLOCK),)](
            source,
            factor,
            out,
            source.numel(),
            BLOCK=SCALE_BLOCK,
            F=module.tl.float64 if wide else module.tl.float32,
            **options(SCALE_WARPS),
        )


ANGLE_TILES = {"TILE": 8, "BLOCK": 32}
ANGLE_WARPS = 4


def angle(job: AngleJob) -> None:
    """:func:`kd_kernels.reference.angle` in Triton, one program a tile of a row."""
    if job.n == 0:
        return
    tiles = -(-job.n // ANGLE_TILES["TILE"])
    partial = job.sums.new_empty(job.n, tiles)
    with on(job.sums):
        kernels().angle.angle[(job.n, tiles)](
            job.student,
            job.student_inverse,
            job.teacher,
            job.teacher_inverse,
            torch.full((), job.beta, dtype=torch.float64, device=job.sums.device),
            partial,
            partial if job.student_grad is None else job.student_grad,
            partial if job.teacher_grad is None else job.teacher_grad,
            job.n,
            job.student.stride(0),
            STUDENT_GRAD=job.student_grad is not None,
            TEACHER_GRAD=job.teacher_grad is not None,
            **ANGLE_TILES,
            **options(ANGLE_WARPS),
        )
    torch.sum(partial, 1, out=job.sums)


DISTANCE_BLOCK, DISTANCE_WARPS = 256, 4


def distance(job: DistanceJob, phases: int) -> None:
    """:func:`kd_kernels.reference.distance` in Triton, one program a row; one phase a call."""
    if job.n == 0:
        return
    gradient = bool(phases & GRADIENT)
    with on(job.statistics):
        kernels().distance.distance[(job.n,)](
            job.numbers,
            job.student,
            job.teacher,
            job.statistics,
            job.terms,
            job.terms if job.student_grad is None else job.student_grad,
            job.terms if job.teacher_grad is None else job.teacher_grad,
            job.n,
            job.student.stride(0),
            STATISTICS=bool(phases & STATISTICS),
            TERMS=bool(phases & TERMS),
            STUDENT_GRAD=gradient and job.student_grad is not None,
            TEACHER_GRAD=gradient and job.teacher_grad is not None,
            BLOCK=DISTANCE_BLOCK,
            **options(DISTANCE_WARPS),
        )


def power_of_two(least: int) -> int:
    """The smallest power of two that is not below ``least``: one compilation serves all numbers between."""
    return 1 << max(least - 1, 0).bit_length()


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
