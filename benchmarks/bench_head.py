"""The main table: one distillation step from hidden states, forward and backward, against its floor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import memory
import torch
from formulas import exact
from harness import Spread, Timed, run_rounds
from providers import Floor, Provider, Unavailable, backend, by_name, forget_compiled, selected
from record import Row, Writer, git_state, rounded
from workloads import (
    DTYPES,
    FLOOR,
    FLOOR_VOCAB_MAJOR,
    HEAD,
    Inputs,
    Objective,
    Shape,
    make_inputs,
    objectives,
)

# Relative errors beyond these mean another function, not a rounding: such a step is not timed.
GATE = {"fp32": 1e-3, "bf16": 0.2}


def spread_row(spread: Optional[Spread]) -> Optional[dict[str, Any]]:
    if spread is None:
        return None
    return {
        "median": rounded(spread.median),
        "p20": rounded(spread.p20),
        "p80": rounded(spread.p80),
        "rounds": spread.count,
    }


def case_row(name: str, objective: Optional[Objective], shape: Shape, dtype: str, threads: int) -> Row:
    case_id = f"{name}/{dtype}/{objective.name if objective else 'gemms'}/{shape.tokens}x{shape.vocab}"
    if (shape.d_student, shape.d_teacher) != (HEAD.d_student, HEAD.d_teacher):
        case_id += f"/{shape.d_student}-{shape.d_teacher}"
    return {
        "bench": name,
        "case_id": case_id,
        "case": {
            "objective": objective.name if objective else None,
            "label": objective.label if objective else None,
            "parameters": dict(objective.parameters) if objective else {},
            "dtype": dtype,
            "tokens": shape.tokens,
            "vocab": shape.vocab,
            "d_student": shape.d_student,
            "d_teacher": shape.d_teacher,
            "threads": threads,
        },
    }


def gate(
    providers: Sequence[Provider], inputs: Inputs, objective: Objective, dtype: str, device: str
) -> dict[str, Row]:
    """Runs each provider once on the timed inputs; status, reason and errors by provider."""
    outcome: dict[str, Row] = {}
    try:
        truth = exact(objective, inputs)
    except KeyError as error:
        return {p.name: {"status": "unchecked", "reason": str(error.args[0])} for p in providers}
    for provider in providers:
        inputs.clear_gradients()
        try:
            errors = truth.errors(provider.step(inputs, objective), inputs)
        except Unavailable as error:
            outcome[provider.name] = {"status": error.status, "reason": error.reason}
        except Exception as error:  # a peer may fail in any way; its row says how
            message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            outcome[provider.name] = {"status": "failed", "reason": message}
        else:
            right = all(value <= GATE[dtype] for value in errors.values())  # False for NaN
            outcome[provider.name] = {
                "status": "ok" if right else "wrong",
                "reason": "" if right else f"error above {GATE[dtype]:g}",
                "error": {key: rounded(value) for key, value in errors.items()},
            }
            if provider.ours:
                outcome[provider.name]["backend"] = backend(provider, device)
    inputs.clear_gradients()
    return outcome


def run_case(
    name: str,
    objective: Objective,
    shape: Shape,
    dtype: str,
    providers: Sequence[Provider],
    *,
    rounds: int,
    threads: int,
    with_memory: bool,
    reject: bool = True,
    device: str = "cpu",
) -> list[Row]:
    """Gate, timing and memory of one case; one row per provider, the two floors first."""
    forget_compiled()
    inputs = make_inputs(shape, DTYPES[dtype], device=device)
    outcomes = gate(providers, inputs, objective, dtype, device)

    def timed_step(provider: Provider) -> Timed:
        return Timed(provider.name, lambda: provider.step(inputs, objective), inputs.clear_gradients)

    runnable = [p for p in providers if outcomes[p.name]["status"] == "ok"]
    floor = Timed(FLOOR, Floor(inputs))
    other_floor = Timed(FLOOR_VOCAB_MAJOR, Floor(inputs, row_major=False))
    steps = [timed_step(provider) for provider in runnable]
    ours = [t for t, p in zip(steps, runnable) if p.ours]
    peers = [t for t, p in zip(steps, runnable) if not p.ours]
    # Ours runs beside the floor it is compared with.
    entries = [other_floor, floor, *ours, *peers]
    run_rounds(entries, rounds=rounds, reject=reject, device=device)
    measured = {timed.name: timed for timed in entries}

    rows = []
    for provider_name in [FLOOR, FLOOR_VOCAB_MAJOR, *(p.name for p in providers)]:
        row = {**case_row(name, objective, shape, dtype, threads), "provider": provider_name}
        row.update(outcomes.get(provider_name, {"status": "ok", "reason": ""}))
        timed = measured.get(provider_name)
        if timed is not None:
            if timed.failure:
                row.update(status="failed", reason=timed.failure)
            else:
                row["seconds"] = spread_row(timed.spread())
                row["ratio_floor"] = spread_row(timed.ratio_to(floor))
                row["ratio_floor_vocab_major"] = spread_row(timed.ratio_to(other_floor))
                row["rejected"] = timed.rejected
                row["noisy"] = timed.noisy or floor.noisy
            is_floor = provider_name in (FLOOR, FLOOR_VOCAB_MAJOR)
            if is_floor and row.get("seconds"):
                row["gflops"] = rounded(shape.gemm_flops / row["seconds"]["median"] / 1e9)
            elif with_memory and row["status"] == "ok":
                row["peak"] = (
                    memory.on_device(by_name(provider_name), objective, inputs, shape, dtype, device)
                    if device.startswith("cuda")
                    else memory.in_subprocess(provider_name, objective, shape, dtype, threads)
                )
        rows.append(row)
    return rows


def fill_in_memory(results: Path, only: Optional[Sequence[str]] = None) -> list[Row]:
    """Peak memory of rows that were timed without it. It does not need a quiet machine, so it may come
    later; the commit at which it was taken stands beside it."""
    writer = Writer("head", results)
    for row in list(writer.kept.values()):
        case, name = row["case"], row["provider"]
        if row["status"] != "ok" or row.get("peak") or name in (FLOOR, FLOOR_VOCAB_MAJOR):
            continue
        if only is not None and case["objective"] not in only:
            continue
        print(f"  {row['case_id']} {name}", file=sys.stderr, flush=True)
        objective = Objective(case["objective"], tuple(case["parameters"].items()))
        shape = Shape(case["tokens"], case["vocab"], case["d_student"], case["d_teacher"])
        peak = memory.in_subprocess(name, objective, shape, case["dtype"], case["threads"])
        writer.keep({**row, "peak": {**peak, "commit": git_state()["commit"]}})
    return writer.rows


def run(
    results: Optional[Path],
    *,
    shape: Shape = HEAD,
    rounds: int = 7,
    threads: int = 2,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    only: Optional[Sequence[str]] = None,
    provider_names: Optional[Sequence[str]] = None,
    memory_for: Optional[Sequence[str]] = ("forward_kl", "jensen_shannon"),
    compiling: bool = True,
    reject: bool = True,
    device: str = "cpu",
) -> list[Row]:
    """All cases; ``memory_for=None`` measures the memory of every objective."""
    torch.set_num_threads(threads)
    writer = Writer("head", results, device)
    for dtype in dtypes:
        for objective in objectives(only):
            print(f"  {dtype} {objective.label}", file=sys.stderr, flush=True)
            rows = run_case(
                "head",
                objective,
                shape,
                dtype,
                selected(dtype, device, provider_names, compiling),
                rounds=rounds,
                threads=threads,
                with_memory=memory_for is None or objective.name in memory_for,
                reject=reject,
                device=device,
            )
            for row in rows:
                writer.add(row)
    return writer.rows
