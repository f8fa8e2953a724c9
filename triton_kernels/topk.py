"""The topk kernels: the largest entries of each row, its sums, ranks of given entries, and draws.

``csrc/topk.h`` states the contract. One program takes one row, in up to three launches:

* ``walk`` reads the row once (and again for more than two targets). Of each group of neighbouring entries it
  leaves in scratch memory the largest logit and the sum of exponentials relative to it; the row's sums are
  made of these.
* ``largest``: a bound that the maxima of k groups reach is reached by k entries, so none of the k largest is
  below it, nor in a group whose maximum is. The other groups, at most a quarter more than k, are read again,
  and what reaches the bound, little more than k entries, is put in order. The tail is summed from the groups
  left out, whose sums are known, and from what is not kept of the others.
* ``draw`` inverts the cumulated probability in two steps: a bisection of the groups' prefix sums finds a
  draw's group, which is read once more.

A bound is found by bisection of the bits of a value, not by sorting: 32 counts at most are a third of the
instructions of a bitonic sort, which spilled registers and took the compiler a minute. Groups and candidates
stay in the order of their ids, so that ties need no keys that float64 has no room for: of those equal to the
k-th the first ones stay.
"""

import triton
import triton.language as tl

from .elementary import exponential
from .rows import add_exp_block, load_block, load_whole, lowest, number, row_mean_sum, row_start, row_sum


@triton.jit
def load_at(start, ids, listed, scale, softcap, CAPPED: tl.constexpr, F: tl.constexpr):
    """Logits at ``ids`` after scale and softcap; ``-inf`` where not ``listed``."""
    return load_block(start, tl.where(listed, ids, 0), listed, scale, softcap, CAPPED, F)


@triton.jit
def largest_of_groups(z):
    """The largest entry (finite) of each group of a block ``[runs, groups, lanes, width]``. Here and below,
    what a thread holds comes first, then the lanes."""
    return tl.maximum(tl.max(tl.max(tl.max(z, 3), 0), 1), lowest(z.dtype))


@triton.jit
def sums_of_groups(x):
    """Each group's sums of ``exp(x)`` and of ``x exp(x)``."""
    exp = exponential(x)
    weighted = exp * tl.maximum(x, lowest(x.dtype))  # what has no probability has no share in it
    return tl.sum(tl.sum(tl.sum(exp, 3), 0), 1), tl.sum(tl.sum(tl.sum(weighted, 3), 0), 1)


@triton.jit
def store_groups(start, group, groups, values, LANES: tl.constexpr):
    """One number of each ``group``: its first lane stores what its threads have."""
    lane = tl.arange(0, LANES)[None, :]
    # Said to be neighbours along the lanes, or the compiler would hand them to other threads, to be stored in
    # one piece.
    places = tl.max_contiguous(group[:, None] + lane, [1, 2])
    values = values[:, None] + tl.zeros_like(places).to(values.dtype)
    tl.store(start + places, values, mask=(group < groups)[:, None] & (lane == 0))


@triton.jit
def pick(values, i, P: tl.constexpr):
    """The i-th of ``values`` [P]."""
    return tl.sum(tl.where(tl.arange(0, P) == i, values, 0.0), 0)


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
def smallest(dtype: tl.constexpr):
    """The smallest integer: it stands for what is not there."""
    return tl.full([], 1, dtype) << (dtype.primitive_bitwidth - 1)


@triton.jit
def bound(key, k, most):
    """An integer that at least ``k`` of ``key`` reach, and at most ``most`` >= k but for ties; the smallest
    one where there are fewer than k. Found bit by bit, the sign first."""
    BITS: tl.constexpr = key.dtype.primitive_bitwidth
    one = tl.full([], 1, key.dtype)
    least = smallest(key.dtype)
    reached, bit = tl.zeros([], tl.int32) + most + 1, tl.full([], BITS, tl.int32)
    while (bit > 0) & (reached > most):
        bit -= 1
        trial = least ^ (one << bit.to(key.dtype))
        count = tl.sum((key >= trial).to(tl.int32), 0)
        least = tl.where(count >= k, trial, least)
        reached = tl.where(count >= k, count, reached)
    return least


@triton.jit
def first_of_tied(key, least, most):
    """Which of ``key`` reach ``least``; of those equal to it the first ones, ``most`` in all."""
    above, tied = key > least, key == least
    room = most - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))


@triton.jit
def cut(buffer, count, start, k, scale, cap, CAPPED: tl.constexpr, CAPACITY: tl.constexpr, F: tl.constexpr):
    """Leaves of ``count`` candidates the k largest, in their order; returns the k-th largest value."""
    slots = tl.arange(0, CAPACITY)
    tl.debug_barrier()  # after the candidates' stores
    candidate = tl.load(buffer + slots, mask=slots < count, other=-1)
    z = load_at(start, candidate, slots < count, scale, cap, CAPPED, F)
    key = ordered(z)
    key = tl.where(slots < count, key, smallest(key.dtype))
    kept = first_of_tied(key, bound(key, k, k), k).to(tl.int32)
    tl.debug_barrier()
    tl.store(buffer + tl.cumsum(kept, 0) - 1, candidate, mask=kept == 1)
    tl.debug_barrier()
    return tl.min(tl.where(kept == 1, z, float("inf")), 0)


@triton.jit
def ahead(z, columns, target_z, target):
    """Which entries come before which targets in the order; int32."""
    return ((z > target_z) | ((z == target_z) & (columns < target))).to(tl.int32)


@triton.jit
def lanes_ahead(z, columns, target_z, target):
    """How many entries of each lane of ``[runs, groups, lanes, width]`` come before each target ``[RP]``."""
    if target.shape[0] == 1:
        before = ahead(z, columns, tl.sum(target_z, 0), tl.sum(target, 0))
        return tl.sum(tl.sum(before, 3), 0)
    else:
        target, target_z = target[:, None, None, None, None], target_z[:, None, None, None, None]
        before = ahead(z[None, :, :, :, :], columns[None, :, :, :, :], target_z, target)
        return tl.sum(tl.sum(before, 4), 1)


@triton.jit
def no_ranks(RP: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    if RP == 1:
        return tl.zeros([GROUPS, LANES], tl.int32)
    else:
        return tl.zeros([RP, GROUPS, LANES], tl.int32)


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
def block_columns(first, entries):
    """Columns of a block ``[runs x groups, lanes, width]``, said to be neighbours along the lanes too: it
    makes the compiler lay the threads over these first."""
    LANES: tl.constexpr = entries.shape[1]
    return tl.max_contiguous(first + entries, [1, min(LANES, 2), entries.shape[2]])


@triton.jit
def store_targets(target_values, target_ranks, first, count, known, z, rank, RP: tl.constexpr):
    r = first + tl.arange(0, RP)
    if RP == 1:
        rank = rank[None, :, :]
    rank = tl.sum(tl.sum(rank, 2), 1)
    tl.store(target_values + r, tl.where(known, z, float("nan")).to(tl.float64), mask=r < count)
    tl.store(target_ranks + r, tl.where(known, 1 + rank, 0), mask=r < count)


@triton.jit
def store_statistics(
    out,
    tops,
    masses,
    means,
    temperatures,
    temperatures_count,
    groups,
    AT_ONCE: tl.constexpr,
    F: tl.constexpr,
):
    """A row's statistics, made of its groups'."""
    g = tl.arange(0, AT_ONCE)
    lane_top = tl.full([AT_ONCE], lowest(F), F)
    for first in range(0, groups, AT_ONCE):
        lane_top = tl.maximum(lane_top, tl.load(tops + first + g, mask=first + g < groups, other=lowest(F)))
    row_top = tl.max(lane_top, 0)
    largest = row_top.to(tl.float64)
    for i in range(temperatures_count):
        inverse_wide = 1.0 / tl.load(temperatures + i)
        inverse = inverse_wide.to(F)
        whole, mean = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
        for first in range(0, groups, AT_ONCE):
            there = first + g < groups
            top = tl.load(tops + first + g, mask=there, other=lowest(F))
            mass = tl.load(masses + i * groups + first + g, mask=there, other=0.0)
            weighted = tl.load(means + i * groups + first + g, mask=there, other=0.0)
            whole += row_sum(mass, top, row_top, inverse)
            mean += row_mean_sum(mass, weighted, top, row_top, inverse)
        whole = tl.where(whole == 0.0, float("nan"), whole)  # a row without a finite logit
        log_whole = tl.log(whole)
        tl.store(out + 3 * i + 1, largest * inverse_wide + log_whole)
        tl.store(out + 3 * i + 2, log_whole - mean / whole)
        # Of no entries kept: all of the probability.
        tl.store(out + 3 * i + 3, tl.where(whole == whole, 0.0, whole))
        if i == 0:
            tl.store(out, tl.where(whole == whole, largest, whole))


@triton.jit(do_not_specialize=["temperatures_count", "targets_count"])
def walk(
    logits,
    offsets,
    scale,
    scale_low,
    softcap,
    softcap_low,
    temperatures,
    statistics,
    tops,  # [n, groups] scratch: each group's largest logit
    masses,  # [n, temperatures, groups] scratch: its exponentials relative to that, added up
    means,  # [n, temperatures, groups] scratch: those times their exponents
    targets,
    target_values,
    target_ranks,
    targets_count,
    temperatures_count,
    vocab,
    RANKED: tl.constexpr,  # targets_count > 0
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,  # whether the scale is another than 1
    ALIGNMENT: tl.constexpr,  # divides every offset
    MP: tl.constexpr,  # a power of two that the number of temperatures does not exceed
    RP: tl.constexpr,  # targets at a time: the first ones in the walk, more in walks of their own
    # A block is [GROUPS] groups of [RUNS, LANES, WIDTH] entries; one thread has all runs of a lane.
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,  # groups whose sums are added up
    F: tl.constexpr,  # arithmetic: float32 or float64
):
    row = tl.program_id(0).to(tl.int64)
    RUN: tl.constexpr = LANES * WIDTH
    GROUP: tl.constexpr = RUNS * RUN
    BLOCK: tl.constexpr = GROUPS * GROUP
    blocks = tl.cdiv(vocab, BLOCK)
    groups = tl.cdiv(vocab, GROUP)
    g = tl.arange(0, GROUPS)
    run = tl.arange(0, RUNS * GROUPS)
    in_run = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    entries = (run % GROUPS * GROUP + run // GROUPS * RUN)[:, None, None] + in_run[None, :, :]
    start = row_start(logits, offsets, row, ALIGNMENT)
    scale = number(scale, scale_low, F)
    cap = number(softcap, softcap_low, F)
    m = tl.arange(0, MP)
    inverse = (1.0 / tl.load(temperatures + m, mask=m < temperatures_count, other=1.0)).to(F)
    row_tops = tops + row * groups
    row_masses = masses + row * temperatures_count * groups
    row_means = means + row * temperatures_count * groups
    if RANKED:
        row_targets = targets + row * targets_count
        row_target_values = target_values + row * targets_count
        row_target_ranks = target_ranks + row * targets_count
        known, target, target_z = load_targets(
            row_targets, start, 0, targets_count, vocab, scale, cap, CAPPED, RP, F
        )
        rank = no_ranks(RP, GROUPS, LANES)

    for i in range(blocks):
        columns = block_columns(i * BLOCK, entries)
        if (i + 1) * BLOCK <= vocab:
            z = load_whole(start, columns, scale, cap, CAPPED, SCALED, F)
        else:
            z = load_block(start, columns, columns < vocab, scale, cap, CAPPED, F)
        z = tl.reshape(z, [RUNS, GROUPS, LANES, WIDTH])
        if RANKED:
            columns = tl.reshape(columns, [RUNS, GROUPS, LANES, WIDTH])
            rank += lanes_ahead(z, columns, target_z, target)
        top = largest_of_groups(z)
        group = i * GROUPS + g
        store_groups(row_tops, group, groups, top, LANES)
        below = z - top[None, :, None, None]
        for j in range(temperatures_count):
            mass, mean = sums_of_groups(below * pick(inverse, j, MP))
            store_groups(row_masses + j * groups, group, groups, mass, LANES)
            store_groups(row_means + j * groups, group, groups, mean, LANES)
    tl.debug_barrier()
    store_statistics(
        statistics + row * (1 + 3 * temperatures_count),
        row_tops,
        row_masses,
        row_means,
        temperatures,
        temperatures_count,
        groups,
        AT_ONCE,
        F,
    )

    if RANKED:
        store_targets(row_target_values, row_target_ranks, 0, targets_count, known, target_z, rank, RP)
        for first in range(RP, targets_count, RP):
            known, target, target_z = load_targets(
                row_targets, start, first, targets_count, vocab, scale, cap, CAPPED, RP, F
            )
            rank = no_ranks(RP, GROUPS, LANES)
            for i in range(blocks):
                columns = block_columns(i * BLOCK, entries)
                z = load_block(start, columns, columns < vocab, scale, cap, CAPPED, F)
                z = tl.reshape(z, [RUNS, GROUPS, LANES, WIDTH])
                columns = tl.reshape(columns, [RUNS, GROUPS, LANES, WIDTH])
                rank += lanes_ahead(z, columns, target_z, target)
            store_targets(
                row_target_values, row_target_ranks, first, targets_count, known, target_z, rank, RP
            )


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
    """The k largest candidates in their order, P at a time, -1 and -inf behind them where there are fewer.
    Returns value and id of the k-th, -inf and -1 where there is none."""
    CHUNK: tl.constexpr = 16
    last_z, last = tl.full([], -float("inf"), F), tl.full([], -1, tl.int32)
    for i in range(0, tl.maximum(count, k), P):
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
        tl.store(ids + place, candidate, mask=place < k)
        tl.store(values + place, z.to(tl.float64), mask=place < k)
        last_z = tl.maximum(last_z, tl.max(tl.where(place == k - 1, z, -float("inf")), 0))
        last = tl.maximum(last, tl.max(tl.where(place == k - 1, candidate, -1), 0))
    return last_z, last


@triton.jit
def load_groups(
    first,
    slots,
    chosen,
    count,
    start,
    vocab,
    scale,
    cap,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    F: tl.constexpr,
):
    """Entries of the chosen groups from the ``first`` on, as many as there are ``slots``: ids and logits."""
    place = first + slots // GROUP
    group = tl.load(chosen + place, mask=place < count, other=0)
    columns = group * GROUP + slots % GROUP
    inside = (place < count) & (columns < vocab)
    return columns, load_at(start, columns, inside, scale, cap, CAPPED, F)


@triton.jit(do_not_specialize=["k", "temperatures_count"])
def largest(
    logits,
    offsets,
    scale,
    scale_low,
    softcap,
    softcap_low,
    temperatures,
    statistics,  # what walk left: log sums are read, log tails written
    tops,
    masses,
    chosen,  # [n, groups] int32, scratch
    candidates,  # [n, CAPACITY] int32, scratch
    ids,
    values,
    k,
    temperatures_count,
    vocab,
    CAPPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    P: tl.constexpr,  # how many of the k largest are put in order at a time
    GP: tl.constexpr,  # a power of two that the number of groups does not exceed
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,  # entries of chosen groups at a time
    CAPACITY: tl.constexpr,  # of the candidates' buffer: with room for a block beside k
    MANY: tl.constexpr,  # >= k: more candidates are cut back before they are put in order
    F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row_start(logits, offsets, row, ALIGNMENT)
    scale = number(scale, scale_low, F)
    cap = number(softcap, softcap_low, F)
    groups = tl.cdiv(vocab, GROUP)
    g = tl.arange(0, GP)
    row_chosen = chosen + row * groups
    buffer = candidates + row * CAPACITY

    top = tl.load(tops + row * groups + g, mask=g < groups, other=-float("inf"))
    top = tl.where(top == top, top, -float("inf"))  # where a maximum hands NaN on
    key = ordered(top)
    key = tl.where(g < groups, key, smallest(key.dtype))
    most = k + k // 4
    taken = (g < groups) & first_of_tied(key, bound(key, k, most), most)
    count_chosen = tl.sum(taken.to(tl.int32), 0)
    tl.store(row_chosen + tl.cumsum(taken.to(tl.int32), 0) - 1, g, mask=taken)
    tl.debug_barrier()

    slots = tl.arange(0, BLOCK)
    threshold = tl.maximum(tl.min(tl.where(taken, top, float("inf")), 0), lowest(F))
    threshold = tl.where(count_chosen < k, lowest(F), threshold)
    count, cuts = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for first in range(0, count_chosen, BLOCK // GROUP):
        if count + BLOCK > CAPACITY:
            threshold = cut(buffer, count, start, k, scale, cap, CAPPED, CAPACITY, F)
            count = tl.zeros([], tl.int32) + k
            cuts += 1
        columns, z = load_groups(
            first, slots, row_chosen, count_chosen, start, vocab, scale, cap, CAPPED, GROUP, F
        )
        # What equals the k-th largest does not come before the k that a cut has left.
        fresh = ((z > threshold) | ((z == threshold) & (cuts == 0))).to(tl.int32)
        tl.store(buffer + count + tl.cumsum(fresh, 0) - 1, columns, mask=fresh == 1)
        count += tl.sum(fresh, 0)
    if count > MANY:
        cut(buffer, count, start, k, scale, cap, CAPPED, CAPACITY, F)
        count = tl.zeros([], tl.int32) + k
    tl.debug_barrier()
    threshold, last = store_largest(
        ids + row * k, values + row * k, buffer, start, count, k, scale, cap, CAPPED, P, F
    )

    rest = tl.where(taken, -float("inf"), top)  # which takes their masses out of the tail, too
    stats = statistics + row * (1 + 3 * temperatures_count) + 1
    for i in range(temperatures_count):
        inverse_wide = 1.0 / tl.load(temperatures + i)
        inverse = inverse_wide.to(F)
        lane_top, lane_mass = tl.full([BLOCK], lowest(F), F), tl.zeros([BLOCK], F)
        for first in range(0, count_chosen, BLOCK // GROUP):
            columns, z = load_groups(
                first, slots, row_chosen, count_chosen, start, vocab, scale, cap, CAPPED, GROUP, F
            )
            kept = (z > threshold) | ((z == threshold) & (columns <= last))
            z = tl.where(kept, -float("inf"), z)
            lane_mass, lane_top = add_exp_block(lane_mass, lane_top, z[:, None], inverse)
        mass = tl.load(masses + (row * temperatures_count + i) * groups + g, mask=g < groups, other=0.0)
        tail_top = tl.maximum(tl.max(rest, 0), tl.max(lane_top, 0))
        tail = row_sum(mass, rest, tail_top, inverse) + row_sum(lane_mass, lane_top, tail_top, inverse)
        lse = tl.load(stats + 3 * i)
        tl.store(stats + 3 * i + 2, tail_top.to(tl.float64) * inverse_wide - lse + tl.log(tail))


@triton.jit
def prefix_sums(tops, masses, prefix, groups, row_top, inverse, GP: tl.constexpr):
    """Cumulated masses of the groups into ``prefix``, never falling; returns the last."""
    for first in range(0, groups, GP):
        g = first + tl.arange(0, GP)
        top = tl.load(tops + g, mask=g < groups, other=0.0)
        share = exponential((top - row_top) * inverse).to(tl.float64)
        mass = tl.load(masses + g, mask=g < groups, other=0.0)
        tl.store(prefix + g, share * mass.to(tl.float64), mask=g < groups)
    tl.debug_barrier()
    # One after the other: a parallel scan may round a group without mass into some.
    running = tl.zeros([], tl.float64)
    for i in range(groups):
        running += tl.load(prefix + i)
        tl.store(prefix + i, running)
    tl.debug_barrier()
    return running


@triton.jit(do_not_specialize=["temperatures_count", "draws"])
def draw(
    logits,
    offsets,
    scale,
    scale_low,
    softcap,
    softcap_low,
    temperatures,
    statistics,
    tops,
    masses,
    prefix,  # [n, groups] float64, scratch
    uniforms,
    samples,
    draws,
    temperatures_count,
    vocab,
    CAPPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,  # groups at a time
    F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row_start(logits, offsets, row, ALIGNMENT)
    scale = number(scale, scale_low, F)
    cap = number(softcap, softcap_low, F)
    groups = tl.cdiv(vocab, GROUP)
    inverse = (1.0 / tl.load(temperatures)).to(F)
    row_top = tl.load(statistics + row * (1 + 3 * temperatures_count)).to(F)  # NaN: there is no distribution
    cumulated = prefix + row * groups
    row_masses = masses + row * temperatures_count * groups
    reach = prefix_sums(tops + row * groups, row_masses, cumulated, groups, row_top, inverse, GP)
    for i in range(draws):
        target = tl.load(uniforms + row * draws + i) * reach
        low, high = tl.zeros([], tl.int32), tl.zeros([], tl.int32) + (groups - 1)
        while low < high:
            middle = (low + high) // 2
            beyond = tl.load(cumulated + middle) > target
            low = tl.where(beyond, low, middle + 1)
            high = tl.where(beyond, middle, high)
        before = tl.load(cumulated + low - 1, mask=low > 0, other=0.0)
        share = (target - before) / (tl.load(cumulated + low) - before)
        columns = low * GROUP + tl.arange(0, GROUP)
        z = load_block(start, columns, columns < vocab, scale, cap, CAPPED, F)
        weight = exponential((z - tl.max(z, 0)) * inverse).to(tl.float64)
        # Sums of a parallel scan are rounded each in its own way: what has no probability is never drawn.
        possible = weight > 0.0
        reached = (tl.cumsum(weight, 0) > share * tl.sum(weight, 0)) & possible
        first = tl.min(tl.where(reached, columns, vocab), 0)
        final = tl.max(tl.where(possible, columns, -1), 0)
        drawn = tl.where(first < vocab, first, final)
        tl.store(samples + row * draws + i, tl.where(row_top == row_top, drawn, -1))
