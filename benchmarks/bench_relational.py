"""Losses between points: each as published code writes it, in plain torch, and ours; forward and backward.

Every case has the published form as its yardstick: the factor by which the others are faster is what counts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from contest import Step, contest, errors, graded, run_cases
from providers import need
from record import Row
from registry import Bench
from report import OURS, cases, failure, judged, median, on_gpu, ratio, seconds, spread, worst_error
from torch import Tensor
from workloads import RELATIONAL, RELATIONAL_SPEEDUP, RelationalSize

PUBLISHED = "published"
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


# --- transport ------------------------------------------------------------------------------------------

EPSILON, ITERATIONS, TEMPERATURE = 0.05, 10, 2.0  # of WKD-L


def published_classes(student: Tensor, teacher: Tensor, cost: Tensor, labels: Tensor) -> Tensor:
    """WKD-L: the label's class is cut out of a copy of the cost for every sample."""
    n, c = student.shape
    keep = torch.ones_like(student, dtype=torch.bool).scatter_(1, labels[:, None], False)
    a, b = ((x[keep].reshape(n, c - 1) / TEMPERATURE).softmax(1)[:, :, None] for x in (student, teacher))
    costs = cost.repeat(n, 1, 1)[keep[:, :, None] & keep[:, None, :]].reshape(n, c - 1, c - 1)
    kernel = (-costs / EPSILON).exp()
    u = torch.full_like(a, 1 / (c - 1))
    for _ in range(ITERATIONS):
        v = b / (kernel.transpose(1, 2) @ u + 1e-8)
        u = a / (kernel @ v + 1e-8)
    plan = u * (kernel * v.transpose(1, 2))
    return (plan * costs).sum((1, 2)).mean()


def shared_classes(student: Tensor, teacher: Tensor, cost: Tensor, labels: Tensor) -> Tensor:
    """The same by products that all samples share."""
    left = torch.ones_like(student).scatter_(1, labels[:, None], 0.0)
    a, b = ((x / TEMPERATURE).masked_fill(left == 0, -math.inf).softmax(1) for x in (student, teacher))
    kernel = (-cost / EPSILON).exp()
    u = left / (student.shape[1] - 1)
    for _ in range(ITERATIONS):
        v = b / (u @ kernel + 1e-8)
        u = a / (v @ kernel.t() + 1e-8)
    return (u * (v @ (kernel * cost).t())).sum(1).mean()


def class_case(size: RelationalSize, device: str) -> tuple[Case, Step]:
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    directions = F.normalize(normal(size.width, 64), dim=1)
    cost = (1 - directions @ directions.t()).clamp(min=0).fill_diagonal_(0.0)
    labels = torch.randint(size.width, (size.rows,), generator=generator, device=device)
    student, teacher = 3 * normal(size.rows, size.width), 3 * normal(size.rows, size.width)

    def ours(*inputs: Tensor) -> Tensor:
        return need("kd_kernels").class_transport(*inputs, denominator_eps=1e-8)

    return _steps(ours, published_classes, shared_classes, [student], [teacher, cost, labels])


def published_points(student: Tensor, teacher: Tensor, epsilon: float = 0.1) -> Tensor:
    """Cosine cost, uniform marginals, 100 iterations: columns, then rows."""
    cost = 1 - F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).t()
    kernel = (-cost / epsilon).exp()
    a, b = (cost.new_full((n, 1), 1 / n) for n in cost.shape)
    u = torch.ones_like(a)
    for _ in range(100):
        v = b / (kernel.t() @ u + 1e-9)
        u = a / (kernel @ v + 1e-9)
    return (u * kernel * v.t() * cost).sum()


def feature_case(size: RelationalSize, device: str) -> tuple[Case, Step]:
    def ours(*rows: Tensor) -> Tensor:
        return need("kd_kernels").feature_transport(*rows, epsilon=0.1, order="columns_rows")

    return _steps(ours, published_points, None, *points(size, device))


POSITIONS = 128


def sequence_case(size: RelationalSize, device: str) -> tuple[Case, Step]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (size.rows, POSITIONS, size.width)
    student, teacher = (torch.randn(shape, generator=generator, device=device) for _ in range(2))

    def ours(*states: Tensor) -> Tensor:
        return need("kd_kernels").sequence_transport(*states, epsilon=0.1)

    def published(student: Tensor, teacher: Tensor) -> Tensor:
        return torch.stack([published_points(x, y) for x, y in zip(student, teacher)]).mean()

    return _steps(ours, published, None, [student], [teacher])


PROMPT = POSITIONS // 4  # rows ahead of the answer


def published_multi_level(student: Tensor, teacher: Tensor, top_k: int = 50) -> Tensor:
    """Multi-Level OT: whole tensors of probabilities, their columns sorted, a Sinkhorn loop per sequence."""

    def kept(z: Tensor) -> Tensor:
        z = z / (z.std(dim=-1, keepdim=True) + 1e-4)
        p = torch.stack([one[PROMPT:].softmax(-1) for one in z])
        p = F.pad(p, (0, 0, 0, PROMPT))[:, : POSITIONS - PROMPT]
        return p[:, :, p.sum((0, 1)).argsort(descending=True)][:, :, :top_k]

    q, p = kept(student), kept(teacher)
    q, p = (F.pad(x, (0, max(q.shape[2], p.shape[2]) - x.shape[2])) for x in (q, p))
    loss = (q - p).abs().sum(-1).mean() - 0.1 * (q.softmax(-1) * p.log_softmax(-1)).sum(-1).mean()
    for one, other in zip((p / 2).softmax(-1), (q / 2).softmax(-1)):
        cost = torch.cdist(one, other, p=1)
        plan = (-cost / 0.1).exp()
        for _ in range(10):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        loss = loss + 1e-4 * (plan * cost).sum()
    return loss


def batched_multi_level(student: Tensor, teacher: Tensor, top_k: int = 50) -> Tensor:
    """The same without sorted copies, all sequences at once."""

    def kept(z: Tensor) -> Tensor:
        p = (z / (z.std(dim=-1, keepdim=True) + 1e-4)).softmax(-1)[:, PROMPT:]
        return p[:, :, p.sum((0, 1)).topk(min(top_k, p.shape[2])).indices]

    q, p = kept(student), kept(teacher)
    width = max(q.shape[2], p.shape[2])
    q, p = (F.pad(x, (0, width - x.shape[2])) for x in (q, p))
    loss = (q - p).abs().sum(-1).mean() - 0.1 * (q.softmax(-1) * p.log_softmax(-1)).sum(-1).mean()
    cost = torch.cdist((p / 2).softmax(-1), (q / 2).softmax(-1), p=1)
    plan = (-cost / 0.1).exp()
    for _ in range(10):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return loss + 1e-4 * (plan * cost).sum()


def multi_level_case(size: RelationalSize, device: str) -> tuple[Case, Step]:
    """Logits that exist; the teacher's vocabulary is the smaller one."""
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        3 * torch.randn(size.rows, POSITIONS, vocab, generator=generator, device=device)
        for vocab in (size.width, 7 * size.width // 8)
    )
    mask = (torch.arange(POSITIONS, device=device) >= PROMPT).expand(size.rows, -1)

    def ours(*logits: Tensor) -> Tensor:
        call = need("kd_kernels").multi_level_transport
        return call(*logits, student_mask=mask, teacher_mask=mask, padding=True, log_of="teacher")

    return _steps(ours, published_multi_level, batched_multi_level, [student], [teacher])


# --- tokens that both vocabularies have ---------------------------------------------------------------


def published_hybrid(student: Tensor, teacher: Tensor, matches: Tensor, beta: float = 0.5) -> Tensor:
    """TRL's GOLD: the matched probabilities by generalised JS, the others sorted."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    own, other = matches.unbind(1)
    logs = [x.clamp_min(1e-8).log() for x in (q[:, own], p[:, other])]
    mixture = torch.logsumexp(torch.stack([logs[0] + math.log1p(-beta), logs[1] + math.log(beta)]), 0)
    a, b = (F.kl_div(mixture, x, reduction="sum", log_target=True) for x in logs)
    rest = []
    for x, ids in ((q, own), (p, other)):
        left = torch.ones(x.shape[1], dtype=torch.bool, device=x.device).index_fill(0, ids, False)
        rest.append(x[:, left].sort(dim=-1, descending=True).values)
    width = max(x.shape[1] for x in rest)
    rest = [F.pad(x, (0, width - x.shape[1])) for x in rest]
    share = len(matches) / p.shape[1]
    unmatched = F.l1_loss(*rest, reduction="sum")
    return (share * (beta * b + (1 - beta) * a) + (1 - share) * unmatched) / len(q)


def hybrid_case(size: RelationalSize, device: str) -> tuple[Case, Step]:
    """Logits that exist; half of the teacher's tokens are the student's too."""
    generator = torch.Generator(device).manual_seed(0)
    vocabs = size.width, 7 * size.width // 8
    student, teacher = (
        3 * torch.randn(size.rows, vocab, generator=generator, device=device) for vocab in vocabs
    )
    ids = [torch.randperm(vocab, generator=generator, device=device)[: vocabs[1] // 2] for vocab in vocabs]

    def ours(*inputs: Tensor) -> Tensor:
        return need("kd_kernels").hybrid_uld(*inputs)

    return _steps(ours, published_hybrid, None, [student], [teacher, torch.stack(ids, 1)])


CASES = {
    "relational angle": angle_case,
    "relational distance": distance_case,
    "class transport": class_case,
    "feature transport": feature_case,
    "sequence transport": sequence_case,
    "multi-level OT": multi_level_case,
    "hybrid ULD": hybrid_case,
}


# --- running ----------------------------------------------------------------------------------------------


def run_case(name: str, size: RelationalSize, *, threads: int, device: str, **timing: Any) -> list[Row]:
    steps, exact = CASES[name](size, device)
    truth = exact()
    row = {
        "bench": "relational",
        "case_id": f"relational/{name}/{size.rows}x{size.width}",
        "case": {"what": name, "dtype": "fp32", "threads": threads, **vars(size)},
    }
    return contest(
        row,
        steps,
        lambda _, found: graded(errors(found, truth), 1e-3),
        yardstick=PUBLISHED,
        timed_anyway=(PUBLISHED,),
        device=device,
        **timing,
    )


def run(results: Optional[Path], *, sizes: str, dtypes: Sequence[str], **timing: Any) -> list[Row]:
    """In float32, whatever ``dtypes``."""
    cases = [(name, run_case, (name, size)) for name, size in RELATIONAL[sizes].items()]
    return run_cases("relational", results, cases, compiling=sizes != "quick", **timing)


# --- the table ----------------------------------------------------------------------------------------

RELATIONAL_HEADER = ("what", "size", "provider", "median [p20 .. p80]", "faster", "worst error", "targets")


def relational_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One line per provider; ``faster`` is how many times, than the published form."""
    lines = []
    for case in cases(rows).values():
        for row in case.values():
            what, over = row["case"]["what"], median(row, "ratio_floor")
            note = failure(row)
            size = RelationalSize(row["case"]["rows"], row["case"]["width"])
            wanted = RELATIONAL_SPEEDUP.get(what)
            promised = size == RELATIONAL["full"][what] and not on_gpu(row)
            if row["provider"] in OURS and over and wanted and promised:
                note = judged(1 / over >= wanted, f"published >= {wanted:g}x")
            lines.append(
                (
                    what, f"{size.rows} x {size.width}", row["provider"], spread(row, "seconds", seconds),
                    ratio(1 / over if over else None), worst_error(row), note,
                )
            )  # fmt: skip
    return lines


BENCH = Bench(
    name="relational",
    title="Losses between points, against the published form",
    about=(
        "Losses between points, forward and backward, fp32, rows x features or classes (or sequences of 128 "
        "positions x features or vocabulary); `published` is the form that the methods' own code has, "
        "`torch` the best we know in plain torch."
    ),
    header=RELATIONAL_HEADER,
    lines=relational_lines,
    run=run,
)
