"""One case of a benchmark: every result is checked, then the providers that are right are timed in turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, Optional

import torch
from bench_head import spread_row
from harness import Timed, run_rounds
from providers import Unavailable, backend, by_name, forget_compiled
from record import Row, Writer, rounded
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]
COMPILED = "torch.compile"


def errors(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest relative error of all results; NaN where one is, which Python's max would pass over."""
    pairs = zip(found, exact)
    return float(torch.stack([(x.double() - y.double()).norm() / y.double().norm() for x, y in pairs]).amax())


def graded(error: float, bar: float) -> Row:
    """What a row says of a result; NaN is wrong."""
    return {"error": {"worst": rounded(error)}, "status": "ok" if error <= bar else "wrong"}


def contest(
    row: Row,
    steps: dict[str, Step],
    check: Callable[[str, tuple[Tensor, ...]], Row],
    *,
    yardstick: str,
    floor: Optional[Callable[[], Any]] = None,
    timed_anyway: Container[str] = (),
    rounds: int,
    reject: bool,
    compiling: bool = True,
    device: str = "cpu",
) -> list[Row]:
    """A row for the yardstick and each provider.

    Args:
        row: what all rows begin with: bench, case_id, case.
        steps: of each provider; ours have names that begin with "kd".
        check: (provider, result) -> what the row says of it, with a ``status``; see :func:`graded`.
        yardstick: name of what times are divided by: ``floor``, or one of the steps.
        floor: the yardstick, where it is no provider.
        timed_anyway: providers that are timed though wrong: what people run.
        compiling: False leaves out torch.compile.
    """
    forget_compiled()
    steps = {name: step for name, step in steps.items() if compiling or name != COMPILED}
    outcome: dict[str, Row] = {} if floor is None else {yardstick: {"status": "ok", "reason": ""}}
    for provider, step in steps.items():
        found: Row = {"status": "ok", "reason": ""}
        try:
            found.update(check(provider, step()))
        except Unavailable as reason:
            found.update(status=reason.status, reason=reason.reason)
        except Exception as reason:  # a peer may fail in any way; its row says how
            found.update(status="failed", reason=f"{type(reason).__name__}: {reason}".splitlines()[0][:200])
        if provider.startswith("kd"):
            found["backend"] = backend(by_name("kd"), device)
        outcome[provider] = found

    right = [name for name in steps if outcome[name]["status"] == "ok" or name in timed_anyway]
    entries = [] if floor is None else [Timed(yardstick, floor)]
    entries += [Timed(name, steps[name]) for name in right]
    run_rounds(entries, rounds=rounds, reject=reject, device=device)
    measured = {timed.name: timed for timed in entries}
    base = measured.get(yardstick)
    rows = []
    for provider, found in outcome.items():
        result: Row = {**row, "provider": provider, **found}
        timed = measured.get(provider)
        if timed is not None and timed.failure:
            result.update(status="failed", reason=timed.failure)
        elif timed is not None:
            result["seconds"] = spread_row(timed.spread())
            result["ratio_floor"] = None if base is None else spread_row(timed.ratio_to(base))
            result["rejected"] = timed.rejected
            result["noisy"] = timed.noisy or (base is not None and base.noisy)
        rows.append(result)
    return rows


def run_cases(
    bench: str,
    results: Optional[Path],
    cases: Iterable[tuple[str, Callable[..., list[Row]], tuple[Any, ...]]],
    *,
    threads: int = 2,
    device: str = "cpu",
    **timing: Any,
) -> list[Row]:
    """Rows of all (label, run_case, its arguments), written as they come; ``timing``: see :func:`contest`."""
    torch.set_num_threads(threads)
    writer = Writer(bench, results, device)
    for label, run_case, arguments in cases:
        print(f"  {label}", file=sys.stderr, flush=True)
        for row in run_case(*arguments, threads=threads, device=device, **timing):
            writer.add(row)
    return writer.rows
