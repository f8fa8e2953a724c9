"""Losses between points: each as published code writes it, in plain torch, and ours; forward and backward.

Every case has the published form as its yardstick: the factor by which the others are faster is what counts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from bench_head import spread_row
from bench_sparse import errors
from harness import Timed, run_rounds
from providers import Unavailable, backend, by_name, forget_compiled, need
from record import Row, Writer, rounded
from torch import Tensor
from workloads import RELATIONAL, RelationalSize

PUBLISHED = "published"
Step = Callable[[], tuple[Tensor, ...]]
Case = dict[str, Step]


def _with_gradients(loss_of: Callable[..., Tensor], *inputs: Tensor) -> Step:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def step() -> tuple[Tensor, ...]:
        loss = loss_of(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


def _steps(
    ours: Callable[..., Tensor],
    published: Callable[..., Tensor],
    plain: Optional[Callable[..., Tensor]],
    leaves: list[Tensor],
    fixed: list[Tensor],
) -> tuple[Case, Step]:
    """(providers, exact results): ``leaves`` get gradients, ``fixed`` are constants."""
    steps = {
        PUBLISHED: _with_gradients(lambda *x: published(*x, *fixed), *leaves),
        "kd": _with_gradients(lambda *x: ours(*x, *fixed), *leaves),
    }
    if plain is not None:
        compiled = functools.cache(lambda: torch.compile(plain, dynamic=False))
        steps["torch"] = _with_gradients(lambda *x: plain(*x, *fixed), *leaves)
        steps["torch.compile"] = _with_gradients(lambda *x: compiled()(*x, *fixed), *leaves)
    wide = [x.double() if x.is_floating_point() else x for x in fixed]
    exact = _with_gradients(lambda *x: published(*x, *wide), *(x.double() for x in leaves))
    return steps, exact


# --- angles and distances (RKD) -------------------------------------------------------------------------


def published_angle(student: Tensor, teacher: Tensor) -> Tensor:
    def cosines(x: Tensor) -> Tensor:
        unit = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
        return torch.bmm(unit, unit.transpose(1, 2))

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


def gram_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """From the centred Gram matrix, which is what plain torch can do: no ``[N, N, D]``, but ``[N, N, N]``."""

    def cosines(x: Tensor) -> Tensor:
        x = x - x.mean(0)
        gram = x @ x.t()
        norms = gram.diagonal()
        squared = norms[:, None] + norms - 2 * gram
        edge = squared.fill_diagonal_(0.0) > 0
        inverse = torch.where(edge, torch.where(edge, squared, 1.0).rsqrt(), 0.0)
        products = gram[None] - gram[:, :, None] - gram[:, None, :] + norms[:, None, None]
        return products * inverse[:, :, None] * inverse[:, None, :]

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


def published_distance(student: Tensor, teacher: Tensor) -> Tensor:
    def relative(x: Tensor) -> Tensor:
        norms = x.pow(2).sum(1)
        squared = (norms[:, None] + norms - 2 * (x @ x.t())).clamp(min=1e-12)
        d = squared.sqrt() * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
        return d / d[d > 0].mean()

    return F.smooth_l1_loss(relative(student), relative(teacher))


def points(size: RelationalSize, device: str) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        torch.randn(size.rows, size.width, generator=generator, device=device) for _ in range(2)
    )
    return [student], [teacher]


def angle_case(size: RelationalSize, device: str) -> tuple[Case, Step]:
    def ours(*rows: Tensor) -> Tensor:
        return need("kd_kernels").relational_angle(*rows)

    return _steps(ours, published_angle, gram_angle, *points(size, device))


def distance_case(size: RelationalSize, device: str) -> tuple[Case, Step]:
    def ours(*rows: Tensor) -> Tensor:
        return need("kd_kernels").relational_distance(*rows)

    return _steps(ours, published_distance, None, *points(size, device))


CASES = {"relational angle": angle_case, "relational distance": distance_case}


# --- running ----------------------------------------------------------------------------------------------


def run_case(
    name: str, size: RelationalSize, *, rounds: int, threads: int, reject: bool, compiling: bool, device: str
) -> list[Row]:
    forget_compiled()
    steps, exact = CASES[name](size, device)
    if not compiling:
        steps.pop("torch.compile", None)
    truth, outcome = exact(), {}
    for provider, step in steps.items():
        found: dict[str, Any] = {"status": "ok", "reason": ""}
        try:
            error = errors(step(), truth)
            found.update(error={"worst": rounded(error)}, status="ok" if error <= 1e-3 else "wrong")
        except Unavailable as reason:
            found.update(status=reason.status, reason=reason.reason)
        except Exception as reason:  # a peer may fail in any way; its row says how
            found.update(status="failed", reason=f"{type(reason).__name__}: {reason}".splitlines()[0][:200])
        if provider == "kd":
            found["backend"] = backend(by_name("kd"), device)
        outcome[provider] = found
    del truth

    # A published form that is wrong is timed all the same: it is what people run.
    entries = [Timed(p, steps[p]) for p in steps if p == PUBLISHED or outcome[p]["status"] == "ok"]
    run_rounds(entries, rounds=rounds, reject=reject, device=device)
    measured = {timed.name: timed for timed in entries}
    rows = []
    for provider in steps:
        row: Row = {
            "bench": "relational",
            "case_id": f"relational/{name}/{size.rows}x{size.width}",
            "case": {"what": name, "dtype": "fp32", "threads": threads, **vars(size)},
            "provider": provider,
            **outcome[provider],
        }
        timed = measured.get(provider)
        if timed is not None and timed.failure:
            row.update(status="failed", reason=timed.failure)
        elif timed is not None:
            row["seconds"] = spread_row(timed.spread())
            row["ratio_floor"] = spread_row(timed.ratio_to(measured[PUBLISHED]))
            row["rejected"], row["noisy"] = timed.rejected, timed.noisy
        rows.append(row)
    return rows


def run(
    results: Optional[Path],
    *,
    sizes: Optional[dict[str, RelationalSize]] = None,
    rounds: int = 7,
    threads: int = 2,
    compiling: bool = True,
    reject: bool = True,
    device: str = "cpu",
) -> list[Row]:
    torch.set_num_threads(threads)
    writer = Writer("relational", results, device)
    for name, size in (sizes or RELATIONAL).items():
        print(f"  {name}", file=sys.stderr, flush=True)
        for row in run_case(
            name, size, rounds=rounds, threads=threads, reject=reject, compiling=compiling, device=device
        ):
            writer.add(row)
    return writer.rows
