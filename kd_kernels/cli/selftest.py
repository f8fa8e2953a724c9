"""Check every op on every backend and device of this machine against the float64 reference.

Loss and every gradient may be twice as wrong as plain torch is in the same dtype, plus a few roundings.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor

from kd_kernels.backends import TABLE
from kd_kernels.cli import selftest_points as points
from kd_kernels.cli import selftest_rows as one_model
from kd_kernels.cli.common import DTYPES, Progress, UsageError, device, devices, emit, need_device
from kd_kernels.distill import distill
from kd_kernels.objectives import CATALOGUE, Objective, SortedWasserstein
from kd_kernels.reference import dense_distill
from kd_kernels.sources import Head, Logits

HELP = "check every op on your devices against the float64 reference"

# A few roundings of each dtype's own results, for where plain torch happens to be exact.
FLOOR = {torch.float64: 2e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

SOURCES = ("head x head", "head x logits", "logits x head", "logits x logits")
REDUCTIONS = ("mean", "none")
TOKENS, VOCAB, WIDTHS = 37, 1031, {"student": 24, "teacher": 40}
WORKSPACE = 256 << 10  # so small that heads are walked in several chunks
Source = Union[Head, Logits]


@dataclass(frozen=True)
class Check:
    """One call; ``error`` is the worst of loss and gradients as a multiple of what is allowed."""

    op: str
    device: str
    backend: str
    objective: str
    dtype: str
    sources: str
    reduction: str
    error: Optional[float] = None
    worst: str = ""
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error is not None and self.error <= 1

    @property
    def label(self) -> str:
        return (
            f"{self.op} {self.device} {self.backend} {self.objective} {self.dtype} {self.sources} "
            f"{self.reduction}"
        )


class DivergenceProblem:
    """Random models with every option in use, and what float64 and plain torch make of them."""

    def __init__(self, objective: Objective, dtype: torch.dtype, sources: str, reduction: str, seed: int):
        self.objective, self.dtype, self.kinds = objective, dtype, sources.split(" x ")
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.tensors: list[list[Optional[Tensor]]] = []
        for kind, width in zip(self.kinds, WIDTHS.values()):
            if kind == "head":
                made = [normal(TOKENS, width), normal(VOCAB, width) * 2.5 / width**0.5, normal(VOCAB)]
            else:
                made = [normal(TOKENS, VOCAB) * 2.5, None, None]
            self.tensors.append([None if x is None else x.to(dtype) for x in made])
        self.labels = torch.randint(VOCAB, (TOKENS,), generator=g)
        self.labels[::4] = -100
        self.upstream = normal(TOKENS)
        self.temperature = torch.rand(TOKENS, generator=g) + 0.7
        self.options: dict[str, Any] = dict(temperature_squared=True, hard_weight=0.3, reduction=reduction)
        self.exact = self.run(dense_distill, "cpu", torch.float64)
        self.allowed = [
            2 * relative(plain, exact) + FLOOR[dtype]
            for plain, exact in zip(self.run(_plain, "cpu", dtype), self.exact)
        ]

    def run(
        self, function: Callable[..., Tensor], where: str, dtype: torch.dtype, **more: Any
    ) -> list[Tensor]:
        """Loss and the gradients of everything that ``function`` was given."""
        sources: list[Source] = []
        leaves = []
        for kind, tensors in zip(self.kinds, self.tensors):
            moved = [None if x is None else x.detach().to(where, dtype).requires_grad_() for x in tensors]
            leaves += [x for x in moved if x is not None]
            shaping = {"scale": 0.9, "softcap": 12.0}
            sources.append(Head(*moved, **shaping) if kind == "head" else Logits(moved[0], **shaping))
        loss = function(
            *sources,
            self.objective,
            labels=self.labels.to(where),
            temperature=self.temperature.to(where),
            **self.options,
            **more,
        )
        upstream = self.upstream.to(where, loss.dtype) if loss.dim() else None
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

    def worst(self, where: str, backend: str) -> tuple[float, str]:
        """(the worst error as a multiple of what is allowed, of what)."""
        found = self.run(
            distill, where, self.dtype, teacher_grad=True, backend=backend, workspace_bytes=WORKSPACE
        )
        names = ["loss"]
        for side, kind in zip(WIDTHS, self.kinds):
            parts = ("hidden", "weight", "bias") if kind == "head" else ("logits",)
            names += [f"d {side} {part}" for part in parts]
        ratios = [relative(x, z) / bar for x, z, bar in zip(found, self.exact, self.allowed)]
        # NaN compares with nothing: it is the worst
        return max(((float("inf") if r != r else r), name) for r, name in zip(ratios, names))


def _plain(student: Source, teacher: Source, objective: Objective, **options: Any) -> Tensor:
    logits = (one_model.plain_logits(source) for source in (student, teacher))
    return dense_distill(*logits, objective, **options)


def relative(x: Tensor, exact: Tensor) -> float:
    x = x.detach().to("cpu", torch.float64)
    return ((x - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def check_row_divergence(places: list[tuple[str, str]], seed: int) -> Iterator[Check]:
    """All objectives x dtypes x sources x reductions, at each (device, backend)."""
    return _divergences("row_divergence", CATALOGUE, places, seed)


def check_sorted_l1(places: list[tuple[str, str]], seed: int) -> Iterator[Check]:
    return _divergences("sorted_l1", {SortedWasserstein.name: SortedWasserstein}, places, seed)


def _divergences(
    op: str, objectives: dict[str, type[Objective]], places: list[tuple[str, str]], seed: int
) -> Iterator[Check]:
    for name, dtype, sources, reduction in itertools.product(objectives, DTYPES, SOURCES, REDUCTIONS):
        problem = DivergenceProblem(objectives[name](), DTYPES[dtype], sources, reduction, seed)
        for where, backend in places:
            check = Check(op, where, backend, name, dtype, sources, reduction)
            try:
                error, worst = problem.worst(where, backend)
                yield dataclasses.replace(check, error=error, worst=worst)
            except Exception as failure:  # whatever it is, the user wants to see it beside the others
                yield dataclasses.replace(check, failure=f"{type(failure).__name__}: {failure}")


def _each(
    functions: dict[str, Callable], kinds: tuple[str, ...], problem: Callable,
    op: str, places: list[tuple[str, str]], seed: int,
) -> Iterator[Check]:  # fmt: skip
    """Each function x dtype x kind of ``problem``, at each (device, backend)."""
    for (name, function), dtype, kind in itertools.product(functions.items(), DTYPES, kinds):
        model = problem(kind, DTYPES[dtype], seed)
        exact = function(model, "cpu", torch.float64, "", plainly=True)
        plain = function(model, "cpu", DTYPES[dtype], "", plainly=True)
        bars = [2 * relative(x, z) + FLOOR[DTYPES[dtype]] for (_, x), (_, z) in zip(plain, exact)]
        for where, backend in places:
            check = Check(op, where, backend, name, dtype, kind, "none")
            try:
                found = function(model, where, DTYPES[dtype], backend, plainly=False)
                ratios = [relative(x, z) / bar for (_, x), (_, z), bar in zip(found, exact, bars)]
                worst = max(((float("inf") if r != r else r), part) for r, (part, _) in zip(ratios, found))
                yield dataclasses.replace(check, error=worst[0], worst=worst[1])
            except Exception as failure:
                yield dataclasses.replace(check, failure=f"{type(failure).__name__}: {failure}")


# op -> (its checks, how many per place). A test fails while an op of backends.TABLE is missing here.
CHECKS: dict[str, tuple[Callable[[list[tuple[str, str]], int], Iterator[Check]], int]] = {
    "row_divergence": (check_row_divergence, len(CATALOGUE) * len(DTYPES) * len(SOURCES) * len(REDUCTIONS)),
    "sorted_l1": (check_sorted_l1, len(DTYPES) * len(SOURCES) * len(REDUCTIONS)),
    **{
        op: (
            functools.partial(_each, checks, room.KINDS, problem, op),
            len(checks) * len(DTYPES) * len(room.KINDS),
        )
        for room, problem in ((one_model, one_model.OneModel), (points, points.TwoModels))
        for op, checks in room.CHECKS.items()
    },
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device, help="only this one (default: the CPU and every CUDA device)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random models")


def places_of(op: str, wanted: Optional[torch.device]) -> list[tuple[str, str]]:
    """Every (device, backend) that serves ``op`` here."""
    return [
        (str(where), backend)
        for where in ([wanted] if wanted else devices())
        for backend, (kernel, objections) in TABLE[op].items()
        if kernel is not None and not objections(where)
    ]


def show(checks: list[Check], seconds: float) -> None:
    print("worst error of loss and gradients, as a share of what is allowed (1: twice plain torch's)\n")
    print(f"{'device':8s} {'backend':10s} {'op':15s} {'objective':18s}" + "".join(f"{d:>8s}" for d in DTYPES))
    for key, row in itertools.groupby(
        sorted(checks, key=lambda c: (c.device, c.backend, c.op)),
        key=lambda c: (c.device, c.backend, c.op, c.objective),
    ):
        cells: dict[str, list[Check]] = {dtype: [] for dtype in DTYPES}
        for check in row:
            cells[check.dtype].append(check)
        print(f"{key[0]:8s} {key[1]:10s} {key[2]:15s} {key[3]:18s}", end="")
        for found in cells.values():
            good = all(c.passed for c in found)
            print(f"{max(c.error for c in found):8.2f}" if good else f"{'FAIL':>8s}", end="")
        print()
    failed = [c for c in checks if not c.passed]
    for check in failed:
        print(
            f"FAILED {check.label}: " + (check.failure or f"{check.worst} is {check.error:.2g} times the bar")
        )
    verdict = f"{len(failed)} of them failed" if failed else "all passed"
    print(f"\n{len(checks)} checks in {seconds:.1f} s: {verdict}")


def run(args: argparse.Namespace) -> int:
    if args.device is not None:
        need_device(args.device)
    places = {op: places_of(op, args.device) for op in CHECKS}
    if not any(places.values()):
        raise UsageError(f"--device {args.device}: no backend serves it")
    start = time.perf_counter()
    checks = []
    with Progress("selftest", sum(CHECKS[op][1] * len(found) for op, found in places.items())) as progress:
        for op, (function, _) in CHECKS.items():
            for check in function(places[op], args.seed):
                checks.append(check)
                progress.step(f"{check.objective} {check.dtype} {check.device} {check.backend}")
    seconds = time.perf_counter() - start
    passed = all(c.passed for c in checks)
    if args.json:
        rows = [{**dataclasses.asdict(c), "passed": c.passed} for c in checks]
        emit({"passed": passed, "seconds": seconds, "checks": rows})
    else:
        show(checks, seconds)
    return 0 if passed else 1
