"""Sparse teachers: every mode and objective against the textbook, and what a saved target may look like."""

import pytest
import torch
from cases import DTYPES, OBJECTIVES, OPTIONS, SHAPING, Batch, batch_for, error
from plain import compare

import kd_kernels as kd
from kd_kernels.drivers.selection import Selection
from kd_kernels.sources import MISSING

IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x).replace("torch.", "")}
SMALL = {"workspace_bytes": 3 << 10}  # three tokens at a time, two of 16-bit heads, one in float64
K = 9
INFINITE = {"reverse_kl", "weighted_kl"}  # where the teacher has probability 0


def defined(missing: str, objective: kd.Objective) -> bool:
    if missing == "unnormalised":
        return objective.name == "forward_kl"
    return missing != "teacher_renorm" or objective.name not in INFINITE


PAIRS = [(m, o) for m in MISSING for o in OBJECTIVES if defined(m, o)]
PAIR_IDS = [f"{m}-{o.name}" for m, o in PAIRS]


def target_of(
    batch: Batch, missing: str, dtype: torch.dtype = torch.float32, tail: bool = False, banned: bool = False
) -> kd.SparseTarget:
    """The batch's teacher at its top K, in random order, with all that a saved target may hold."""
    generator = torch.Generator().manual_seed(batch.seed)
    log_p = batch.tensors["teacher logits"].log_softmax(-1)
    values, ids = log_p.topk(K, -1)
    order = torch.rand(ids.shape, generator=generator).argsort(-1)
    values, ids = values.gather(-1, order), ids.gather(-1, order)
    flat_ids, flat = ids.view(-1, K), values.view(-1, K)
    flat_ids[0, 3], flat[0, 3] = -1, torch.nan  # unused, wherever it stands and whatever it holds
    flat_ids[1, 6:], flat[1, 6:] = -1, torch.inf  # fewer than K
    flat_ids[2, 2], flat[2, 2] = flat_ids[2, 5], flat[2, 5] - 0.7  # twice: their probabilities add up
    flat_ids[3, 4] = flat_ids[3, 0] = flat_ids[3, 7]
    flat[3, [0, 4, 7]] -= 1.1
    if banned:
        flat[4, 1] = -torch.inf
    mass = torch.where(ids < 0, -torch.inf, values).exp().sum(-1)
    log_tail = (1 - mass).log() + 0.02 if tail else None  # not quite what the log-probabilities say
    return kd.SparseTarget(
        ids, values.to(dtype), missing, log_tail_mass=None if log_tail is None else log_tail.to(dtype)
    )


def options_for(missing: str, options: dict) -> dict:
    """The modes that cannot be brought to another temperature are trained at their own."""
    return {**options, "teacher_temperature": 1.0} if missing in ("tail", "unnormalised") else options


@pytest.mark.parametrize("missing, objective", PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(missing, objective, option, backend):
    batch = batch_for(backend, seed=1)
    for kind in ("head", "logits"):
        student = batch.source("student", kind, torch.float64)
        options = options_for(missing, OPTIONS[option](batch))
        compare(batch, student, target_of(batch, missing), objective, backend, **SMALL, **options)


@pytest.mark.parametrize("missing, objective", PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_dtypes_and_shaping(missing, objective, dtype, backend):
    batch = batch_for(backend, seed=2)
    student = batch.source("student", "head", dtype, **SHAPING["all"])
    options = options_for(missing, OPTIONS["everything"](batch))
    compare(batch, student, target_of(batch, missing), objective, backend, **SMALL, **options)
    student = batch.source("student", "logits", dtype, scale=1.3, softcap=6.0)
    compare(batch, student, target_of(batch, missing), objective, backend, **SMALL, **options)


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_given_tail_mass(objective, backend):
    batch = batch_for(backend, seed=3)
    student = batch.source("student", "head", torch.float64)
    given, own = target_of(batch, "tail", torch.float64, tail=True), target_of(batch, "tail", torch.float64)
    compare(batch, student, given, objective, backend)
    assert error(kd.distill(student, given, objective), kd.distill(student, own, objective)) > 1e-4


@pytest.mark.parametrize("missing, objective", [(m, o) for m, o in PAIRS if o.name not in INFINITE], ids=str)
def test_probability_zero(missing, objective, backend):
    batch = batch_for(backend, seed=4)
    student = batch.source("student", "head", torch.float64)
    compare(batch, student, target_of(batch, missing, banned=True), objective, backend, reduction="sum")


@pytest.mark.parametrize("missing, objective", PAIRS, ids=PAIR_IDS)
def test_the_whole_vocabulary_is_the_dense_divergence(missing, objective, backend):
    batch = batch_for(backend, seed=5, vocab=57)
    student = batch.source("student", "head", torch.float64)
    teacher = batch.tensors["teacher logits"]
    ids = torch.rand(teacher.shape).argsort(-1)
    target = kd.SparseTarget(ids, teacher.log_softmax(-1).gather(-1, ids), missing)
    for options in ({}, {"labels": batch.labels, "hard_weight": 0.4, "return_parts": True}):
        ours, dense = (
            kd.distill(student, t, objective, backend=backend, **options) for t in (target, teacher)
        )
        if options:
            for name in ours[1]._fields:
                assert torch.allclose(getattr(ours[1], name), getattr(dense[1], name), atol=1e-12), name
            ours, dense = ours[0], dense[0]
        assert error(ours, dense) < 1e-12
        got, want = (torch.autograd.grad(x, (student.hidden, student.weight)) for x in (ours, dense))
        assert all(error(x, y) < 1e-11 for x, y in zip(got, want))


@pytest.mark.parametrize("missing", ["teacher_renorm", "renorm_both"])
def test_renormalised_modes_take_any_temperature(missing, backend):
    """Recorded at 0.7, trained at 2: as a softmax over the ids of the logits at 2."""
    batch = batch_for(backend)
    student = batch.source("student", "head", torch.float64)
    logits = batch.tensors["teacher logits"]
    values, ids = (logits / 0.7).log_softmax(-1).topk(K, -1)
    recorded = kd.SparseTarget(ids, values, missing, temperature=0.7)
    for temperature in (2.0, batch.temperature):
        t = temperature if isinstance(temperature, float) else temperature[..., None].double()
        direct = kd.SparseTarget(ids, (logits.gather(-1, ids) / t).log_softmax(-1), missing)
        a = kd.distill(student, recorded, kd.SkewKL(0.1), temperature=temperature, backend=backend)
        b = kd.distill(
            student, direct, kd.SkewKL(0.1), temperature=temperature, teacher_temperature=1.0, backend=backend
        )
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("missing", MISSING)
def test_parts(missing, backend):
    batch = batch_for(backend)
    student = batch.source("student", "head", torch.float64)
    target = target_of(batch, missing, torch.float64)
    loss, parts = kd.distill(
        student, target, kd.ForwardKL(), labels=batch.labels, hard_weight=0.3, return_parts=True,
        reduction="none", backend=backend,
    )  # fmt: skip
    log_q = (student.hidden @ student.weight.T).log_softmax(-1).detach()
    counts = batch.labels != -100
    assert error(parts.student_entropy, torch.where(counts, -(log_q.exp() * log_q).sum(-1), 0.0)) < 1e-12
    nll = -log_q.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    assert error(parts.hard, torch.where(counts, nll, 0.0)) < 1e-12
    assert error(parts.soft + 0.3 * parts.hard, loss) < 1e-12
    t = torch.where(target.ids < 0, 0.0, target.logprobs.nan_to_num(0.0, 0.0).exp())
    p = torch.zeros_like(log_q).scatter_add(-1, target.ids.clamp(min=0), t)
    rest = 1 - p.sum(-1, keepdim=True)
    p = torch.cat([p, rest], -1) if missing == "tail" else p / p.sum(-1, keepdim=True)
    assert error(parts.teacher_entropy, torch.where(counts, -torch.xlogy(p, p).sum(-1), 0.0)) < 1e-12


def test_the_tail_is_a_lower_bound_that_grows_with_k(backend):
    batch = batch_for(backend)
    student = batch.source("student", "head", torch.float64)
    logits = batch.tensors["teacher logits"]
    dense = kd.distill(student, logits, kd.ForwardKL(), reduction="none", backend=backend)
    last = torch.zeros_like(dense)
    for k in (1, 4, 16, 64):
        values, ids = logits.log_softmax(-1).topk(k, -1)
        loss = kd.distill(
            student, kd.SparseTarget(ids, values), kd.ForwardKL(), reduction="none", backend=backend
        )
        assert (loss > last).all() and (loss < dense).all()
        last = loss


def test_samples_are_unbiased():
    """Loss and gradient, averaged over many draws, against the dense ones, in standard errors."""
    generator = torch.Generator().manual_seed(3)
    vocab, repeats, draws = 40, 4000, 8
    z_t = torch.randn(vocab, generator=generator, dtype=torch.float64) * 2
    z_s = (torch.randn(vocab, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    p = z_t.softmax(-1)
    ids = torch.multinomial(p.expand(repeats, -1), draws, replacement=True, generator=generator)
    students = z_s.detach().expand(repeats, -1).clone().requires_grad_()
    target = kd.SparseTarget.from_samples(ids, torch.ones_like(ids))  # repeated ids add up
    loss = kd.distill(students, target, kd.ForwardKL(), reduction="none")
    loss.sum().backward()
    # The sampled loss carries -H(t) of the sample instead of the teacher's entropy: compare cross-entropies.
    counts = torch.zeros(repeats, vocab, dtype=torch.float64).scatter_add_(
        1, ids, torch.ones(ids.shape).double()
    )
    cross = loss.detach() - torch.xlogy(counts / draws, counts / draws).sum(-1)
    dense = kd.distill(z_s[None], z_t[None], kd.ForwardKL(), reduction="sum")
    dense.backward()
    exact = dense.detach() - (p * p.log()).sum()
    assert abs(cross.mean() - exact) < 4 * cross.std() / repeats**0.5
    standard = students.grad.std(0) / repeats**0.5
    assert ((students.grad.mean(0) - z_s.grad).abs() < 4.5 * standard + 1e-12).all()
    assert (students.grad - z_s.grad).norm() / z_s.grad.norm() > 1  # one sample alone is far off


def test_counts_are_repeated_ids():
    batch = Batch()
    student = batch.source("student", "head", torch.float64)
    ids = torch.tensor([7, 3, 3, 9, 3, 7]).expand(*batch.lead, -1)
    once = torch.tensor([3, 7, 9, -1]).expand(*batch.lead, -1)
    counts = torch.tensor([3, 2, 1, 55]).expand(*batch.lead, -1)
    a = kd.distill(student, kd.SparseTarget.from_samples(ids, torch.ones_like(ids)), kd.ForwardKL())
    b = kd.distill(student, kd.SparseTarget.from_samples(once, counts), kd.ForwardKL())
    assert error(a, b) < 1e-7


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("missing", MISSING)
def test_tokens_that_do_not_count_may_hold_anything(missing, compact, backend):
    batch = batch_for(backend)
    student = batch.source("student", "head", torch.float32)
    target = target_of(batch, missing)
    dead = batch.labels == -100
    options = {"labels": batch.labels, "hard_weight": 0.5, "compact": compact, "backend": backend}

    def gradients(student, target):
        loss = kd.distill(student, target, kd.ForwardKL(), **options)
        return [loss, *torch.autograd.grad(loss, (student.hidden, student.weight))]

    clean = gradients(student, target)
    hidden = torch.where(dead[..., None], torch.nan, student.hidden.detach()).requires_grad_()
    ids = torch.where(dead[..., None], 1 << 30, target.ids)
    values = torch.where(dead[..., None], torch.nan, target.logprobs)
    dirty = gradients(kd.Head(hidden, student.weight), kd.SparseTarget(ids, values, missing))
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty))


def test_a_sure_teacher_is_finite_in_every_objective(backend):
    """1 - sum of float32 probabilities says 0; reverse KL must not become infinite for it."""
    student = torch.randn(2, 50, dtype=torch.float32, requires_grad=True)
    target = kd.SparseTarget(torch.tensor([[4, 9]] * 2), torch.tensor([[-1e-9, -40.0]] * 2))
    for objective in OBJECTIVES:
        loss = kd.distill(student, target, objective, backend=backend, workspace_bytes=1 << 16)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all(), objective


def test_banned_tokens_of_the_student(backend):
    """-inf among the named and among the others."""
    batch = batch_for(backend)
    student = batch.source("student", "logits", torch.float64)
    with torch.no_grad():
        student.values[..., 100:] = -torch.inf
    values, ids = batch.tensors["teacher logits"][..., :100].log_softmax(-1).topk(K, -1)
    target = kd.SparseTarget(ids, values)
    for objective in OBJECTIVES:
        loss = kd.distill(student, target, objective, backend=backend, workspace_bytes=1 << 16)
        short = student.values[..., :100].detach().requires_grad_()
        want = kd.distill(short, target, objective, backend="reference")
        assert error(loss, want) < 1e-12
        (got,), (exact,) = torch.autograd.grad(loss, student.values), torch.autograd.grad(want, short)
        assert error(got[..., :100], exact) < 1e-11 and got[..., 100:].abs().max() == 0


def test_far_below_every_other_token(backend):
    """The others' mass is 1e-60 of the student's: their shares of its gradient are still right."""
    z = torch.full((1, 40), -140.0, dtype=torch.float64)
    z[0, 3], z[0, 5:9] = 0.0, torch.tensor([-139.0, -138.0, -141.0, -139.5], dtype=torch.float64)
    z.requires_grad_()
    target = kd.SparseTarget(torch.tensor([[3]]), torch.tensor([[-0.5]], dtype=torch.float64))
    loss = kd.distill(z, target, kd.ForwardKL(), backend=backend, workspace_bytes=1 << 16)
    (gradient,) = torch.autograd.grad(loss, z)
    others = z.detach().clone()
    others[0, 3] = -torch.inf
    share = others.softmax(-1)
    tail = 1 - torch.tensor(-0.5, dtype=torch.float64).exp()
    assert torch.allclose(gradient[share > 0], -(tail * share)[share > 0], rtol=1e-9)
    assert torch.allclose(gradient[0, 3], tail, rtol=1e-9)


@pytest.mark.parametrize("missing", MISSING)
def test_gradcheck(missing):
    batch = Batch(lead=(2,), vocab=23, student_width=4)
    target = target_of(Batch(lead=(5,), vocab=23), missing, torch.float64)
    target = kd.SparseTarget(target.ids[1:3], target.logprobs[1:3], missing)
    tensors = [batch.tensors[f"student {name}"].requires_grad_() for name in ("hidden", "weight", "bias")]

    def loss(hidden, weight, bias):
        return kd.distill(
            kd.Head(hidden, weight, bias), target, kd.ForwardKL(), labels=torch.tensor([3, 20]),
            hard_weight=0.5, temperature=1.0, reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, tensors)


def test_chunks_and_threads_do_not_change_a_bit():
    batch = Batch(lead=(400,), vocab=1511)
    target = target_of(batch, "tail")
    results = []
    for threads, workspace in ((1, 1 << 26), (1, 1 << 18), (2, 1 << 26)):
        torch.set_num_threads(threads)
        student = batch.source("student", "logits", torch.float32)
        loss = kd.distill(student, target, kd.JensenShannon(), workspace_bytes=workspace, labels=batch.labels)
        results.append([loss, *torch.autograd.grad(loss, student.values)])
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_op_and_compile(reduction):
    batch = Batch()
    student, target = batch.source("student", "head", torch.float32), target_of(batch, "tail")

    def loss(hidden, weight, temperature):
        return kd.distill(
            kd.Head(hidden, weight), target, kd.ForwardKL(), labels=batch.labels, temperature=temperature,
            teacher_temperature=1.0, hard_weight=0.3, reduction=reduction,
        ).sum()  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 1.5):
        values = [f(student.hidden, student.weight, temperature) for f in (loss, compiled)]
        grads = [torch.autograd.grad(v, (student.hidden, student.weight)) for v in values]
        assert torch.equal(*values) and all(torch.equal(x, y) for x, y in zip(*grads))


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing, objective",
    [(m, o) for m in MISSING for o in OBJECTIVES if not defined(m, o)]
    + [("teacher_renorm", kd.JensenShannon(1.0)), ("teacher_renorm", kd.SkewReverseKL(0.0))],
    ids=str,
)
def test_undefined_modes_are_refused(missing, objective):
    batch = Batch()
    with pytest.raises(ValueError, match=missing):
        kd.distill(batch.source("student", "head", torch.float32), target_of(batch, missing), objective)


def call(student=None, target=None, **options):
    batch = Batch()
    student = batch.source("student", "head", torch.float32) if student is None else student
    return kd.distill(
        student, target_of(batch, "tail") if target is None else target, kd.ForwardKL(), **options
    )


def changed(**change):
    target = target_of(Batch(), change.pop("missing", "tail"))
    ids, logprobs = change.pop("ids", lambda x: x), change.pop("logprobs", lambda x: x)
    return kd.SparseTarget(ids(target.ids), logprobs(target.logprobs), target.missing, **change)


def at(value, place=(1, 1, 2)):
    def change(x):
        x = x.clone()
        x[place] = value
        return x

    return change


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: call(target=changed(ids=at(203))), r"ids must be in \[0, 203\)"),
        (lambda: call(target=changed(ids=at(-2))), "or -1 where unused; got -2"),
        (lambda: call(target=changed(logprobs=at(torch.nan))), "NaN or"),
        (lambda: call(target=changed(logprobs=at(torch.inf))), "NaN or"),
        (lambda: call(target=changed(logprobs=at(3.0))), "logits less their log-sum-exp"),
        (lambda: call(temperature=2.0), "teacher_temperature=1.0"),
        (lambda: call(temperature=torch.ones(3, 5)), "teacher_temperature=1.0"),
        (lambda: call(target=changed(temperature=0.5)), "recorded at 0.5"),
        (lambda: call(target=changed(missing="renorm_both"), teacher_temperature=0.0), "> 0, got 0.0"),
        (
            lambda: call(target=changed(missing="renorm_both"), teacher_temperature=torch.ones(4)),
            "leading shape",
        ),
        (
            lambda: call(target=changed(missing="renorm_both", ids=at(-1, (1, 1)))),
            "leaves it without a target",
        ),
        (lambda: call(teacher_grad=True), "a SparseTarget is a constant"),
        (lambda: call(target=changed(ids=lambda x: x[:2], logprobs=lambda x: x[:2])), "same tokens"),
        (lambda: changed(missing="tails"), "missing must be one of"),
        (lambda: changed(ids=lambda x: x[..., :3]), "same shape"),
        (lambda: changed(ids=lambda x: x.float()), "ids must be integers"),
        (lambda: changed(ids=lambda x: x.to(torch.uint16)), "ids must be integers"),
        (
            lambda: call(target=changed(missing="renorm_both"), teacher_temperature=torch.tensor(-2.0)),
            "> 0, got",
        ),
        (lambda: changed(temperature=True), "must be one number"),
        (
            lambda: kd.SparseTarget.from_samples(torch.ones(3, 2).long(), torch.ones(3, 2) > 0),
            "must be integers",
        ),
        (lambda: changed(logprobs=lambda x: x.long()), "logprobs has dtype"),
        (lambda: changed(temperature=0.0), "temperature must be one number > 0"),
        (lambda: changed(log_tail_mass=torch.zeros(3)), "leading shape"),
        (lambda: changed(missing="renorm_both", log_tail_mass=torch.zeros(3, 5)), 'goes with missing="tail"'),
        (lambda: call(target=changed(log_tail_mass=torch.ones(3, 5))), "instead of 1"),
        (lambda: call(target=changed(log_tail_mass=torch.full((3, 5), -9.0))), "instead of 1"),
        (lambda: call(target=changed(logprobs=lambda x: x - 60)), "is most of it"),
        (lambda: changed(temperature=(1.0, 2.0)), "target.index"),
        (lambda: kd.SparseTarget(torch.zeros(3, 0).long(), torch.zeros(3, 0)), "K > 0"),
        (lambda: kd.SparseTarget.from_samples(torch.ones(3, 2).long(), torch.ones(3, 2)), "must be integers"),
        (lambda: kd.SparseTarget.from_samples(torch.ones(3, 2).long(), -torch.ones(3, 2).long()), ">= 0"),
        (lambda: call(student=changed()), "only the teacher"),
    ],
    ids=range(32),
)
def test_refusals(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_ids_of_any_width():
    """A vocabulary that the ids' own type cannot hold, with a label beyond it."""
    student = torch.randn(2, 70000)
    ids, logprobs = torch.tensor([[1, 2], [30000, 7]]), torch.tensor([[0.5, 0.4]] * 2).log()
    options = {"labels": torch.tensor([69999, 4]), "hard_weight": 1.0}
    losses = [
        kd.distill(student, kd.SparseTarget(ids.to(dtype), logprobs), kd.ForwardKL(), **options)
        for dtype in (torch.int64, torch.int32, torch.int16)
    ]
    assert losses[0].isfinite() and losses[0] == losses[1] == losses[2]


def test_repeated_ids_add_up_before_they_are_tempered():
    z = torch.randn(1, 4, dtype=torch.float64)
    twice = kd.SparseTarget(torch.tensor([[0, 0, 1]]), torch.tensor([[0.25, 0.25, 0.5]]).log(), "renorm_both")
    once = kd.SparseTarget(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log(), "renorm_both")
    a, b = (kd.distill(z, t, kd.ReverseKL(), temperature=2.0) for t in (twice, once))
    assert error(a, b) < 1e-6


def test_draws_in_a_compiled_function():
    def loss(x, ids):
        target = kd.SparseTarget.from_samples(ids[..., None], torch.ones_like(ids)[..., None])
        return kd.distill(x, target, kd.ForwardKL())

    x, ids = torch.randn(3, 9), torch.arange(3)
    assert torch.equal(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, ids), loss(x, ids))


def test_tokens_without_draws_teach_nothing():
    target = kd.SparseTarget.from_samples(torch.tensor([[1, 2], [1, 2]]), torch.tensor([[0, 0], [1, 1]]))
    loss = kd.distill(torch.randn(2, 5), target, kd.ForwardKL(), reduction="none")
    assert loss[0] == 0 and loss[1] > 0


def test_values_that_nobody_checked_make_their_row_nan(monkeypatch):
    """As on a GPU, where looking would wait: a bad id is never read."""
    monkeypatch.setattr("kd_kernels.ops.row_divergence.checks_values", lambda device: False)
    batch = Batch()
    student = batch.source("student", "head", torch.float32)
    for missing in MISSING:
        target = target_of(batch, missing)
        target.ids[1, 1, 2] = 1 << 30
        loss = kd.distill(student, target, kd.ForwardKL(), reduction="none", labels=batch.labels)
        assert loss[1, 1].isnan() and loss.isnan().sum() == 1, missing


# --- ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_selection(seed):
    generator = torch.Generator().manual_seed(seed)
    n, k, vocab = 7, int(torch.randint(1, 12, (), generator=generator)), 9
    ids = torch.randint(-2, vocab + 2, (n, k), generator=generator)
    values = torch.rand(n, k, generator=generator, dtype=torch.float64)
    for selection in (Selection(ids, vocab),):
        merged = selection.merge(values, torch.add, 0.0)
        for i in range(n):
            used = [x for x in ids[i].tolist() if 0 <= x < vocab]
            unique = sorted(set(used))
            assert selection.ids[i].tolist() == [-1] * (k - len(unique)) + unique
            for j, x in enumerate(selection.ids[i].tolist()):
                want = sum(values[i][ids[i] == x].tolist()) if x >= 0 else 0.0
                assert abs(merged[i, j] - want) < 1e-12
        back = selection.spread(merged, -1.0)
        for i in range(n):
            for j, x in enumerate(ids[i].tolist()):
                want = sum(values[i][ids[i] == x].tolist()) if 0 <= x < vocab else -1.0
                assert abs(back[i, j] - want) < 1e-12
