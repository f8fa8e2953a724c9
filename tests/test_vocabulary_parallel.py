"""A vocabulary split over two or three processes: the loss and gradients of one that has all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, FLOOR, OBJECTIVES, OPTIONS, SHAPING, SOURCES, Batch, batch_for, error, leaves
from conftest import PROVED
from gpu import wants_gpu
from ranks import checks_of, read, run_checks
from torch import Tensor, nn

import kd_kernels as kd
from kd_kernels import triton_runtime

JS = kd.JensenShannon(0.3)


def part_of(vocab: int, world: int, rank: int) -> slice:
    """The first part is much larger than the others."""
    edges = [0, *(vocab * 2 // 3 + vocab * i // (4 * world) for i in range(world - 1)), vocab]
    return slice(edges[rank], edges[rank + 1])


def own(source: kd.Head | kd.Logits, part: slice, device: str = "cpu") -> kd.Head | kd.Logits:
    """The rank's part of a source, in tensors of its own."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(device).clone().requires_grad_(x.requires_grad)

    if isinstance(source, kd.Logits):
        return replace(source, values=leaf(source.values[..., part]))
    bias = None if source.bias is None else leaf(source.bias[part])
    return replace(source, hidden=leaf(source.hidden), weight=leaf(source.weight[part]), bias=bias)


def gradients(student, teacher, objective, upstream: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
    """Of all leaves that want one; the upstream gradient is not 1."""
    loss, parts = kd.distill(student, teacher, objective, return_parts=True, **options)
    wanted = [x for x in leaves(student, teacher) if x.requires_grad]
    found = torch.autograd.grad((loss * upstream.to(loss)).sum(), wanted)
    return [loss, parts.soft, parts.hard, parts.student_entropy, parts.teacher_entropy], list(found)


def of_part(found: list[Tensor], student, teacher, part: slice) -> list[Tensor]:
    """Of a whole model's gradients those that a rank has: all of hidden states, its part of the others."""
    hidden = [x.hidden for x in (student, teacher) if isinstance(x, kd.Head)]
    wanted = [x for x in leaves(student, teacher) if x.requires_grad]
    return [
        g if any(x is h for h in hidden) else g[part] if x.dim() < 3 else g[..., part]
        for g, x in zip(found, wanted)
    ]


def compare(
    world: int,
    rank: int,
    objective: kd.Objective,
    option: str = "everything",
    kinds: tuple[str, str] = ("head", "head"),
    dtype: torch.dtype = torch.float32,
    shaping: str = "bare",
    backend: str | None = None,
    device: str = "cpu",
    **more,
) -> None:
    """As exact, against all of the vocabulary in float64, as one process is in ``dtype``."""
    batch = batch_for(backend)
    part = part_of(batch.vocab, world, rank)
    asked = {**OPTIONS[option](batch), **more, "teacher_grad": True}
    upstream = batch.upstream if asked.get("reduction") == "none" else torch.tensor(1.7)

    def sources(dtype: torch.dtype) -> list[kd.Head | kd.Logits]:
        made = []
        for side, kind in zip(("student", "teacher"), kinds):
            shape = {**SHAPING[shaping]}
            if kind == "logits":
                shape.pop("bias", None)
            made.append(batch.source(side, kind, dtype, **shape))
        return made

    rounded = [own(x, slice(None)) for x in sources(dtype)]
    exact = [
        replace(
            x,
            **{k: v.detach().double().requires_grad_() for k, v in vars(x).items() if isinstance(v, Tensor)},
        )
        for x in rounded
    ]
    results = []
    for pair in (exact, rounded):
        terms, found = gradients(*pair, objective, upstream, **asked)
        results.append((terms, of_part(found, *pair, part)))
    mine = [own(x, part, device) for x in rounded]
    here = {k: v.to(device) if isinstance(v, Tensor) and v.dim() else v for k, v in asked.items()}
    here |= {"vocab_group": dist.group.WORLD, "backend": backend}
    terms, found = gradients(*mine, objective, upstream, workspace_bytes=8_000 << 3 * rank, **here)
    (exact_terms, exact_found), (whole_terms, whole_found) = results
    for what, ours, whole, truth in zip(
        ("terms", "gradients"), (terms, found), (whole_terms, whole_found), (exact_terms, exact_found)
    ):
        for i, (x, y, z) in enumerate(zip(ours, whole, truth)):
            bar = 2 * error(y, z) + FLOOR[dtype]
            assert error(x.cpu(), z) <= bar, (what, i, objective, option, kinds, dtype, shaping)


def check_objectives(world, rank, mesh):
    for objective in OBJECTIVES:
        for option in ("everything", "none", "cross-entropy"):
            compare(world, rank, objective, option)


def check_options(world, rank, mesh):
    for option in OPTIONS:
        for compact in (True, False):
            compare(world, rank, JS, option, compact=compact)


def check_sources(world, rank, mesh):
    for kinds in SOURCES:
        for shaping in SHAPING:
            for option in ("everything", "none"):
                compare(world, rank, kd.ReverseKL(), option, kinds, shaping=shaping)


def check_dtypes(world, rank, mesh):
    for dtype in DTYPES:
        for kinds in SOURCES:
            compare(world, rank, JS, "cross-entropy", kinds, dtype)


def check_reference(world, rank, mesh):
    for objective in OBJECTIVES:
        compare(world, rank, objective, "cross-entropy at temperature", backend="reference")


def check_interpreted(world, rank, mesh):
    """Triton's kernels, phase by phase, labels beyond their entries."""
    skip_old_triton()
    for objective in OBJECTIVES:
        compare(world, rank, objective, "cross-entropy at temperature", backend="triton")
    compare(world, rank, JS, "none", ("logits", "logits"), backend="triton")


def skip_old_triton() -> None:
    if triton_runtime.version() < PROVED:
        pytest.skip(f"Triton is older than {PROVED}: its interpreter aborts on some kernels")


def rows(world: int, rank: int) -> tuple[Tensor, Tensor, slice]:
    g = torch.Generator().manual_seed(3)
    return *torch.randn(2, 4, 30, generator=g).mul(2), part_of(30, world, rank)


def check_banned_entries(world, rank, mesh):
    """A rank may have none but banned entries, of one row or of all (the padding of a vocabulary)."""
    for banned in (part_of(30, world, world - 1), slice(0, 1), part_of(30, world, 0)):
        student, teacher, part = rows(world, rank)
        for x in (student, teacher):
            x[:2, banned] = -torch.inf
        labels = torch.tensor([29 if banned.start == 0 else 0] * 4)
        options = {"labels": labels, "hard_weight": 0.4, "reduction": "none"}
        whole, mine = student.clone().requires_grad_(), student[:, part].clone().requires_grad_()
        loss = kd.distill(whole, teacher, JS, **options)
        split = kd.distill(mine, teacher[:, part], JS, **options, vocab_group=dist.group.WORLD)
        assert loss.isfinite().all() and error(split, loss) < 1e-6
        loss.sum().backward()
        split.sum().backward()
        assert error(mine.grad, whole.grad[:, part]) < 1e-6


def check_nan_and_infinity(world, rank, mesh, backends=("cpu", "reference")):
    """Wherever it stands, also among banned entries, and whatever is computed: that row is NaN on all ranks,
    the others are as they were."""
    for wrong in (torch.nan, torch.inf):
        for backend in backends:
            for place in (0, 29):
                for weights in ({"hard_weight": 1.0, "soft_weight": 0.0}, {"hard_weight": 0.5}):
                    student, teacher, part = rows(world, rank)
                    clean = kd.distill(
                        student, teacher, JS, reduction="none", labels=torch.ones(4).long(), **weights
                    )
                    student[1] = -torch.inf
                    student[1, [1, 28]] = 0.5
                    student[1, place] = wrong
                    if place == 29:
                        student[1, 28] = -torch.inf
                    mine = student[:, part].clone().requires_grad_()
                    loss = kd.distill(
                        mine, teacher[:, part], JS, reduction="none", labels=torch.ones(4).long(),
                        vocab_group=dist.group.WORLD, backend=backend, **weights,
                    )  # fmt: skip
                    loss.sum().backward()
                    assert loss[1].isnan() and mine.grad[1].isnan().all(), (wrong, backend, place, weights)
                    rest = [0, 2, 3]
                    assert error(loss[rest], clean[rest]) < 1e-6 and mine.grad[rest].isfinite().all()


def check_nan_and_infinity_interpreted(world, rank, mesh):
    skip_old_triton()
    check_nan_and_infinity(world, rank, mesh, ["triton"])


def check_a_row_without_a_finite_logit(world, rank, mesh):
    student, teacher, part = rows(world, rank)
    student[1] = -torch.inf
    loss = kd.distill(student[:, part], teacher[:, part], JS, reduction="none", vocab_group=dist.group.WORLD)
    assert loss[1].isnan() and loss[[0, 2, 3]].isfinite().all()


def check_labels(world, rank, mesh):
    """Ids count over all ranks; out of all of them is an error on every rank."""
    student, teacher, part = rows(world, rank)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 30\).*got 30"):
        kd.distill(
            student[:, part], teacher[:, part], JS, labels=torch.tensor([0, 30, 1, 2]), hard_weight=0.5,
            vocab_group=dist.group.WORLD,
        )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # as on a GPU, where a look would wait
        patch.setattr("kd_kernels.ops.row_divergence.checks_values", lambda device: False)
        mine = student[:, part].clone().requires_grad_()
        loss = kd.distill(
            mine, teacher[:, part], JS, labels=torch.tensor([0, 30, 1, 2]), hard_weight=0.5, reduction="none",
            vocab_group=dist.group.WORLD,
        )  # fmt: skip
        loss.sum().backward()
    assert loss[1].isnan() and mine.grad[1].isnan().all()
    assert loss[[0, 2, 3]].isfinite().all() and mine.grad[[0, 2, 3]].isfinite().all()


def check_sums_are_not_in_16_bits(world, rank, mesh):
    """Many ranks would round many times; two, as here, once in any case."""
    summed, found = dist.all_reduce, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda x, *a, **k: found.append(x.dtype) or summed(x, *a, **k))
        compare(world, rank, JS, dtype=torch.bfloat16)
    assert found and not {torch.bfloat16, torch.float16} & set(found)


def check_parts_that_cancel(world, rank, mesh):
    """What the rows of a weight have in common cancels over all ranks and not within one: no summand may be
    rounded to 16 bits."""
    g = torch.Generator().manual_seed(5)
    hidden, vocab = torch.randn(16, 32, generator=g), 1024
    weight = 0.1 * torch.randn(vocab, 32, generator=g) + torch.randn(32, generator=g)
    teacher = torch.randn(16, vocab, generator=g) - 0.7 * (torch.arange(vocab) < vocab // 2)
    part, dtype = part_of(vocab, world, rank), torch.bfloat16
    for deferred in (False, True):
        reduction, found = "none" if deferred else "mean", []
        for h, w, t, group in (
            (hidden.to(dtype).double(), weight.to(dtype).double(), teacher.double(), None),
            (hidden.to(dtype), weight.to(dtype), teacher, None),
            (hidden.to(dtype), weight.to(dtype)[part], teacher[:, part], dist.group.WORLD),
        ):
            h = h.clone().requires_grad_()
            loss = kd.distill(kd.Head(h, w), t, kd.ForwardKL(), reduction=reduction, vocab_group=group)
            found += torch.autograd.grad(loss.sum(), h)
        exact, whole, split = found
        assert error(split, exact) <= 2 * error(whole, exact)


def check_disagreement(world, rank, mesh):
    """What would end in waiting or in wrong sums is an error on every rank."""
    student, teacher, part = rows(world, rank)
    student, teacher = student[:, part], teacher[:, part]
    group = {"vocab_group": dist.group.WORLD}
    mask = torch.arange(4) < 3 + (rank == 0)
    with pytest.raises(
        ValueError, match=r"number of tokens that count must be the same on every rank, got \[4, 3"
    ):
        kd.distill(student, teacher, JS, mask=mask, **group)
    with pytest.raises(ValueError, match="gradients wanted.*same on every rank"):
        kd.distill(student.clone().requires_grad_(rank == 0), teacher, JS, reduction="none", **group)


def check_no_room(world, rank, mesh):
    """For the largest part: an error on every rank, also on those whose part would fit."""
    batch = Batch()
    part = part_of(batch.vocab, world, rank)
    mine = [own(batch.source(side, "head", torch.float32), part) for side in ("student", "teacher")]
    with pytest.raises(ValueError, match="workspace_bytes"):
        kd.distill(*mine, JS, vocab_group=dist.group.WORLD, workspace_bytes=900)


def check_refusals(world, rank, mesh):
    student, teacher, part = rows(world, rank)
    sparse = kd.SparseTarget(torch.zeros(4, 1, dtype=torch.int32), torch.full((4, 1), -0.5))
    group = {"vocab_group": dist.group.WORLD}
    for wrong, words, arguments in (
        (TypeError, r"ProcessGroup.*get_group\(\)\), got DeviceMesh", (teacher, JS, {"vocab_group": mesh})),
        (TypeError, "ProcessGroup that this rank is in.*got int", (teacher, JS, {"vocab_group": -100})),
        (ValueError, "SinkhornBatch compares whole rows", (teacher, kd.SinkhornBatch(), group)),
        (ValueError, "SortedWasserstein compares whole rows", (teacher, kd.SortedWasserstein(), group)),
        (ValueError, "SparseTarget names tokens of all ranks", (sparse, JS, group)),
        (ValueError, "cut both models before", (teacher, JS, {**group, "vocab": "truncate"})),
    ):
        with pytest.raises(wrong, match=words):
            kd.distill(student, arguments[0], arguments[1], **arguments[2])


def check_nothing_counts(world, rank, mesh):
    student, teacher, part = rows(world, rank)
    mine = student[:, part].clone().requires_grad_()
    loss = kd.distill(mine, teacher[:, part], JS, mask=torch.zeros(4).bool(), vocab_group=dist.group.WORLD)
    loss.backward()
    assert loss == 0 and not mine.grad.any()


def check_a_column_parallel_layer(world, rank, mesh):
    """As torch's own tensor parallelism holds the output layer, its 23 rows in parts of unequal size."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(0)
    whole, split = nn.Linear(8, 23), nn.Linear(8, 23)
    split.load_state_dict(whole.state_dict())
    hidden, teacher = torch.randn(5, 8), torch.randn(5, 23)
    parallelize_module(split, mesh, ColwiseParallel())
    weight, bias = (x.to_local() for x in (split.weight, split.bias))
    first = sum(len(x) for x in torch.arange(23).chunk(world)[:rank])
    mine = kd.Logits(teacher[:, first : first + len(weight)])
    loss = kd.distill(kd.Head(hidden, weight, bias), mine, JS, vocab_group=mesh.get_group())
    loss.backward()
    exact = kd.distill(kd.Head(hidden, whole.weight, whole.bias), teacher, JS)
    exact.backward()
    assert error(loss, exact) < 1e-6
    for x, y in ((split.weight, whole.weight), (split.bias, whole.bias)):
        assert error(x.grad.full_tensor(), y.grad) < 1e-6


def check_compiled(world, rank, mesh):
    """The group is a constant of the graph."""
    batch = Batch()
    part, found = part_of(batch.vocab, world, rank), []
    for wrap in (lambda f: f, torch.compile(fullgraph=True, backend="aot_eager")):
        mine = [own(batch.source(side, "head", torch.float32), part) for side in ("student", "teacher")]

        def step(hidden, weight, teacher=mine[1]):
            return kd.distill(kd.Head(hidden, weight), teacher, JS, vocab_group=dist.group.WORLD)

        loss = wrap(step)(mine[0].hidden, mine[0].weight)
        found.append([loss, *torch.autograd.grad(loss, [mine[0].hidden, mine[0].weight])])
    for eager, compiled in zip(*found):
        assert torch.equal(eager, compiled)


def check_the_same_on_all_ranks(world, rank, mesh):
    """To the bit, or their models drift apart."""
    batch = Batch()
    mine = [
        own(batch.source(side, "head", torch.float32), part_of(batch.vocab, world, rank))
        for side in ("student", "teacher")
    ]
    loss = kd.distill(*mine, JS, labels=batch.labels, hard_weight=0.5, vocab_group=dist.group.WORLD)
    loss.backward()
    for x in (loss.detach(), mine[0].hidden.grad):
        others = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(others, x.contiguous())
        assert all(torch.equal(x, other) for other in others)


def gpu_parity(world, rank, mesh):
    """Both ranks on one GPU, which gloo serves by way of the host."""
    for backend in ("triton", "reference"):
        for objective in OBJECTIVES:
            compare(world, rank, objective, "cross-entropy at temperature", backend=backend, device="cuda")
        for dtype in DTYPES:
            compare(world, rank, JS, "none", ("head", "logits"), dtype, backend=backend, device="cuda")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_checks(2, tmp_path_factory, __name__, "check_")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return run_checks(3, tmp_path_factory, __name__, "check_")


@pytest.mark.parametrize("name", checks_of(__name__, "check_"))
def test_two_processes(name, two):
    read(two, 2, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", checks_of(__name__, "check_"))
def test_three_processes(name, three):
    read(three, 3, name)


@wants_gpu[0]
@wants_gpu[1]
@pytest.mark.parametrize("name", checks_of(__name__, "gpu_"))
def test_on_a_gpu(name, tmp_path_factory):
    read(run_checks(2, tmp_path_factory, __name__, "gpu_"), 2, name)
