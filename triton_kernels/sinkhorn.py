"""The Sinkhorn kernels: one program solves one problem, and goes back from its plan.

``csrc/sinkhorn.h`` states the contract. A walk takes whole rows, some at a time, in a tile
``[ROWS, COLUMNS]``; what belongs to a column stays in registers from walk to walk. Iterations are on
logarithms whatever the domain: once a row is right, no entry of the plan exceeds its mass, so one exponential
serves both half-steps and an iteration is one walk.

Partial sums of the columns keep the tile's shape until a walk ends.
"""

import triton
import triton.language as tl

from .elementary import exponential
from .objectives import times

NUMBERS = tl.constexpr(5)
TRANSPORT, ERROR, ITERATIONS, GAP, STATUS = (tl.constexpr(i) for i in range(5))
SOLVED, INFEASIBLE, OUT_OF_ROOM = (tl.constexpr(i) for i in range(3))


@triton.jit
def masses_of_columns(b, m, COLUMNS: tl.constexpr, F: tl.constexpr):
    """``(j, mass [COLUMNS])``; 0 beyond the last column, as of every absent one."""
    j = tl.arange(0, COLUMNS)
    return j, tl.load(b + j, mask=j < m, other=0.0).to(F)


@triton.jit
def masses_of_rows(a, first, n, ROWS: tl.constexpr, F: tl.constexpr):
    i = first + tl.arange(0, ROWS)
    return i, tl.load(a + i, mask=i < n, other=0.0).to(F)


@triton.jit
def load_cost(cost, i, j, row_stride, mass_i, mass_j, F: tl.constexpr):
    """A tile of costs; infinite where a row or column is absent, whatever stands there."""
    there = (mass_i > 0.0)[:, None] & (mass_j > 0.0)[None, :]
    at = i.to(tl.int64)[:, None] * row_stride + j[None, :]
    return tl.load(cost + at, mask=there, other=float("inf")).to(F)


@triton.jit
def log_plan(phi, psi, cost, inverse):
    """``phi + psi - cost / epsilon``; ``-inf`` where the pair is absent or forbidden."""
    return tl.where(cost == float("inf"), -float("inf"), (phi[:, None] + psi[None, :]) - cost * inverse)


@triton.jit
def not_lowest(top):
    """A maximum to subtract: 0 in the place of ``-inf``."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def log_sum_of_columns(cost, a, phi, mass_j, j, inverse, n, row_stride, ROWS: tl.constexpr, F: tl.constexpr):
    """``logsumexp_i(phi_i - C_ij / epsilon)``, of each column from its own largest term."""
    zero = tl.zeros_like(mass_j)
    top = tl.zeros([ROWS, mass_j.shape[0]], F) - float("inf")
    total = tl.zeros([ROWS, mass_j.shape[0]], F)
    for first in range(0, n, ROWS):
        i, mass_i = masses_of_rows(a, first, n, ROWS, F)
        c = load_cost(cost, i, j, row_stride, mass_i, mass_j, F)
        z = log_plan(tl.load(phi + i, mask=i < n, other=-float("inf")), zero, c, inverse)
        new = tl.maximum(top, z)
        total = total * exponential(top - not_lowest(new)) + exponential(z - not_lowest(new))
        top = new
    row_top = tl.max(top, 0)
    total *= exponential(top - not_lowest(row_top)[None, :])
    return tl.log(tl.sum(total, 0)) + row_top


@triton.jit(do_not_specialize=["iterations"])
def solve(
    cost,
    a,
    b,
    epsilons,
    tolerance,  # a pointer: Triton takes Python's floats as float32
    phi,
    psi,
    numbers,
    phi_history,
    psi_history,
    halves,  # [B, 2, n]: phi after this row step and after the one before
    n,
    m,
    cost_batch,
    cost_row,
    iterations,
    TOLERANCE: tl.constexpr,
    HISTORY: tl.constexpr,
    SCALING: tl.constexpr,
    ROOM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    F: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * cost_batch
    a += problem * n
    halves += problem * 2 * n
    j, mass_j = masses_of_columns(b + problem * m, m, COLUMNS, F)
    there = mass_j > 0.0
    inf: tl.constexpr = float("inf")
    least: tl.constexpr = 1e-290 if F == tl.float64 else 1e-30

    column = tl.where(there, 0.0, -inf).to(F)
    last = tl.load(epsilons + iterations - 1)
    before = tl.load(epsilons)
    smallest = before
    step = 0
    running = iterations > 0
    while running & (step < iterations):
        epsilon = tl.load(epsilons + step)
        inverse = (1.0 / epsilon).to(F)
        if SCALING:
            smallest = tl.minimum(smallest, epsilon)
        column = column * (before / epsilon).to(F)  # the same potential in the new unit
        new_phi, old_phi = halves + (step % 2) * n, halves + ((step + 1) % 2) * n
        sums = tl.zeros([ROWS, COLUMNS], F)
        error = tl.zeros([ROWS], tl.float64)
        mass = tl.zeros([ROWS], tl.float64)
        for first in range(0, n, ROWS):
            i, mass_i = masses_of_rows(a, first, n, ROWS, F)
            c = load_cost(cost, i, j, cost_row, mass_i, mass_j, F)
            z = log_plan(tl.zeros([ROWS], F), column, c, inverse)
            top = not_lowest(tl.max(z, 1))
            e = exponential(z - top[:, None])
            total = tl.sum(e, 1)
            log_sum = tl.log(total) + top
            present = mass_i > 0.0
            if TOLERANCE:
                if step > 0:
                    old = tl.load(old_phi + i, mask=i < n, other=-inf)
                    off = tl.abs(exponential(old + log_sum) - mass_i)
                    error += tl.where(present, off, 0.0).to(tl.float64)
                    mass += mass_i.to(tl.float64)
            row = tl.where(present, tl.log(mass_i) - log_sum, -inf)
            tl.store(new_phi + i, row, mask=i < n)
            if HISTORY:
                tl.store(phi_history + (problem * iterations + step) * n + i, row, mask=i < n)
            sums += tl.where(present, mass_i / total, 0.0)[:, None] * e
        if TOLERANCE:
            # What an earlier epsilon of a schedule solves is another problem.
            looks = (step > 0) & (epsilon == last) & (before == last)
            running = (looks == 0) | (tl.sum(error, 0) > tl.load(tolerance) * tl.sum(mass, 0))
        tl.debug_barrier()  # the row potentials are read by other threads from here on
        if running:
            by_column = tl.sum(sums, 0)
            new = column + tl.log(mass_j / by_column)
            lost = there & (by_column < least)  # all of it rounded away
            if tl.max(lost.to(tl.int32), 0) > 0:
                own = log_sum_of_columns(cost, a, new_phi, mass_j, j, inverse, n, cost_row, ROWS, F)
                new = tl.where(lost, tl.log(mass_j) - own, new)
            column = tl.where(there, new, -inf)
            if HISTORY:
                tl.store(psi_history + (problem * iterations + step) * m + j, column, mask=j < m)
            step += 1
        before = epsilon

    inverse = (1.0 / last).to(F)
    final = halves + ((step + 1) % 2) * n
    transport = tl.zeros([ROWS], tl.float64)
    error, inner = transport, transport
    open_columns = tl.zeros([ROWS, COLUMNS], tl.int32)
    shut = tl.zeros([ROWS], tl.int32)
    span = tl.zeros([ROWS], F)
    for first in range(0, n, ROWS):
        i, mass_i = masses_of_rows(a, first, n, ROWS, F)
        c = load_cost(cost, i, j, cost_row, mass_i, mass_j, F)
        row = tl.load(final + i, mask=i < n, other=-inf)
        plan = exponential(log_plan(row, column, c, inverse))
        sum_i = tl.sum(plan.to(tl.float64), 1)
        transport += tl.sum(times(plan, c).to(tl.float64), 1)
        present = mass_i > 0.0
        error += tl.abs(sum_i - mass_i)
        inner += tl.where(present, sum_i * (row - tl.log(mass_i)), 0.0)
        tl.store(phi + problem * n + i, row, mask=i < n)
        # NaN is no forbidden pair
        allowed = (present[:, None] & there[None, :] & (c != inf)).to(tl.int32)
        open_columns = tl.maximum(open_columns, allowed)
        shut = tl.maximum(shut, (present & (tl.max(allowed, 1) == 0)).to(tl.int32))
        if SCALING:
            lowest = tl.min(c, 1)
            above = tl.where(allowed > 0, c - lowest[:, None], 0.0)
            span = tl.maximum(span, tl.max(above, 1))
    tl.store(psi + problem * m + j, column, mask=j < m)
    shut_column = there & (tl.max(open_columns, 0) == 0)
    infeasible = (tl.max(shut, 0) > 0) | (tl.max(shut_column.to(tl.int32), 0) > 0)
    status = tl.where(infeasible, INFEASIBLE, SOLVED)
    if SCALING:
        out = tl.max(span, 0) / smallest.to(F) > ROOM
        status = tl.where(out, OUT_OF_ROOM, status)
    wide = mass_j.to(tl.float64)
    mass = tl.sum(wide, 0)
    inner_j = tl.where(there, wide * (column.to(tl.float64) - tl.log(wide)), 0.0)
    moved = tl.sum(transport, 0)
    gap = (tl.sum(inner, 0) + tl.sum(inner_j, 0) - moved / last) / mass + tl.log(mass)
    numbers += problem * NUMBERS
    tl.store(numbers + TRANSPORT, moved)
    tl.store(numbers + ERROR, tl.sum(error, 0))
    tl.store(numbers + ITERATIONS, step.to(tl.float64))
    tl.store(numbers + GAP, tl.where(mass == 0.0, 0.0, gap))
    tl.store(numbers + STATUS, status.to(tl.float64))


@triton.jit
def cotangent(plan, cost, d_plan, i, j, n, m, weight, PLAN: tl.constexpr):
    """``P * G``, where G arrives at P; 0 where P is, whatever stands there."""
    through = weight * times(plan, cost)
    if PLAN:
        inside = (i < n)[:, None] & (j < m)[None, :]
        at = i.to(tl.int64)[:, None] * m + j[None, :]
        through += times(plan, tl.load(d_plan + at, mask=inside, other=0.0).to(plan.dtype))
    return through


@triton.jit
def over(x, sums):
    """``x / sums``, 0 where there is no sum."""
    return tl.where(sums > 0.0, x / tl.where(sums > 0.0, sums, 1.0), 0.0)


@triton.jit(do_not_specialize=["iterations"])
def unrolled(
    cost,
    a,
    b,
    epsilons,
    phi,
    psi,
    phi_history,
    psi_history,
    d_transport,
    d_plan,
    d_phi,
    d_psi,
    d_cost,
    d_a,
    d_b,
    n,
    m,
    cost_batch,
    cost_row,
    iterations,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    F: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * cost_batch
    a += problem * n
    phi_history += problem * iterations * n
    psi_history += problem * iterations * m
    d_phi += problem * n
    d_a += problem * n
    d_plan += problem * n * m
    d_cost += problem * n * m
    j, mass_j = masses_of_columns(b + problem * m, m, COLUMNS, F)
    inside = j < m
    inf: tl.constexpr = float("inf")
    inverse = (1.0 / tl.load(epsilons + iterations - 1)).to(F)
    weight = tl.load(d_transport + problem).to(F)

    # From the plan to its potentials.
    column = tl.load(psi + problem * m + j, mask=inside, other=-inf)
    sums = tl.zeros([ROWS, COLUMNS], F)
    for first in range(0, n, ROWS):
        i, mass_i = masses_of_rows(a, first, n, ROWS, F)
        c = load_cost(cost, i, j, cost_row, mass_i, mass_j, F)
        row = tl.load(phi + problem * n + i, mask=i < n, other=-inf)
        plan = exponential(log_plan(row, column, c, inverse))
        through = cotangent(plan, c, d_plan, i, j, n, m, weight, PLAN)
        at = i.to(tl.int64)[:, None] * m + j[None, :]
        tl.store(d_cost + at, weight * plan - through * inverse, mask=(i < n)[:, None] & inside[None, :])
        sums += through
        arriving = tl.load(d_phi + i, mask=i < n, other=0.0)
        # Until the loop below sums it up, d_a holds what arrives at the last row potentials.
        tl.store(d_a + i, tl.where(mass_i > 0.0, arriving + tl.sum(through, 1), 0.0), mask=i < n)
    d_column = tl.load(d_psi + problem * m + j, mask=inside, other=0.0) + tl.sum(sums, 0)
    tl.debug_barrier()

    d_mass_j = tl.zeros([COLUMNS], F)
    step = iterations - 1
    while step >= 0:
        d_mass_j += d_column
        now = tl.load(psi_history + step * m + j, mask=inside, other=-inf)
        old = tl.where(mass_j > 0.0, 0.0, -inf).to(F)
        if step > 0:
            old = tl.load(psi_history + (step - 1) * m + j, mask=inside, other=-inf)
        by_column = over(d_column, mass_j)
        sums = tl.zeros([ROWS, COLUMNS], F)
        for first in range(0, n, ROWS):
            i, mass_i = masses_of_rows(a, first, n, ROWS, F)
            c = load_cost(cost, i, j, cost_row, mass_i, mass_j, F)
            row = tl.load(phi_history + step * n + i, mask=i < n, other=-inf)
            columns = exponential(log_plan(row, now, c, inverse)) * by_column[None, :]
            d_mass_i = tl.load(d_a + i, mask=i < n, other=0.0)
            d_row = tl.where(step == iterations - 1, d_mass_i, 0.0) - tl.sum(columns, 1)
            tl.store(d_a + i, tl.where(step == iterations - 1, 0.0, d_mass_i) + d_row, mask=i < n)
            rows = exponential(log_plan(row, old, c, inverse)) * over(d_row, mass_i)[:, None]
            sums -= rows
            at, whole = i.to(tl.int64)[:, None] * m + j[None, :], (i < n)[:, None] & inside[None, :]
            gradient = tl.load(d_cost + at, mask=whole, other=0.0)
            tl.store(d_cost + at, gradient + (columns + rows) * inverse, mask=whole)
        d_column = tl.sum(sums, 0)
        tl.debug_barrier()
        step -= 1
    tl.store(d_b + problem * m + j, d_mass_j, mask=inside)


@triton.jit
def subtract_average(target, plan, row_sums, along, i_sums, j, n, m, ROWS: tl.constexpr, OWN: tl.constexpr):
    """``target - P' diag(1 / P1) x``: x ``[n]`` at ``along`` where OWN, else x = P y with y = ``along``."""
    sums = tl.zeros([ROWS, target.shape[0]], tl.float64)
    for first in range(0, n, ROWS):
        i = first + tl.arange(0, ROWS)
        at, whole = i.to(tl.int64)[:, None] * m + j[None, :], (i < n)[:, None] & (j < m)[None, :]
        p = tl.load(plan + at, mask=whole, other=0.0)
        if OWN:
            x = tl.load(i_sums + i, mask=i < n, other=0.0)
        else:
            x = tl.sum(p * along[None, :], 1)
        sums += p * over(x, tl.load(row_sums + i, mask=i < n, other=0.0))[:, None]
    return target - tl.sum(sums, 0)


@triton.jit(do_not_specialize=["iterations"])
def implicit(
    cost,
    a,
    b,
    epsilons,
    phi,
    psi,
    d_transport,
    d_value,
    d_plan,
    d_cost,
    d_a,
    d_b,
    plan,  # [B, n, m] float64: the plan
    row_sums,  # [B, 2, n] float64: of P and of P * G
    n,
    m,
    cost_batch,
    cost_row,
    iterations,
    steps,
    tolerance,  # a pointer, as in solve
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # In float64: where plans are nearly permutations the system is nearly singular.
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * cost_batch
    a += problem * n
    plan += problem * n * m
    d_plan += problem * n * m
    d_cost += problem * n * m
    row_sums += problem * 2 * n
    j, mass_j = masses_of_columns(b + problem * m, m, COLUMNS, tl.float64)
    inf: tl.constexpr = float("inf")
    inverse = 1.0 / tl.load(epsilons + iterations - 1)
    weight = tl.load(d_transport + problem).to(tl.float64)
    value_weight = weight + tl.load(d_value + problem).to(tl.float64)

    column = tl.load(psi + problem * m + j, mask=j < m, other=-inf).to(tl.float64)
    mass = tl.zeros([ROWS, COLUMNS], tl.float64)
    throughs = mass
    for first in range(0, n, ROWS):
        i, mass_i = masses_of_rows(a, first, n, ROWS, tl.float64)
        c = load_cost(cost, i, j, cost_row, mass_i, mass_j, tl.float64)
        row = tl.load(phi + problem * n + i, mask=i < n, other=-inf).to(tl.float64)
        p = exponential(log_plan(row, column, c, inverse))
        through = cotangent(p, c, d_plan, i, j, n, m, weight, PLAN)
        at = i.to(tl.int64)[:, None] * m + j[None, :]
        tl.store(plan + at, p, mask=(i < n)[:, None] & (j < m)[None, :])
        tl.store(row_sums + i, tl.sum(p, 1), mask=i < n)
        tl.store(row_sums + n + i, tl.sum(through, 1), mask=i < n)
        mass += p
        throughs += through
    by_column = tl.sum(mass, 0)
    residual = tl.sum(throughs, 0)
    tl.debug_barrier()

    # Conjugate gradients on (diag(P'1) - P' diag(1 / P1) P) y = residual.
    residual = subtract_average(residual, plan, row_sums, residual, row_sums + n, j, n, m, ROWS, True)
    y = tl.zeros([COLUMNS], tl.float64)
    direction = over(residual, by_column)
    rho = tl.sum(residual * direction, 0)
    bar = tl.load(tolerance)
    enough = rho * bar * bar
    step = 0
    running = rho > enough
    while running & (step < steps):
        image = subtract_average(
            by_column * direction, plan, row_sums, direction, row_sums, j, n, m, ROWS, False
        )
        curvature = tl.sum(direction * image, 0)
        # Along a constant there is none: only rounding is left there.
        running = curvature > 2.2e-14 * tl.sum(by_column * direction * direction, 0)
        if running:
            alpha = rho / curvature
            y += alpha * direction
            residual -= alpha * image
            preconditioned = over(residual, by_column)
            next_rho = tl.sum(residual * preconditioned, 0)
            direction = preconditioned + (next_rho / rho) * direction
            rho = next_rho
            running = rho > enough
        step += 1

    tl.store(d_b + problem * m + j, y, mask=j < m)
    for first in range(0, n, ROWS):
        i, mass_i = masses_of_rows(a, first, n, ROWS, tl.float64)
        c = load_cost(cost, i, j, cost_row, mass_i, mass_j, tl.float64)
        at, whole = i.to(tl.int64)[:, None] * m + j[None, :], (i < n)[:, None] & (j < m)[None, :]
        p = tl.load(plan + at, mask=whole, other=0.0)
        through = cotangent(p, c, d_plan, i, j, n, m, weight, PLAN)
        sums = tl.load(row_sums + i, mask=i < n, other=0.0)
        x = over(tl.load(row_sums + n + i, mask=i < n, other=0.0) - tl.sum(p * y[None, :], 1), sums)
        tl.store(d_a + problem * n + i, x, mask=i < n)
        gradient = value_weight * p - (through - p * (x[:, None] + y[None, :])) * inverse
        tl.store(d_cost + at, gradient, mask=whole)
