"""The gather kernel: a few entries of each row by id, and sums over all the others.

``csrc/gather.h`` states the contract. One program takes one row and walks it as the row kernel does: in
blocks of ``[LANES, WIDTH]``, the one in which the row ends masked. Where the ids are is not looked up in the
walk: their logits are marked beforehand, by overwriting them with the number that stands for probability 0.
The gradient needs no marks: the walk writes something at the ids too, and what belongs there is stored last.
"""

import triton
import triton.language as tl

from .elementary import exponential
from .objectives import times
from .rows import (
    add_exp_and_mean_block,
    add_exp_block,
    lowest,
    number,
    row_mean_sum,
    row_start,
    row_sum,
    shaped,
    store_gradient,
)

GATHER_COLUMNS = tl.constexpr(4)


@triton.jit
def others_sum(lanes, top, row_top, inverse, marked, cap_below):
    """A row's sum of exponentials with the ``marked`` entries at ``-softcap``, ``cap_below`` the maximum."""
    share = exponential(cap_below * inverse).to(tl.float64)
    return row_sum(lanes, top, row_top, inverse) + times(marked, share)


@triton.jit
def share_gradient(coefficient, share):
    """A coefficient of 0 silences its summand, whatever the row holds."""
    return tl.where(coefficient == 0.0, 0.0, coefficient * share)


@triton.jit(do_not_specialize=["k"])
def gather(
    logits,
    offsets,
    temperature,
    grad,
    grad_offsets,
    scale,
    scale_low,
    softcap,
    softcap_low,
    ids,
    gathered,
    statistics,
    soft,
    slope,
    hard_weight,
    at_ids,
    k,
    vocab,
    STATISTICS: tl.constexpr,  # the phases to run
    GRADIENT: tl.constexpr,
    HARD: tl.constexpr,
    MEANS: tl.constexpr,
    SLOPE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,  # whether the scale is another than 1
    ALIGNMENT: tl.constexpr,  # divides every offset
    KP: tl.constexpr,  # a power of two that k does not exceed
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    F: tl.constexpr,  # arithmetic: float32 or float64
):
    row = tl.program_id(0).to(tl.int64)
    BLOCK: tl.constexpr = WIDTH * LANES
    blocks, whole = tl.cdiv(vocab, BLOCK), vocab // BLOCK
    entries = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    start = row_start(logits, offsets, row, ALIGNMENT)
    scale = number(scale, scale_low, F)
    cap = number(softcap, softcap_low, F)
    row_temperature = tl.load(temperature + row)
    inverse = (1.0 / row_temperature).to(F)
    slots = tl.arange(0, KP)
    places = row * k + slots
    listed = slots < k
    at = tl.load(ids + places, mask=listed, other=-1)
    used = at >= 0
    stats = statistics + row * GATHER_COLUMNS

    if STATISTICS:
        z_at = shaped(tl.load(start + at, mask=used, other=0.0).to(F), scale, cap, CAPPED)
        z_at = tl.where(used, z_at, -float("inf"))
        tl.store(gathered + places, z_at.to(tl.float64), mask=listed)
        tl.debug_barrier()  # where threads share an entry, all must have read it
        mark = tl.where(scale < 0.0, float("inf"), -float("inf"))
        tl.store(start + at, (mark + tl.zeros([KP], F)).to(logits.dtype.element_ty), mask=used)
        tl.debug_barrier()

        floor = lowest(F)
        top = tl.full([LANES], floor, F)
        mass = tl.zeros([LANES], F)
        weighted, mass_hard = mass, mass
        marks = tl.zeros([LANES], tl.int32)
        for part in tl.static_range(2):  # whole blocks, then the masked rest
            for i in range(whole if part == 1 else 0, blocks if part == 1 else whole):
                columns = i * BLOCK + entries
                if part == 1:
                    x = tl.load(start + columns, mask=columns < vocab, other=mark).to(F)
                else:
                    x = tl.load(start + columns).to(F)
                z = shaped(x, scale, cap, CAPPED, SCALED)
                if CAPPED or SCALED:  # else a mark is -inf as it stands
                    absent = x == mark
                    z = tl.where(absent, -float("inf"), z)
                if CAPPED:
                    marks += tl.sum(absent.to(tl.int32), 1)
                if HARD:
                    mass_hard, _ = add_exp_block(mass_hard, top, z, 1.0)
                if MEANS:
                    mass, weighted, top = add_exp_and_mean_block(mass, weighted, top, z, inverse)
                else:
                    mass, top = add_exp_block(mass, top, z, inverse)
        others_top = tl.max(top, 0)
        if CAPPED:
            # A softcap makes -softcap of a logit of -inf. Those look like marks: counted, they join now.
            beyond = blocks * BLOCK - vocab
            marked = tl.sum(marks, 0) - beyond - tl.sum(used.to(tl.int32), 0)
            others_top = tl.where((marked > 0) & (others_top < -cap), -cap, others_top)
            marked = marked.to(tl.float64)
            cap_below = -cap - others_top
        else:
            marked, cap_below = tl.zeros([], tl.float64), tl.zeros([], F)
        others_mass = others_sum(mass, top, others_top, inverse, marked, cap_below)
        nothing = others_mass == 0.0
        others_logz = tl.log(others_mass)
        others_top = tl.where(nothing, -float("inf"), others_top)
        tl.store(stats + 0, others_top.to(tl.float64))
        tl.store(stats + 1, others_logz)
        others_logz_hard = others_logz
        if HARD:
            row_top = tl.where(nothing, floor, others_top)
            others_logz_hard = tl.log(others_sum(mass_hard, top, row_top, 1.0, marked, cap_below))
            tl.store(stats + 2, others_logz_hard)
        if MEANS:
            row_top = tl.where(nothing, floor, others_top)
            mean = row_mean_sum(mass, weighted, top, row_top, inverse)
            x_cap = cap_below * inverse
            mean += times(marked * exponential(x_cap).to(tl.float64), x_cap.to(tl.float64))
            tl.store(stats + 3, tl.where(nothing, 0.0, mean / tl.where(nothing, 1.0, others_mass)))
    else:
        others_top = tl.load(stats + 0).to(F)
        others_logz = tl.load(stats + 1)
        others_logz_hard = tl.load(stats + 2) if HARD else others_logz

    if GRADIENT:
        out = row_start(grad, grad_offsets, row, ALIGNMENT)
        c_soft = tl.load(soft + row).to(F)
        c_slope = tl.load(slope + row).to(F) if SLOPE else c_soft
        c_hard = tl.load(hard_weight + row).to(F) if HARD else c_soft
        logz, logz_hard = others_logz.to(F), others_logz_hard.to(F)
        for part in tl.static_range(2):  # the masked rest, then whole blocks
            for i in range(blocks - whole if part == 0 else whole):
                columns = ((blocks if part == 0 else whole) - 1 - i) * BLOCK + entries
                inside = columns < vocab
                if part == 0:
                    x = tl.load(start + columns, mask=inside, other=0.0).to(F)
                else:
                    x = tl.load(start + columns).to(F)
                z = shaped(x, scale, cap, CAPPED, SCALED)
                below = z - others_top
                log_share = below * inverse - logz
                share = exponential(log_share)
                gradient = share_gradient(c_soft, share)
                if SLOPE:
                    gradient += share_gradient(c_slope, times(share, log_share))
                if HARD:
                    gradient += share_gradient(c_hard, exponential(below - logz_hard))
                gradient = tl.where(z == -float("inf"), 0.0, gradient)
                if SCALED:
                    gradient *= scale
                store_gradient(out, columns, inside, gradient, z, cap, CAPPED, part == 0)
        if not STATISTICS:
            z_at = tl.load(gathered + places, mask=used, other=0.0).to(F)
        tl.debug_barrier()  # what the walk has stored at the ids comes first
        gradient_at = tl.load(at_ids + places, mask=used, other=0.0).to(F) * scale
        store_gradient(out, at, used, gradient_at, z_at, cap, CAPPED)
