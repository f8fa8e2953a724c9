"""Predict memory and FLOPs of a step, plain and fused, and how the fused one would be cut.

Nothing is run: the chunking is the driver's own, the plain step is traced on tensors without memory.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from kd_kernels import rows as R
from kd_kernels.backends import pick
from kd_kernels.cli.common import UsageError, add_case, emit
from kd_kernels.cli.trace import trace
from kd_kernels.cli.workload import Case, Inputs, objective_of, plain_step
from kd_kernels.drivers.chunked_head import Problem
from kd_kernels.drivers.plan import Chunking, chunking
from kd_kernels.drivers.scale import SLAB
from kd_kernels.drivers.sides import Model, accumulate_dtype, hidden_gradient_dtype
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.gemm import matmul, offers_widening, route

HELP = "predict memory, FLOPs and chunking of a step"


def configure(parser: argparse.ArgumentParser) -> None:
    add_case(parser)


def problem_of(case: Case, inputs: Inputs) -> Problem:
    """The walk's problem for a case; every token counts."""

    def model(hidden: torch.Tensor, weight: torch.Tensor) -> Model:
        needs = (hidden.requires_grad, weight.requires_grad, False)
        return Model(hidden.detach(), weight.detach(), None, 1.0, 0.0, 1.0, needs)

    return Problem(
        student=model(inputs.student_hidden, inputs.student_weight),
        teacher=model(inputs.teacher_hidden, inputs.teacher_weight),
        objective=case.objective,
        parameter0=1.0,
        parameter1=1.0,
        soft_weight=1.0,
        hard_weight=None,
        labels=None,
        tokens=Tokens(case.tokens),
        entropies=False,
        compute_dtype=None,
        logits_dtype=None,
        backend=case.backend,
        workspace_bytes=case.workspace_bytes,
    )


def temporaries(case: Case, backend: str, rows: int) -> int:
    """What the row kernel and the products allocate beside the workspace, at their worst.

    The compiled kernels allocate nothing. The reference is torch code, as is the product that casts its
    operands up: both are traced.
    """
    dtype = case.torch_dtype
    wide = accumulate_dtype(dtype)

    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    worst = 0
    on_cpu = case.device == "cpu"
    if wide != dtype and (route(dtype) == "upcast" if on_cpu else not offers_widening()):
        hidden, weight = meta(rows, case.student, dtype=dtype), meta(case.vocab, case.student, dtype=dtype)
        logits, grad = meta(case.vocab, rows, dtype=wide), meta(case.vocab, rows, dtype=dtype)
        products = [(weight, hidden.t(), logits, False)]
        products.append((grad.t(), weight, meta(*hidden.shape, dtype=hidden_gradient_dtype(dtype)), False))
        if not case.frozen_head:
            products.append((grad, hidden, meta(*weight.shape, dtype=wide), True))
        for product in products:
            worst = max(worst, trace(lambda product=product: matmul(*product), product[:3]).peak_bytes)
    if backend == "reference":
        sides = [
            R.Rows(meta(case.vocab, rows, dtype=wide), None, meta(rows, dtype=torch.float64))
            for _ in range(2)
        ]
        sides[0].grad = meta(case.vocab, rows, dtype=dtype)
        per_token = [meta(rows, dtype=torch.float64) for _ in range(4)]
        job = R.RowJob(
            objective_of(case).name, rows, case.vocab, *sides, per_token[0], per_token[1], None,
            per_token[2], per_token[3], meta(rows, R.STATISTIC_COLUMNS, dtype=torch.float64),
            meta(rows, R.TERM_COLUMNS, dtype=torch.float64), False,
        )  # fmt: skip
        kernel = pick("row_divergence", torch.device(case.device), backend)[1]
        held = [x for s in sides for x in (s.logits, s.temperature, s.grad) if x is not None]
        held += [*per_token, job.statistics, job.terms]
        phases = R.STATISTICS | R.TERMS | R.GRADIENT
        worst = max(worst, trace(lambda: kernel(job, phases), held).peak_bytes)
    return worst


def fused(case: Case) -> tuple[Chunking, str, dict[str, int]]:
    """(chunking, backend, bytes by what they are for with the peak of all)."""
    inputs = Inputs.of(case, "meta")
    device = torch.device(case.device)
    backend = pick("row_divergence", device, case.backend)[0]
    cut = chunking(problem_of(case, inputs), backend, device)
    results = sum(x.nbytes for x in inputs.tensors() if x.requires_grad)
    # The backward pass casts through a buffer where the accumulator is wider than the gradient.
    widened = accumulate_dtype(case.torch_dtype) != case.torch_dtype and not case.frozen_head
    slab = min(SLAB, case.vocab * case.student) * 4 if widened else 0
    scratch = temporaries(case, backend, cut.rows)
    forward = cut.accumulator_bytes + cut.workspace_bytes + scratch
    kept = cut.workspace_bytes if case.device == "cpu" else 0  # for the next call
    backward = cut.accumulator_bytes + kept + results + slab
    return (
        cut,
        backend,
        {
            "workspace": cut.workspace_bytes,
            "accumulators": cut.accumulator_bytes,
            "gradients": results,
            "temporaries": max(scratch, slab),
            "peak": max(forward, backward),
        },
    )


def predict(case: Case) -> dict[str, Any]:
    """Everything that ``plan`` prints, as plain data; bytes are above the inputs'.

    Raises:
        ValueError: a workspace that holds no row; matrices that no address space holds.
    """
    if max(case.tokens, case.vocab) * max(case.vocab, case.student, case.teacher) * 8 >= 1 << 63:
        raise ValueError(f"matrices of {case.label} are beyond any address space; give smaller numbers")
    cut, backend, memory = fused(case)
    inputs = Inputs.of(case, "meta")
    plain = trace(lambda: plain_step(case, inputs), inputs.tensors())
    return {
        "case": dataclasses.asdict(case),
        "backend": backend,
        "plain": {
            "peak_bytes": plain.peak_bytes,
            "flops": plain.flops,
            "logits_bytes": case.tokens * case.vocab * case.torch_dtype.itemsize,
        },
        "kd": {
            "peak_bytes": memory.pop("peak"),
            "flops": case.gemm_flops,
            **{f"{name}_bytes": size for name, size in memory.items()},
            "chunk_rows": cut.rows,
            "chunks": cut.chunks,
        },
    }


def show(case: Case, found: dict[str, Any]) -> None:
    plain, ours = found["plain"], found["kd"]

    def mib(size: int) -> str:
        return f"{size / 2**20:.1f}"

    print(case.label)
    print(f"\n{'':24s} {'plain torch':>14s} {'kd.distill':>14s}")
    print(f"{'peak above inputs, MiB':24s} {mib(plain['peak_bytes']):>14s} {mib(ours['peak_bytes']):>14s}")
    for name in ("workspace", "accumulators", "gradients", "temporaries"):
        print(f"{'  ' + name:24s} {'':14s} {mib(ours[name + '_bytes']):>14s}")
    print(f"{'products, TFLOP':24s} {plain['flops'] / 1e12:14.3f} {ours['flops'] / 1e12:14.3f}")
    print(f"\none model's logits would take {mib(plain['logits_bytes'])} MiB")
    print(f"kd.distill: {ours['chunks']} chunks of {ours['chunk_rows']} tokens, backend {found['backend']}")
    if found["backend"] == "reference":
        print("the reference is plain torch by chunks: a smaller --workspace-bytes shrinks its temporaries")


def run(args: argparse.Namespace) -> int:
    case = Case.of(args)
    try:
        found = predict(case)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.json:
        emit(found)
    else:
        show(case, found)
    return 0
