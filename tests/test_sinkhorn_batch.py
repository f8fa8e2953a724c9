"""SinKD: the transport between the rows of two models, against the published code in float64 and autograd."""

import pytest
import torch
from cases import DTYPES, FLOOR, SHAPING, SOURCES, Batch, error, leaves
from watch import in_a_process

import kd_kernels as kd
from kd_kernels.backends import TABLE

BACKENDS = ["cpu", "reference", "triton"]
EACH = pytest.mark.parametrize("name", BACKENDS)
CONVERGED = kd.SinkhornBatch(epsilon=0.4, iterations=5000, tolerance=1e-11)
# Interpreted, an iteration is slow and like the next: fewer, and problems that need fewer.
SOON_CONVERGED = kd.SinkhornBatch(epsilon=2.0, iterations=5000, tolerance=1e-11)
GROUPS = torch.tensor([[4, 4, 0, 4, -7], [-7, 0, 4, 9, 4], [0, 4, 0, -7, 0]])


def logits(source: kd.Head | kd.Logits, dtype: torch.dtype, vocab: int) -> torch.Tensor:
    values, weight, bias = (None if x is None else x.to(dtype) for x in source.tensors())
    z = values if weight is None else values @ weight.T + (0 if bias is None else bias)
    z = z[..., :vocab] * source.scale
    return z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)


def published(p: torch.Tensor, q: torch.Tensor, objective: kd.SinkhornBatch) -> torch.Tensor:
    """As SinKD's code has it, on probabilities ``[n, V]``; the converged form by more of the same."""
    cost = (p[:, None] - q[None]).abs().sum(-1)
    plan = (-cost / objective.epsilon).exp()
    for _ in range(20 if objective.iterations is None else min(objective.iterations, 100)):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def dense(
    student, teacher, objective, *, dtype=torch.float64, labels=None, mask=None, groups=None, temperature=2.0,
    teacher_temperature=None, hard_weight=0.0, soft_weight=1.0, temperature_squared=False, reduction="mean",
    num_items=None,
) -> torch.Tensor:  # fmt: skip
    vocab = min(student.vocab_size, teacher.vocab_size)
    z_s, z_t = (logits(x, dtype, vocab).reshape(-1, vocab) for x in (student, teacher))
    t_s, t_t = (
        torch.as_tensor(t, dtype=dtype).reshape(-1, 1)
        for t in (temperature, temperature if teacher_temperature is None else teacher_temperature)
    )
    counts = torch.ones(len(z_s), dtype=torch.bool)
    if labels is not None:
        counts &= labels.reshape(-1) != -100
    if mask is not None:
        counts &= mask.reshape(-1)
    p, q = (z_s / t_s).softmax(-1), (z_t / t_t).softmax(-1)
    group = torch.zeros(len(z_s)) if groups is None else groups.reshape(-1)
    total = z_s.new_zeros(())
    for g in group[counts].unique():
        rows = counts & (group == g)
        total = total + published(p[rows], q[rows], objective)
    total = soft_weight * total * (t_s.squeeze() ** 2 if temperature_squared else 1)
    if hard_weight:
        total = total + hard_weight * torch.nn.functional.cross_entropy(
            z_s[counts], labels.reshape(-1)[counts], reduction="sum"
        )
    if reduction == "mean":
        return total / (counts.sum().clamp(min=1) if num_items is None else num_items)
    return total / student.leading_shape[0] if reduction == "batchmean" else total


def gradients(loss: torch.Tensor, *sources) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves(*sources)))


def pair(kinds=("head", "head"), dtype=torch.float64, shape="all", **batch):
    made = Batch(**batch)
    return made, *(
        made.source(s, k, dtype, **shaped(k, shape)) for s, k in zip(("student", "teacher"), kinds)
    )


def shaped(kind: str, shape: str) -> dict:
    return {k: v for k, v in SHAPING[shape].items() if kind == "head" or k != "bias"}


OPTIONS = {
    "plain": lambda b: {},
    "labels and mask": lambda b: {"labels": b.labels, "mask": b.mask},
    "groups": lambda b: {"groups": GROUPS},
    "groups and mask": lambda b: {"groups": GROUPS, "mask": b.mask, "reduction": "sum"},
    "each token alone": lambda b: {"groups": torch.arange(15).view(3, 5)},
    "everything": lambda b: {
        "groups": GROUPS, "labels": b.labels, "hard_weight": 0.4, "soft_weight": 0.7, "temperature": 1.7,
        "teacher_temperature": b.temperature, "temperature_squared": True, "num_items": 7.0,
    },
    "token temperature": lambda b: {"temperature": b.temperature, "reduction": "batchmean"},
}  # fmt: skip


@EACH
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kinds", SOURCES, ids="x".join)
def test_value_and_gradients(kinds, options, name):
    interpreted = name == "triton"
    if interpreted and options == "each token alone" and kinds != ("head", "head"):
        pytest.skip("15 problems take the interpreter a while: of two heads only")
    batch, student, teacher = pair(kinds)
    objectives = (
        (kd.SinkhornBatch(iterations=5), SOON_CONVERGED) if interpreted else (kd.SinkhornBatch(), CONVERGED)
    )
    for objective in objectives:
        converged = objective.tolerance is not None
        for few in (not converged,) if interpreted else (False, True):  # several slabs once, one slab once
            chosen = {"temperature": 2.0, **OPTIONS[options](batch)}
            want = dense(student, teacher, objective, **chosen)
            room = 10000 if not interpreted else 80000 if options != "each token alone" else 280000
            small = {"workspace_bytes": room} if few else {}  # several slabs
            loss = kd.distill(student, teacher, objective, teacher_grad=True, backend=name, **small, **chosen)
            tolerance = 1e-8 if converged else 1e-12
            assert error(loss, want) < tolerance
            exact = gradients(want, student, teacher)
            for g, x in zip(gradients(loss, student, teacher), exact):
                assert error(g, x) < (1e-7 if converged else 1e-11)


@EACH
@pytest.mark.parametrize("kinds", SOURCES, ids="x".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_as_accurate_as_plain_torch(dtype, kinds, name):
    batch, student, teacher = pair(kinds, dtype, vocab=1500, lead=(2, 9))
    wide = [
        type(x)(
            *(None if t is None else t.detach().double().requires_grad_() for t in x.tensors()),
            x.scale,
            x.softcap,
        )
        if isinstance(x, kd.Head)
        else kd.Logits(x.values.detach().double().requires_grad_(), x.scale, x.softcap)
        for x in (student, teacher)
    ]
    options = {"labels": batch.labels, "reduction": "sum", "temperature": 2.0}
    exact = dense(*wide, kd.SinkhornBatch(), **options)
    plain = dense(student, teacher, kd.SinkhornBatch(), dtype=dtype, **options)
    loss = kd.distill(student, teacher, kd.SinkhornBatch(), teacher_grad=True, backend=name, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(loss, exact) <= 2 * error(plain, exact) + FLOOR[dtype]
    ours, theirs = gradients(loss, student, teacher), gradients(plain, student, teacher)
    for g, p, x in zip(ours, theirs, gradients(exact, *wide)):
        assert g.dtype == dtype
        assert error(g, x) <= 2 * error(p, x) + FLOOR[dtype]


@EACH
def test_subsets_of_gradients_and_a_frozen_head(name):
    batch, student, teacher = pair()
    whole = gradients(kd.distill(student, teacher, kd.SinkhornBatch(), backend=name), student)
    for needed in range(3):
        tensors = [x.detach().requires_grad_(i == needed) for i, x in enumerate(leaves(student))]
        head = kd.Head(*tensors, student.scale, student.softcap)
        loss = kd.distill(head, teacher, kd.SinkhornBatch(), backend=name)
        (g,) = torch.autograd.grad(loss, [tensors[needed]])
        assert error(g, whole[needed]) < 1e-14
    assert not kd.distill(student, teacher, kd.SinkhornBatch(), backend=name).isnan()
    with torch.no_grad():
        assert not kd.distill(student, teacher, kd.SinkhornBatch(), backend=name).requires_grad


@EACH
def test_gradcheck(name):
    if name == "triton":
        pytest.skip("takes the interpreter a minute; its gradients are compared with autograd's elsewhere")
    _, student, teacher = pair(("head", "logits"), lead=(3,), vocab=11, student_width=4)

    def loss(hidden, weight, bias, values):
        head = kd.Head(hidden, weight, bias, student.scale, student.softcap)
        return kd.distill(head, values, kd.SinkhornBatch(iterations=4), teacher_grad=True, backend=name)

    assert torch.autograd.gradcheck(loss, (*student.tensors(), teacher.values), eps=1e-7, atol=1e-6)


@EACH
def test_not_compacted_is_the_same(name):
    batch, student, teacher = pair(("head", "logits"))
    dirty = teacher.values.detach().clone()
    dirty[~batch.mask] = torch.nan
    dirty.requires_grad_()
    results = []
    for compact, values in ((True, teacher.values), (False, teacher.values), (False, dirty)):
        loss = kd.distill(
            student,
            values,
            kd.SinkhornBatch(),
            mask=batch.mask,
            compact=compact,
            teacher_grad=True,
            backend=name,
        )
        results.append([loss, *torch.autograd.grad(loss, [*leaves(student), values])])
    for other in results[1:]:
        for x, y in zip(other, results[0]):
            assert error(x, y) < 1e-13


@EACH
def test_same_models_have_no_gradient_from_their_own_pair(name):
    """sign(0) is 0: one row, and the same for both, is at the minimum."""
    z = torch.randn(1, 50, requires_grad=True)
    loss = kd.distill(z, z.detach().clone(), kd.SinkhornBatch(), backend=name)
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


@EACH
@pytest.mark.parametrize("fill", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_distribution_is_nan_for_its_group_only(fill, name):
    student, teacher = torch.randn(6, 40), torch.randn(6, 40)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    clean = kd.distill(
        student[2:], teacher[2:], kd.SinkhornBatch(), groups=groups[2:], backend=name, reduction="sum"
    )
    student[1] = fill if fill < 0 else student[1]
    student[1, 3] = fill
    student.requires_grad_()
    loss, parts = kd.distill(
        student, teacher, kd.SinkhornBatch(), groups=groups, backend=name, reduction="sum", return_parts=True
    )
    assert loss.isnan()
    assert parts.soft[:2].isnan().all() and error(parts.soft[2:].sum(), clean) < 1e-6
    loss.backward()
    assert student.grad[1].isnan().any() and student.grad[2:].isfinite().all()


@EACH
def test_banned_entries(name):
    batch, student, teacher = pair(("logits", "logits"), shape="bare")
    student.values.data[..., ::3] = -torch.inf
    teacher.values.data[..., 1::3] = -torch.inf
    want = dense(student, teacher, kd.SinkhornBatch())
    loss = kd.distill(student, teacher, kd.SinkhornBatch(), temperature=2.0, backend=name)
    assert error(loss, want) < 1e-12
    (g,) = torch.autograd.grad(loss, [student.values])
    assert error(g, torch.autograd.grad(want, [student.values])[0]) < 1e-12


@EACH
def test_nothing_counts(name):
    _, student, teacher = pair()
    for options in ({}, {"groups": GROUPS}, {"compact": False}):
        loss = kd.distill(
            student, teacher, kd.SinkhornBatch(), mask=torch.zeros(3, 5).bool(), backend=name, **options
        )
        assert loss == 0
        assert all((g == 0).all() for g in gradients(loss, student))


def test_other_vocabularies_truncated():
    batch, student, _ = pair()
    teacher = Batch(vocab=150, seed=1).source("teacher", "head", torch.float64)
    with pytest.raises(ValueError, match="vocab="):
        kd.distill(student, teacher, kd.SinkhornBatch())
    options = {"labels": batch.labels.clamp(max=149), "hard_weight": 0.5, "temperature": 2.0}
    want = dense(student, teacher, kd.SinkhornBatch(), **options)
    loss = kd.distill(student, teacher, kd.SinkhornBatch(), vocab="truncate", teacher_grad=True, **options)
    assert error(loss, want) < 1e-12
    for g, x in zip(gradients(loss, student, teacher), gradients(want, student, teacher)):
        assert error(g, x) < 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_the_heads(dtype):
    """As heads cast by hand, with gradients in the parameters' own dtype."""
    _, *heads = pair(dtype=torch.float32)
    # Without the biases, which autocast adds to the products as they are.
    student, teacher = (kd.Head(x.hidden, x.weight, None, x.scale, x.softcap) for x in heads)
    narrow = [
        kd.Head(x.hidden.to(dtype), x.weight.to(dtype), None, x.scale, x.softcap) for x in (student, teacher)
    ]
    objective, options = kd.SinkhornBatch(), {"temperature": 2.0, "teacher_grad": True}
    with torch.autocast("cpu", dtype):
        loss = kd.distill(student, teacher, objective, **options)
    by_hand = kd.distill(*narrow, objective, **options)
    assert torch.equal(loss, by_hand)
    for g, x in zip(gradients(loss, student, teacher), gradients(by_hand, student, teacher)):
        assert g.dtype == torch.float32 and error(g, x) < 2 * torch.finfo(dtype).eps


def test_parts():
    batch, student, teacher = pair()
    options = {"labels": batch.labels, "temperature": 2.0, "hard_weight": 0.3, "groups": GROUPS}
    loss, parts = kd.distill(student, teacher, kd.SinkhornBatch(), return_parts=True, **options)
    kl = kd.distill(student, teacher, kd.ForwardKL(), return_parts=True, **{**options, "groups": None})[1]
    n = parts.valid_tokens
    assert error((parts.soft.sum() + 0.3 * parts.hard.sum()) / n, loss) < 1e-12
    assert (parts.soft[batch.labels == -100] == 0).all()
    for name in ("hard", "student_entropy", "teacher_entropy", "valid_tokens"):
        assert error(getattr(parts, name), getattr(kl, name)) < 1e-12, name


def test_neither_threads_nor_groups_change_the_bits():
    z, y = torch.randn(37, 3000, requires_grad=True), torch.randn(37, 3000)
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = kd.distill(z, y, kd.SinkhornBatch())
            found.append((loss, *torch.autograd.grad(loss, [z])))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0]))


def test_groups_too_uneven_for_sums_of_their_own_sections():
    """One large group beside many of one token: threads share the tiles there."""
    batch = Batch(lead=(363,), vocab=40)
    groups = torch.arange(363).clamp(min=299) - 299

    def step(rows, threads):
        torch.set_num_threads(threads)
        logits = [
            batch.source(side, "logits", torch.float32).values.detach()[rows]
            for side in ("student", "teacher")
        ]
        logits[0].requires_grad_()
        objective = kd.SinkhornBatch(iterations=3)
        loss = kd.distill(*logits, objective, reduction="sum", groups=groups[rows], backend="cpu")
        return [loss.detach(), *torch.autograd.grad(loss, logits[0])]

    try:
        whole, alone = step(slice(None), 1), step(slice(0, 300), 1)
        assert all(torch.equal(x, y) for x, y in zip(whole, step(slice(None), 2)))
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(whole[1][:300], alone[1], rtol=1e-4, atol=1e-7)
    single = step(slice(300, None), 1)
    torch.testing.assert_close(whole[0], alone[0] + single[0], rtol=1e-5, atol=0)


def test_slabs_change_hardly_anything():
    _, student, teacher = pair(dtype=torch.float32, vocab=5000)
    one, many = (
        kd.distill(student, teacher, kd.SinkhornBatch(), workspace_bytes=size) for size in (None, 100_000)
    )
    assert error(many, one) < 1e-6
    for x, y in zip(gradients(many, student), gradients(one, student)):
        assert error(x, y) < 1e-5


REFUSED = {
    "none": (lambda z, o: kd.distill(z, z, o, reduction="none"), ValueError, 'reduction must be "mean"'),
    "weights": (
        lambda z, o: kd.distill(z, z, o, token_weight=torch.ones(4)),
        ValueError,
        "token_weight has no",
    ),
    "sparse": (
        lambda z, o: kd.distill(z, kd.SparseTarget(torch.zeros(4, 1).long(), torch.zeros(4, 1)), o),
        TypeError,
        "not a SparseTarget",
    ),
    "groups elsewhere": (
        lambda z, o: kd.distill(z, z, kd.ForwardKL(), groups=torch.zeros(4).long()),
        ValueError,
        "groups goes with",
    ),
    "groups' shape": (
        lambda z, o: kd.distill(z, z, o, groups=torch.zeros(3).long()),
        ValueError,
        "groups must have",
    ),
    "groups' type": (
        lambda z, o: kd.distill(z, z, o, groups=torch.zeros(4)),
        TypeError,
        "groups must be integers",
    ),
    "temperatures squared": (
        lambda z, o: kd.distill(z, z, o, temperature=torch.ones(4), temperature_squared=True),
        ValueError,
        "one temperature",
    ),
    "temperature": (lambda z, o: kd.distill(z, z, o, temperature=0.0), ValueError, "temperature must be"),
    "workspace": (
        lambda z, o: kd.distill(kd.Head(z, z), kd.Head(z, z), o, workspace_bytes=10),
        ValueError,
        "workspace_bytes=10",
    ),
    **{
        f"label {label}{', hard' if hard else ''}": (
            lambda z, o, label=label, hard=hard: kd.distill(
                z, z + 1, o, labels=torch.tensor([1, label, 2, -100]), hard_weight=hard
            ),
            ValueError,
            rf"labels must be in \[0, 30\) or ignore_index .* got {label}",
        )
        for label in (-1, 30)
        for hard in (0.0, 1.0)
    },
    "epsilon": (lambda z, o: kd.SinkhornBatch(epsilon=0), ValueError, "epsilon must be finite and > 0"),
    "iterations": (lambda z, o: kd.SinkhornBatch(iterations=2.0), TypeError, "iterations must be an int"),
    "no iterations": (lambda z, o: kd.SinkhornBatch(iterations=0), ValueError, "iterations must be >= 1"),
    "tolerance": (lambda z, o: kd.SinkhornBatch(tolerance="1"), TypeError, "tolerance must be a number"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_refusals(which):
    call, kind, message = REFUSED[which]
    with pytest.raises(kind, match=message):
        call(torch.randn(4, 30, requires_grad=True), kd.SinkhornBatch())


def test_double_backward_is_refused():
    z = torch.randn(4, 30, requires_grad=True)
    (g,) = torch.autograd.grad(kd.distill(z, z.detach() + 1, kd.SinkhornBatch()), [z], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_opcheck_and_compile():
    _, student, teacher = pair(("head", "logits"), torch.float32, lead=(6,))
    members = torch.tensor([[0, 2, 5], [1, 3, -1]])
    one = torch.ones((), dtype=torch.float64)
    scalars = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    needs = [True, True, True, False, False, False]
    call = (
        *student.tensors(),
        *teacher.tensors(),
        members,
        one,
        one,
        scalars,
        None,
        None,
        None,
        None,
        True,
        needs,
    )
    call = tuple(
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in call
    )
    torch.use_deterministic_algorithms(False)  # opcheck compares uninitialised empties otherwise
    torch.library.opcheck(torch.ops.kd_kernels.pairwise_l1.default, call)

    def step(hidden, weight, values, mask):
        loss = kd.distill(kd.Head(hidden, weight), values, kd.SinkhornBatch(), mask=mask, compact=False)
        return loss, *torch.autograd.grad(loss, [hidden, weight])

    arguments = student.hidden, student.weight, teacher.values.detach(), torch.arange(6) != 2
    for x, y in zip(torch.compile(step, backend="aot_eager")(*arguments), step(*arguments)):
        assert error(x, y) < 1e-6


def test_the_module_and_the_objective_as_data():
    z, y = torch.randn(4, 30), torch.randn(4, 30)
    module = kd.DistillationLoss(kd.SinkhornBatch(epsilon=0.2), temperature=2.0)
    assert torch.equal(module(z, y), kd.distill(z, y, kd.SinkhornBatch(0.2, 20), temperature=2.0))
    assert "SinkhornBatch(epsilon=0.2" in repr(module)
    assert {"reference", "cpu"} <= set(TABLE["pairwise_l1"])


_STEP = """
import sys, torch, kd_kernels as kd
dtype = eval(sys.argv[1])
torch.set_num_threads(1)
tokens, vocab, workspace = 512, 64000, 24 << 20

def head(n, v, width, grad):
    h, w = torch.randn(n, width).to(dtype), torch.randn(v, width).to(dtype) * width**-0.5
    return kd.Head(h.requires_grad_(grad), w.requires_grad_(grad))

def step(student, teacher, groups):
    loss = kd.distill(student, teacher, kd.SinkhornBatch(), groups=groups, workspace_bytes=workspace)
    loss.backward()

step(head(8, 500, 64, True), head(8, 500, 96, False), torch.arange(8) // 2)  # libraries load
kd.release_workspace()
student, teacher = head(tokens, vocab, 64, True), head(tokens, vocab, 96, False)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(student, teacher, torch.arange(tokens) // 16)
above = status("VmHWM") - before
print(above - vocab * 64 * dtype.itemsize - workspace)
"""


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_memory_is_the_workspace_and_the_gradients(dtype):
    """[tokens, vocab] would be 131 MB in float32, for each model; of d weight nothing wider is kept."""
    above = in_a_process(_STEP, dtype)
    assert above <= 40 << 20, f"{above / 2**20:.0f} MiB above gradients and workspace"


_SHORT_GROUPS = """
import torch, kd_kernels as kd
torch.set_num_threads(2)
tokens, vocab = 8192, 1024
student, teacher = torch.randn(tokens, vocab), torch.randn(tokens, vocab)
kd.distill(student[:8], teacher[:8], kd.SinkhornBatch(), groups=torch.arange(8) // 4)  # libraries load
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
kd.distill(student, teacher, kd.SinkhornBatch(), groups=torch.arange(tokens) // 4)
print(status("VmHWM") - before)
"""


def test_memory_of_short_groups_is_not_of_all_rows():
    """A tile of the probabilities of all rows would be 65 MiB, for each thread."""
    above = in_a_process(_SHORT_GROUPS)
    assert above <= 24 << 20, f"{above / 2**20:.0f} MiB"
