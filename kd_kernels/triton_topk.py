"""The door to the Triton kernels of top-K: how a row is cut into groups, and the three launches."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple, Optional

import torch

from kd_kernels.rows import TopkJob
from kd_kernels.triton_runtime import (
    ALIGNMENT,
    MANY_REGISTERS,
    REGISTERS,
    configuration,
    kernels,
    on,
    options,
    power_of_two,
    split,
)
from kd_kernels.triton_runtime import why_not as why_not_triton

_TARGETS_AT_A_TIME = 2  # each costs a counter a lane
_MOST_ENTRIES = 1024  # beyond it the buffer of candidates no longer fits in one program's registers
_GROUPS = 2048  # of a row, up to a vocabulary of two million: one program looks at all of them at once
_SCRATCH = 64 << 20  # bytes beside the logits
_DRAW_WARPS = 1  # its steps wait for one another: many programs rather than many threads


def why_not(device: torch.device, k: int = 0) -> list[str]:
    """Why Triton cannot serve the ``k`` largest on ``device``; empty where it can."""
    reasons = why_not_triton(device)
    if k > _MOST_ENTRIES:
        reasons = [*reasons, f"keeps {_MOST_ENTRIES} entries of a row at most, {k} are wanted"]
    return reasons


class Launch(NamedTuple):
    """What a kernel is compiled for, but for its logits, and how many warps run it."""

    constants: dict
    num_warps: int


def registers(kernel: str, k: int, wide: bool) -> int:
    """Of a thread at most."""
    return MANY_REGISTERS if kernel == "largest" and (wide or k > 512) else REGISTERS


def walk_launch(vocab: int, temperatures: int, targets: int, wide: bool) -> Launch:
    """A group is up to four runs of at least eight lanes, a cache line; a lane is what one load brings. What
    one thread holds, a lane of each run, it adds up without the others."""
    block, num_warps = configuration(vocab, wide)
    width = 1 if wide else 4
    group = max(power_of_two(vocab) // _GROUPS, 8 * width)
    runs = min(group // (8 * width), 4)
    threads = 32 * num_warps
    lanes = min(group // (runs * width), threads)
    constants = {
        "RANKED": targets > 0,
        "MP": power_of_two(temperatures),
        "RP": min(power_of_two(targets), _TARGETS_AT_A_TIME),
        "RUNS": runs,
        "GROUPS": threads // lanes,
        "LANES": lanes,
        "WIDTH": width,
        "AT_ONCE": block,
    }
    return Launch(constants, num_warps)


def group_of(walk: Launch) -> int:
    return walk.constants["RUNS"] * walk.constants["LANES"] * walk.constants["WIDTH"]


def largest_launch(vocab: int, k: int, group: int, wide: bool) -> Launch:
    kept, groups = power_of_two(k), power_of_two(-(-vocab // group))
    block = max(256 if wide else 512, group)
    # Room for more than a block beside what is kept, or every newcomer would make a cut.
    capacity = power_of_two(kept + block + block // 2)
    constants = {
        "P": min(kept, 64),
        "GP": max(groups, 512 if wide else 1024),  # fewer would leave threads idle
        "GROUP": group,
        "BLOCK": block,
        "CAPACITY": capacity,
        "MANY": max(2 * kept, 64),
    }
    # Eight numbers a thread (in float64 four): more spill.
    threads = max(groups, capacity) // (4 if wide else 8)
    return Launch(constants, min(max(threads // 32, 4), 8 if wide else 16))


def draw_launch(group: int) -> Launch:
    return Launch({"GROUP": group, "GP": 256}, _DRAW_WARPS)


def topk(job: TopkJob) -> None:
    """:func:`kd_kernels.reference.topk` in Triton, one program a row; row-major only, ``k`` that
    :func:`why_not` does not object to. Takes at most 64 MiB of scratch memory at a time, a row's at least."""
    wide = job.side.logits.dtype == torch.float64
    temperatures, k, draws = job.temperatures.numel(), job.ids.shape[1], job.uniforms.shape[1]
    walk = walk_launch(job.vocab, temperatures, job.targets.shape[1], wide)
    group = group_of(walk)
    groups = -(-job.vocab // group)
    largest = largest_launch(job.vocab, k, group, wide) if k > 0 else None
    row_bytes = groups * ((1 + 2 * temperatures) * (8 if wide else 4) + 8 * (draws > 0))
    row_bytes += 4 * (groups + largest.constants["CAPACITY"]) if largest else 0
    at_once = _SCRATCH // row_bytes
    at_once = max(at_once - at_once % 4, 1)  # rows of 4 bytes each begin at multiples of 16
    assert job.side.offsets is not None
    for start in range(0, job.n, at_once):
        part = slice(start, min(job.n, start + at_once))
        side = replace(job.side, offsets=job.side.offsets[part])
        _launch(job.part(part, side, job.uniforms[part]), walk, largest, draw_launch(group), groups, wide)


def _launch(
    job: TopkJob, walk: Launch, largest: Optional[Launch], draw: Launch, groups: int, wide: bool
) -> None:
    module = kernels().topk
    number = module.tl.float64 if wide else module.tl.float32
    temperatures, k, draws = job.temperatures.numel(), job.ids.shape[1], job.uniforms.shape[1]
    scratch = functools.partial(torch.empty, device=job.statistics.device)
    kind = torch.float64 if wide else torch.float32
    tops = scratch(job.n, groups, dtype=kind)
    masses, means = (scratch(job.n, temperatures, groups, dtype=kind) for _ in range(2))

    def run(name: str, launch: Launch, *arguments, **constants) -> None:
        getattr(module, name)[(job.n,)](
            job.side.logits,
            job.side.offsets,
            *split(job.side.scale),
            *split(job.side.softcap),
            job.temperatures,
            job.statistics,
            tops,
            masses,
            *arguments,
            temperatures,
            job.vocab,
            CAPPED=job.side.softcap != 0,
            ALIGNMENT=ALIGNMENT if job.side.multiple % ALIGNMENT == 0 else 1,
            F=number,
            **launch.constants,
            **constants,
            **options(launch.num_warps, registers=registers(name, k, wide)),
        )

    with on(job.statistics):
        looked_up = (job.targets, job.target_values, job.target_ranks)
        run("walk", walk, means, *looked_up, job.targets.shape[1], SCALED=job.side.scale != 1)
        if largest is not None:
            chosen = scratch(job.n, groups, dtype=torch.int32)
            candidates = scratch(job.n, largest.constants["CAPACITY"], dtype=torch.int32)
            run("largest", largest, chosen, candidates, job.ids, job.values, k)
        if draws > 0:
            prefix = scratch(job.n, groups, dtype=torch.float64)
            run("draw", draw, prefix, job.uniforms, job.samples, draws)
