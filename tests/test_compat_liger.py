"""compat.liger against liger-kernel: its chunked losses, its Triton modules through Triton's interpreter
(float32, compat_liger_triton.py), and their arithmetic written plainly, for all that the interpreter is too
slow or too inexact for."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import FLOOR, Batch, error
from compat_check import assert_same, evaluate, leaves

import kd_kernels as kd
from kd_kernels.compat import liger
from kd_kernels.reference import dense_distill

DTYPES = [torch.float32, torch.bfloat16]
ABSENT = "liger-kernel is not installed (pip install kd-kernels[dropin])"
BETAS = [0.0, 0.3, 1.0]


def heads(batch, *names):
    return [None if name is None else batch.tensors[name] for name in names]


def logits_of(hidden, weight, bias=None):
    """In float32 at least, as Liger's fused JSD asks of its GEMM."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


# --- LigerFusedLinearJSDLoss, against the library --------------------------------------------------------

HEADS = ("student hidden", "student weight", "teacher hidden", "teacher weight")
OPTIONS = {
    "defaults": {},
    "soft only": {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
    "weights and temperature": {"weight_hard_loss": 0.7, "weight_soft_loss": 0.4, "temperature": 2.0},
    "ignore_index": {"ignore_index": 3, "temperature": 1.5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", OPTIONS)
def test_chunked_jsd(options, beta, bias, dtype):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason=ABSENT).LigerFusedLinearJSDLoss
    options = {"beta": beta, **OPTIONS[options]}
    batch = Batch(lead=(15,))
    labels = torch.where(batch.labels == -100, options.get("ignore_index", -100), batch.labels)
    tensors = heads(batch, *HEADS, *(("student bias", "teacher bias") if bias else (None, None)))

    def call(module):
        return lambda s, w, t, v, b, c: module(s, w, t, v, labels, b, c)

    def exact(s, w, t, v, b, c):
        return dense_distill(
            kd.Head(s, w, b),
            kd.Head(t.detach(), v.detach(), None if c is None else c.detach()),
            kd.JensenShannon(beta),
            labels=labels,
            ignore_index=options.get("ignore_index", -100),
            temperature=options.get("temperature", 1.0),
            hard_weight=options.get("weight_hard_loss", 0.5),
            soft_weight=options.get("weight_soft_loss", 0.5),
        )

    assert_same(
        call(liger.LigerFusedLinearJSDLoss(**options)),
        call(theirs(**options, compiled=False, chunk_size=4)),
        tensors,
        dtype,
        exact,
    )


def test_chunked_jsd_parts():
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason=ABSENT).LigerFusedLinearJSDLoss
    batch = Batch(lead=(15,))
    tensors = [x.float() for x in heads(batch, *HEADS)]
    options = {"weight_hard_loss": 0.7, "weight_soft_loss": 0.4, "beta": 0.3, "return_soft_hard_loss": True}
    a = liger.LigerFusedLinearJSDLoss(**options)(*tensors, batch.labels)
    b = theirs(**options, compiled=False)(*tensors, batch.labels)
    assert isinstance(a, tuple) and len(a) == len(b) == 3
    assert all(error(x, y) < 1e-5 for x, y in zip(a, b))


def modules_of_the_library():
    pytest.importorskip("triton", reason=ABSENT)
    pytest.importorskip("liger_kernel", reason=ABSENT)
    try:
        return importlib.import_module("liger_kernel.transformers")
    except RuntimeError as error:  # Triton 3.2 without a driver
        pytest.skip(f"Liger's Triton modules cannot be imported here: {error}")


def test_signatures_are_the_library_s():
    modules = modules_of_the_library()
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason=ABSENT)
    for name in liger.__all__:
        ours, theirs = getattr(liger, name), getattr(modules, name, None) or getattr(chunked, name)
        for method in ("__init__", "forward"):
            a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (ours, theirs))
            assert list(a) == list(b), (name, method)
            assert [p.default for p in a.values()] == [p.default for p in b.values()], (name, method)


# --- the Triton modules: liger_kernel/ops/{jsd,fused_linear_jsd,kl_div,fused_linear_kl_div,tvd}.py -------


def test_triton_modules_through_the_interpreter():
    modules_of_the_library()
    tests = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, tests / "compat_liger_triton.py"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("same: ") == 36


def jsd_rows(log_q, log_p, beta):
    """``_jsd_kernel``, summed over the vocabulary."""
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)


def kl_rows(log_q, target, eps=1e-10):
    """``_kldiv_kernel_forward`` and ``_kl_div_kernel``, summed over the vocabulary."""
    target = target.to(log_q.dtype)
    return (target * (target.clamp(min=eps).log() - log_q)).sum(-1)


def reduce(rows, reduction, vocab):
    return {"batchmean": rows.mean(), "mean": rows.mean() / vocab, "sum": rows.sum()}[reduction]


def labelled(batch, labels):
    keep = batch.labels != -100 if labels else torch.ones_like(batch.labels, dtype=torch.bool)
    return (batch.labels if labels else None), keep


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_fused_jsd(beta, temperature, labels, dtype):
    batch = Batch(lead=(15,))
    labels, keep = labelled(batch, labels)
    module = liger.LigerFusedLinearJSD(beta, temperature=temperature, accum_dtype=torch.float32)

    def formula(s, w, t, v):
        log_q = (logits_of(s, w) / temperature).log_softmax(-1)
        log_p = (logits_of(t, v) / temperature).log_softmax(-1).detach()
        return jsd_rows(log_q, log_p, beta)[keep].mean()

    assert_same(lambda *x: module(*x, labels), formula, heads(batch, *HEADS), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("mass", ["normalised", "any mass"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_fused_kl_div(reduction, mass, labels, dtype):
    batch = Batch(lead=(15,))
    labels, keep = labelled(batch, labels)
    target = batch.tensors["teacher logits"].softmax(-1)
    target[:, ::7] = 0
    target[2] = 0  # a row without mass is 0, in Liger too
    if mass == "normalised":
        target[2] = 1 / 203
        target = target / target.sum(-1, keepdim=True)
    module = liger.LigerFusedLinearKLDivLoss(reduction, temperature=1.7)

    def formula(s, w, t):
        rows = kl_rows((logits_of(s, w) / 1.7).log_softmax(-1), t.detach())
        return reduce(rows[keep], reduction, 203)

    tensors = [*heads(batch, "student hidden", "student weight"), target]
    assert_same(lambda s, w, t: module(s, w, t, labels), formula, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_of_log_probabilities(beta, labels, dtype):
    batch = Batch(lead=(15,))
    labels, keep = labelled(batch, labels)
    module = liger.LigerJSD(beta)

    def inputs(z):
        return z.log_softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))

    assert_same(
        lambda s, t: module(inputs(s), inputs(t), labels),
        lambda s, t: jsd_rows(inputs(s), inputs(t).detach(), beta)[keep].mean(),
        heads(batch, "student logits", "teacher logits"),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True], ids=["probabilities", "log-probabilities"])
@pytest.mark.parametrize("mass", [1.0, 0.8])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_kl_div_of_log_probabilities(reduction, mass, log_target, dtype):
    batch = Batch(lead=(15,))
    module = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)
    torch_s = torch.nn.KLDivLoss(reduction=reduction, log_target=log_target)

    def inputs(s, t):
        wide = torch.promote_types(s.dtype, torch.float32)
        p = t.softmax(-1, dtype=wide) * mass
        return s.log_softmax(-1, dtype=wide), (p.log() if log_target else p)

    def formula(s, t):
        log_q, target = inputs(s, t)
        return torch_s(log_q, target.detach())

    tensors = heads(batch, "student logits", "teacher logits")
    assert_same(lambda s, t: module(*inputs(s, t)), formula, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_tvd_of_probabilities(reduction, labels, dtype):
    batch = Batch(lead=(15,))
    labels, keep = labelled(batch, labels)
    module = liger.LigerTVDLoss(reduction)

    def inputs(z):
        return z.softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))

    def formula(s, t):
        return reduce(0.5 * (inputs(s) - inputs(t).detach()).abs().sum(-1)[keep], reduction, 203)

    tensors = heads(batch, "student logits", "teacher logits")
    assert_same(lambda s, t: module(inputs(s), inputs(t), labels), formula, tensors, dtype)


def test_tvd_of_underflowed_probabilities():
    student = torch.tensor([[0.0, 200.0, 199.0, -50.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.3, 0.6, 0.1]])
    assert (student.softmax(-1) == 0).any()
    (a,) = torch.autograd.grad(liger.LigerTVDLoss()(student.softmax(-1), teacher), student)
    (b,) = torch.autograd.grad(0.5 * (student.softmax(-1) - teacher).abs().sum(), student)
    assert error(a, b) < FLOOR[torch.float32]


def test_second_backward():
    """Liger scales its saved gradients in place, so that its second backward is wrong."""
    batch = Batch(lead=(15,))
    tensors = leaves(heads(batch, *HEADS), torch.float32)
    loss = liger.LigerFusedLinearJSD()(*tensors, batch.labels)
    first, second = (torch.autograd.grad(3 * loss, tensors[:2], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_nothing_counts():
    batch = Batch(lead=(15,))
    nothing = torch.full_like(batch.labels, -100)
    probabilities = [x.softmax(-1) for x in heads(batch, "student logits", "teacher logits")]
    hidden = heads(batch, *HEADS)
    for function, inputs in (
        (lambda *x: liger.LigerFusedLinearJSDLoss()(*x, nothing), hidden),
        (lambda *x: liger.LigerFusedLinearJSD()(*x, nothing), hidden),
        (
            lambda s, w, p: liger.LigerFusedLinearKLDivLoss()(s, w, p, nothing),
            [*hidden[:2], probabilities[1]],
        ),
        (lambda s, t: liger.LigerJSD()(s.log(), t.log(), nothing), probabilities),
        (lambda s, t: liger.LigerTVDLoss()(s, t, nothing), probabilities),
    ):
        loss, gradient, *_ = evaluate(function, leaves(inputs, torch.float32))
        assert loss == 0 and gradient.abs().sum() == 0


# --- refusals --------------------------------------------------------------------------------------------

H, W, G = torch.randn(3, 4), torch.randn(9, 4), torch.randn(11, 4)
P = torch.rand(3, 9).softmax(-1)
LABELS = torch.tensor([1, 2, 8])

REFUSED = {
    "temperature": (lambda: liger.LigerFusedLinearJSDLoss(temperature=0), "temperature must be > 0, got 0"),
    "temperature, fused": (lambda: liger.LigerFusedLinearJSD(temperature=-1.0), "temperature must be > 0"),
    "temperature, KL": (lambda: liger.LigerFusedLinearKLDivLoss(temperature=0), "temperature must be > 0"),
    "beta": (lambda: liger.LigerFusedLinearJSDLoss(beta=1.5), r"beta must be in \[0, 1\]"),
    "beta, fused": (lambda: liger.LigerFusedLinearJSD(-0.5), "beta"),
    "beta, logits": (lambda: liger.LigerJSD(2.0), "beta"),
    "vocabularies": (
        lambda: liger.LigerFusedLinearJSDLoss()(H, W, H, G, LABELS),
        "student_weight has 9 .* teacher_weight 11.*truncate",
    ),
    "vocabularies, fused": (lambda: liger.LigerFusedLinearJSD()(H, G, H, W, None), "11 .* teacher_weight 9"),
    "accum_dtype": (
        lambda: liger.LigerFusedLinearJSD(accum_dtype=torch.float64)(H, W, H, W, None),
        "accum_dtype=torch.float64",
    ),
    "accum_dtype, KL": (
        lambda: liger.LigerFusedLinearKLDivLoss(accum_dtype=torch.float64)(H, W, P),
        "accum_dtype=torch.float64",
    ),
    "eps": (lambda: liger.LigerKLDIVLoss(1e-3), r"eps must be in \[0, 1e-08\], got 0.001"),
    "eps, fused": (lambda: liger.LigerFusedLinearKLDivLoss(eps=1e-3), "eps must be"),
    "none": (lambda: liger.LigerKLDIVLoss(reduction="none"), r"\[tokens, vocab\] terms"),
    "none, fused": (lambda: liger.LigerFusedLinearKLDivLoss("none"), r"\[tokens, vocab\] terms"),
    "none, TVD": (lambda: liger.LigerTVDLoss("none"), r"\[tokens, vocab\] terms"),
    "leading shape": (
        lambda: liger.LigerKLDIVLoss()(P[None].log(), P[None]),
        r"y_pred must be \[N, V\], got",
    ),
    "NaN": (lambda: liger.LigerKLDIVLoss()(P.log(), P * torch.nan), "row of the target has no finite mass"),
    "reduction": (lambda: liger.LigerTVDLoss("average"), "reduction must be one of batchmean, mean, sum"),
    "labels": (lambda: liger.LigerJSD()(P.log(), P.log(), LABELS[:2]), "labels must have the leading shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    function, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        function()
