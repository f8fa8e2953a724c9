"""SinKD, loss and gradient to the student's logits: the published code (``torch.cdist``), compiled, and ours.

The yardstick is the forward pass of ``torch.cdist(p=1)`` alone. Solvers of transport problems (POT, GeomLoss)
are no peers here: they start from finished distances, which take nearly all of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from contest import Step, contest, errors, graded, run_cases
from providers import need
from record import Row, rounded
from registry import Bench
from report import cases, failure, judged, median, on_gpu, ratio, seconds, spread, worst_error
from torch import Tensor
from workloads import (
    DTYPES,
    SINKHORN_BATCH,
    SINKHORN_BATCH_OVER_BOUND,
    SINKHORN_BATCH_SPEEDUP,
    SinkhornBatchSize,
)

YARDSTICK = "cdist forward"
EPSILON, ITERATIONS, TEMPERATURE = 0.1, 20, 2.0
SLAB = 16384  # entries of which float64 distances are taken at a time


def published(student: Tensor, teacher: Tensor, slab: Optional[int] = None) -> Tensor:
    """``slab`` entries at a time: on a GPU the gradient of a distance takes memory for every entry of every
    pair."""
    p, q = ((z / TEMPERATURE).softmax(-1) for z in (student, teacher))
    slabs = zip(*(x.split(slab or x.shape[1], 1) for x in (p, q)))
    cost = sum(torch.cdist(*each, p=1) for each in slabs)
    plan = (-cost / EPSILON).exp()
    for _ in range(ITERATIONS):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def case(
    size: SinkhornBatchSize, dtype: torch.dtype, device: str
) -> tuple[Callable[[], object], dict[str, Step], Step]:
    """(yardstick, steps, exact result)"""
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        torch.randn(size.tokens, size.vocab, generator=generator, device=device).mul_(3).to(dtype)
        for _ in range(2)
    )
    student.requires_grad_()

    def step(loss_of: Callable[[Tensor, Tensor], Tensor], z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss = loss_of(z, y)
        return loss.detach(), *torch.autograd.grad(loss, z)

    def ours() -> tuple[Tensor, ...]:
        kd = need("kd_kernels")
        objective = kd.SinkhornBatch(EPSILON, ITERATIONS)
        options = {"temperature": TEMPERATURE, "reduction": "sum"}
        return step(lambda z, y: kd.distill(z, y, objective, **options), student, teacher)

    def wide(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, y: loss(z.float(), y.float())

    def plain() -> tuple[Tensor, ...]:
        return step(wide(published), student, teacher)

    compiled_loss = functools.cache(lambda: torch.compile(published, dynamic=False))

    def compiled() -> tuple[Tensor, ...]:
        return step(wide(compiled_loss()), student, teacher)

    def exact() -> tuple[Tensor, ...]:
        loss = functools.partial(published, slab=SLAB)
        return step(loss, student.detach().double().requires_grad_(), teacher.double())

    with torch.no_grad():
        p, q = ((z.float() / TEMPERATURE).softmax(-1) for z in (student, teacher))
    return lambda: torch.cdist(p, q, p=1), {"kd": ours, "torch": plain, "torch.compile": compiled}, exact


def instruction_bound(size: SinkhornBatchSize) -> float:
    """Seconds of the least float32 instructions per pair of entries: subtract and add the absolute value; for
    the gradient compare, select and add. A multiprocessor issues 128 a clock."""
    device = torch.cuda.get_device_properties(0)
    clock = 1e3 * getattr(device, "clock_rate", 1_980_000)  # kHz
    return 5 * size.tokens**2 * size.vocab / (128 * device.multi_processor_count * clock)


def run_case(size: SinkhornBatchSize, dtype: str, *, threads: int, device: str, **timing: Any) -> list[Row]:
    floor, steps, exact = case(size, DTYPES[dtype], device)
    truth = exact()
    # Near-ties between two rows turn a sign, and a whole entry of the gradient with it.
    bar = {"fp32": 1e-2, "bf16": 0.2}[dtype]
    row = {
        "bench": "sinkhorn_batch",
        "case_id": f"sinkhorn_batch/{dtype}/{size.tokens}x{size.vocab}",
        "case": {"dtype": dtype, "threads": threads, **vars(size)},
    }
    if device.startswith("cuda"):
        row["case"]["bound"] = rounded(instruction_bound(size))
    return contest(
        row,
        steps,
        lambda _, found: graded(errors(found, truth), bar),
        yardstick=YARDSTICK,
        floor=floor,
        device=device,
        **timing,
    )


def run(results: Optional[Path], *, sizes: str, dtypes: Sequence[str], **timing: Any) -> list[Row]:
    chosen = SINKHORN_BATCH[sizes]
    cases = [(f"{size.tokens} x {size.vocab} {x}", run_case, (size, x)) for size in chosen for x in dtypes]
    return run_cases("sinkhorn_batch", results, cases, compiling=sizes != "quick", **timing)


# --- the table ----------------------------------------------------------------------------------------

SINKHORN_BATCH_HEADER = (
    "rows x vocabulary",
    "dtype",
    "provider",
    "time",
    "x cdist forward",
    "worst error",
    "targets",
)


def sinkhorn_batch_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    lines = []
    for case in cases(rows).values():
        plain = median(case.get("torch"))
        for row in case.values():
            shape, mine = row["case"], median(row)
            note = failure(row)
            size = SinkhornBatchSize(shape["tokens"], shape["vocab"])
            wanted, limit = SINKHORN_BATCH_SPEEDUP.get(size), SINKHORN_BATCH_OVER_BOUND.get(size)
            if row["provider"] == "kd" and mine is not None:
                if wanted is not None and plain is not None and not on_gpu(row):
                    note = judged(plain / mine >= wanted, f"torch >= {wanted:g}x")
                if limit is not None and shape["dtype"] == "fp32" and "bound" in shape:
                    note = judged(mine <= limit * shape["bound"], f"instructions <= {limit:g}")
            lines.append(
                (
                    f"{shape['tokens']} x {shape['vocab']}", shape["dtype"], row["provider"],
                    spread(row, "seconds", seconds), ratio(median(row, "ratio_floor")),
                    worst_error(row), note,
                )
            )  # fmt: skip
    return lines


BENCH = Bench(
    name="sinkhorn_batch",
    title="SinKD between all rows, loss and gradient",
    about=(
        "The batch Sinkhorn loss (`kd.SinkhornBatch`), all rows of one model against all of the other, from "
        "logits, with its gradient; `torch` is the published form over `torch.cdist`."
    ),
    header=SINKHORN_BATCH_HEADER,
    lines=sinkhorn_batch_lines,
    run=run,
)
