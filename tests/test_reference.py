"""The oracle itself: textbook formulas against gradcheck, closed forms against autograd, all in float64."""

import pytest
import torch
from cases import OBJECTIVES, OPTIONS, Batch, error
from plain import gradients

import kd_kernels as kd
from kd_kernels import rows as R
from kd_kernels.objectives import CATALOGUE
from kd_kernels.reference import dense_distill, divergence

IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x)}


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_textbook_formula_by_gradcheck(objective):
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: divergence(objective, s, t), (student, teacher))


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_definition_in_probabilities(objective):
    """Against sums over probabilities written out by hand."""
    p, q = torch.rand(2, 9, dtype=torch.float64).softmax(-1)
    a, b = objective.parameters()

    def kl(x, y):
        return (x * (x / y).log()).sum()

    by_hand = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: a * kl(p, a * p + (1 - a) * q) + (1 - a) * kl(q, a * p + (1 - a) * q),
        "skew_kl": lambda: kl(p, a * p + (1 - a) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - a) * p + a * q),
        "total_variation": lambda: (p - q).abs().sum() / 2,
        "weighted_kl": lambda: a * kl(p, q) + b * kl(q, p),
    }
    value = divergence(objective, q.log(), p.log())
    assert abs(value - by_hand[objective.name]()) < 1e-14


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_gradcheck_through_the_public_call(objective, backend):
    batch = Batch(lead=(4,), vocab=9, student_width=3, teacher_width=4, spread=1.0)
    inputs = [batch.tensors[f"{side} {part}"].clone().requires_grad_() for side in ("student", "teacher")
              for part in ("hidden", "weight", "bias")]  # fmt: skip

    def call(h_s, w_s, b_s, h_t, w_t, b_t, reduction):
        student = kd.Head(h_s, w_s, b_s, scale=0.9, softcap=3.0)
        teacher = kd.Head(h_t, w_t, b_t, scale=1.2, softcap=4.0)
        options = {**OPTIONS["everything"](batch), "num_items": None, "reduction": reduction, "mask": None}
        return kd.distill(student, teacher, objective, teacher_grad=True, backend=backend, **options)

    fast = backend == "triton"  # interpreted: along random directions instead of one input at a time
    for reduction in ("sum", "none"):
        assert torch.autograd.gradcheck(lambda *x, r=reduction: call(*x, r), inputs, fast_mode=fast)


@pytest.mark.parametrize("kinds", [("head", "head"), ("logits", "logits")], ids="x".join)
def test_wrong_reference_would_show(kinds):
    """The comparison helper can fail: a loss with another objective is far outside the bar."""
    batch = Batch()
    student, teacher = (
        batch.source(side, kind, torch.float64) for side, kind in zip(("student", "teacher"), kinds)
    )
    exact = dense_distill(student, teacher, kd.ForwardKL())
    other = kd.distill(student, teacher, kd.SkewKL(0.01), backend="reference")
    assert error(other, exact) > 1e-3
    assert error(gradients(other, [student])[0], gradients(exact, [student])[0]) > 1e-3


def test_phases_can_run_apart(backend):
    """Statistics, terms and gradient in three calls give what one fused call gives."""
    from kd_kernels.backends import pick

    n, vocab = 5, 77
    _, kernel = pick("row_divergence", torch.device("cpu"), backend)
    for objective in CATALOGUE:
        z_s, z_t = torch.randn(2, n, vocab) * 3
        results = []
        for plan in ((R.STATISTICS | R.TERMS | R.GRADIENT,), (R.STATISTICS, R.TERMS, R.GRADIENT),
                     (R.STATISTICS | R.TERMS, R.GRADIENT), (R.STATISTICS, R.TERMS | R.GRADIENT)):  # fmt: skip
            offsets = torch.arange(n) * vocab
            ones = torch.ones(n, dtype=torch.float64)
            job = R.RowJob(
                objective, n, vocab,
                R.Rows(z_s, offsets, ones * 1.5, grad=torch.empty_like(z_s), grad_offsets=offsets),
                R.Rows(z_t, offsets, ones * 0.8, grad=torch.empty_like(z_t), grad_offsets=offsets),
                ones * 0.3, ones * 0.6, torch.arange(n), ones, ones * 0.5,
                torch.zeros(n, R.STATISTIC_COLUMNS, dtype=torch.float64),
                torch.zeros(n, R.TERM_COLUMNS, dtype=torch.float64), True,
            )  # fmt: skip
            for phases in plan:
                kernel(job, phases)
            results.append((job.terms, job.student.grad, job.teacher.grad))
        for other in results[1:]:
            for x, y in zip(results[0], other):
                assert error(x, y) < 2e-6, objective


@pytest.mark.parametrize("objective", [kd.ForwardKL(), kd.ReverseKL(), kd.WeightedKL(0.5, 2.0)], ids=repr)
def test_a_saved_vocabulary_named_as_a_whole_is_the_dense_one(objective):
    """What it leaves is nothing, though its probabilities add up to 1 but for rounding; and it may name
    tokens whose probabilities float64 does not have."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        z, y = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator).unbind()
        y[:2] *= 5
        y[3] *= 500
        ids = torch.rand(4, 5, generator=generator).argsort(1)
        logprobs = y.log_softmax(-1).gather(1, ids)
        dense = dense_distill(z, y, objective, reduction="none")
        for missing in ("tail", "renorm_both", "teacher_renorm"):
            if missing == "teacher_renorm" and objective.name != "forward_kl":
                continue
            found = dense_distill(z, kd.SparseTarget(ids, logprobs, missing), objective, reduction="none")
            torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)


def test_the_dense_loss_refuses_what_distill_does():
    z, y = torch.randn(3, 5), torch.randn(3, 5)
    for call, message in (
        ({"reduction": "batch"}, "reduction must be"),
        ({"hard_weight": 0.5}, "hard_weight=0.5 needs labels"),
    ):
        for loss in (dense_distill, kd.distill):
            with pytest.raises(ValueError, match=message):
                loss(z, y, kd.ForwardKL(), **call)
    both = [loss(z[0], y[0], kd.ForwardKL(), reduction="batchmean") for loss in (dense_distill, kd.distill)]
    torch.testing.assert_close(*both)
