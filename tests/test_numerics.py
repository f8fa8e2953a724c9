"""The numerics contract: agreement, extremes, infinities, NaN, ignored rows."""

import math

import pytest
import torch
from cases import FLOOR, OBJECTIVES, Batch, error, leaves
from plain import values_and_gradients

import kd_kernels as kd
from kd_kernels.reference import divergence

IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x).replace("torch.", "")}
INF, NAN = math.inf, math.nan


def as_heads(student, teacher):
    """Heads that give exactly these logits: hidden is the identity, the weight holds them."""
    eye = torch.eye(student.shape[0], dtype=student.dtype)
    return kd.Head(eye, student.t().contiguous()), kd.Head(eye, teacher.t().contiguous())


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("layout", ["logits", "heads"])
def test_near_agreement(objective, layout, backend):
    """KL ~ 5e-7 at V = 128256, float32: loss right to 1e-4, where plain torch has no digit left."""
    teacher = torch.randn(4, 128256) * 3
    student = teacher + 1e-3 * torch.randn(4, 128256)
    exact = divergence(objective, student.double(), teacher.double())
    sources = (kd.Logits(student), kd.Logits(teacher)) if layout == "logits" else as_heads(student, teacher)
    ours = kd.distill(*sources, objective, reduction="none", backend=backend)
    assert ((ours - exact) / exact).abs().max() < 1e-4
    assert (ours >= 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_an_entropy_is_of_its_own_side_alone(objective, backend):
    """Whatever the other one holds."""
    clean = torch.randn(2, 3, 40)
    spoilt = clean.clone()
    spoilt[0, 0, 3], spoilt[0, 1, 5] = NAN, INF

    def entropies(first, second):
        call = kd.distill(first, second, objective, return_parts=True, backend=backend, compact=False)
        return call[1].student_entropy, call[1].teacher_entropy

    own, other = entropies(*clean)
    assert torch.equal(entropies(*spoilt)[1], other)
    assert torch.equal(entropies(clean[1], spoilt[0])[0], entropies(clean[1], clean[0])[0])
    assert own.isfinite().all() and not entropies(*spoilt)[0][:2].isfinite().any()


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_gradient_near_agreement(objective, backend):
    teacher = torch.randn(2, 32000) * 3
    student = teacher + 1e-3 * torch.randn(2, 32000)
    wide = [x.double().requires_grad_() for x in (student, teacher)]
    exact = torch.autograd.grad(divergence(objective, *wide).sum(), wide)
    for x, y in zip(values_and_gradients(objective, student, teacher, backend)[1:], exact):
        assert error(x, y) < 2e-3  # d is a difference of float32 logits: 1e-7 * 10 / 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], **IDS)
def test_zero_where_they_agree(objective, dtype, backend):
    logits = (torch.randn(5, 1031) * 5).to(dtype)
    loss, *grads = values_and_gradients(objective, logits, logits.clone(), backend)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert all(g.abs().max() < 1e-6 for g in grads)


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_never_negative(objective, backend):
    for spread in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        teacher = torch.randn(6 if backend == "triton" else 64, 257) * 4  # interpreted: fewer
        loss = values_and_gradients(
            objective, teacher + spread * torch.randn_like(teacher), teacher, backend
        )[0]
        assert (loss >= 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_far_below_the_maximum(objective, backend):
    """Entries a thousand nats down, on either side or both, stay finite and right."""
    teacher, student = torch.randn(2, 6, 67)
    teacher[0, :60] -= 1000
    student[1, 5:] -= 1000
    teacher[2, 3:] -= 1000
    student[2, :-3] -= 1000
    teacher[3] *= 200
    student[4] *= 200
    teacher[5], student[5] = teacher[5] * 1e4, student[5] * 1e4
    wide = [x.double().requires_grad_() for x in (student, teacher)]
    exact = divergence(objective, *wide)
    ours, *grads = values_and_gradients(objective, student, teacher, backend)
    assert torch.isfinite(ours).all()
    assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-6)
    for x, y in zip(grads, torch.autograd.grad(exact.sum(), wide)):
        assert torch.isfinite(x).all()
        assert torch.allclose(x.double(), y, rtol=1e-4, atol=1e-4 + 1e-6 * exact.max().item())


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_shift_of_1e4(objective, backend):
    """float32 logits with 10000 added keep 3 decimals; what they still say must come through."""
    student, teacher = (torch.randn(2, 3, 517) * 3 + torch.tensor([1e4, -1e4])[:, None, None]).unbind()
    exact = divergence(objective, student.double(), teacher.double())
    assert torch.allclose(
        values_and_gradients(objective, student, teacher, backend)[0].double(), exact, rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_both_banned(objective, backend):
    """Both -inf: no loss, no gradient, the same as without these entries; also a whole first block."""
    for banned in (slice(0, 1), slice(0, 300), slice(500, 517), slice(3, 400, 7)):
        student, teacher = torch.randn(2, 3, 517) * 2
        keep = torch.ones(517, dtype=torch.bool)
        keep[banned] = False
        exact = values_and_gradients(objective, student[:, keep], teacher[:, keep], backend)
        student[:, banned] = teacher[:, banned] = -INF
        ours = values_and_gradients(objective, student, teacher, backend)
        assert error(ours[0], exact[0]) < 1e-5
        for x, y in zip(ours[1:], exact[1:]):
            assert error(x[:, keep], y) < 1e-5
            assert torch.equal(x[:, banned], torch.zeros_like(x[:, banned]))


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_teacher_banned_only(objective, backend):
    """p = 0 contributes 0; under reverse KL with q > 0 the loss is honestly infinite."""
    student, teacher = torch.randn(2, 3, 131)
    teacher[:, 7] = -INF
    loss, g_s, g_t = values_and_gradients(objective, student, teacher, backend)
    if objective.name in ("reverse_kl", "weighted_kl"):
        assert torch.equal(loss, torch.full_like(loss, INF))
        return
    wide = [x.double().requires_grad_() for x in (student, teacher)]
    exact = divergence(objective, *wide)
    assert error(loss, exact) < 1e-5
    assert error(g_s, torch.autograd.grad(exact.sum(), wide[0])[0]) < 1e-5
    assert torch.isfinite(g_s).all()


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_student_banned_only(objective, backend):
    student, teacher = torch.randn(2, 3, 131)
    student[:, 7] = -INF
    loss, g_s, _ = values_and_gradients(objective, student, teacher, backend)
    if objective.name in ("forward_kl", "weighted_kl"):
        assert torch.equal(loss, torch.full_like(loss, INF))
        if objective.name == "forward_kl":  # q - p, finite all over
            assert torch.isfinite(g_s).all()
            assert error(g_s[:, 7], -teacher.double().softmax(-1)[:, 7]) < 1e-5
        return
    assert torch.isfinite(loss).all()
    assert error(loss, divergence(objective, student.double(), teacher.double())) < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("layout", ["logits", "heads"])
@pytest.mark.parametrize("poison", [NAN, INF, "all -inf"], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_bad_rows_are_nan_and_alone(objective, layout, poison, side, backend):
    logits = torch.randn(2, 40, 131)
    clean = values_and_gradients(objective, *logits, backend)
    rows = torch.tensor([0, 17, 39])
    if poison == "all -inf":
        logits[side, rows] = -INF
    else:
        logits[side, rows, 77] = poison
    if layout == "logits":
        loss, *grads = values_and_gradients(objective, *logits, backend)
    else:
        bad = logits
        weight_free = as_heads(*torch.where(torch.isfinite(bad), bad, 0.0))
        # put the poison in through a per-token route: hidden of those rows
        heads = list(weight_free)
        hidden = heads[side].hidden.clone()
        hidden[rows] = NAN
        heads[side] = kd.Head(hidden, heads[side].weight)
        loss, grads = kd.distill(*heads, objective, reduction="none", backend=backend), []
    good = torch.ones(40, dtype=torch.bool)
    good[rows] = False
    assert torch.isnan(loss[rows]).all()
    assert error(loss[good], clean[0][good]) < 1e-5
    for x, y in zip(grads, clean[1:]):
        assert torch.isnan(x[rows]).any(-1).all()
        assert torch.equal(x[good], y[good])


@pytest.mark.parametrize("kinds", [("head", "head"), ("head", "logits"), ("logits", "logits")], ids="x".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compact", [True, False], ids=["dropped", "silenced"])
def test_nan_in_an_ignored_row_goes_nowhere(kinds, reduction, compact, backend):
    batch = Batch()
    ignored = batch.labels == -100

    def run_with(poison):
        sources = [
            batch.source(side, kind, torch.float32) for side, kind in zip(("student", "teacher"), kinds)
        ]
        weight, temperature = batch.weight.clone(), batch.temperature.clone()
        if poison:
            for source in sources:
                source.tensors()[0].data[ignored] = NAN
            weight[ignored] = NAN
            temperature[ignored] = NAN
        loss = kd.distill(
            *sources, kd.JensenShannon(), labels=batch.labels, hard_weight=0.5, token_weight=weight,
            temperature=temperature, reduction=reduction, teacher_grad=True, backend=backend, compact=compact,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves(*sources))]

    for x, y in zip(run_with(False), run_with(True)):
        assert torch.equal(x, y)


def test_nan_in_a_valid_row_is_not_hidden(backend):
    batch = Batch()
    student, teacher = (batch.source(side, "head", torch.float32) for side in ("student", "teacher"))
    student.hidden.data[0, 1, 2] = NAN
    for reduction in ("mean", "sum", "batchmean"):
        assert torch.isnan(kd.distill(student, teacher, kd.ForwardKL(), reduction=reduction, backend=backend))
    none = kd.distill(student, teacher, kd.ForwardKL(), reduction="none", backend=backend)
    assert torch.isnan(none).sum() == 1


@pytest.mark.parametrize("softcap", [5.0, 30.0])
def test_softcap_maps_infinity(softcap, backend):
    """-inf under a softcap is -softcap: finite, and the gradient there is 0."""
    student, teacher = torch.randn(2, 3, 67) * 3
    student[:, 5] = -INF
    sources = [kd.Logits(x.clone().requires_grad_(), softcap=softcap) for x in (student, teacher)]
    loss = kd.distill(*sources, kd.ForwardKL(), reduction="none", backend=backend)
    capped = [softcap * torch.tanh(x.double() / softcap) for x in (student, teacher)]
    assert error(loss, divergence(kd.ForwardKL(), *capped)) < 1e-5
    (g,) = torch.autograd.grad(loss.sum(), sources[0].values)
    assert torch.isfinite(g).all() and g[:, 5].abs().max() == 0


def test_cross_entropy_of_a_certain_student(backend):
    """-log q stays right far from the maximum, and the label's own logit may be -inf."""
    student, teacher = torch.zeros(3, 65), torch.randn(3, 65)
    student[0, 3], student[1, 3], student[2, 9] = 500.0, -500.0, -INF
    labels = torch.tensor([4, 3, 9])
    loss, parts = kd.distill(
        student, teacher, kd.TotalVariation(), labels=labels, hard_weight=1.0, soft_weight=0.0,
        reduction="none", return_parts=True, backend=backend,
    )  # fmt: skip
    exact = torch.nn.functional.cross_entropy(student.double(), labels, reduction="none")
    assert torch.allclose(parts.hard.double()[:2], exact[:2], rtol=1e-6) and parts.hard[2] == INF


def test_entropies(backend):
    batch = Batch(spread=4.0)
    for kinds in (("head", "head"), ("logits", "logits")):
        sources = [
            batch.source(side, kind, torch.float32) for side, kind in zip(("student", "teacher"), kinds)
        ]
        _, parts = kd.distill(
            *sources, kd.ForwardKL(), labels=batch.labels, temperature=1.5, return_parts=True, backend=backend
        )
        valid = batch.labels != -100
        for side, got in (("student", parts.student_entropy), ("teacher", parts.teacher_entropy)):
            source = batch.source(side, kinds[0], torch.float32)
            z = (source.values if kinds[0] == "logits" else source.hidden @ source.weight.T).double() / 1.5
            exact = torch.distributions.Categorical(logits=z).entropy() * valid
            assert error(got, exact) < 1e-5
        assert parts.valid_tokens == valid.sum()
        assert (parts.hard != 0).sum() == valid.sum()


def test_offsets_are_64_bit():
    """Rows 2^30 elements apart: 6 GiB of virtual memory, three rows resident."""
    torch.use_deterministic_algorithms(False)  # or torch fills all 4 GiB
    base = torch.empty(2 * 2**30 + 64, dtype=torch.float16)
    torch.use_deterministic_algorithms(True)
    far = base.as_strided((3, 64), (2**30, 1))
    far.copy_(torch.randn(3, 64))
    near = far.clone()
    teacher = torch.randn(3, 64)
    assert torch.equal(kd.distill(far, teacher, kd.ForwardKL(), reduction="none"),
                       kd.distill(near, teacher, kd.ForwardKL(), reduction="none"))  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("spread", [3.0, 12.0, 30.0])
def test_sharp_rows(objective, spread, backend):
    """Nearly one-hot rows that half agree: the softmax Jacobian must not cancel the digits away."""
    student, noise = (torch.randn(2, 16 if backend == "triton" else 64, 1031) * spread).unbind()
    teacher = 0.3 * noise + 0.7 * student

    def gradients_of(loss, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (student, teacher)]
        return torch.autograd.grad(loss(*inputs).sum(), inputs)

    exact = gradients_of(lambda s, t: divergence(objective, s, t), torch.float64)
    plain = gradients_of(lambda s, t: divergence(objective, s, t), torch.float32)
    for x, y, z in zip(values_and_gradients(objective, student, teacher, backend)[1:], plain, exact):
        assert error(x, z) <= 2 * error(y, z) + FLOOR[torch.float32]


def test_a_row_of_the_lowest_finite_number_is_uniform(backend):
    lowest = torch.full((2, 300), torch.finfo(torch.float32).min)
    ours, *grads = values_and_gradients(kd.JensenShannon(0.3), lowest, torch.randn(2, 300), backend)
    assert torch.isfinite(ours).all() and all(torch.isfinite(g).all() for g in grads)


def test_cross_entropy_gradient_of_shifted_logits(backend):
    """A constant on a whole row costs its own rounding and no more."""
    logits = (torch.randn(3, 9) * 2 + 1e4).requires_grad_()
    teacher, labels = torch.randn(3, 9), torch.tensor([3, 0, 8])
    options = {"labels": labels, "hard_weight": 1.0, "soft_weight": 0.0, "reduction": "sum"}
    kd.distill(logits, teacher, kd.ForwardKL(), backend=backend, **options).backward()
    wide = logits.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(wide, labels, reduction="sum").backward()
    assert error(logits.grad, wide.grad) < 1e-6


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0)], ids=str)
def test_a_weight_of_zero_silences_an_infinite_divergence(weights, backend):
    student, teacher = torch.randn(2, 2, 17)
    (student if weights[0] == 0 else teacher)[:, 4] = -torch.inf
    objective = kd.ReverseKL() if weights[0] == 0 else kd.ForwardKL()
    ours, *grads = values_and_gradients(kd.WeightedKL(*weights), student, teacher, backend)
    want = divergence(objective, student.double(), teacher.double())
    assert error(ours, want) < 1e-5 and all(torch.isfinite(g).all() for g in grads)
    assert error(divergence(kd.WeightedKL(*weights), student.double(), teacher.double()), want) < 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_a_soft_weight_of_zero_silences_an_infinite_divergence(objective, backend):
    student, teacher = torch.randn(2, 2, 17)
    teacher[0, 4] = student[1, 4] = -torch.inf
    student.requires_grad_()
    teacher.requires_grad_()
    labels, given = torch.tensor([3, 0]), [student, teacher]
    loss = kd.distill(
        student, teacher, objective, labels=labels, hard_weight=1.0, soft_weight=0.0, teacher_grad=True,
        backend=backend,
    )  # fmt: skip
    ours, others = torch.autograd.grad(loss, given)
    hard = torch.nn.functional.cross_entropy(student, labels)
    assert error(loss, hard) < 1e-6 and error(ours, torch.autograd.grad(hard, student)[0]) < 1e-6
    assert not others.any()


def test_models_of_different_dtypes(backend):
    student = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 9).bfloat16().requires_grad_()
    kd.distill(student, teacher, kd.SkewKL(), teacher_grad=True, backend=backend).backward()
    wide = [x.detach().double().requires_grad_() for x in (student, teacher)]
    divergence(kd.SkewKL(), *wide).mean().backward()
    assert error(student.grad, wide[0].grad) < 1e-12 and error(teacher.grad, wide[1].grad) < 4e-3
