"""The op that measures distances for ``kd.SinkhornBatch``, on every backend: slabs, heads, groups."""

import re

import pytest
import torch
from cases import SHAPING, SOURCES, Batch, error, leaves
from jobs import backends_of

from kd_kernels.backends import PAIRWISE_L1_SCRATCH
from kd_kernels.drivers.pairwise_l1 import PairwiseProblem, _Walk
from kd_kernels.drivers.sides import Model
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.ops.pairwise_l1 import pairwise_l1

BACKENDS = backends_of("pairwise_l1")
EACH = pytest.mark.parametrize("name", BACKENDS)
MEMBERS = torch.tensor([[0, 2, 5, 6], [1, 3, 4, -1]])  # of 8 tokens
ALL, KEPT = torch.arange(8)[None], torch.tensor([[0, -1, 2, 3, -1, 5, 6, 7]])


def pair(kinds=("head", "head"), dtype=torch.float64, shape="all", vocab=203):
    batch = Batch(lead=(8,), vocab=vocab)
    shaped = [{k: v for k, v in SHAPING[shape].items() if k != "bias" or kind == "head"} for kind in kinds]
    sides = zip(("student", "teacher"), kinds, shaped)
    return batch, *(batch.source(side, kind, dtype, **options) for side, kind, options in sides)


def distances(student, teacher, members, temperature, name, workspace=None, compact=True):
    """``[G, L, L]``, 0 where there is no pair."""
    tensors = [*student.tensors(), None, None][:3] + [*teacher.tensors(), None, None][:3]
    scalars = [x for s in (student, teacher) for x in (s.scale, s.softcap or 0.0)]
    needs = [x is not None and x.requires_grad for x in tensors]
    cost, _, _ = pairwise_l1(
        *tensors,
        members,
        temperature,
        temperature.new_tensor(1.3),
        torch.tensor(scalars, dtype=torch.float64),
        None,
        None,
        name,
        workspace,
        compact,
        needs,
    )
    return torch.where(_pairs(members), cost, 0.0)


def _pairs(members):
    return (members[:, :, None] >= 0) & (members[:, None, :] >= 0)


def dense(student, teacher, members, temperature):
    both = []
    for source, t in ((student, temperature[:, None]), (teacher, 1.3)):
        values, weight, bias = ([*source.tensors(), None, None])[:3]
        z = values if weight is None else values @ weight.T + (0 if bias is None else bias)
        z = z * source.scale
        if source.softcap:
            z = source.softcap * torch.tanh(z / source.softcap)
        both.append((z / t).softmax(-1)[members])
    cost = (both[0][:, :, None] - both[1][:, None]).abs().sum(-1)
    return torch.where(_pairs(members), cost, 0.0)


@EACH
@pytest.mark.parametrize("slabs", [False, True], ids=["whole", "slabs"])
@pytest.mark.parametrize("members", [MEMBERS, ALL, KEPT], ids=["groups", "all", "not compacted"])
@pytest.mark.parametrize("kinds", SOURCES, ids="x".join)
def test_values_and_gradients(kinds, members, slabs, name):
    batch, student, teacher = pair(kinds)
    temperature = torch.rand(8, dtype=torch.float64) + 0.6
    workspace = None if not slabs else 50_000 if name in PAIRWISE_L1_SCRATCH else 10_000
    cost = distances(student, teacher, members, temperature, name, workspace, compact=members is not KEPT)
    want = dense(student, teacher, members, temperature)
    assert error(cost, want) < 1e-12
    upstream = torch.randn(cost.shape, dtype=torch.float64)
    inputs = leaves(student, teacher)
    exact = torch.autograd.grad(want, inputs, upstream)
    for g, x in zip(torch.autograd.grad(cost, inputs, upstream), exact):
        assert error(g, x) < 1e-11


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_the_triton_kernel_takes_counts_as_workspace(dtype, gradients):
    one = torch.ones((), dtype=torch.float64)
    _, student, teacher = pair(("head", "logits"), dtype, "bare", vocab=5000)

    def walk(budget):
        models = [
            Model(*[*x.tensors(), None, None][:3], 1.0, 0.0, one, (True, x is student, False))
            for x in (student, teacher)
        ]
        tokens = Tokens(models[0].token_count, MEMBERS[MEMBERS >= 0])
        problem = PairwiseProblem(*models, MEMBERS, tokens, None, None, "triton", budget)
        return _Walk(problem, gradients)

    for budget in (100_000, 300_000, 1 << 30):
        cut = walk(budget)
        assert cut._room(cut.width, gradients) <= budget
        assert (cut.width < 5000) == (budget < 1 << 30)
    with pytest.raises(ValueError, match=r"workspace_bytes=100 .* at least \d+ bytes") as refusal:
        walk(100)
    needed = int(re.search(r"at least (\d+)", str(refusal.value))[1])
    assert walk(needed).width >= 1, "what the message asks for is taken"


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kinds", [("head", "head"), ("head", "logits")], ids="x".join)
def test_the_workspace_that_a_refusal_asks_for_does_for_both_passes(kinds, dtype, name):
    _, student, teacher = pair(kinds, dtype)
    temperature = torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"workspace_bytes=10 .* at least \d+ bytes") as refusal:
        distances(student, teacher, MEMBERS, temperature, name, 10)
    needed = int(re.search(r"at least (\d+)", str(refusal.value))[1])
    cost = distances(student, teacher, MEMBERS, temperature, name, needed)
    inputs = leaves(student, teacher)
    for g in torch.autograd.grad(cost.sum(), inputs):
        assert g.isfinite().all()
    with pytest.raises(ValueError, match="workspace_bytes"):
        distances(student, teacher, MEMBERS, temperature, name, needed - 1)
