"""The door to the Triton kernels of transport: Sinkhorn problems, half-steps of those that share a cost, and
L1 distances between all rows."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kd_kernels import problems as P
from kd_kernels.reference.half_step import half_step as reference_half_step
from kd_kernels.reference.sinkhorn import sinkhorn as reference_sinkhorn
from kd_kernels.rows import GRADIENT, TERMS, PairwiseL1Job
from kd_kernels.triton_runtime import (
    ALIGNMENT,
    MOST_REGISTERS,
    aligned,
    configuration,
    kernels,
    on,
    options,
    power_of_two,
    side_arguments,
    split,
    version,
)

_SINKHORN_MOST_COLUMNS = 4096  # a tile holds whole rows
# Fewer problems, of more pairs each: one program a problem leaves most of a GPU idle, and took twice as long
# as torch's operations on all of it for 8 of 1024 x 1024 (benchmarks/NOTES.md). Guessed from that.
_SINKHORN_FEW, _SINKHORN_LARGE = 16, 1 << 18
SINKHORN_REGISTERS = MOST_REGISTERS  # a problem has a multiprocessor for itself


def sinkhorn_tile(rows: int, columns: int, wide: bool) -> tuple[dict[str, int], int]:
    """The tile of the Sinkhorn kernels, and the warps that share it: eight numbers a thread, in float64
    four, and more where a row has more."""
    width, each = max(power_of_two(columns), 16), 4 if wide else 8
    height = min(max(256 * each // width, 1), power_of_two(rows))
    return {"ROWS": height, "COLUMNS": width}, min(max(height * width // (32 * each), 1), 8)


def _on_device(epsilons: Tensor, device: torch.device) -> Tensor:
    """By filling in what is the same: a copy from the host would wait."""
    out = torch.empty(epsilons.shape, dtype=epsilons.dtype, device=device)
    start = 0
    for value, count in zip(*(x.tolist() for x in torch.unique_consecutive(epsilons, return_counts=True))):
        out[start : start + count].fill_(value)
        start += count
    return out


def sinkhorn(job: P.SinkhornJob, phases: int) -> None:
    """:func:`kd_kernels.reference.sinkhorn` in Triton, one program a problem, whose iterations are always on
    logarithms. Problems of more than 4096 columns stay with the plain version, and so does a given number of
    iterations of a few large ones, and the gradient through it; not iterations to a tolerance nor the
    implicit gradient, whose end a program sees without the host."""
    (count, n), m = job.a.shape, job.b.shape[1]
    if count == 0 or n == 0:
        return
    if m > _SINKHORN_MOST_COLUMNS:
        reference_sinkhorn(job, phases)
        return
    if job.tolerance == 0 and count < _SINKHORN_FEW and n * m > _SINKHORN_LARGE:
        reference_sinkhorn(job, phases & ~P.IMPLICIT)
        phases &= P.IMPLICIT
        if not phases:
            return
    module, device = kernels().sinkhorn, job.a.device
    wide = job.a.dtype == torch.float64
    tile, num_warps = sinkhorn_tile(n, m, wide)
    epsilons = _on_device(job.epsilons, device)
    sizes = (n, m, job.cost.stride(0), job.cost.stride(1), job.iterations)
    number = functools.partial(torch.full, (), dtype=torch.float64, device=device)
    with on(job.a):
        if phases & P.SOLVE:
            history = job.phi_history is not None
            module.solve[(count,)](
                job.cost,
                job.a,
                job.b,
                epsilons,
                number(job.tolerance),
                job.phi,
                job.psi,
                job.numbers,
                job.phi_history if history else job.phi,
                job.psi_history if history else job.psi,
                job.phi.new_empty(count, 2, n),
                *sizes,
                TOLERANCE=job.tolerance > 0,
                HISTORY=history,
                SCALING=job.domain == P.SCALING,
                ROOM=P.room(job.a.dtype),
                F=module.tl.float64 if wide else module.tl.float32,
                **tile,
                **options(num_warps, registers=SINKHORN_REGISTERS),
            )
        if not phases & (P.UNROLLED | P.IMPLICIT):
            return
        plan = job.d_cost if job.d_plan is None else job.d_plan  # an address for what is not read
        results = (job.d_cost, job.d_a, job.d_b)
        if phases & P.UNROLLED:
            module.unrolled[(count,)](
                job.cost,
                job.a,
                job.b,
                epsilons,
                job.phi,
                job.psi,
                job.phi_history,
                job.psi_history,
                job.d_transport,
                plan,
                job.d_phi,
                job.d_psi,
                *results,
                *sizes,
                PLAN=job.d_plan is not None,
                F=module.tl.float64 if wide else module.tl.float32,
                **tile,
                **options(num_warps, registers=SINKHORN_REGISTERS),
            )
        if phases & P.IMPLICIT:
            tile, num_warps = sinkhorn_tile(n, m, True)
            module.implicit[(count,)](
                job.cost,
                job.a,
                job.b,
                epsilons,
                job.phi,
                job.psi,
                job.d_transport,
                job.d_value,
                plan,
                *results,
                job.a.new_empty(count, n, m, dtype=torch.float64),
                job.a.new_empty(count, 2, n, dtype=torch.float64),
                *sizes,
                P.CG_STEPS,
                number(P.CG_TOLERANCE),
                PLAN=job.d_plan is not None,
                **tile,
                **options(num_warps, registers=SINKHORN_REGISTERS),
            )


def half_step_tile(wide: bool) -> dict[str, int]:
    return {"PROBLEMS": 16, "OUTER": 32, "INNER": 16 if wide else 32}


HALF_STEP_WARPS = 4
HALF_STEP_REGISTERS = MOST_REGISTERS  # there are fewer programs than multiprocessors
# With more problems a half-step is a product like any other, the library's business; from how many on has not
# been measured.
_HALF_STEP_MOST_PROBLEMS = 64
_DOUBLE_PRODUCTS = 3, 5  # the first Triton that has them


def half_step(job: P.HalfStepJob) -> None:
    """:func:`kd_kernels.reference.half_step` in Triton, for a few problems."""
    (count, outer), wide = job.weight.shape, job.out.dtype == torch.float64
    if count > _HALF_STEP_MOST_PROBLEMS or (wide and version() < _DOUBLE_PRODUCTS):
        reference_half_step(job)
        return
    module, strides = kernels().half_step, job.kernel.stride()
    tile = half_step_tile(wide)
    grid = (-(-outer // tile["OUTER"]), -(-count // tile["PROBLEMS"]))
    with on(job.out):
        module.half_step[grid](
            job.kernel,
            job.x,
            job.weight,
            job.weight if job.extra is None else job.extra,
            job.out,
            count,
            outer,
            job.x.shape[1],
            *(t.stride(0) for t in (job.x, job.weight, job.out)),
            *(reversed(strides) if job.transposed else strides),
            DIVIDE=job.divide,
            EXTRA=job.extra is not None,
            F=module.tl.float64 if wide else module.tl.float32,
            **tile,
            **options(HALF_STEP_WARPS, registers=HALF_STEP_REGISTERS),
        )


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
    with on(job.starts):
        if phases & TERMS:
            assert job.cost is not None
            _pairwise_terms(job, _PairwisePlan(job.n, *job.cost.shape[:2], job.vocab, wide))
        if phases & GRADIENT:
            assert job.d_cost is not None
            _pairwise_gradient(job, _PairwisePlan(job.n, *job.d_cost.shape[:2], job.vocab, wide))


def _probabilities(job: PairwiseL1Job, plan: _PairwisePlan, transposed: bool) -> list[Tensor]:
    """Of the student and the teacher, as the next kernel reads them."""
    module, (groups, longest, _) = kernels().pairwise_l1, plan.weights
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
            *split(side.scale),
            *split(side.softcap),
            statistics,
            job.starts,
            out,
            out.stride(0),
            lines,
            job.vocab,
            tiles,
            TRANSPOSED=transposed,
            CAPPED=side.softcap != 0,
            ALIGNMENT=ALIGNMENT if side.multiple % ALIGNMENT == 0 else 1,
            GRANULE=PAIR_GRANULE,
            F=_float(plan.dtype),
            **constants,
            **options(PAIR_WARPS),
        )
        both.append(out)
    return both


def _pairwise_terms(job: PairwiseL1Job, plan: _PairwisePlan) -> None:
    module, pairs = kernels().pairwise_l1, plan.pairs
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
    module, (groups, longest, width) = kernels().pairwise_l1, plan.weights
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
            *side_arguments(side),
            gradient,
            plan.stride,
            job.vocab,
            CAPPED=side.softcap != 0,
            ALIGNMENT=ALIGNMENT if aligned(side) else 1,
            BLOCK=block,
            F=_float(plan.dtype),
            **options(num_warps),
        )


def _float(dtype: torch.dtype):
    """Triton's name of the dtype in which a kernel reckons."""
    language = kernels().pairwise_l1.tl
    return language.float64 if dtype == torch.float64 else language.float32


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
