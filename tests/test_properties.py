"""Properties that need no reference, and random shapes, strides and masks."""

import pytest
import torch
from cases import OBJECTIVES, Batch, error, leaves
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import values_and_gradients
from watch import chunks

import kd_kernels as kd
from kd_kernels.reference import dense_distill

IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x)}
each = pytest.mark.parametrize("objective", OBJECTIVES, **IDS)


def rows(n=9, vocab=517, spread=3.0):
    return torch.randn(2, n, vocab).mul(spread).unbind()


@each
def test_shift_invariance(objective, backend):
    s, t = rows()
    for x, y in zip(
        values_and_gradients(objective, s, t, backend), values_and_gradients(objective, s + 7, t - 3, backend)
    ):
        assert error(x, y) < 1e-5


@each
def test_permutation_of_the_vocabulary(objective, backend):
    s, t = rows()
    order = torch.randperm(517)
    loss, g_s, g_t = values_and_gradients(objective, s, t, backend)
    other, h_s, h_t = values_and_gradients(objective, s[:, order], t[:, order], backend)
    assert error(loss, other) < 1e-6
    assert error(g_s[:, order], h_s) < 1e-5 and error(g_t[:, order], h_t) < 1e-5


@each
def test_gradient_rows_sum_to_zero(objective, backend):
    s, t = rows()
    for g in values_and_gradients(objective, s, t, backend, labels=torch.arange(9), hard_weight=0.5)[1:]:
        assert (g.double().sum(-1).abs() < 1e-5 * g.abs().sum(-1)).all()


@each
@pytest.mark.parametrize("kind", ["head", "logits"])
def test_a_row_alone_equals_the_row_in_a_batch(objective, kind):
    """Bitwise, for the row kernel; through a head up to the GEMM's own order of summation."""
    batch = Batch(lead=(41,), vocab=517)
    student, teacher = (batch.source(side, kind, torch.float32).tensors() for side in ("student", "teacher"))

    def losses(part):
        if kind == "logits":
            return kd.distill(student[0][part], teacher[0][part], objective, reduction="none")
        return kd.distill(
            kd.Head(student[0][part], student[1]),
            kd.Head(teacher[0][part], teacher[1]),
            objective,
            reduction="none",
        )

    together = losses(slice(None))
    for i in (0, 1, 31, 32, 40):
        alone = losses(slice(i, i + 1))
        if kind == "logits":
            assert torch.equal(alone[0], together[i])
        else:
            assert error(alone[0], together[i]) < 1e-5


@each
def test_chunk_size_does_not_matter(objective, backend):
    batch = Batch(lead=(12 if backend == "triton" else 130,), vocab=101)
    results = []
    for workspace in (101 * 8 + 128, 5_000, 30_000, 60_000, None):
        student, teacher = (batch.source(side, "head", torch.float32) for side in ("student", "teacher"))
        loss = kd.distill(student, teacher, objective, workspace_bytes=workspace, backend=backend)
        loss.backward()
        results.append((loss, student.hidden.grad, student.weight.grad))
    for other in results[1:]:
        for x, y in zip(results[0], other):
            assert error(x, y) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["head", "logits"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_many_chunks_add_up_in_float32(reduction, kind, dtype, backend):
    """What 40 chunks bring lies between one 2048 times as large and another that takes it back: a sum in 16
    bits, or one rounded to them after each chunk, keeps nothing of the 40."""
    n, vocab, width = 42, 37, 5
    hidden = torch.randn(n, width).to(dtype)
    hidden[-1] = -hidden[0]
    weight, bias = torch.zeros(vocab, width, dtype=dtype), torch.randn(vocab).to(dtype)  # tokens alike
    loud = torch.ones(n)
    loud[0] = loud[-1] = 2048
    student = kd.Head(hidden, weight.requires_grad_(), bias.requires_grad_())
    teacher = (torch.randn(1, 3).expand(n, 3).to(dtype), torch.randn(vocab, 3).to(dtype))
    logits = teacher[0].double() @ teacher[1].double().t()
    teacher = kd.Head(*teacher) if kind == "head" else kd.Logits(logits)
    with chunks() as walks:
        loss = kd.distill(
            student, teacher, kd.ForwardKL(), token_weight=loud, reduction=reduction, backend=backend,
            workspace_bytes=600,
        )  # fmt: skip
        loss.sum().backward()
    assert walks[-1] == [1] * n  # an earlier one finds no gradient, which leaves room for more
    one = bias.detach().double().softmax(0) - logits[0].softmax(0)
    assert error(weight.grad, one[:, None] * hidden[1:-1].double().sum(0)) < 1e-2
    assert error(bias.grad, one * (2 * 2048 + n - 2)) < 5e-3


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jensen_shannon_with_roles_swapped(beta, backend):
    s, t = rows()
    ours = values_and_gradients(kd.JensenShannon(beta), s, t, backend)
    swapped = values_and_gradients(kd.JensenShannon(1 - beta), t, s, backend)
    for x, y in zip(ours, (swapped[0], swapped[2], swapped[1])):
        assert error(x, y) < 1e-5


def test_reverse_kl_is_forward_kl_with_roles_swapped(backend):
    s, t = rows()
    ours = values_and_gradients(kd.ReverseKL(), s, t, backend)
    swapped = values_and_gradients(kd.ForwardKL(), t, s, backend)
    for x, y in zip(ours, (swapped[0], swapped[2], swapped[1])):
        assert error(x, y) < 1e-5


@each
def test_reductions_agree(objective, backend):
    batch = Batch()
    sources = [batch.source(side, "head", torch.float32) for side in ("student", "teacher")]

    def loss(**options):
        return kd.distill(*sources, objective, labels=batch.labels, backend=backend, **options).double()

    none, count = loss(reduction="none"), (batch.labels != -100).sum()
    assert (none[batch.labels == -100] == 0).all()
    assert error(loss(reduction="sum"), none.sum()) < 1e-6
    assert error(loss(), none.sum() / count) < 1e-6
    assert error(loss(reduction="batchmean"), none.sum() / 3) < 1e-6
    assert error(loss(num_items=5), none.sum() / 5) < 1e-6


@each
def test_temperature_is_a_division_of_logits(objective, backend):
    s, t = rows()
    ours = kd.distill(s, t, objective, temperature=2.5, teacher_temperature=0.7, backend=backend)
    assert error(ours, kd.distill(s / 2.5, t / 0.7, objective, backend=backend)) < 1e-6


@given(
    lead=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    vocab=st.integers(1, 140),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kinds=st.sampled_from([("head", "head"), ("head", "logits"), ("logits", "head"), ("logits", "logits")]),
    objective=st.sampled_from(OBJECTIVES),
    reduction=st.sampled_from(["mean", "sum", "batchmean", "none"]),
    shape=st.fixed_dictionaries(
        {"bias": st.booleans(), "scale": st.sampled_from([1.0, 0.5]), "softcap": st.sampled_from([None, 4.0])}
    ),
    hard=st.sampled_from([0.0, 0.5]),
    masked=st.booleans(),
    transposed=st.booleans(),
    workspace=st.integers(0, 40_000),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_calls(
    lead, vocab, widths, kinds, objective, reduction, shape, hard, masked, transposed, workspace, seed
):
    batch = Batch(lead=tuple(lead), vocab=vocab, student_width=widths[0], teacher_width=widths[1], seed=seed)
    sources = [
        batch.source(side, kind, torch.float64, **shape) for side, kind in zip(("student", "teacher"), kinds)
    ]
    wanted = leaves(*sources)
    if transposed:
        sources = [
            kd.Logits(s.values.mT.contiguous().mT, s.scale, s.softcap)
            if isinstance(s, kd.Logits) and s.values.dim() > 1
            else s
            for s in sources
        ]
    options = {"labels": batch.labels, "hard_weight": hard, "reduction": reduction}
    if masked:
        options["mask"] = batch.mask
    loss = kd.distill(
        *sources,
        objective,
        teacher_grad=True,
        compact=seed % 2 == 0,
        workspace_bytes=workspace + vocab * 32 + 256,
        **options,
    )
    exact = dense_distill(*sources, objective, **options)
    assert torch.allclose(loss, exact, rtol=1e-11, atol=1e-13)
    up = batch.upstream if reduction == "none" else None
    for x, y in zip(torch.autograd.grad(loss, wanted, up), torch.autograd.grad(exact, wanted, up)):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)
