"""The row kernel alone: logits in, loss and gradient of the student's logits out.

Its floor is memory traffic. Minimal bytes are those the result cannot be had without: both logit
tensors read once, the gradient written once. A second pass over the logits is not counted as work. The
yardstick is a copy of the same number of bytes in the same rounds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from bench_head import case_row, spread_row
from formulas import exact_sum, user_loss
from harness import Timed, run_rounds
from providers import Unavailable, backend, by_name, forget_compiled, need, selected
from record import Row, Writer, rounded
from torch import Tensor
from workloads import DTYPES, ROWS, Objective, Shape, objectives

COPY = "copy"


def minimal_bytes(tokens: int, vocab: int, dtype: torch.dtype) -> int:
    return 3 * tokens * vocab * dtype.itemsize


def _ours(student: Tensor, teacher: Tensor, objective: Objective, backend: Optional[str] = None) -> None:
    kd = need("kd_kernels")
    formula = kd.objectives.CATALOGUE[objective.name](**dict(objective.parameters))
    try:
        loss = kd.distill(kd.Logits(student), kd.Logits(teacher), formula, backend=backend)
    except kd.BackendUnavailable as error:
        raise Unavailable("absent", str(error).splitlines()[0]) from None
    loss.backward()


def _plain(student: Tensor, teacher: Tensor, objective: Objective) -> None:
    user_loss(objective, student, teacher).backward()


@functools.cache
def _compiled_loss(objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(functools.partial(user_loss, objective), dynamic=False)


def _compiled(student: Tensor, teacher: Tensor, objective: Objective) -> None:
    _compiled_loss(objective)(student, teacher).backward()


STEPS: dict[str, Callable[[Tensor, Tensor, Objective], None]] = {
    "kd": _ours,
    "kd cuda": functools.partial(_ours, backend="cuda"),
    "torch": _plain,
    "torch.compile": _compiled,
}


def make_logits(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.tokens, shape.vocab)
    student = torch.randn(size, generator=generator, device=device) * 3
    teacher = 0.7 * student + 0.7 * 3 * torch.randn(size, generator=generator, device=device)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def _truth(student: Tensor, teacher: Tensor, objective: Objective, rows: slice) -> Tensor:
    """Float64 gradient of some rows, the other rows do not enter it."""
    leaf = student.detach()[rows].double().requires_grad_()
    (grad,) = torch.autograd.grad(exact_sum(objective, leaf, teacher[rows].double()), leaf)
    return grad / student.shape[0]


def run_case(
    objective: Objective,
    shape: Shape,
    dtype: str,
    names: Sequence[str],
    rounds: int,
    threads: int,
    reject: bool,
    device: str,
) -> list[Row]:
    forget_compiled()
    _compiled_loss.cache_clear()
    student, teacher = make_logits(shape, DTYPES[dtype], device)
    sample = slice(0, 64)
    truth = _truth(student, teacher, objective, sample)
    outcome: dict[str, dict[str, Any]] = {}
    for name in names:
        student.grad = None
        try:
            STEPS[name](student, teacher, objective)
            error = float((student.grad[sample].double() - truth).norm() / truth.norm())
        except Unavailable as reason:
            outcome[name] = {"status": reason.status, "reason": reason.reason}
        except Exception as reason:
            message = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
            outcome[name] = {"status": "failed", "reason": message}
        else:
            right = error <= (1e-3 if dtype == "fp32" else 2e-2)
            status = "ok" if right else "wrong"
            outcome[name] = {"status": status, "reason": "", "error": {"gradient": rounded(error)}}
            if name.startswith("kd"):
                outcome[name]["backend"] = backend(by_name(name), device)
    student.grad = None

    # Half the bytes are read and half written, so a copy moves as many as the kernel must.
    moved = minimal_bytes(shape.tokens, shape.vocab, DTYPES[dtype])
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def clear() -> None:
        student.grad = None

    def timed_step(name: str) -> Timed:
        return Timed(name, lambda: STEPS[name](student, teacher, objective), clear)

    copy = Timed(COPY, lambda: target.copy_(source))
    entries = [copy, *(timed_step(n) for n in names if outcome[n]["status"] == "ok")]
    run_rounds(entries, rounds=rounds, reject=reject, device=device)
    measured = {timed.name: timed for timed in entries}
    rows = []
    for name in [COPY, *names]:
        row = {**case_row("rows", objective, shape, dtype, threads), "provider": name}
        row.update(outcome.get(name, {"status": "ok", "reason": ""}))
        timed = measured.get(name)
        spread = timed.spread() if timed is not None else None
        if timed is not None and timed.failure:
            row.update(status="failed", reason=timed.failure)
        elif timed is not None and spread is not None:
            row["seconds"] = spread_row(spread)
            row["ratio_copy"] = spread_row(timed.ratio_to(copy))
            row["gb_per_s"] = rounded(moved / spread.median / 1e9)
            row["rejected"], row["noisy"] = timed.rejected, timed.noisy or copy.noisy
        rows.append(row)
    return rows


def run(
    results: Optional[Path],
    *,
    shape: Shape = ROWS,
    rounds: int = 7,
    threads: int = 2,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    only: Optional[Sequence[str]] = None,
    compiling: bool = True,
    reject: bool = True,
    device: str = "cpu",
) -> list[Row]:
    torch.set_num_threads(threads)
    writer = Writer("rows", results, device)
    for dtype in dtypes:
        names = [p.name for p in selected(dtype, device, list(STEPS), compiling)]
        for objective in objectives(only):
            print(f"  rows {dtype} {objective.label}", file=sys.stderr, flush=True)
            for row in run_case(objective, shape, dtype, names, rounds, threads, reject, device):
                writer.add(row)
    return writer.rows
