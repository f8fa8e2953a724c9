"""The angle kernel: all angles between n points from their squared distances, student's against teacher's.

``csrc/angle.h`` states the contract. A program makes one tile of a row j of the gradients: first the vertices
i of the tile meet all k, which gives the loss and what a vertex adds to ``s_ji``; then the columns k of the
tile meet all vertices, which gives ``s_jk``. So each term is computed twice, and no two programs ever add to
one number.
"""

import triton
import triton.language as tl

from .smooth_l1 import slope_of, terms_of


@triton.jit
def cosine(s_ij, r_ij, s_ik, r_ik, s_jk):
    return (s_ij + s_ik - s_jk) * (0.5 * r_ij) * r_ik


@triton.jit
def column(matrix, rows, j, ld, inside):
    """Entries of column j, upright."""
    return tl.load(matrix + rows * ld + j, mask=inside, other=0.0)[:, None]


@triton.jit
def angle(
    student,
    student_inverse,
    teacher,
    teacher_inverse,
    beta,  # a pointer: Triton takes Python's floats as float32
    sums,
    student_grad,
    teacher_grad,
    n,
    ld,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_tile = tile < n
    tile = tile.to(tl.int64)
    step = tl.arange(0, BLOCK)
    width = tl.load(beta)

    s_ij, s_r = column(student, tile, j, ld, in_tile), column(student_inverse, tile, j, ld, in_tile)
    t_ij, t_r = column(teacher, tile, j, ld, in_tile), column(teacher_inverse, tile, j, ld, in_tile)
    loss = tl.zeros([TILE], tl.float64)
    s_inverse, s_along, t_inverse, t_along = loss, loss, loss, loss
    for start in range(0, n, BLOCK):
        k = start + step
        inside = k < n
        both = in_tile[:, None] & inside[None, :]
        at = tile[:, None] * ld + k[None, :]
        s_ik, s_rk = tl.load(student + at, both, 0.0), tl.load(student_inverse + at, both, 0.0)
        t_ik, t_rk = tl.load(teacher + at, both, 0.0), tl.load(teacher_inverse + at, both, 0.0)
        s_cos = cosine(s_ij, s_r, s_ik, s_rk, tl.load(student + j * ld + k, inside, 0.0)[None, :])
        t_cos = cosine(t_ij, t_r, t_ik, t_rk, tl.load(teacher + j * ld + k, inside, 0.0)[None, :])
        difference = s_cos - t_cos
        slope = slope_of(difference, width)
        loss += tl.sum(terms_of(slope, difference, width), 1)
        if STUDENT_GRAD:
            s_inverse += tl.sum(slope * s_rk, 1)
            s_along += tl.sum(slope * s_cos, 1)
        if TEACHER_GRAD:
            t_inverse -= tl.sum(slope * t_rk, 1)
            t_along -= tl.sum(slope * t_cos, 1)
    tl.store(sums + j * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, 0))

    if STUDENT_GRAD or TEACHER_GRAD:
        s_jk, t_jk = (
            tl.load(student + j * ld + tile, in_tile, 0.0),
            tl.load(teacher + j * ld + tile, in_tile, 0.0),
        )
        s_opposite = tl.zeros([TILE], tl.float64)
        t_opposite = s_opposite
        for start in range(0, n, BLOCK):
            i = start + step
            inside = i < n
            i = i.to(tl.int64)
            both = inside[:, None] & in_tile[None, :]
            at = i[:, None] * ld + tile[None, :]
            s_ik, s_rk = tl.load(student + at, both, 0.0), tl.load(student_inverse + at, both, 0.0)
            t_ik, t_rk = tl.load(teacher + at, both, 0.0), tl.load(teacher_inverse + at, both, 0.0)
            s_ri, t_ri = column(student_inverse, i, j, ld, inside), column(teacher_inverse, i, j, ld, inside)
            s_cos = cosine(column(student, i, j, ld, inside), s_ri, s_ik, s_rk, s_jk[None, :])
            t_cos = cosine(column(teacher, i, j, ld, inside), t_ri, t_ik, t_rk, t_jk[None, :])
            slope = slope_of(s_cos - t_cos, width)
            s_opposite += tl.sum(slope * s_ri * s_rk, 0)
            t_opposite -= tl.sum(slope * t_ri * t_rk, 0)
        if STUDENT_GRAD:
            r = tl.load(student_inverse + tile * ld + j, in_tile, 0.0)
            tl.store(student_grad + j * ld + tile, r * (s_inverse - r * s_along) - 0.5 * s_opposite, in_tile)
        if TEACHER_GRAD:
            r = tl.load(teacher_inverse + tile * ld + j, in_tile, 0.0)
            tl.store(teacher_grad + j * ld + tile, r * (t_inverse - r * t_along) - 0.5 * t_opposite, in_tile)
