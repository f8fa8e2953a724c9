"""The sorted L1 between two vocabularies (ULD), of logits that exist: exact, top-K with the tail, published.

The yardstick is two plain ``torch.sort`` of the same data, which the published form cannot go below.
``sorted`` is the loss alone, ``sorted step`` with its gradient to the student's logits.
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
from workloads import DTYPES, SORTED, SORTED_OVER_FLOOR, SORTED_SPEEDUP, SortedSize

YARDSTICK = "two sorts"
EXACT, TOP = "kd", "kd top-K"


def published(student: Tensor, teacher: Tensor, top_k: Optional[int] = None) -> Tensor:
    """Softmax, sort, fill up with zeros, L1, mean over the tokens; with ``top_k`` the rest as one outcome.

    The sort is stable, as it is not where published: which of two equal entries gets which gradient must
    not depend on who sorts.
    """
    width = max(student.shape[-1], teacher.shape[-1])

    def ranked(z: Tensor) -> Tensor:
        p = z.softmax(-1).sort(dim=-1, descending=True, stable=True).values
        return torch.nn.functional.pad(p, (0, width - p.shape[-1]))

    q, p = ranked(student), ranked(teacher)
    k = width if top_k is None else top_k
    rest = q[:, k:].sum(-1) - p[:, k:].sum(-1)
    return ((q - p)[:, :k].abs().sum(-1) + rest.abs()).mean()


def case(
    size: SortedSize, dtype: torch.dtype, device: str, gradient: bool
) -> tuple[Callable[[], object], dict[str, Step], dict[str, Step]]:
    """(yardstick, steps, their exact results)"""
    generator = torch.Generator(device).manual_seed(0)

    def logits(vocab: int) -> Tensor:
        return torch.randn(size.tokens, vocab, generator=generator, device=device).mul_(3).to(dtype)

    student, teacher = logits(size.vocab).requires_grad_(gradient), logits(size.teacher_vocab)

    def step(loss_of: Callable[[Tensor, Tensor], Tensor], z: Tensor) -> tuple[Tensor, ...]:
        loss = loss_of(z, teacher.to(z.dtype))
        return (loss.detach(), *torch.autograd.grad(loss, z)) if gradient else (loss,)

    def ours(k: Optional[int]) -> Step:
        kd = need("kd_kernels")
        return functools.partial(step, lambda z, y: kd.distill(z, y, kd.SortedWasserstein(top_k=k)), student)

    def exact(k: Optional[int]) -> tuple[Tensor, ...]:
        return step(functools.partial(published, top_k=k), student.detach().double().requires_grad_(gradient))

    def plain() -> tuple[Tensor, ...]:
        return step(lambda z, y: published(z.float(), y.float()), student)

    @torch.no_grad()
    def sorts() -> object:
        return student.sort(dim=-1), teacher.sort(dim=-1)

    steps = {EXACT: lambda: ours(None)(), TOP: lambda: ours(size.k)(), "torch": plain}
    truths = {EXACT: lambda: exact(None), TOP: lambda: exact(size.k), "torch": lambda: exact(None)}
    return sorts, steps, truths


def short_of(size: SortedSize, dtype: torch.dtype, device: str) -> dict[str, float]:
    """By how much the top-K form is too small, and by how much it may be: means over the tokens."""
    kd = need("kd_kernels")
    generator = torch.Generator(device).manual_seed(0)
    z, y = (
        torch.randn(size.tokens, vocab, generator=generator, device=device).mul_(3).to(dtype)
        for vocab in (size.vocab, size.teacher_vocab)
    )
    _, parts = kd.distill(z, y, kd.SortedWasserstein(top_k=size.k), return_parts=True)
    short = kd.distill(z, y, kd.SortedWasserstein(), reduction="none") - parts.soft
    if not bool((short <= parts.error_bound + 1e-5).all()):
        raise AssertionError("the top-K form is too small by more than its bound")
    return {"short": rounded(float(short.mean())), "bound": rounded(float(parts.error_bound.mean()))}


def run_case(
    what: str, size: SortedSize, dtype: str, *, threads: int, device: str, **timing: Any
) -> list[Row]:
    floor, steps, truths = case(size, DTYPES[dtype], device, what == "sorted step")
    # Near-ties between the two sides turn a sign, and a whole entry of the gradient with it.
    bar = {"fp32": 1e-2, "bf16": 0.2}[dtype]

    def check(provider: str, found: tuple[Tensor, ...]) -> Row:
        short = short_of(size, DTYPES[dtype], device) if provider == TOP else {}
        return {**graded(errors(found, truths[provider]()), bar), **short}

    row = {
        "bench": "sorted",
        "case_id": f"sorted/{what}/{dtype}/{size.tokens}x{size.vocab}+{size.teacher_vocab}/{size.k}",
        "case": {"what": what, "dtype": dtype, "threads": threads, **vars(size)},
    }
    return contest(row, steps, check, yardstick=YARDSTICK, floor=floor, device=device, **timing)


def run(results: Optional[Path], *, sizes: str, dtypes: Sequence[str], **timing: Any) -> list[Row]:
    names = ("sorted", "sorted step")
    cases = [(f"{name} {x}", run_case, (name, SORTED[sizes], x)) for name in names for x in dtypes]
    return run_cases("sorted", results, cases, compiling=sizes != "quick", **timing)


# --- the table ----------------------------------------------------------------------------------------

SORTED_HEADER = (
    "what",
    "tokens x student + teacher vocabulary",
    "dtype",
    "provider",
    "time",
    "x two sorts",
    "worst error",
    "short / bound",
    "targets",
)


def sorted_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """``short``: by how much the top-K form is below the exact value; ``bound``: by how much it may be."""
    lines = []
    for case in cases(rows).values():
        plain = median(case.get("torch"))
        for row in case.values():
            shape, mine, over = row["case"], median(row), median(row, "ratio_floor")
            note = failure(row)
            size = SortedSize(shape["tokens"], shape["vocab"], shape["teacher_vocab"], shape["k"])
            promised = size == SORTED["full"] and not on_gpu(row)
            if promised and row["provider"] == "kd" and over is not None:
                note = judged(over <= SORTED_OVER_FLOOR, f"two sorts <= {SORTED_OVER_FLOOR:g}")
            top_alone = shape["what"] == "sorted" and row["provider"] == "kd top-K"
            if promised and top_alone and None not in (mine, plain):
                note = judged(plain / mine >= SORTED_SPEEDUP, f"torch >= {SORTED_SPEEDUP:g}x")
            lines.append(
                (
                    shape["what"], f"{size.tokens} x {size.vocab} + {size.teacher_vocab}, K = {size.k}",
                    shape["dtype"], row["provider"], spread(row, "seconds", seconds), ratio(over),
                    worst_error(row),
                    f"{row['short']:.3g} / {row['bound']:.3g}" if "short" in row else "", note,
                )
            )  # fmt: skip
    return lines


BENCH = Bench(
    name="sorted",
    title="Sorted L1 between two vocabularies",
    about=(
        "The sorted L1 between two vocabularies (`kd.SortedWasserstein`), of logits that exist; its "
        "yardstick is two `torch.sort` of them. `sorted` is the loss alone, `sorted step` with the gradient "
        "to the student's logits; `torch` is the published form."
    ),
    header=SORTED_HEADER,
    lines=sorted_lines,
    run=run,
)
