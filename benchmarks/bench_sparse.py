"""Saved teachers: writing one (top-K with all that is kept beside it), training from one.

The write side's yardstick is one read of the logits (``amax``): nothing that looks at every logit can go
below it; from heads it is the product that makes them. The read side's is the student's three products, with
outputs allocated beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from contest import Step, contest, errors, graded, run_cases
from providers import need
from record import Row
from registry import Bench
from report import OURS, cases, failure, judged, median, ratio, seconds, spread, worst_error
from torch import Tensor
from workloads import DTYPES, SPARSE, SPARSE_OVER_FLOOR, SPARSE_SPEEDUP, SparseSize

YARDSTICK = {"topk": "one read", "topk of heads": "product", "sparse step": "three products"}
CHECKED = 256  # tokens of which a written teacher is held against float64
BLOCK = 1024  # tokens of which the float64 step makes logits at a time


# --- writing ------------------------------------------------------------------------------------------


def write_case(
    size: SparseSize, dtype: torch.dtype, device: str
) -> tuple[Callable, dict[str, Step], Callable]:
    """(yardstick, steps, exact results of the first rows)"""
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    if size.width:
        hidden = normal(size.tokens, size.width).to(dtype)
        weight = normal(size.vocab, size.width).mul_(3 / size.width**0.5).to(dtype)
        z = hidden @ weight.t()
        project, yardstick = lambda: hidden @ weight.t(), lambda: torch.mm(hidden, weight.t(), out=z)
    else:
        z = normal(size.tokens, size.vocab).mul_(3).to(dtype)
        project, yardstick = lambda: z, lambda: z.amax(-1)
    targets = torch.randint(size.vocab, (size.tokens,), generator=generator, device=device)

    def ours() -> tuple[Tensor, ...]:
        kd = need("kd_kernels")
        found = kd.linear_topk(kd.Head(hidden, weight) if size.width else z, size.k, targets=targets)
        return (
            found.logits, found.lse, found.entropy, found.log_tail_mass, found.target_logprob,
            found.target_rank,
        )  # fmt: skip

    def rest(z: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        wide = z.float()
        lse = wide.logsumexp(-1)
        p = (wide - lse[:, None]).exp()
        entropy = lse - (p * wide).sum(-1)
        log_tail = p.scatter(1, ids, 0.0).sum(-1).log()
        at_target = wide.gather(1, targets[:, None])
        rank = (wide > at_target).sum(-1) + 1
        return lse, entropy, log_tail, at_target[:, 0] - lse, rank

    def torch_ops() -> tuple[Tensor, ...]:
        z = project()
        values, ids = z.topk(size.k, -1)
        return values, *rest(z, ids, targets)

    compiled_rest = functools.cache(lambda: torch.compile(rest, dynamic=False))

    def compiled() -> tuple[Tensor, ...]:
        z = project()
        values, ids = z.topk(size.k, -1)
        return values, *compiled_rest()(z, ids, targets)

    def exact() -> tuple[Tensor, ...]:
        double, at = z[:CHECKED].double(), targets[:CHECKED]
        if size.width:
            double = hidden[:CHECKED].double() @ weight.double().t()
        values, ids = double.topk(size.k, -1)
        log_p = double.log_softmax(-1)
        at_target = double.gather(1, at[:, None])
        earlier = torch.arange(size.vocab, device=device) < at[:, None]
        rank = ((double > at_target) | ((double == at_target) & earlier)).sum(-1) + 1
        return (
            values,
            double.logsumexp(-1),
            -(log_p.exp() * log_p).sum(-1),
            log_p.scatter(1, ids, -torch.inf).logsumexp(-1),
            log_p.gather(1, at[:, None])[:, 0],
            rank.double(),
        )

    steps = {"kd": ours, "torch": torch_ops, "torch.compile": compiled}
    if size.width:  # the largest alone, of logits that exist
        steps["torch.topk"] = lambda: z.topk(size.k, -1)[:1]
    return yardstick, steps, exact


# --- training -----------------------------------------------------------------------------------------


def step_case(
    size: SparseSize, dtype: torch.dtype, device: str
) -> tuple[Callable, dict[str, Step], Callable]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(size.tokens, size.width, generator=generator, device=device).to(dtype)
    weight = torch.randn(size.vocab, size.width, generator=generator, device=device)
    weight = (weight * (3 / size.width**0.5)).to(dtype)
    teacher = torch.randn(size.tokens, size.vocab, generator=generator, device=device) * 3
    logprobs, ids = teacher.log_softmax(-1).topk(size.k, -1)
    del teacher
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def ours(logits_dtype: Optional[torch.dtype] = None) -> tuple[Tensor, ...]:
        kd = need("kd_kernels")
        target = kd.SparseTarget(ids, logprobs)
        return gradients(
            kd.distill(kd.Head(hidden, weight), target, kd.ForwardKL(), logits_dtype=logits_dtype)
        )

    def losses_of(z: Tensor, at: slice = slice(None)) -> Tensor:
        """Forward KL with the tail as one outcome, as trainers write it."""
        log_q = z.log_softmax(-1).gather(-1, ids[at])
        t = logprobs[at].to(z.dtype).exp()
        rest_p, rest_q = 1 - t.sum(-1), 1 - log_q.exp().sum(-1)
        return (t * (logprobs[at] - log_q)).sum(-1) + torch.xlogy(rest_p, rest_p / rest_q)

    def loss_of(z: Tensor) -> Tensor:
        return losses_of(z).mean()

    def plain() -> tuple[Tensor, ...]:
        return gradients(loss_of((hidden @ weight.t()).float()))

    compiled_loss = functools.cache(lambda: torch.compile(loss_of, dynamic=False))

    def compiled() -> tuple[Tensor, ...]:
        return gradients(compiled_loss()((hidden @ weight.t()).float()))

    def exact() -> tuple[Tensor, ...]:
        wide = [x.detach().double().requires_grad_() for x in leaves]
        total = wide[0].new_zeros(())
        for start in range(0, size.tokens, BLOCK):
            at = slice(start, start + BLOCK)
            loss = losses_of(wide[0][at] @ wide[1].t(), at).sum() / size.tokens
            loss.backward()
            total += loss.detach()
        return total, *(x.grad for x in wide)

    logits = torch.empty(size.tokens, size.vocab, dtype=dtype, device=device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    @torch.no_grad()
    def floor() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    steps = {"kd": ours, "torch": plain, "torch.compile": compiled}
    if dtype == torch.bfloat16:  # as plain torch has them; ours are float32 unless asked
        steps["kd bf16 logits"] = functools.partial(ours, dtype)
    return floor, steps, exact


CASES = {"topk": write_case, "topk of heads": write_case, "sparse step": step_case}


def run_case(
    name: str, size: SparseSize, dtype: str, *, threads: int, device: str, **timing: Any
) -> list[Row]:
    floor, steps, exact = CASES[name](size, DTYPES[dtype], device)
    truth = exact()
    checked = slice(None) if name == "sparse step" else slice(CHECKED)

    def check(_: str, found: tuple[Tensor, ...]) -> Row:
        off = errors((x[checked] if x.dim() else x for x in found), truth)
        return graded(off, {"fp32": 1e-3, "bf16": 0.2}[dtype])

    row = {
        "bench": "sparse",
        "case_id": f"sparse/{name}/{dtype}/{size.tokens}x{size.vocab}/{size.k}",
        "case": {"what": name, "dtype": dtype, "threads": threads, **vars(size)},
    }
    return contest(
        row,
        steps,
        check,
        yardstick=YARDSTICK[name],
        floor=floor,
        device=device,
        **timing,
    )


def run(results: Optional[Path], *, sizes: str, dtypes: Sequence[str], **timing: Any) -> list[Row]:
    chosen = SPARSE[sizes].items()
    cases = [(f"{name} {x}", run_case, (name, size, x)) for name, size in chosen for x in dtypes]
    return run_cases("sparse", results, cases, compiling=sizes != "quick", **timing)


# --- the table ----------------------------------------------------------------------------------------

SPARSE_HEADER = (
    "what",
    "size",
    "dtype",
    "provider",
    "median [p20 .. p80]",
    "x yardstick",
    "worst error",
    "targets",
)


def sparse_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One line per provider; the first of each case is what the others are measured against."""
    rows = list(rows)
    lines = []
    for case in cases(rows).values():
        plain = median(case.get("torch"))
        for row in case.values():
            what, mine = row["case"]["what"], median(row)
            width = f", D = {row['case']['width']}" if row["case"]["width"] else ""
            note = failure(row)
            if row["provider"] in OURS and mine is not None:
                found = []
                limit, over = SPARSE_OVER_FLOOR.get((what, sparse_size(row))), median(row, "ratio_floor")
                if limit is not None and over is not None:
                    found.append(judged(over <= limit, f"floor <= {limit:g}"))
                wanted = SPARSE_SPEEDUP.get((what, sparse_size(row), row["case"]["dtype"]))
                if wanted is not None and plain is not None:
                    found.append(judged(plain / mine >= wanted, f"torch >= {wanted:g}x"))
                note = "; ".join(found)
            size = f"{row['case']['tokens']} x {row['case']['vocab']}, K = {row['case']['k']}{width}"
            lines.append(
                (
                    what, size, row["case"]["dtype"], row["provider"], spread(row, "seconds", seconds),
                    ratio(median(row, "ratio_floor")), worst_error(row), note,
                )
            )  # fmt: skip
    return lines


def sparse_size(row: Row) -> SparseSize:
    case = row["case"]
    return SparseSize(case["tokens"], case["vocab"], case["k"], case["width"])


BENCH = Bench(
    name="sparse",
    title="Saved teachers: writing one, training from one",
    about=(
        "Saved teachers. `topk` writes one from existing logits: the K largest, log-sum-exp, entropy, tail "
        "mass, and the rank and log-probability of a target; its yardstick is one read of the logits (of "
        "heads: the product that makes them). `sparse step` is a training step on one from hidden states, "
        "forward KL with the tail, forward and backward; its yardstick is the student's three products."
    ),
    header=SPARSE_HEADER,
    lines=sparse_lines,
    run=run,
)
