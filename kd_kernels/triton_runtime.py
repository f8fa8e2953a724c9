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
    GatherJob,
    PairwiseL1Job,
    RowJob,
    Rows,
    TopkJob,
)

_ALIGNMENT = 8  # numbers: 16 bytes of bfloat16, the widest load


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


def options(num_warps: int, hip: bool = torch.version.hip is not None) -> dict:
    """What a launch asks of the compiler."""
    # u_s - u_t must vanish where student and teacher agree: no product is fused into it.
    chosen: dict = {"num_warps": num_warps, "enable_fp_fusion": False}
    if hip:
        # Waves of 64: as many threads. More threads than numbers would each do another's work again, and a
        # gradient stored over the logits would meet the late ones.
        chosen["num_warps"] = max(1, num_warps // 2)
    else:
        chosen["maxnreg"] = 128  # without a word ptxas spills a few numbers for the sake of occupancy
    return chosen


def interpreted() -> bool:
    """Whether Triton is told to run on CPU tensors, which proves and is very slow."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _load() -> tuple[Optional[ModuleType], Optional[str]]:
    try:
        from kd_kernels import triton_kernels
        from kd_kernels.triton_kernels import angle, gather, pairwise_l1, row_divergence, topk  # noqa: F401
    except ImportError as error:
        return None, f"Triton cannot be loaded ({error}); `pip install triton`"
    return triton_kernels, None


def _kernels() -> ModuleType:
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


def _split(value: float) -> tuple[float, float]:
    """``value`` as two numbers that survive as float32, the type in which Triton passes floats."""
    high = torch.tensor(value, dtype=torch.float32).item()
    return high, value - high if abs(value) < float("inf") else 0.0


def _side(rows: Rows) -> tuple:
    grad, grad_offsets = (rows.logits, rows.offsets) if rows.grad is None else (rows.grad, rows.grad_offsets)
    return (
        rows.logits,
        rows.offsets,
        rows.temperature,
        grad,
        grad_offsets,
        *_split(rows.scale),
        *_split(rows.softcap),
    )


def _aligned(*sides: Rows) -> bool:
    multiples = [side.multiple for side in sides]
    multiples += [side.grad_multiple for side in sides if side.grad is not None]
    return all(multiple % _ALIGNMENT == 0 for multiple in multiples)


def row_divergence(job: RowJob, phases: int) -> None:
    """:func:`kd_kernels.reference.row_divergence` in Triton, one program a row; row-major only."""
    if job.n == 0:
        return
    module = _kernels().row_divergence
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
    with _on(job.statistics):
        module.row_divergence[(job.n,)](
            *_side(job.student),
            *_side(job.teacher),
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
            STUDENT_GRAD=student_grad,
            TEACHER_GRAD=teacher_grad,
            STUDENT_SUM=student_sum,
            TEACHER_SUM=teacher_sum,
            FUSED=fused,
            ALIGNMENT=_ALIGNMENT if _aligned(job.student, job.teacher) else 1,
            BLOCK=block,
            F=module.tl.float64 if wide else module.tl.float32,
            **options(num_warps),
        )


def gather(job: GatherJob, phases: int) -> None:
    """:func:`kd_kernels.reference.gather` in Triton, one program a row; row-major only.

    STATISTICS overwrites the logits at the ids.
    """
    if job.n == 0:
        return
    module = _kernels().gather
    wide = job.side.logits.dtype == torch.float64
    block, num_warps = configuration(job.vocab, wide)
    unused = job.statistics  # an address for what no phase of this call reads
    with _on(job.statistics):
        module.gather[(job.n,)](
            *_side(job.side),
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
            ALIGNMENT=_ALIGNMENT if _aligned(job.side) else 1,
            KP=_power_of_two(job.ids.shape[1]),
            BLOCK=block,
            F=module.tl.float64 if wide else module.tl.float32,
            **options(num_warps),
        )


_TARGETS_AT_A_TIME = 2  # each costs a counter a lane
_MOST_ENTRIES = 1024  # beyond it the buffer of candidates no longer fits in one program's registers


def topk_configuration(vocab: int, k: int, temperatures: int, wide: bool) -> tuple[Configuration, int]:
    """How the topk kernel walks a row, and how many candidates its buffer holds."""
    block, num_warps = configuration(vocab, wide)
    # Each temperature has sums of its own: with fewer lanes they take the same registers.
    block = max(block // _power_of_two(temperatures), 16)
    kept = _power_of_two(k)
    if kept == block:  # a block must leave room beside what is kept, or every newcomer makes a cut
        block //= 2
    capacity = 2 * max(block, kept)
    # Eight candidates a thread (in float64 four): more spill.
    threads = capacity // (4 if wide else 8)
    return Configuration(block, min(max(num_warps, threads // 32), 16)), capacity


def topk_constants(
    vocab: int, k: int, temperatures: int, targets: int, draws: int, wide: bool
) -> tuple[dict, int]:
    """What a launch of the topk kernel is compiled for, but for its logits; and the number of warps."""
    language = _kernels().topk.tl
    (block, num_warps), capacity = topk_configuration(vocab, k, temperatures, wide)
    constants = {
        "KEEP": k > 0,
        "RANKED": targets > 0,
        "DRAWS": draws > 0,
        "P": min(_power_of_two(k), max(block // 4, 64)),
        "MP": _power_of_two(temperatures),
        "RP": min(_power_of_two(targets), _TARGETS_AT_A_TIME),
        "CAPACITY": capacity,
        "BLOCK": block,
        "F": language.float64 if wide else language.float32,
    }
    return constants, num_warps


def topk(job: TopkJob) -> None:
    """:func:`kd_kernels.reference.topk` in Triton, one program a row; row-major only.

    Raises:
        ValueError: k > 1024.
    """
    if job.ids.shape[1] > _MOST_ENTRIES:
        raise ValueError(
            f"k must be at most {_MOST_ENTRIES} on the triton backend, got {job.ids.shape[1]}; "
            f'backend="reference" takes any'
        )
    if job.n == 0:
        return
    module = _kernels().topk
    wide = job.side.logits.dtype == torch.float64
    k, draws, targets = job.ids.shape[1], job.uniforms.shape[1], job.targets.shape[1]
    temperatures = job.temperatures.numel()
    constants, num_warps = topk_constants(job.vocab, k, temperatures, targets, draws, wide)
    blocks = -(-job.vocab // constants["BLOCK"])
    scratch = functools.partial(torch.empty, device=job.statistics.device)
    candidates = scratch(job.n, constants["CAPACITY"] if k else 0, dtype=torch.int32)
    masses = scratch(job.n, 2, blocks if draws else 0, dtype=torch.float64)
    with _on(job.statistics):
        module.topk[(job.n,)](
            job.side.logits,
            job.side.offsets,
            *_split(job.side.scale),
            *_split(job.side.softcap),
            job.temperatures,
            job.ids,
            job.values,
            job.statistics,
            job.targets,
            job.target_values,
            job.target_ranks,
            job.uniforms,
            job.samples,
            candidates,
            masses,
            k,
            temperatures,
            targets,
            draws,
            job.vocab,
            CAPPED=job.side.softcap != 0,
            ALIGNMENT=_ALIGNMENT if job.side.multiple % _ALIGNMENT == 0 else 1,
            **constants,
            **options(num_warps),
        )


ANGLE_TILES = {"TILE": 8, "BLOCK": 32}
ANGLE_WARPS = 4


def angle(job: AngleJob) -> None:
    """:func:`kd_kernels.reference.angle` in Triton, one program a tile of a row."""
    if job.n == 0:
        return
    tiles = -(-job.n // ANGLE_TILES["TILE"])
    partial = job.sums.new_empty(job.n, tiles)
    with _on(job.sums):
        _kernels().angle.angle[(job.n, tiles)](
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


class PairTiles(NamedTuple):
    """How the pairwise_l1 kernel holds pairs: a thread has OWN rows of the student by SETS x OTHERS of the
    teacher, read OTHERS at a time, 16 bytes."""

    SETS: int
    OWN: int
    THREADS: int
    OTHERS: int
    TILE: int


SMALL_PAIRS, LARGE_PAIRS = PairTiles(1, 4, 64, 4, 32), PairTiles(2, 4, 128, 4, 64)
PAIRS_WIDE = PairTiles(2, 2, 128, 2, 32)
PAIR_GRANULE, PAIR_UNROLL = 4, 2
PAIR_WEIGHTS = {"ROWS": 32, "STEP": 32}
PAIR_ADDITION = {"STEP": 16, "BLOCK": 64}
PAIR_WARPS = 4  # but for the sums, which have a number for each thread
# A program adds up at most so many entries in float32, and no fewer than pay for its start; all of them
# together hold at most so many sums.
_MOST_IN_A_SHARE, _LEAST_IN_A_SHARE, _PAIR_SUMS = 2048, 128, 1 << 23


def pair_tiles(longest: int, wide: bool) -> PairTiles:
    """For groups of up to ``longest`` rows."""
    return PAIRS_WIDE if wide else SMALL_PAIRS if longest <= SMALL_PAIRS.TILE else LARGE_PAIRS


def pair_probability_tiles(wide: bool) -> dict[str, int]:
    return {"ROWS": 8 if wide else 32, "BLOCK": 64}


class GradientTiles(NamedTuple):
    """How the pairwise_l1 kernel holds gradients: a thread has SETS x OWN rows, whose weights are read OWN at
    a time, 16 bytes, by COLUMNS entries; ACROSS threads stand along the vocabulary, the others along rows."""

    SETS: int
    OWN: int
    THREADS: int
    COLUMNS: int
    ACROSS: int

    @property
    def rows(self) -> int:
        return self.THREADS // self.ACROSS * self.SETS * self.OWN


def gradient_tiles(longest: int, wide: bool) -> GradientTiles:
    across = 32 if longest > 16 else 128
    return GradientTiles(2, 2, 128, 2, across) if wide else GradientTiles(2, 4, 128, 4, across)


class _PairwisePlan:
    """Sizes and scratch memory of one call of the pairwise_l1 kernels."""

    def __init__(self, n: int, groups: int, longest: int, vocab: int, wide: bool) -> None:
        self.dtype = torch.float64 if wide else torch.float32
        self.pairs = pair_tiles(longest, wide)
        self.tiles = -(-longest // self.pairs.TILE)
        self.lines = _up(vocab, PAIR_UNROLL)
        self.places = _up(n + PAIR_GRANULE * groups + self.pairs.TILE, 16)
        self.programs = groups * self.tiles**2
        sums = self.programs * self.pairs.TILE**2
        self.shares = max(1, min(self.lines // _LEAST_IN_A_SHARE, _PAIR_SUMS // max(1, sums)))
        rounds = -(-self.lines // (self.shares * _MOST_IN_A_SHARE))
        self.share = _up(-(-self.lines // (self.shares * max(1, rounds))), PAIR_UNROLL)
        self.stride = _up(vocab, 16)
        self.weights = (groups, longest, _up(longest, 32))  # whole tiles of rows
        itemsize = self.dtype.itemsize
        self.bytes = {
            TERMS: 2 * itemsize * (self.lines * self.places + self.shares * sums),
            GRADIENT: itemsize * (3 * n * self.stride + groups * (longest + 2) * self.weights[2]),
        }


def pairwise_l1_scratch(n: int, groups: int, longest: int, vocab: int, wide: bool, phase: int) -> int:
    """Bytes of memory of its own that :func:`pairwise_l1` takes for ``phase``."""
    return _PairwisePlan(n, groups, longest, vocab, wide).bytes[phase]


def pairwise_l1(job: PairwiseL1Job, phases: int) -> None:
    """:func:`kd_kernels.reference.pairwise_l1` in Triton; row-major only."""
    if job.n == 0 or job.vocab == 0:
        return
    wide = torch.float64 in (job.student.logits.dtype, job.teacher.logits.dtype)
    with _on(job.starts):
        if phases & TERMS:
            assert job.cost is not None
            _pairwise_terms(job, _PairwisePlan(job.n, *job.cost.shape[:2], job.vocab, wide))
        if phases & GRADIENT:
            assert job.d_cost is not None
            _pairwise_gradient(job, _PairwisePlan(job.n, *job.d_cost.shape[:2], job.vocab, wide))


def _probabilities(job: PairwiseL1Job, plan: _PairwisePlan, transposed: bool) -> list[Tensor]:
    """Of the student and the teacher, as the next kernel reads them."""
    module, (groups, longest, _) = _kernels().pairwise_l1, plan.weights
    constants = pair_probability_tiles(plan.dtype == torch.float64)
    tiles = -(-longest // constants["ROWS"])
    lines = plan.lines if transposed else job.vocab
    shape = (lines, plan.places) if transposed else (job.n, plan.stride)
    grid = (groups * tiles, -(-lines // constants["BLOCK"]))
    both = []
    for side, statistics in (
        (job.student, job.student_statistics),
        (job.teacher, job.teacher_statistics),
    ):
        out = torch.empty(shape, dtype=plan.dtype, device=statistics.device)
        module.probabilities[grid](
            side.logits,
            side.offsets,
            side.temperature,
            *_split(side.scale),
            *_split(side.softcap),
            statistics,
            job.starts,
            out,
            out.stride(0),
            lines,
            job.vocab,
            tiles,
            TRANSPOSED=transposed,
            CAPPED=side.softcap != 0,
            ALIGNMENT=_ALIGNMENT if side.multiple % _ALIGNMENT == 0 else 1,
            GRANULE=PAIR_GRANULE,
            F=_float(plan.dtype),
            **constants,
            **options(PAIR_WARPS),
        )
        both.append(out)
    return both


def _pairwise_terms(job: PairwiseL1Job, plan: _PairwisePlan) -> None:
    module, pairs = _kernels().pairwise_l1, plan.pairs
    student, teacher = _probabilities(job, plan, transposed=True)
    totals = [total for total in (job.cost, job.signs) if total is not None]
    sums = [student.new_empty(plan.shares, plan.programs, pairs.TILE**2) for _ in totals]
    for begin in range(0, plan.lines, plan.shares * plan.share):
        shares = min(plan.shares, -(-(plan.lines - begin) // plan.share))
        module.pair_sums[(plan.programs, shares)](
            student,
            teacher,
            job.starts,
            sums[0],
            sums[-1],
            plan.places,
            begin,
            plan.lines,
            plan.share,
            plan.tiles,
            SIGNS=job.signs is not None,
            GRANULE=PAIR_GRANULE,
            UNROLL=PAIR_UNROLL,
            F=_float(plan.dtype),
            **pairs._asdict(),
            **options(pairs.THREADS // 32),
        )
        for total, found in zip(totals, sums):
            module.add_sums[(plan.programs * pairs.TILE**2 // PAIR_ADDITION["BLOCK"],)](
                found,
                total,
                job.starts,
                shares,
                total.shape[1],
                plan.tiles,
                **pairs._asdict(),
                **PAIR_ADDITION,
                **options(PAIR_WARPS),
            )


def _pairwise_gradient(job: PairwiseL1Job, plan: _PairwisePlan) -> None:
    module, (groups, longest, width) = _kernels().pairwise_l1, plan.weights
    assert job.d_cost is not None
    p, q = _probabilities(job, plan, transposed=False)  # of both, before a gradient takes a logit's place
    wide = plan.dtype == torch.float64
    tiles = gradient_tiles(longest, wide)
    row_tiles, blocks = -(-longest // tiles.rows), -(-job.vocab // (tiles.ACROSS * tiles.COLUMNS))
    weight_tiles = width // PAIR_WEIGHTS["ROWS"]
    weights = p.new_empty(groups, longest, width)
    balance = p.new_empty(2, groups, width)
    gradient = torch.empty_like(p)
    block, num_warps = configuration(job.vocab, wide)
    for side, own, others, means, steps in (
        (job.student, p, q, job.student_means, (longest, 1)),
        (job.teacher, q, p, job.teacher_means, (1, longest)),
    ):
        if side.grad is None:
            continue
        module.pair_weights[(groups * weight_tiles,)](
            job.d_cost,
            *steps,
            means,
            job.starts,
            weights,
            balance,
            width,
            longest,
            weight_tiles,
            F=_float(plan.dtype),
            **PAIR_WEIGHTS,
            **options(PAIR_WARPS),
        )
        module.pair_gradient[(groups * row_tiles, blocks)](
            own,
            others,
            weights,
            balance,
            job.starts,
            gradient,
            plan.stride,
            width,
            longest,
            groups,
            row_tiles,
            F=_float(plan.dtype),
            **tiles._asdict(),
            **options(PAIR_WARPS),
        )
        module.logit_gradient[(job.n, -(-job.vocab // block))](
            *_side(side),
            gradient,
            plan.stride,
            job.vocab,
            CAPPED=side.softcap != 0,
            ALIGNMENT=_ALIGNMENT if _aligned(side) else 1,
            BLOCK=block,
            F=_float(plan.dtype),
            **options(num_warps),
        )


def _float(dtype: torch.dtype):
    """Triton's name of the dtype in which a kernel reckons."""
    language = _kernels().pairwise_l1.tl
    return language.float64 if dtype == torch.float64 else language.float32


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _power_of_two(least: int) -> int:
    """The smallest power of two that is not below ``least``: one compilation serves all numbers between."""
    return 1 << max(least - 1, 0).bit_length()


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
