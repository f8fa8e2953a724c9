"""The row kernel: rows of student and teacher logits in, divergence, statistics and gradients out.

``csrc/row_divergence.h`` states the contract. One program takes one row and walks its vocabulary in blocks
of ``[LANES, WIDTH]`` entries, up to three times: statistics, terms, gradient. The last two are one where the
parts sum to zero by themselves. Each walk goes the opposite way of the one before, so that it begins with
what the cache holds. The block in which the row ends is masked; the others, nearly all, spend nothing on it.

Nothing crosses lanes inside a walk, see rows.py.
"""

import triton
import triton.language as tl

from . import objectives  # noqa: F401  (the launcher reads its tables)
from .elementary import exponential
from .objectives import evaluate, larger_log, times
from .rows import (
    add_exp_block,
    load_block,
    load_whole,
    log_sum,
    lowest,
    number,
    row_start,
    shaped,
    store_gradient,
    total,
)

STATISTIC_COLUMNS, TERM_COLUMNS = tl.constexpr(10), tl.constexpr(4)


@triton.jit
def log_pair(z_s, z_t, top_s, top_t, inverse_s, inverse_t, logz_s, logz_t, logz_difference):
    """``(log p, log q, log q - log p)``, the last 0 where both probabilities are."""
    u_s, u_t = (z_s - top_s) * inverse_s, (z_t - top_t) * inverse_t
    log_q, log_p = u_s - logz_s, u_t - logz_t
    absent = larger_log(log_p, log_q) == -float("inf")
    return log_p, log_q, tl.where(absent, 0.0, (u_s - u_t) - logz_difference)


@triton.jit
def mean_part(row_sum, mass, F: tl.constexpr):
    """What a gradient subtracts per unit of probability. Parts that are known to sum to 0 have no mass."""
    return tl.where(row_sum == 0.0, 0.0, row_sum / tl.where(row_sum == 0.0, 1.0, mass)).to(F)


@triton.jit
def soft_gradient(part, probability, mean, coefficient, SUM: tl.constexpr):
    """A weight of 0 silences the row, whatever it holds."""
    if SUM:
        part = tl.fma(-probability, mean, part)
    return tl.where(coefficient == 0.0, 0.0, coefficient * part)


@triton.jit
def hard_gradient(z, columns, label, top, logz, coefficient):
    probability = exponential((z - top) - logz)
    rest = tl.where(columns == label, probability - 1.0, probability)
    return tl.where(coefficient == 0.0, 0.0, coefficient * rest)


@triton.jit
def row_divergence(
    student,
    student_offsets,
    student_temperature,
    student_grad,
    student_grad_offsets,
    student_scale,
    student_scale_low,
    student_softcap,
    student_softcap_low,
    teacher,
    teacher_offsets,
    teacher_temperature,
    teacher_grad,
    teacher_grad_offsets,
    teacher_scale,
    teacher_scale_low,
    teacher_softcap,
    teacher_softcap_low,
    parameter0,
    parameter1,
    labels,
    soft_weight,
    hard_weight,
    statistics,
    terms,
    vocab,
    OBJECTIVE: tl.constexpr,
    STATISTICS: tl.constexpr,  # the phases to run
    TERMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    LABELS: tl.constexpr,
    ENTROPIES: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    STUDENT_SCALED: tl.constexpr,  # whether the scale is another than 1
    TEACHER_SCALED: tl.constexpr,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
    STUDENT_SUM: tl.constexpr,  # add up the student's parts, which do not sum to 0 by themselves
    TEACHER_SUM: tl.constexpr,
    FUSED: tl.constexpr,  # write the gradient in the walk that adds up the terms
    ALIGNMENT: tl.constexpr,  # divides every offset
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    F: tl.constexpr,  # arithmetic: float32 or float64
):
    row = tl.program_id(0).to(tl.int64)
    BLOCK: tl.constexpr = WIDTH * LANES
    blocks, whole = tl.cdiv(vocab, BLOCK), vocab // BLOCK
    entries = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    start_s = row_start(student, student_offsets, row, ALIGNMENT)
    start_t = row_start(teacher, teacher_offsets, row, ALIGNMENT)
    scale_s = number(student_scale, student_scale_low, F)
    scale_t = number(teacher_scale, teacher_scale_low, F)
    cap_s = number(student_softcap, student_softcap_low, F)
    cap_t = number(teacher_softcap, teacher_softcap_low, F)
    temperature_s = tl.load(student_temperature + row)
    temperature_t = tl.load(teacher_temperature + row)
    inverse_s, inverse_t = (1.0 / temperature_s).to(F), (1.0 / temperature_t).to(F)
    if LABELS:
        label = tl.load(labels + row)
        known = (label >= 0) & (label < vocab)
        label = tl.where(known, label, -1).to(tl.int32)  # never read elsewhere
        if STATISTICS:
            # Now: the barriers of the reductions below order it before a gradient stored over the logits.
            at_label = tl.load(start_s + label, mask=known, other=0.0).to(F)
    stats = statistics + row * STATISTIC_COLUMNS

    if STATISTICS:
        floor = lowest(F)
        top_s, top_t = tl.full([LANES], floor, F), tl.full([LANES], floor, F)
        sum_s, sum_t = tl.zeros([LANES], F), tl.zeros([LANES], F)
        sum_hard = tl.zeros([LANES], F)
        for part in tl.static_range(2):  # whole blocks, then the masked rest
            for i in range(whole if part == 1 else 0, blocks if part == 1 else whole):
                columns = i * BLOCK + entries
                if part == 1:
                    inside = columns < vocab
                    z_s = load_block(start_s, columns, inside, scale_s, cap_s, STUDENT_CAPPED, F)
                    z_t = load_block(start_t, columns, inside, scale_t, cap_t, TEACHER_CAPPED, F)
                else:
                    z_s = load_whole(start_s, columns, scale_s, cap_s, STUDENT_CAPPED, STUDENT_SCALED, F)
                    z_t = load_whole(start_t, columns, scale_t, cap_t, TEACHER_CAPPED, TEACHER_SCALED, F)
                if LABELS:
                    sum_hard, _ = add_exp_block(sum_hard, top_s, z_s, 1.0)
                sum_s, top_s = add_exp_block(sum_s, top_s, z_s, inverse_s)
                sum_t, top_t = add_exp_block(sum_t, top_t, z_t, inverse_t)
        row_top_s, row_top_t = tl.max(top_s, 0), tl.max(top_t, 0)
        logz_s = log_sum(sum_s, top_s, row_top_s, inverse_s)
        logz_t = log_sum(sum_t, top_t, row_top_t, inverse_t)
        logz_hard = log_sum(sum_hard, top_s, row_top_s, 1.0) if LABELS else logz_s
        # Only without a finite logit, and without NaN, is the sum 0; the lowest finite number is a logit.
        max_s = tl.where(tl.sum(sum_s, 0) == 0.0, -float("inf"), row_top_s)
        max_t = tl.where(tl.sum(sum_t, 0) == 0.0, -float("inf"), row_top_t)
        tl.store(stats + 0, max_s.to(tl.float64))
        tl.store(stats + 1, logz_s)
        tl.store(stats + 2, max_t.to(tl.float64))
        tl.store(stats + 3, logz_t)
        if LABELS:
            at_label = shaped(at_label, scale_s, cap_s, STUDENT_CAPPED)
            label_logit = tl.where(known, at_label, float("nan")).to(tl.float64)
            tl.store(stats + 4, logz_hard)
            tl.store(stats + 7, label_logit)
    else:
        max_s, max_t = tl.load(stats + 0).to(F), tl.load(stats + 2).to(F)
        logz_s, logz_t = tl.load(stats + 1), tl.load(stats + 3)
        if LABELS:
            logz_hard, label_logit = tl.load(stats + 4), tl.load(stats + 7)

    first = tl.load(parameter0 + row)
    rest, first = (1.0 - first).to(F), first.to(F)
    second = tl.load(parameter1 + row).to(F)
    log_ratio = (logz_s - logz_t).to(F)
    log_norm_s, log_norm_t = logz_s.to(F), logz_t.to(F)
    if GRADIENT:
        soft, hard = tl.load(soft_weight + row), tl.load(hard_weight + row)
        coefficient_s = (soft / temperature_s).to(F) * scale_s
        coefficient_t = (soft / temperature_t).to(F) * scale_t
        if STUDENT_GRAD:
            out_s = row_start(student_grad, student_grad_offsets, row, ALIGNMENT)
        if TEACHER_GRAD:
            out_t = row_start(teacher_grad, teacher_grad_offsets, row, ALIGNMENT)
        if LABELS:
            coefficient_hard = hard.to(F) * scale_s
            log_norm_hard = logz_hard.to(F)
            counts = (soft != 0.0) | (hard != 0.0)
            poison = tl.where(counts & (label_logit != label_logit), float("nan"), 0.0).to(F)

    mean_s, mean_t = tl.zeros([], F), tl.zeros([], F)
    if TERMS:
        term = tl.zeros([LANES], F)
        parts_s, parts_t, mass_s, mass_t = term, term, term, term
        entropy_s, entropy_t = term, term
        for part in tl.static_range(2):  # the masked rest, then whole blocks
            for i in range(blocks - whole if part == 0 else whole):
                columns = ((blocks if part == 0 else whole) - 1 - i) * BLOCK + entries
                inside = columns < vocab
                if part == 0:
                    z_s = load_block(start_s, columns, inside, scale_s, cap_s, STUDENT_CAPPED, F)
                    z_t = load_block(start_t, columns, inside, scale_t, cap_t, TEACHER_CAPPED, F)
                else:
                    z_s = load_whole(start_s, columns, scale_s, cap_s, STUDENT_CAPPED, STUDENT_SCALED, F)
                    z_t = load_whole(start_t, columns, scale_t, cap_t, TEACHER_CAPPED, TEACHER_SCALED, F)
                log_p, log_q, d = log_pair(
                    z_s, z_t, max_s, max_t, inverse_s, inverse_t, log_norm_s, log_norm_t, log_ratio
                )
                p, q, summand, part_s, part_t = evaluate(OBJECTIVE, log_p, log_q, d, first, rest, second)
                term += tl.sum(summand, 1)
                if STUDENT_SUM:
                    parts_s += tl.sum(part_s, 1)
                    mass_s += tl.sum(q, 1)
                if TEACHER_SUM:
                    parts_t += tl.sum(part_t, 1)
                    mass_t += tl.sum(p, 1)
                if ENTROPIES:
                    # Not of p and q: what one side holds, NaN included, is no matter of the other's.
                    entropy_s -= tl.sum(times(exponential(log_q), log_q), 1)
                    entropy_t -= tl.sum(times(exponential(log_p), log_p), 1)
                if FUSED:
                    if STUDENT_GRAD:
                        gradient = soft_gradient(part_s, q, mean_s, coefficient_s, STUDENT_SUM)
                        if LABELS:
                            gradient += poison + hard_gradient(
                                z_s, columns, label, max_s, log_norm_hard, coefficient_hard
                            )
                        store_gradient(
                            out_s, columns, inside, gradient, z_s, cap_s, STUDENT_CAPPED, part == 0
                        )
                    if TEACHER_GRAD:
                        gradient = soft_gradient(part_t, p, mean_t, coefficient_t, TEACHER_SUM)
                        store_gradient(
                            out_t, columns, inside, gradient, z_t, cap_t, TEACHER_CAPPED, part == 0
                        )
        row_terms = terms + row * TERM_COLUMNS
        tl.store(row_terms + 0, total(term))
        if LABELS:
            tl.store(row_terms + 1, logz_hard - (label_logit - max_s.to(tl.float64)))
        if ENTROPIES:
            tl.store(row_terms + 2, total(entropy_s))
            tl.store(row_terms + 3, total(entropy_t))
        row_sum_s, row_sum_t = total(parts_s), total(parts_t)
        row_mass_s, row_mass_t = total(mass_s), total(mass_t)
        tl.store(stats + 5, row_sum_s)
        tl.store(stats + 6, row_sum_t)
        tl.store(stats + 8, row_mass_s)
        tl.store(stats + 9, row_mass_t)
    elif GRADIENT:
        row_sum_s, row_sum_t = tl.load(stats + 5), tl.load(stats + 6)
        row_mass_s, row_mass_t = tl.load(stats + 8), tl.load(stats + 9)

    if GRADIENT and not FUSED:
        mean_s = mean_part(row_sum_s, row_mass_s, F)
        mean_t = mean_part(row_sum_t, row_mass_t, F)
        for part in tl.static_range(2):  # whole blocks, then the masked rest
            for i in range(whole if part == 1 else 0, blocks if part == 1 else whole):
                columns = i * BLOCK + entries
                inside = columns < vocab
                if part == 1:
                    z_s = load_block(start_s, columns, inside, scale_s, cap_s, STUDENT_CAPPED, F)
                    z_t = load_block(start_t, columns, inside, scale_t, cap_t, TEACHER_CAPPED, F)
                else:
                    z_s = load_whole(start_s, columns, scale_s, cap_s, STUDENT_CAPPED, STUDENT_SCALED, F)
                    z_t = load_whole(start_t, columns, scale_t, cap_t, TEACHER_CAPPED, TEACHER_SCALED, F)
                log_p, log_q, d = log_pair(
                    z_s, z_t, max_s, max_t, inverse_s, inverse_t, log_norm_s, log_norm_t, log_ratio
                )
                p, q, summand, part_s, part_t = evaluate(OBJECTIVE, log_p, log_q, d, first, rest, second)
                if STUDENT_GRAD:
                    gradient = soft_gradient(part_s, q, mean_s, coefficient_s, STUDENT_SUM)
                    if LABELS:
                        gradient += poison + hard_gradient(
                            z_s, columns, label, max_s, log_norm_hard, coefficient_hard
                        )
                    store_gradient(out_s, columns, inside, gradient, z_s, cap_s, STUDENT_CAPPED, part == 1)
                if TEACHER_GRAD:
                    gradient = soft_gradient(part_t, p, mean_t, coefficient_t, TEACHER_SUM)
                    store_gradient(out_t, columns, inside, gradient, z_t, cap_t, TEACHER_CAPPED, part == 1)
