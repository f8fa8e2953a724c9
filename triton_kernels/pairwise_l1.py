"""The pairwise_l1 kernels: L1 distances between all rows of two models, over a slab of the vocabulary.

``csrc/pairwise_l1.h`` states the contract. ``probabilities`` writes a model's slab as probabilities to
scratch memory, laid out as the next kernel reads it. ``pair_sums`` holds a tile of pairs in registers and
goes through a share of the vocabulary entry by entry; ``add_sums`` adds up what the shares found.
``pair_gradient`` holds a tile of rows by entries and goes through the other model's rows, with the weights
of the pairs as ``pair_weights`` leaves them; ``logit_gradient`` chains what it finds.

Each pair is met at each entry, so what counts is instructions there. A difference's sign takes one of them,
a multiply-add that saturates: see :func:`step`. No two programs write to one number.
"""

import triton
import triton.language as tl

from .elementary import exp_parts, exponential
from .rows import number, row_start, shaped, store_gradient


@triton.jit
def step(x):
    """1 where x is positive, 1/2 where it is 0, else 0; of NaN 0.

    Something in between where ``|x|`` is below 2^-128 (float32): such differences are of probabilities below
    2^-104 only.
    """
    huge: tl.constexpr = 8.98846567431158e307 if x.dtype == tl.float64 else 1.7014118346046923e38
    return tl.minimum(tl.maximum(tl.fma(x, huge, 0.5), 0.0), 1.0)


@triton.jit
def place_of(starts, group, GRANULE: tl.constexpr):
    """Where a group begins among places such that each begins at a multiple of GRANULE, for wide loads; for n
    rows there are ``n + GRANULE groups`` places."""
    start = tl.load(starts + group)
    return tl.multiple_of(start // GRANULE * GRANULE + group * GRANULE, GRANULE)


@triton.jit
def pair_at(part, row, thread, column, SETS, OWN: tl.constexpr, OTHERS: tl.constexpr, TILE: tl.constexpr):
    """A pair's student and teacher row in its tile, whose numbers lie as ``[SETS, OWN, THREADS, OTHERS]``:
    so a thread has a small tile of its own, loads neighbours, and hands no number to another thread."""
    ACROSS: tl.constexpr = TILE // (SETS * OTHERS)  # threads along the teacher's rows
    return thread // ACROSS * OWN + row, (part * ACROSS + thread % ACROSS) * OTHERS + column


@triton.jit
def own_at(base, offset, OWN: tl.constexpr):
    """Addresses of what lies side by side along OWN, the second of four dimensions, said to do so along the
    threads too, the third: over those of which nothing is said the compiler lays threads in one order or the
    other, as its version goes, and hands numbers from thread to thread for it."""
    return tl.max_contiguous(base + offset, [1, OWN, max(OWN // 2, 1), 1])


@triton.jit
def others_at(base, offset, OTHERS: tl.constexpr):
    """The same along the last dimension."""
    return tl.max_contiguous(base + offset, [1, 1, max(OTHERS // 2, 1), OTHERS])


@triton.jit(do_not_specialize=["lines", "tiles"])
def probabilities(
    logits,
    offsets,
    temperature,
    scale,
    scale_low,
    softcap,
    softcap_low,
    statistics,
    starts,
    out,
    stride,
    lines,  # entries to write, no fewer than vocab: beyond it probability 0
    vocab,
    tiles,  # of rows, in the longest group
    TRANSPOSED: tl.constexpr,  # to [lines, places], else to [rows, lines]
    CAPPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    GRANULE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) // tiles
    start = tl.load(starts + group)
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    present = i < tl.load(starts + group + 1) - start
    row = start + i
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.multiple_of(tl.load(offsets + row, mask=present, other=0), ALIGNMENT)
    inside = present[:, None] & (columns < vocab)[None, :]
    x = tl.load(logits + offset[:, None] + columns[None, :], mask=inside, other=0.0).to(F)
    z = shaped(x, number(scale, scale_low, F), number(softcap, softcap_low, F), CAPPED)
    top = tl.load(statistics + 2 * row, mask=present, other=0.0).to(F)
    # Not exp(x - logz): that difference would round to a larger number's last digit.
    share = exponential(-tl.load(statistics + 2 * row + 1, mask=present, other=0.0)).to(F)
    inverse = (1.0 / tl.load(temperature + row, mask=present, other=1.0)).to(F)
    e, _, _, _ = exp_parts((z - top[:, None]) * inverse[:, None])
    p = tl.where(inside, e * share[:, None], 0.0)
    written = present[:, None] & (columns < lines)[None, :]
    if TRANSPOSED:
        place = place_of(starts, group, GRANULE) + i
        tl.store(out + columns.to(tl.int64)[None, :] * stride + place[:, None], p, mask=written)
    else:
        tl.store(out + row[:, None] * stride + columns[None, :], p, mask=written)


@triton.jit(do_not_specialize=["begin", "lines", "share", "tiles"])
def pair_sums(
    student,  # probabilities, [lines, stride]
    teacher,
    starts,
    cost,  # [shares, groups, tiles, tiles, SETS, OWN, THREADS, OTHERS]
    signs,
    stride,
    begin,  # the line with which the first share begins
    lines,
    share,  # lines that a program takes
    tiles,
    SIGNS: tl.constexpr,
    GRANULE: tl.constexpr,
    SETS: tl.constexpr,
    OWN: tl.constexpr,
    THREADS: tl.constexpr,
    OTHERS: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,  # divides begin, lines and share
    F: tl.constexpr,
):
    group, tile = tl.program_id(0).to(tl.int64) // (tiles * tiles), tl.program_id(0) % (tiles * tiles)
    first_own, first_other = tile // tiles * TILE, tile % tiles * TILE
    count = tl.load(starts + group + 1) - tl.load(starts + group)
    if (first_own < count) & (first_other < count):
        part = tl.arange(0, SETS)[:, None, None, None]
        row = tl.arange(0, OWN)[None, :, None, None]
        thread = tl.arange(0, THREADS)[None, None, :, None]
        column = tl.arange(0, OTHERS)[None, None, None, :]
        own, other = pair_at(part, row, thread, column, SETS, OWN, OTHERS, TILE)
        # Behind a group's rows lie other places, or scratch memory behind the last: read, and never added.
        place = place_of(starts, group, GRANULE)
        p_at, q_at = student + place + first_own + own, teacher + place + first_other + other
        distance = tl.zeros([SETS, OWN, THREADS, OTHERS], F)
        above = distance  # sums of p where it is the larger one, of p / 2 where both are equal
        mass = tl.zeros([1, OWN, THREADS, 1], F)
        first = begin + tl.program_id(1) * share
        line = first.to(tl.int64) * stride
        for _ in range(first, tl.minimum(first + share, lines), UNROLL):
            for ahead in tl.static_range(UNROLL):
                at = tl.multiple_of(line + ahead * stride, GRANULE)
                p = tl.load(own_at(p_at, at, OWN))
                q = tl.load(others_at(q_at, at, OTHERS))
                difference = p - q
                distance += tl.abs(difference)
                if SIGNS:
                    above = tl.fma(tl.broadcast_to(p, above.shape), step(difference), above)
                    mass += p
            line += UNROLL * stride
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        into = program * (TILE * TILE) + ((part * OWN + row) * THREADS + thread) * OTHERS + column
        tl.store(others_at(cost, into, OTHERS), distance)
        if SIGNS:  # what is not above is below
            tl.store(others_at(signs, into, OTHERS), 2.0 * above - mass)


@triton.jit(do_not_specialize=["shares", "longest", "tiles"])
def add_sums(
    sums,  # of all shares, from pair_sums
    total,  # [groups, longest, longest] float64
    starts,
    shares,
    longest,
    tiles,
    SETS: tl.constexpr,
    OWN: tl.constexpr,
    THREADS: tl.constexpr,
    OTHERS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,  # shares at a time
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = TILE * TILE // BLOCK
    tile = tl.program_id(0) // blocks
    group, tile = tile.to(tl.int64) // (tiles * tiles), tile % (tiles * tiles)
    number_in_tile = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    thread, column = number_in_tile // OTHERS % THREADS, number_in_tile % OTHERS
    row = number_in_tile // (OTHERS * THREADS)
    own, other = pair_at(row // OWN, row % OWN, thread, column, SETS, OWN, OTHERS, TILE)
    own, other = tile // tiles * TILE + own, tile % tiles * TILE + other
    count = tl.load(starts + group + 1) - tl.load(starts + group)
    present = (own < count) & (other < count)
    size = tl.num_programs(0).to(tl.int64) * BLOCK  # of a share
    at = sums + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros([STEP, BLOCK], tl.float64)
    for first in range(0, shares, STEP):
        share = first + tl.arange(0, STEP)
        there = (share < shares)[:, None] & present[None, :]
        found += tl.load(at[None, :] + share[:, None] * size, mask=there, other=0.0).to(tl.float64)
    into = total + (group * longest + own) * longest + other
    tl.store(into, tl.load(into, mask=present) + tl.sum(found, 0), mask=present)


@triton.jit(do_not_specialize=["longest", "tiles"])
def pair_weights(
    d_cost,  # [groups, longest, longest] float64, read with any two steps
    own_step,
    other_step,
    means,
    starts,
    weights,  # [groups, longest, width]: of a row of the other model and one of this
    balance,  # [2, groups, width]: sum of the weights and mean; how many weights are not 0
    width,
    longest,
    tiles,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    F: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) // tiles
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    start = tl.load(starts + group)
    count = (tl.load(starts + group + 1) - start).to(tl.int32)
    present = i < count
    added = tl.zeros([STEP, ROWS], tl.float64)
    loud = added
    for first in range(0, count, STEP):
        j = first + tl.arange(0, STEP)
        pair = (j < count)[:, None] & present[None, :]
        at = d_cost + group * longest * longest + j[:, None].to(tl.int64) * other_step
        at += i[None, :].to(tl.int64) * own_step
        weight = tl.load(at, mask=pair, other=0.0).to(F)
        into = weights + (group * longest + j[:, None]) * width + i[None, :]
        tl.store(into, weight, mask=(j < count)[:, None] & (i < width)[None, :])
        added += weight.to(tl.float64)
        loud += (weight != 0.0).to(tl.float64)
    mean = tl.load(means + start + i, mask=present, other=0.0)
    at = balance + group * width + i
    tl.store(at, (tl.sum(added, 0) + mean).to(F), mask=i < width)
    tl.store(at + (tl.num_programs(0) // tiles).to(tl.int64) * width, tl.sum(loud, 0).to(F), mask=i < width)


@triton.jit(do_not_specialize=["longest", "groups", "tiles"])
def pair_gradient(
    own,  # probabilities of the model whose gradient it is, and of the other one, [rows, stride]
    others,
    weights,  # as pair_weights writes them
    balance,
    starts,
    gradient,  # [rows, stride]: with respect to log-probabilities before temperature, softcap and scale
    stride,
    width,
    longest,
    groups,
    tiles,
    SETS: tl.constexpr,
    OWN: tl.constexpr,
    THREADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACROSS: tl.constexpr,  # threads along the vocabulary
    F: tl.constexpr,
):
    ROWS: tl.constexpr = THREADS // ACROSS * SETS * OWN
    group, first = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles * ROWS
    start = tl.load(starts + group)
    count = (tl.load(starts + group + 1) - start).to(tl.int32)
    if first < count:
        # [SETS, OWN, THREADS, COLUMNS]: SETS x OWN rows of a thread, whose weights are read OWN at a time
        thread = tl.arange(0, THREADS)[None, None, :, None]
        i = tl.arange(0, SETS)[:, None, None, None] * OWN + tl.arange(0, OWN)[None, :, None, None]
        i += first + thread // ACROSS * (SETS * OWN)
        columns = thread % ACROSS * COLUMNS + tl.arange(0, COLUMNS)[None, None, None, :]
        columns += tl.program_id(1) * (ACROSS * COLUMNS)
        held = columns < stride
        at, inside = (start + i) * stride + columns, (i < count) & held
        p = tl.load(others_at(own, at, COLUMNS), mask=inside, other=0.0)
        halves = tl.zeros([SETS, OWN, THREADS, COLUMNS], F)  # of the sum of signs, and of all weights
        weights_at, q_at = weights + group * longest * width, others + start * stride
        for _ in range(count):
            weight = tl.load(own_at(weights_at, i, OWN))
            q = tl.load(others_at(q_at, columns, COLUMNS), mask=held, other=0.0)
            halves = tl.fma(tl.broadcast_to(weight, halves.shape), step(p - q), halves)
            weights_at += width
            q_at += stride
        balance_at = own_at(balance + group * width, i, OWN)
        silent = tl.load(balance_at + groups.to(tl.int64) * width) == 0.0
        signed = 2.0 * halves - tl.load(balance_at)
        tl.store(others_at(gradient, at, COLUMNS), tl.where(silent, 0.0, p * signed), mask=inside)


@triton.jit
def logit_gradient(
    logits,
    offsets,
    temperature,
    grad,
    grad_offsets,
    scale,
    scale_low,
    softcap,
    softcap_low,
    gradient,  # from pair_gradient
    stride,
    vocab,
    CAPPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    scale, cap = number(scale, scale_low, F), number(softcap, softcap_low, F)
    inverse = (1.0 / tl.load(temperature + row)).to(F)
    z = tl.load(gradient + row * stride + columns, mask=inside, other=0.0)
    found = z * (scale * inverse)
    if CAPPED:
        x = tl.load(row_start(logits, offsets, row, ALIGNMENT) + columns, mask=inside, other=0.0).to(F)
        z = shaped(x, scale, cap, CAPPED)
    store_gradient(row_start(grad, grad_offsets, row, ALIGNMENT), columns, inside, found, z, cap, CAPPED)
