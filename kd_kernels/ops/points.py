"""Torch ops that compare the rows of two models."""

from __future__ import annotations

from collections.abc import Callable

from kd_kernels.ops.found_gradients import differentiated
from kd_kernels.sources import result_dtype


def between_points(op: str, numbers: str, function: str) -> Callable[[Callable], Callable]:
    """Makes an op of ``(student, teacher, mask, *numbers, backend, needs) -> (loss, gradients)``.

    Its arguments: student and teacher ``[N, D]``; mask bool ``[N]`` or None; ``numbers``, each 0-d float64 on
    the CPU; gradients wanted of the first two. Its results: 0-d, and two of the rows' shapes, ``[0, 0]``
    where not wanted; float64 for float64 rows, else float32. ``function`` is what a caller knows it as.
    """
    call = f"Tensor student, Tensor teacher, Tensor? mask, {numbers}, str? backend, bool[] needs"

    def register(walk: Callable) -> Callable:
        def forward(student, teacher, *others):
            loss, gradients = walk(student, teacher, *others)
            made = [
                x.new_empty(0, 0, dtype=result_dtype(x)) if g is None else g.to(result_dtype(x))
                for x, g in zip((student, teacher), gradients)
            ]
            return (loss.to(result_dtype(student, teacher)), *made)

        def shapes(student, teacher, *others):
            made = [
                x.new_empty(x.shape if wanted else (0, 0), dtype=result_dtype(x))
                for x, wanted in zip((student, teacher), others[-1])
            ]
            return (student.new_empty((), dtype=result_dtype(student, teacher)), *made)

        return differentiated(op, call, 3, forward, shapes, function)

    return register
