"""compat.trl's losses against those of the installed TRL."""

import inspect
import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from cases import Batch, error
from compat_check import assert_same

import kd_kernels as kd
from kd_kernels.compat import trl as compat
from kd_kernels.reference import dense_distill

DTYPES = [torch.float32, torch.bfloat16]
BETAS = [0.0, 0.3, 1.0]
WHY = "trl, transformers and datasets are not installed (pip install kd-kernels[dropin])"
for library in ("trl", "datasets"):  # without which TRL's trainers cannot be imported
    pytest.importorskip(library, reason=WHY)
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

# --- losses -------------------------------------------------------------------------------------------


def test_signatures_are_the_library_s():
    for ours, theirs in (
        (compat.generalized_jsd_loss, GKDTrainer.generalized_jsd_loss),
        (compat.chunked_divergence_loss, distillation_trainer._chunked_divergence_loss),
        (compat.ChunkedDivergenceFunction.apply, ChunkedDivergenceFunction.forward),
    ):
        a, b = (
            [(p.name, p.default) for p in inspect.signature(f).parameters.values() if p.name != "ctx"]
            for f in (ours, theirs)
        )
        assert a == b


REDUCTIONS = {
    "default": {},
    "batchmean": {"reduction": "batchmean"},
    "mean": {"reduction": "mean"},
    "sum": {"reduction": "sum", "temperature": 2.0},
    "num_items": {"reduction": "sum", "num_items_in_batch": 11, "temperature": 0.7},
    "num_items tensor": {"num_items_in_batch": torch.tensor(7)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_generalized_jsd_loss(reduction, beta, labels, dtype):
    batch = Batch(lead=(3, 5))
    labels = batch.labels if labels else None
    options = REDUCTIONS[reduction]
    temperature, rest = options.get("temperature", 1.0), {**options}
    rest.pop("temperature", None)

    def call(function):
        return lambda s, t: function(s, t.detach(), labels, beta, temperature, **rest)

    tensors = [batch.tensors["student logits"], batch.tensors["teacher logits"]]
    assert_same(call(compat.generalized_jsd_loss), call(GKDTrainer.generalized_jsd_loss), tensors, dtype)


def test_generalized_jsd_loss_takes_heads():
    batch = Batch(lead=(3, 5))
    heads = [batch.source(side, "head", torch.float32) for side in ("student", "teacher")]
    dense = [x.hidden @ x.weight.T for x in heads]
    for options in ({}, {"reduction": "mean"}, {"reduction": "sum"}, {"num_items_in_batch": 5}):
        a = compat.generalized_jsd_loss(*heads, batch.labels, beta=0.3, **options)
        b = GKDTrainer.generalized_jsd_loss(*dense, batch.labels, beta=0.3, **options)
        assert error(a, b) < 1e-5


def test_generalized_jsd_loss_of_nothing():
    z = torch.randn(2, 3, 9, requires_grad=True)
    nothing = torch.full((2, 3), -100)
    for reduction in ("batchmean", "mean", "sum"):
        loss = compat.generalized_jsd_loss(z, torch.randn(2, 3, 9), nothing, reduction=reduction)
        assert loss == 0 and torch.autograd.grad(loss, z)[0].abs().sum() == 0


SHAPING = {
    "bare": (1.0, None, 1.0, None),
    "scales": (0.6, None, 1.4, None),
    "softcaps": (1.0, 4.0, 1.0, 6.0),
    "all": (1.3, 5.0, 0.7, 3.0),
}


def chunked_inputs(batch, bias):
    names = [f"{side} {part}" for side in ("student", "teacher") for part in ("hidden", "weight", "bias")]
    return [batch.tensors[name] if bias or "bias" not in name else None for name in names]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shaping", SHAPING)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_chunked_divergence_function(bias, shaping, beta, dtype):
    """The 12 positionals; per-token divergence and entropy under an upstream gradient per token."""
    batch = Batch(lead=(15,))
    temperature, shape = 1.7, SHAPING[shaping]
    entropies = []

    def call(function):
        def loss(*tensors):
            divergence, entropy = function(*tensors, beta, temperature, *shape)
            assert divergence.shape == entropy.shape == (15,)
            assert divergence.requires_grad and not entropy.requires_grad
            entropies.append(entropy)
            return (divergence * batch.upstream).sum()

        return loss

    def exact(h_s, w_s, b_s, h_t, w_t, b_t):
        teacher = [None if x is None else x.detach() for x in (h_t, w_t, b_t)]
        return dense_distill(
            kd.Head(h_s, w_s, b_s, scale=shape[0], softcap=shape[1]),
            kd.Head(*teacher, scale=shape[2], softcap=shape[3]),
            kd.JensenShannon(beta),
            temperature=temperature,
            token_weight=batch.upstream,
            reduction="sum",
        )

    tensors = chunked_inputs(batch, bias)
    ours, theirs = (x.apply for x in (compat.ChunkedDivergenceFunction, ChunkedDivergenceFunction))
    assert_same(call(ours), call(theirs), tensors, dtype, exact)
    assert error(*entropies) < (1e-5 if dtype == torch.float32 else 1e-3)


def test_chunked_divergence_function_of_other_dtypes():
    """A float32 weight on bfloat16 hidden states, which TRL casts, and the same under autocast."""
    batch = Batch(lead=(15,))
    h, w, _, t, v, _ = (x if x is None else x.float() for x in chunked_inputs(batch, False))
    for hidden, teacher, autocast in ((h.bfloat16(), t.bfloat16(), False), (h, t, True)):
        results = []
        for function in (compat.ChunkedDivergenceFunction, ChunkedDivergenceFunction):
            weight = w.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                divergence, _ = function.apply(hidden, weight, None, teacher, v, None, 0.5)
            results.append((divergence, *torch.autograd.grad(divergence.sum(), weight)))
        assert results[0][1].dtype == torch.float32
        assert all(error(a, b) < 1e-2 for a, b in zip(*results))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(7.0)], ids=str)
def test_chunked_divergence_loss(num_items, beta):
    batch = Batch(lead=(3, 5))
    mask = batch.mask.int()
    options = {"temperature": 1.3, "student_logit_scale": 0.8, "teacher_final_logit_softcapping": 5.0}
    outputs = []

    def call(function):
        def loss(h, w, b, t, v, c):
            result = function(
                h, t, w, v, mask, beta, num_items, student_lm_head_bias=b, teacher_lm_head_bias=c, **options
            )
            outputs.append(result[1:])
            return result[0]

        return loss

    theirs = distillation_trainer._chunked_divergence_loss
    assert_same(
        call(compat.chunked_divergence_loss), call(theirs), chunked_inputs(batch, True), torch.float32
    )
    (entropy, count), (their_entropy, their_count) = outputs[:2]
    assert error(entropy, their_entropy) < 1e-5 and count == their_count == mask.sum()


# --- refusals -----------------------------------------------------------------------------------------

Z = torch.randn(3, 9)
H, W, G = torch.randn(3, 4), torch.randn(9, 4), torch.randn(11, 4)

REFUSED = {
    "none": (lambda: compat.generalized_jsd_loss(Z, Z, reduction="none"), r"\[tokens, vocab\] terms"),
    "reduction": (lambda: compat.generalized_jsd_loss(Z, Z, reduction="avg"), "reduction must be one of"),
    "beta": (lambda: compat.generalized_jsd_loss(Z, Z, beta=2.0), "beta must be in"),
    "num_items": (lambda: compat.generalized_jsd_loss(Z, Z, num_items_in_batch=0), "num_items must be > 0"),
    "vocabularies": (
        lambda: compat.ChunkedDivergenceFunction.apply(H, W, None, H, G, None, 0.5),
        "9 vocabulary entries and teacher 11",
    ),
    "ZeRO-3": (
        lambda: compat.ChunkedDivergenceFunction.apply(H, W[:0], None, H, W, None, 0.5),
        "gather it first",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    function, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        function()


def test_sharded_weights_are_refused():
    class DTensor(torch.Tensor):
        """Stands for torch's, which needs a process group."""

    sharded = W.as_subclass(DTensor)
    with pytest.raises(TypeError, match="weight is a DTensor"):
        compat.ChunkedDivergenceFunction.apply(H, sharded, None, H, W, None, 0.5)
    with pytest.raises(TypeError, match="weight is a DTensor"):
        compat.chunked_divergence_loss(H, H, W, sharded, torch.ones(3), 0.5)
