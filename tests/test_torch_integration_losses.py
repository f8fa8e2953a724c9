"""Every public loss in what a training loop puts round it: torch.compile with lengths that change, autocast,
activation checkpointing, accumulation, inference-mode teachers, copies."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cases import OBJECTIVES, TORCH, error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import kd_kernels as kd
from kd_kernels.compat import automodel, liger, modelopt, torchtune, trl

VOCAB, OTHER, WIDTH = 23, 31, 8
Inputs = dict[str, Tensor]


def inputs(samples: int = 4, length: int = 5) -> Inputs:
    g = torch.Generator().manual_seed(100 * samples + length)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    shape = samples, length
    found = {
        "hidden": normal(*shape, WIDTH), "weight": normal(VOCAB, WIDTH), "bias": normal(VOCAB),
        "teacher": normal(*shape, VOCAB), "stranger": normal(*shape, OTHER),
        "z": normal(*shape, VOCAB), "x": normal(*shape, 6), "y": normal(*shape, 6),
        "cost": torch.rand(samples, length, length + 2, generator=g),
        "classes": torch.rand(VOCAB, VOCAB, generator=g),
        "labels": torch.randint(VOCAB, shape, generator=g), "mask": torch.rand(shape, generator=g) < 0.7,
    }  # fmt: skip
    found["matches"] = torch.tensor([[1, 2], [3, 4], [5, 9]])
    found["labels"][:, -1] = -100
    found["mask"][:, 0] = True
    found["logprobs"], found["ids"] = found["teacher"].log_softmax(-1).topk(4)
    return found


def head(d: Inputs) -> kd.Head:
    return kd.Head(d["hidden"], d["weight"], d["bias"])


def flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def alignment(d: Inputs) -> kd.Alignment:
    """Answers of which the teacher's tokenizer puts two tokens in one."""
    rows = kd.answer_rows(d["mask"])
    groups = [
        kd.byte_groups([1] * len(each), [2] * (len(each) // 2) + [1] * (len(each) % 2)) for each in rows
    ]
    return kd.align_tokens(rows, [each[: (len(each) + 1) // 2] for each in rows], groups)


def masses(d: Inputs, pairs: kd.Alignment) -> dict:
    labels = d["labels"].clamp(min=0)
    return {
        "student_log_mass": pairs.student.log_mass(head(d), labels),
        "teacher_log_mass": pairs.teacher.log_mass(d["stranger"], labels).detach(),
    }


def aligned(d: Inputs, pairs: kd.Alignment) -> Tensor:
    objective = kd.SortedWasserstein(**masses(d, pairs))
    return kd.distill(pairs.student.take(head(d)), pairs.teacher.take(d["stranger"]), objective)


def aligned_hybrid(d: Inputs) -> Tensor:
    pairs = alignment(d)
    student, teacher = pairs.student.take(head(d)), pairs.teacher.take(d["stranger"])
    weight = pairs.sample_weight()
    return kd.hybrid_uld(student, teacher, d["matches"], token_weight=weight, **masses(d, pairs))


def with_parts(d: Inputs) -> Tensor:
    options = {"labels": d["labels"], "hard_weight": 0.5, "compact": False, "return_parts": True}
    loss, parts = kd.distill(head(d), d["teacher"], kd.SinkhornBatch(), **options)
    return loss + parts.soft.mean() + parts.student_entropy.mean()


def measured(d: Inputs) -> Tensor:
    """No losses, but asked for in the same loop."""
    found = kd.linear_topk(d["teacher"], 3, targets=d["labels"].clamp(min=0))
    scores = kd.score(head(d), d["teacher"], labels=d["labels"])
    numbers = found.lse.mean() + scores.mean(scores.pairs[0].forward_kl)
    return numbers.float() + kd.distill(d["z"], d["teacher"], JS)


JS, SINKD = kd.JensenShannon(0.3), kd.SinkhornBatch()
HEAD = ("hidden", "weight", "bias")
JSD_LOSS, KL_LOSS = liger.LigerFusedLinearJSDLoss(), torchtune.ForwardKLLoss()
MODULE = kd.DistillationLoss(JS, temperature=2.0)


@dataclass(frozen=True)
class Loss:
    of: Callable[[Inputs], Tensor]
    trained: tuple[str, ...]
    heads: bool = True  # whose products autocast makes narrow

    def __call__(self, d: Inputs) -> Tensor:
        return self.of(d)


# What a compiler takes whole.
WHOLE = {
    "head": Loss(lambda d: kd.distill(head(d), d["teacher"], JS, labels=d["labels"], hard_weight=0.5), HEAD),
    "module": Loss(lambda d: MODULE(head(d), d["teacher"], labels=d["labels"], reduction="batchmean"), HEAD),
    "per token": Loss(lambda d: kd.distill(head(d), d["teacher"], JS, reduction="none").mean(), HEAD),
    "logits": Loss(lambda d: kd.distill(d["z"], d["teacher"], JS, mask=d["mask"]), ("z",), False),
    "sorted": Loss(lambda d: kd.distill(head(d), d["stranger"], kd.SortedWasserstein(5)), HEAD),
    "sparse": Loss(lambda d: kd.distill(head(d), kd.SparseTarget(d["ids"], d["logprobs"]), JS), HEAD),
    "sinkhorn batch": Loss(with_parts, HEAD),
    "sinkhorn batch, compact": Loss(lambda d: kd.distill(head(d), d["teacher"], kd.SinkhornBatch()), HEAD),
    "sinkhorn batch, labels": Loss(
        lambda d: kd.distill(head(d), d["teacher"], kd.SinkhornBatch(), labels=d["labels"]), HEAD
    ),
    "logprobs": Loss(lambda d: kd.linear_logprobs(head(d), d["labels"], entropy=True)[0].mean(), HEAD),
    "distance": Loss(lambda d: kd.relational_distance(flat(d["x"]), flat(d["y"])), ("x",), False),
    "angle": Loss(lambda d: kd.relational_angle(flat(d["x"]), flat(d["y"])), ("x",), False),
    "sinkhorn": Loss(lambda d: kd.sinkhorn(d["cost"], epsilon=0.3).transport_cost.mean(), ("cost",), False),
    "features": Loss(lambda d: kd.feature_transport(flat(d["x"]), flat(d["y"]), epsilon=0.3), ("x",), False),
    "sequences": Loss(
        lambda d: kd.sequence_transport(d["x"], d["y"], epsilon=0.3, student_mask=d["mask"], cost="l1"),
        ("x",), False,
    ),
    "classes": Loss(
        lambda d: kd.class_transport(flat(d["z"]), flat(d["teacher"]), d["classes"], d["labels"].flatten()),
        ("z",), False,
    ),
    "liger": Loss(
        lambda d: JSD_LOSS(
            flat(d["hidden"]), d["weight"], flat(d["hidden"]) * 0.9, d["weight"].detach() + 0.1,
            d["labels"].flatten(),
        ),
        HEAD[:2],
    ),
    "measured": Loss(measured, ("z",)),
}  # fmt: skip
# One call of kd.distill each, as those above are.
SHIMS = {
    "torchtune": Loss(lambda d: KL_LOSS(d["z"], d["teacher"], d["labels"]), ("z",), False),
    "trl": Loss(lambda d: trl.generalized_jsd_loss(d["z"], d["teacher"], d["labels"]), ("z",), False),
    "automodel": Loss(lambda d: automodel.KDLoss()(d["z"], d["teacher"], d["labels"]), ("z",), False),
    "modelopt": Loss(lambda d: modelopt.standard_kd_loss(head(d), d["teacher"], d["labels"]), HEAD),
}  # fmt: skip
# What asks its inputs' values how to go on; by the function that a compiler must leave alone.
LEFT = {
    "hybrid_uld": Loss(lambda d: kd.hybrid_uld(head(d), d["stranger"], d["matches"]), HEAD),
    "multi_level_transport": Loss(
        lambda d: kd.multi_level_transport(
            head(d), d["stranger"], student_mask=d["mask"], teacher_mask=d["mask"], top_k=6
        ),
        HEAD,
    ),
    "sinkhorn_batch": Loss(
        lambda d: kd.distill(
            head(d), d["teacher"], SINKD,
            groups=torch.arange(len(d["z"]), device=d["z"].device)[:, None].expand(d["labels"].shape),
        ),
        HEAD,
    ),
    "answer_rows": Loss(lambda d: aligned(d, alignment(d)), HEAD),
}  # fmt: skip
LOSSES = {**WHOLE, **SHIMS, **LEFT, "aligned hybrid": Loss(aligned_hybrid, HEAD)}


def step(loss: Callable[[Inputs], Tensor], d: Inputs, trained: tuple[str, ...]) -> list[Tensor]:
    """The loss and its gradients, of fresh leaves."""
    d = {name: x.detach().clone().requires_grad_(name in trained) for name, x in d.items()}
    found = loss(d)
    return [found.detach(), *torch.autograd.grad(found, [d[name] for name in trained])]


def same(ours: list[Tensor], wanted: list[Tensor], bar: float = 0.0) -> None:
    assert all(x.abs().sum() > 0 for x in wanted), "the test is vacuous"
    assert max(error(x, y) for x, y in zip(ours, wanted)) <= bar


# --- torch.compile ------------------------------------------------------------------------------------


def compiled(loss: Callable, **options) -> tuple[Callable, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(loss, backend=counter, **options), counter


LENGTHS = (3, 5), (2, 7), (4, 6)


@pytest.mark.parametrize("name", WHOLE)
def test_a_new_length_is_no_new_graph(name):
    """One graph of the first sizes, one of any: a graph for each would end at the compiler's limit of 8."""
    loss = WHOLE[name]
    whole, counter = compiled(loss.of, fullgraph=True)
    for sizes in LENGTHS:
        d = inputs(*sizes)
        same(step(whole, d, loss.trained), step(loss, d, loss.trained))
    assert counter.frame_count == 2


def test_an_alignment_that_is_there_compiles():
    """Made beside the batch, as a collator would."""
    whole, counter = compiled(aligned, fullgraph=True)
    for sizes in LENGTHS:
        d = inputs(*sizes)
        pairs = alignment(d)
        same(*(step(partial(loss, pairs=pairs), d, HEAD) for loss in (whole, aligned)))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", LEFT)
def test_what_looks_at_values_is_left_alone(name):
    loss = LEFT[name]
    refused(loss.of, name, inputs())
    if name == "sinkhorn_batch" and TORCH < (2, 7):
        pytest.skip("torch 2.6 fails an assertion of its own where it leaves this call between two graphs")
    parts, counter = compiled(loss.of)
    # Between graphs an alignment is made sample by sample, and each is a length to compile for.
    for sizes in LENGTHS[:1] if name == "answer_rows" else LENGTHS:
        d = inputs(*sizes)
        same(step(parts, d, loss.trained), step(loss, d, loss.trained))
    assert counter.frame_count < 12  # dozens, were it cut at every look


def refused(call: Callable, name: str, *arguments) -> None:
    """Told apart from what a compiler says of a branch in the middle of the function: that names it too."""
    whole, _ = compiled(call, fullgraph=True)
    with pytest.raises(Exception, match=rf"(?s)(marked as skipped|skip function).*\b{name}\b"):
        whole(*arguments)


def test_making_an_alignment_is_refused_by_name():
    refused(lambda x: x * len(kd.byte_groups([1, 1], [2])), "byte_groups", torch.ones(2))
    rows, groups = [torch.arange(2)], [[(range(2), range(1))]]
    refused(lambda x: x * kd.align_tokens(rows, rows, groups).samples, "align_tokens", torch.ones(2))


@pytest.mark.parametrize("name", ["head", "sinkhorn batch", "features", "classes"])
def test_one_compiled_loss_in_training_and_evaluation(name):
    """Under no_grad, inference_mode and autocast, one after the other."""
    loss, d = WHOLE[name], inputs()
    whole, _ = compiled(loss.of, fullgraph=True)
    leaves = {k: x.clone().requires_grad_(k in loss.trained) for k, x in d.items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = whole(leaves)
            assert torch.equal(found, loss(leaves)) and not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole(leaves), loss(leaves))
    same(step(whole, d, loss.trained), step(loss, d, loss.trained))


# --- eager --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_autocast(name):
    """Heads are cast, nothing else is; losses and gradients stay float32."""
    loss, d = LOSSES[name], inputs()

    def narrow(d):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(d)

    found, wanted = step(narrow, d, loss.trained), step(loss, d, loss.trained)
    assert all(x.dtype == torch.float32 for x in found)
    assert error(found[0], wanted[0]) < 0.02
    if not loss.heads:
        same(found, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_checkpoint(name, reentrant):
    loss, d = LOSSES[name], inputs()

    def again(d):
        return checkpoint(lambda *values: loss(dict(zip(d, values))), *d.values(), use_reentrant=reentrant)

    leaves = {k: x.clone().requires_grad_(k in loss.trained) for k, x in d.items()}
    again(leaves).backward()  # autograd.grad does not go through the reentrant form
    same([leaves[k].grad for k in loss.trained], step(loss, d, loss.trained)[1:])


@pytest.mark.parametrize("name", LOSSES)
def test_checkpoint_that_keeps_products(name):
    loss, d = LOSSES[name], inputs()
    aten = torch.ops.aten
    policy = partial(
        create_selective_checkpoint_contexts, [aten.mm.default, aten.addmm.default, aten.bmm.default]
    )

    def again(d):
        whole = lambda *values: loss(dict(zip(d, values)))  # noqa: E731
        return checkpoint(whole, *d.values(), use_reentrant=False, context_fn=policy)

    same(step(again, d, loss.trained), step(loss, d, loss.trained))


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_saved_may_come_back_in_another_layout(name):
    loss, d = LOSSES[name], inputs()

    def stored(d):
        turned = lambda x: x.mT.contiguous().mT if x.dim() > 1 else x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, turned):
            return loss(d)

    same(step(stored, d, loss.trained), step(loss, d, loss.trained), 2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_constants_made_in_inference_mode(name):
    """Labels, teachers, a frozen head: of a data loader or a model that was run, or loaded, there."""
    loss, d = LOSSES[name], inputs()
    trained = loss.trained[:1]
    wanted = step(loss, d, trained)
    with torch.inference_mode():
        constants = {k: x.clone() for k, x in d.items()}
    leaves = {k: d[k].clone().requires_grad_() for k in trained}
    found = loss({**constants, **leaves})
    same([found, *torch.autograd.grad(found, list(leaves.values()))], wanted)
    with torch.inference_mode():
        assert error(loss(constants), wanted[0]) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_there_is_refused(name):
    """A second derivative, torch.func: by an error, never by zeros."""
    loss, d = LOSSES[name], inputs()
    first = loss.trained[0]
    for each in loss.trained:
        # Also where there is another way from the slope to x, which would be taken alone.
        x = d[each].clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss({**d, each: x.tanh()}), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"kd_kernels\.\w+: double backward"):
            torch.autograd.grad(slope.square().sum(), x)
    for transform in (torch.func.grad, torch.func.vmap):
        # The second of torch 2.6, where an alignment is made under the transform.
        refusal = r"kd_kernels\.\w+ does not work under torch.func|Cannot access data pointer"
        with pytest.raises((TypeError, RuntimeError), match=refusal):
            transform(lambda v: loss({**d, first: v}))(
                d[first] if transform is torch.func.grad else d[first][None]
            )


# Sums, or means over num_items, of a batch: the same whole and in two halves.
SUMS = {
    "num_items": (lambda d, n: kd.distill(head(d), d["teacher"], JS, labels=d["labels"], num_items=n), HEAD),
    "sorted": (
        lambda d, n: kd.distill(
            head(d), d["stranger"], kd.SortedWasserstein(), labels=d["labels"], num_items=n
        ),
        HEAD,
    ),
    "sparse": (
        lambda d, n: kd.distill(
            head(d), kd.SparseTarget(d["ids"], d["logprobs"]), JS, labels=d["labels"], num_items=n
        ),
        HEAD,
    ),
    "sinkhorn batch": (
        lambda d, n: kd.distill(
            head(d), d["teacher"], kd.SinkhornBatch(), num_items=n, labels=d["labels"],
            groups=torch.arange(len(d["z"]), device=d["z"].device)[:, None].expand(d["labels"].shape),
        ),
        HEAD,
    ),
    "logprobs": (lambda d, n: kd.linear_logprobs(head(d), d["labels"]).sum() / n, HEAD),
    "sequences": (
        lambda d, n: kd.sequence_transport(d["x"], d["y"], epsilon=0.3, reduction="sum") / n, ("x",),
    ),
    "classes": (
        lambda d, n: kd.class_transport(
            flat(d["z"]), flat(d["teacher"]), d["classes"], d["labels"].flatten(), reduction="sum"
        ) / n,
        ("z",),
    ),
    "hybrid": (lambda d, n: kd.hybrid_uld(head(d), d["stranger"], d["matches"], reduction="sum") / n, HEAD),
    "automodel": (lambda d, n: automodel.KDLoss()(d["z"], d["teacher"], d["labels"], n), ("z",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_accumulation(name):
    (loss, trained), d = SUMS[name], inputs()
    items = (d["labels"] != -100).sum()
    shared = ("weight", "bias", "classes", "matches")

    def halves(d):
        parts = (
            {k: x if k in shared else x[rows] for k, x in d.items()} for rows in (slice(0, 1), slice(1, 4))
        )
        return sum(loss(part, items) for part in parts)

    same(step(halves, d, trained), step(lambda d: loss(d, items), d, trained), 1e-5)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    """As data loaders, EMA models and checkpoints make them."""
    d = inputs()
    for objective in (*OBJECTIVES, kd.SortedWasserstein(3), kd.SinkhornBatch(0.2)):
        module = kd.DistillationLoss(objective, temperature=2.0)
        wanted = module(d["z"], d["teacher"])
        assert torch.equal(copied(module)(d["z"], d["teacher"]), wanted)
        assert module.state_dict() == {}
    for given in (head(d), kd.Logits(d["z"]), kd.SparseTarget(d["ids"], d["logprobs"])):
        assert all(
            x is y is None or torch.equal(x, y) for x, y in zip(copied(given).tensors(), given.tensors())
        )


@pytest.mark.parametrize("name", LOSSES)
def test_the_default_dtype_has_no_say(name):
    d = inputs()
    try:
        torch.set_default_dtype(torch.float64)
        assert LOSSES[name](d).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


POINTS = torch.arange(12.0).view(4, 3).sin()
NUMBERS = {
    "epsilon": [
        lambda x: kd.sinkhorn(POINTS, epsilon=x).transport_cost,
        lambda x: kd.feature_transport(POINTS, 2 * POINTS, epsilon=x),
        lambda x: kd.distill(POINTS, 2 * POINTS, kd.SinkhornBatch(epsilon=x)),
        lambda x: kd.class_transport(POINTS, 2 * POINTS, torch.rand(3, 3), epsilon=x),
    ],
    "tolerance": [lambda x: kd.sinkhorn(POINTS, epsilon=0.1, tolerance=x).transport_cost],
    "beta": [
        lambda x: kd.relational_distance(POINTS, 2 * POINTS, beta=x),
        lambda x: kd.relational_angle(POINTS, 2 * POINTS, beta=x),
    ],
}


@pytest.mark.parametrize("value", [-1.0, float("nan"), 0.0])
@pytest.mark.parametrize("name, call", [(name, call) for name, calls in NUMBERS.items() for call in calls])
def test_a_compiled_call_refuses_what_is_no_number_above_0(name, call, value):
    if name == "tolerance" and value == 0:
        pytest.skip("to the op 0 is no tolerance; all iterations are done")
    compiled = torch.compile(call, backend="aot_eager")
    assert compiled(0.3).isfinite().all()
    for each in (call, compiled):
        with pytest.raises(ValueError, match=f"{name} must be .*finite.* > 0"):
            each(value)
