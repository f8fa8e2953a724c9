"""The topk kernel: the largest entries of each row, its sums, ranks of given entries, and draws.

``csrc/topk.h`` states the contract. One program takes one row and reads it once. An entry above the running
k-th largest value (the threshold) goes to a buffer of candidates, the others to the lane sums at once. The
buffer, ids only, is in global memory: nothing in Triton addresses shared memory. When the next block might
not fit, the buffer is cut back to the k largest, the rest joins the lane sums, and the threshold rises.

The k-th largest value is found by bisection of its bits, not by sorting: 32 counts of a buffer are a third of
the instructions of a bitonic sort, which spilled registers and took the compiler a minute. Candidates stay in
the order of their ids, so that ties need no keys that float64 has no room for: of those equal to the k-th the
first ones stay, and a new entry equal to the threshold has a larger id than all k: it loses.

Draws invert the cumulated probability in two steps: the walk leaves each block's log-sum in scratch memory, a
bisection of their prefix sums finds a draw's block, which is read once more.
"""

import triton
import triton.language as tl

from .elementary import exponential
from .rows import (
    add_exp_and_mean_block,
    join_exp_and_mean,
    load_block,
    load_whole,
    lowest,
    number,
    row_mean_sum,
    row_start,
    row_sum,
)


@triton.jit
def load_at(start, ids, listed, scale, softcap, CAPPED: tl.constexpr, F: tl.constexpr):
    """Logits at ``ids`` after scale and softcap; ``-inf`` where not ``listed``."""
    return load_block(start, tl.where(listed, ids, 0), listed, scale, softcap, CAPPED, F)


@triton.jit
def lane_sums(MP: tl.constexpr, LANES: tl.constexpr, dtype: tl.constexpr):
    """Zeros for each temperature (or target) and lane, ``[LANES]`` of a single one: with a dimension more,
    Triton would hand the entries from thread to thread."""
    if MP == 1:
        return tl.zeros([LANES], dtype)
    else:
        return tl.zeros([MP, LANES], dtype)


@triton.jit
def each(sums):
    """``[MP, LANES]`` of what :func:`lane_sums` gave."""
    if len(sums.shape) == 1:
        return sums[None, :]
    else:
        return sums


@triton.jit
def add(mass, weighted, top, z, inverse):
    """One more block ``[LANES, WIDTH]`` in the lane sums of temperatures ``[MP]`` over maxima ``[LANES]``."""
    if len(mass.shape) == 1:
        return add_exp_and_mean_block(mass, weighted, top, z, tl.sum(inverse, 0))
    else:
        new = tl.maximum(top, tl.max(z, 1))
        x, moved = (z - new[:, None])[None, :, :], (top - new)[None, :]
        mass, weighted = join_exp_and_mean(
            mass, weighted, moved * inverse[:, None], x * inverse[:, None, None]
        )
        return mass, weighted, new


@triton.jit
def ordered(z):
    """Integers in the order of the floats ``z``, which are not NaN."""
    z = tl.where(z == 0.0, 0.0, z)  # -0 is no less
    if z.dtype == tl.float64:
        bits = z.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = z.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def cut(slots, z, count, k):
    """Where each of ``count`` candidates goes so that the k largest come first, all in their order.

    Returns ``(places, how many are kept, the k-th largest value, -inf where there are fewer)``.
    """
    BITS: tl.constexpr = z.dtype.primitive_bitwidth
    held = slots < count
    key = ordered(z)
    one = tl.full([], 1, key.dtype)
    least = one << (BITS - 1)  # the k-th largest key, found bit by bit, the sign first
    key = tl.where(held, key, least)
    for i in range(BITS):
        trial = least ^ (one << (BITS - 1 - i))
        least = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= k, trial, least)
    above = (key > least).to(tl.int32)
    tied = (held & (key == least)).to(tl.int32)
    kept = above + tl.where(tl.cumsum(tied, 0) <= k - tl.sum(above, 0), tied, 0)
    before = tl.cumsum(kept, 0)
    number_kept = tl.max(before, 0)
    threshold = tl.min(tl.where(kept == 1, z, float("inf")), 0)
    threshold = tl.where(number_kept < k, -float("inf"), threshold)
    return tl.where(kept == 1, before - 1, number_kept + slots - before), number_kept, threshold


@triton.jit
def ahead(z, columns, target_z, target):
    """Which entries come before which targets in the order; int32."""
    return ((z > target_z) | ((z == target_z) & (columns < target))).to(tl.int32)


@triton.jit
def lanes_ahead(z, columns, target_z, target):
    """How many entries of each lane of ``[LANES, WIDTH]`` come before each of the targets ``[RP]``, as
    :func:`lane_sums`."""
    if target.shape[0] == 1:
        return tl.sum(ahead(z, columns, tl.sum(target_z, 0), tl.sum(target, 0)), 1)
    else:
        z, columns = z[None, :, :], columns[None, :, :]
        return tl.sum(ahead(z, columns, target_z[:, None, None], target[:, None, None]), 2)


@triton.jit
def pick(values, i: tl.constexpr, P: tl.constexpr):
    """The i-th of ``values`` [P]."""
    return tl.sum(tl.where(tl.arange(0, P) == i, values, 0.0), 0)


@triton.jit
def load_targets(
    targets, start, first, count, vocab, scale, cap, CAPPED: tl.constexpr, RP: tl.constexpr, F: tl.constexpr
):
    """RP targets of a row from the ``first`` on: ``(which are in range, ids, logits)``."""
    r = first + tl.arange(0, RP)
    target = tl.load(targets + r, mask=r < count, other=-1)
    known = (target >= 0) & (target < vocab)
    target = tl.where(known, target, 0).to(tl.int32)
    return known, target, load_at(start, target, known, scale, cap, CAPPED, F)


@triton.jit
def store_targets(target_values, target_ranks, first, count, known, z, rank, RP: tl.constexpr):
    r = first + tl.arange(0, RP)
    tl.store(target_values + r, tl.where(known, z, float("nan")).to(tl.float64), mask=r < count)
    tl.store(target_ranks + r, tl.where(known, 1 + tl.sum(each(rank), 1), 0), mask=r < count)


@triton.jit
def store_largest(
    ids,
    values,
    buffer,
    start,
    count,
    k,
    scale,
    cap,
    CAPPED: tl.constexpr,
    P: tl.constexpr,
    F: tl.constexpr,
):
    """The ``count`` <= k candidates in their order, -1 and -inf behind them; P at a time."""
    CHUNK: tl.constexpr = 16
    for i in range(0, k, P):
        slots = i + tl.arange(0, P)
        candidate = tl.load(buffer + slots, mask=slots < count, other=-1)
        z = load_at(start, candidate, slots < count, scale, cap, CAPPED, F)
        place = tl.zeros([P], tl.int32)
        for j in range(0, count, CHUNK):
            listed = j + tl.arange(0, CHUNK)
            other = tl.load(buffer + listed, mask=listed < count, other=0)
            other_z = load_at(start, other, listed < count, scale, cap, CAPPED, F)
            before = ahead(other_z[None, :], other[None, :], z[:, None], candidate[:, None])
            place += tl.sum(before, 1)
        place = tl.where(slots < count, place, slots)
        tl.store(ids + place, candidate, mask=slots < k)
        tl.store(values + place, z.to(tl.float64), mask=slots < k)


@triton.jit
def prefix_masses(log_masses, prefix, blocks, log_total):
    """Cumulated probabilities of the blocks into ``prefix``, never falling; returns the last."""
    running = tl.zeros([], tl.float64)
    for i in range(blocks):
        running += exponential(tl.load(log_masses + i) - log_total)
        tl.store(prefix + i, running)
    return running


@triton.jit
def draw(
    start,
    prefix,
    reach,
    blocks,
    vocab,
    scale,
    cap,
    inverse,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """The first id whose cumulated probability exceeds ``reach``."""
    low, high = tl.zeros([], tl.int32), tl.zeros([], tl.int32) + (blocks - 1)
    while low < high:
        middle = (low + high) // 2
        beyond = tl.load(prefix + middle) > reach
        low = tl.where(beyond, low, middle + 1)
        high = tl.where(beyond, middle, high)
    before = tl.load(prefix + low - 1, mask=low > 0, other=0.0)
    share = (reach - before) / (tl.load(prefix + low) - before)
    columns = low * BLOCK + tl.arange(0, BLOCK)
    z = load_block(start, columns, columns < vocab, scale, cap, CAPPED, F)
    weight = exponential((z - tl.max(z, 0)) * inverse).to(tl.float64)
    # Sums of a parallel scan are rounded each in its own way: what has no probability is never drawn.
    possible = weight > 0.0
    reached = (tl.cumsum(weight, 0) > share * tl.sum(weight, 0)) & possible
    first = tl.min(tl.where(reached, columns, vocab), 0)
    last = tl.max(tl.where(possible, columns, -1), 0)
    return tl.where(first < vocab, first, last)


@triton.jit(do_not_specialize=["k", "temperatures_count", "targets_count", "draws"])
def topk(
    logits,
    offsets,
    scale,
    scale_low,
    softcap,
    softcap_low,
    temperatures,
    ids,
    values,
    statistics,
    targets,
    target_values,
    target_ranks,
    uniforms,
    samples,
    candidates,  # [n, CAPACITY] int32, scratch
    masses,  # [n, 2, blocks] float64, scratch
    k,
    temperatures_count,
    targets_count,
    draws,
    vocab,
    KEEP: tl.constexpr,  # k > 0
    RANKED: tl.constexpr,  # targets_count > 0
    DRAWS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,  # whether the scale is another than 1
    ALIGNMENT: tl.constexpr,  # divides every offset
    P: tl.constexpr,  # how many of the k largest are put in order at a time
    MP: tl.constexpr,  # a power of two that the number of temperatures does not exceed
    RP: tl.constexpr,  # targets at a time: the first ones in the walk, more in walks of their own
    CAPACITY: tl.constexpr,  # of the candidates' buffer: with room for a block beside k
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    F: tl.constexpr,  # arithmetic: float32 or float64
):
    row = tl.program_id(0).to(tl.int64)
    BLOCK: tl.constexpr = WIDTH * LANES
    blocks = tl.cdiv(vocab, BLOCK)
    entries = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    start = row_start(logits, offsets, row, ALIGNMENT)
    scale = number(scale, scale_low, F)
    cap = number(softcap, softcap_low, F)
    m = tl.arange(0, MP)
    inverse_wide = 1.0 / tl.load(temperatures + m, mask=m < temperatures_count, other=1.0)
    inverse = inverse_wide.to(F)

    floor = lowest(F)
    top = tl.full([LANES], floor, F)
    mass, weighted = lane_sums(MP, LANES, F), lane_sums(MP, LANES, F)
    if KEEP:
        buffer = candidates + row * CAPACITY
        slots = tl.arange(0, CAPACITY)
        threshold = tl.full([], -float("inf"), F)
        count = tl.zeros([], tl.int32)
    if RANKED:
        row_targets = targets + row * targets_count
        row_target_values = target_values + row * targets_count
        row_target_ranks = target_ranks + row * targets_count
        known, target, target_z = load_targets(
            row_targets, start, 0, targets_count, vocab, scale, cap, CAPPED, RP, F
        )
        rank = lane_sums(RP, LANES, tl.int32)
    if DRAWS:
        log_masses = masses + row * 2 * blocks
        inverse_draw = pick(inverse, 0, MP)

    # One step more than there are blocks: it cuts the buffer a last time and finds nothing to read.
    for i in range(blocks + 1):
        if KEEP:
            if (count + BLOCK > CAPACITY) | (i == blocks):
                tl.debug_barrier()  # after the candidates' stores
                held = slots < count
                candidate = tl.load(buffer + slots, mask=held, other=0)
                z_held = load_at(start, candidate, held, scale, cap, CAPPED, F)
                place, kept, threshold = cut(slots, z_held, count, k)
                tl.debug_barrier()
                tl.store(buffer + place, candidate, mask=held)
                tl.debug_barrier()
                for j in range(kept // BLOCK, tl.cdiv(count, BLOCK)):
                    slot = j * BLOCK + entries
                    given_up = (slot >= kept) & (slot < count)
                    evicted = tl.load(buffer + slot, mask=given_up, other=0)
                    z = load_at(start, evicted, given_up, scale, cap, CAPPED, F)
                    mass, weighted, top = add(mass, weighted, top, z, inverse)
                tl.debug_barrier()  # before new candidates are stored
                count = kept
        columns = i * BLOCK + entries
        if (i + 1) * BLOCK <= vocab:
            z = load_whole(start, columns, scale, cap, CAPPED, SCALED, F)
        else:
            z = load_block(start, columns, columns < vocab, scale, cap, CAPPED, F)
        if RANKED:
            rank += lanes_ahead(z, columns, target_z, target)
        if DRAWS:
            block_top = tl.max(tl.max(z, 1), 0)
            relative = z - tl.where(block_top == -float("inf"), 0.0, block_top)
            block_mass = tl.sum(tl.sum(exponential(relative * inverse_draw).to(tl.float64), 1), 0)
            log_mass = block_top.to(tl.float64) * pick(inverse_wide, 0, MP) + tl.log(block_mass)
            tl.store(log_masses + i, log_mass, mask=i < blocks)
        if KEEP:
            fresh = z > threshold  # never NaN: that goes to the sums, where it stays
            in_lane = tl.cumsum(fresh.to(tl.int32), 1)
            of_lanes = tl.sum(fresh.to(tl.int32), 1)
            arrived = (tl.cumsum(of_lanes, 0) - of_lanes)[:, None] + in_lane
            tl.store(buffer + count + arrived - 1, columns, mask=fresh)
            count += tl.sum(of_lanes, 0)
            z = tl.where(fresh, -float("inf"), z)
        mass, weighted, top = add(mass, weighted, top, z, inverse)

    tail_top = tl.max(top, 0)
    tail = row_sum(each(mass), top[None, :], tail_top, inverse[:, None])
    if KEEP:
        for j in range(tl.cdiv(count, BLOCK)):
            slot = j * BLOCK + entries
            candidate = tl.load(buffer + slot, mask=slot < count, other=0)
            z = load_at(start, candidate, slot < count, scale, cap, CAPPED, F)
            mass, weighted, top = add(mass, weighted, top, z, inverse)
        store_largest(ids + row * k, values + row * k, buffer, start, count, k, scale, cap, CAPPED, P, F)
    row_top = tl.max(top, 0)
    whole = row_sum(each(mass), top[None, :], row_top, inverse[:, None])
    whole = tl.where(whole == 0.0, float("nan"), whole)  # a row without a finite logit
    log_whole = tl.log(whole)
    entropy = (
        log_whole - row_mean_sum(each(mass), each(weighted), top[None, :], row_top, inverse[:, None]) / whole
    )
    largest, largest_tail = row_top.to(tl.float64), tail_top.to(tl.float64)
    lse = largest * inverse_wide + log_whole
    log_tail = (largest_tail - largest) * inverse_wide + (tl.log(tail) - log_whole)
    stats = statistics + row * (1 + 3 * temperatures_count)
    bad = pick(whole, 0, MP) != pick(whole, 0, MP)
    tl.store(stats, tl.where(bad, float("nan"), largest))
    at = stats + 1 + 3 * m
    tl.store(at + 0, lse, mask=m < temperatures_count)
    tl.store(at + 1, entropy, mask=m < temperatures_count)
    tl.store(at + 2, log_tail, mask=m < temperatures_count)

    if RANKED:
        store_targets(row_target_values, row_target_ranks, 0, targets_count, known, target_z, rank, RP)
        for first in range(RP, targets_count, RP):
            known, target, target_z = load_targets(
                row_targets, start, first, targets_count, vocab, scale, cap, CAPPED, RP, F
            )
            rank = lane_sums(RP, LANES, tl.int32)
            for i in range(blocks):
                columns = i * BLOCK + entries
                z = load_block(start, columns, columns < vocab, scale, cap, CAPPED, F)
                rank += lanes_ahead(z, columns, target_z, target)
            store_targets(
                row_target_values, row_target_ranks, first, targets_count, known, target_z, rank, RP
            )

    if DRAWS:
        tl.debug_barrier()
        prefix = log_masses + blocks
        reach = prefix_masses(log_masses, prefix, blocks, pick(lse, 0, MP))
        tl.debug_barrier()
        for i in range(draws):
            uniform = tl.load(uniforms + row * draws + i)
            drawn = draw(
                start, prefix, uniform * reach, blocks, vocab, scale, cap, inverse_draw, CAPPED, BLOCK, F
            )
            tl.store(samples + row * draws + i, tl.where(bad, -1, drawn))
