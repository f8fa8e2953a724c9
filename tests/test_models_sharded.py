"""Sharded and wrapped models, two or four processes over gloo: the loss and gradients of one process."""

from __future__ import annotations

import dataclasses
import weakref
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cases import TORCH, error
from ranks import checks_of, read, run_checks
from torch import nn

import kd_kernels as kd

if TORCH < (2, 7):
    pytest.skip("torch 2.6 shards on GPUs only (FSDP2 records events of streams)", allow_module_level=True)

VOCAB, WIDTH = 23, 8  # 23 rows: shards of unequal size
OBJECTIVE = kd.JensenShannon(0.3)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.norm(x)


class Toy(nn.Module):
    """The shape of a causal language model, without its library."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="toy")
        self.model = Body()
        self.lm_head = nn.Linear(WIDTH, VOCAB)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids)))


def toy() -> Toy:
    torch.manual_seed(0)
    model = Toy()
    model.lm_head.weight.data.normal_(0, 0.5)
    return model


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(10 + rank)
    return torch.randint(0, VOCAB, (2, 5), generator=g), torch.randn(2, 5, VOCAB, generator=g)


def loss_of(model: nn.Module, rank: int, reduction: str = "mean", objective=OBJECTIVE) -> torch.Tensor:
    ids, teacher = batch(rank)
    hidden = kd.last_hidden_state(model, input_ids=ids)
    return kd.distill(kd.Head.from_model(model, hidden), teacher, objective, reduction=reduction).mean()


def expected(world: int, objective=OBJECTIVE) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Each rank's loss, and the gradient of their mean, in one process."""
    model = toy()
    losses = [loss_of(model, rank, objective=objective) for rank in range(world)]
    (sum(losses) / world).backward()
    return [loss.item() for loss in losses], {name: p.grad for name, p in model.named_parameters()}


def compare(model: nn.Module, world: int, rank: int, reduction: str = "mean", objective=OBJECTIVE) -> None:
    losses, gradients = expected(world, objective)
    for _ in range(2):  # the state that a step leaves behind must serve the next
        model.zero_grad()
        loss = loss_of(model, rank, reduction, objective)
        loss.backward()
        assert abs(loss.item() - losses[rank]) < 1e-6
        seen = set()
        for name, p in model.named_parameters():
            name = name.removeprefix("module.")
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert error(grad, gradients[name]) < 1e-5, name
            seen.add(name)
        assert seen == set(gradients)


def sharded(model: Toy, *own: nn.Module, **options) -> Toy:
    from torch.distributed.fsdp import fully_shard

    for module in (*model.model.layers, *own):
        fully_shard(module, **options)
    return fully_shard(model, **options)


def check_root(world, rank, mesh):
    """The head in the root's group, whole after the forward."""
    compare(sharded(toy(), mesh=mesh), world, rank)


def check_resharded_root(world, rank, mesh):
    compare(sharded(toy(), mesh=mesh, reshard_after_forward=True), world, rank)


def check_own_group(world, rank, mesh):
    model = toy()
    sharded(model, model.lm_head, mesh=mesh)
    hidden = kd.last_hidden_state(model, input_ids=batch(rank)[0])
    assert hasattr(model.lm_head.weight, "full_tensor"), "the test is about a sharded weight"
    head = kd.Head.from_model(model, hidden)
    assert not hasattr(head.weight, "full_tensor") and head.weight.shape == (VOCAB, WIDTH)
    with torch.no_grad():
        assert not kd.Head.from_model(model, hidden).weight.requires_grad
    compare(model, world, rank)


def check_divide_factor(world, rank, mesh):
    """FSDP2 told to divide by something else than the ranks, as where a loss is over the tokens of all."""
    if TORCH < (2, 9):
        pytest.skip("this torch keeps the factor in an NCCL reduction that nobody can read")
    _, gradients = expected(world)
    for factor in (1.0, 4.0):
        model = toy()
        sharded(model, model.lm_head, mesh=mesh)
        for module in (m for m in model.modules() if hasattr(m, "set_gradient_divide_factor")):
            module.set_gradient_divide_factor(factor)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        loss_of(model, rank).backward()
        for name, p in model.named_parameters():
            assert error(p.grad.full_tensor(), gradients[name] * world / factor) < 1e-5, (name, factor)


def check_per_token(world, rank, mesh):
    model = toy()
    compare(sharded(model, model.lm_head, mesh=mesh), world, rank, reduction="none")


def check_sinkhorn_batch(world, rank, mesh):
    """Its backward pass always makes the logits again, of a head that is gathered for it."""
    model = toy()
    compare(sharded(model, model.lm_head, mesh=mesh), world, rank, objective=kd.SinkhornBatch())


def check_gathered_again(world, rank, mesh):
    """In a checkpoint, the gathered weight is not kept for the backward but gathered again."""
    from torch.utils.checkpoint import checkpoint

    losses, gradients = expected(world)
    model = toy()
    sharded(model, model.lm_head, mesh=mesh)
    ids, teacher = batch(rank)
    hidden = kd.last_hidden_state(model, input_ids=ids)
    gathered = []

    def loss(hidden):
        head = kd.Head.from_model(model, hidden)
        gathered.append(head.weight)
        return kd.distill(head, teacher, OBJECTIVE, reduction="none").mean()

    value = checkpoint(loss, hidden, use_reentrant=False)
    assert len(gathered) == 1
    value.backward()
    assert len(gathered) == 2 and abs(value.item() - losses[rank]) < 1e-6
    assert error(model.lm_head.weight.grad.full_tensor(), gradients["lm_head.weight"]) < 1e-5


def check_released_between(world, rank, mesh):
    """Without a checkpoint: gone after the forward, student's and teacher's, and back in the backward. All
    other saved tensors go through the caller's hooks."""
    from torch.autograd.graph import saved_tensors_hooks

    packed = []

    def note(tensor):
        packed.append(tensor.shape)
        return tensor

    for student_grad, teacher_grad, reduction in (
        ("all", False, "none"),
        ("hidden", False, "none"),
        ("all", True, "none"),
        ("all", True, "mean"),
    ):
        results = []
        for split in (False, True):
            packed.clear()
            torch.manual_seed(3)
            models = [toy(), Toy()]
            if student_grad == "hidden":
                models[0].lm_head.requires_grad_(False)
            if split:
                for model in models:
                    sharded(model, model.lm_head, mesh=mesh)
            hidden = [kd.last_hidden_state(model, input_ids=batch(0)[0]) for model in models]
            heads = [kd.Head.from_model(*pair) for pair in zip(models, hidden)]
            weights = [weakref.ref(head.weight) for head in heads]
            with saved_tensors_hooks(note, lambda x: x):
                loss, parts = kd.distill(
                    *heads, OBJECTIVE, reduction=reduction, teacher_grad=teacher_grad, return_parts=True
                )
            del heads
            if reduction == "none":
                assert (2, 5, WIDTH) in packed and ((VOCAB, WIDTH) in packed) == (not split)
            if split:
                assert [weight() for weight in weights] == [None, None]
            total = (loss * torch.arange(1.0, 11).view(2, 5)).sum()
            for _ in range(2):
                total.backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="double backward"):
                torch.autograd.grad(total, hidden[0], create_graph=True)[0].sum().backward()
            # Nor is it left out where a leaf is named, to which there is another way.
            weight = models[0].lm_head.weight
            if weight.requires_grad:
                (slope,) = torch.autograd.grad(total, weight, create_graph=True)
                local = [x.to_local() if split else x for x in (slope, weight)]
                # DTensors of torch 2.11 keep no graph of the way back from what was gathered.
                if slope.grad_fn is not None or TORCH >= (2, 13):
                    with pytest.raises(RuntimeError, match="double backward"):
                        torch.autograd.grad((local[0] * local[1]).sum(), weight)
            results.append(
                [total.detach(), parts.soft]
                + [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                   for model in models for p in model.parameters() if p.grad is not None]
            )  # fmt: skip
        whole, split = results
        assert len(whole) == len(split) == 2 + 9 * (1 + teacher_grad) - 2 * (student_grad == "hidden")
        assert all(error(b, a) < 1e-5 for a, b in zip(whole, split))


def check_changed_between(world, rank, mesh):
    """What is gathered again must be what the forward saw, as for a weight that autograd saved."""
    model = toy()
    sharded(model, model.lm_head, mesh=mesh)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (loss_of(model, rank, "none") for _ in range(2))
    first.backward()
    step.step()
    with pytest.raises(RuntimeError, match="output layer was changed in place"):
        second.backward()
    held = kd.Head.from_model(model, torch.randn(2, 5, WIDTH, requires_grad=True))
    other = dataclasses.replace(held, weight=2 * held.weight.detach())
    expected = kd.distill(
        kd.Head(held.hidden, other.weight, held.bias), batch(0)[1], OBJECTIVE, reduction="none"
    )
    value = kd.distill(other, batch(0)[1], OBJECTIVE, reduction="none")
    (a,), (b,) = (torch.autograd.grad(x.sum(), held.hidden) for x in (value, expected))
    assert torch.equal(a, b)


def check_two_forwards(world, rank, mesh):
    """FSDP2 frees the root's tensors at the end of a backward: the next one needs a head of its own group."""
    gradients = expected(world)[1]
    for own, reduction in ((False, "mean"), (True, "mean"), (True, "none")):
        model = toy()
        sharded(model, *([model.lm_head] if own else []), mesh=mesh)
        for loss in [loss_of(model, rank, reduction) for _ in range(2)]:
            loss.backward()
        for name, p in model.named_parameters():
            assert error(p.grad.full_tensor(), 2 * gradients[name]) < 1e-5, name
    for loss_function in (lambda model: loss_of(model, rank, "none"), lambda model: logprobs_of(model, rank)):
        model = sharded(toy(), mesh=mesh)
        first, second = (loss_function(model) for _ in range(2))
        first.backward()
        with pytest.raises(
            RuntimeError, match=r"FSDP2 freed the output layer.*group of its own.*fully_shard"
        ):
            second.backward()


def logprobs_of(model: nn.Module, rank: int) -> torch.Tensor:
    ids = batch(rank)[0]
    head = kd.Head.from_model(model, kd.last_hidden_state(model, input_ids=ids))
    logprobs, entropies = kd.linear_logprobs(head, ids, entropy=True)
    return (logprobs * torch.arange(1.0, 11).view(2, 5)).mean() + 0.3 * entropies.square().mean()


def check_logprobs(world, rank, mesh):
    """Gathered again in the backward, not kept; either result alone can be differentiated."""
    whole = toy()
    sum(logprobs_of(whole, r) for r in range(world)).div(world).backward()
    for own in (False, True):
        model = toy()
        sharded(model, *([model.lm_head] if own else []), mesh=mesh)
        logprobs_of(model, rank).backward()
        for (name, p), exact in zip(model.named_parameters(), whole.parameters()):
            assert error(p.grad.full_tensor(), exact.grad) < 1e-5, name

    model = toy()
    sharded(model, model.lm_head, mesh=mesh)
    ids = batch(rank)[0]
    hidden = kd.last_hidden_state(model, input_ids=ids)
    head = kd.Head.from_model(model, hidden)
    weight = weakref.ref(head.weight)
    results = kd.linear_logprobs(head, ids, entropy=True)
    del head
    assert weight() is None
    plain = kd.Head(hidden, toy().lm_head.weight, toy().lm_head.bias)
    for value, exact in zip(results, kd.linear_logprobs(plain, ids, entropy=True)):
        (a,), (b,) = (
            torch.autograd.grad(x.square().sum(), hidden, retain_graph=True) for x in (value, exact)
        )
        assert error(a, b) < 1e-5
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(results[0].sum(), hidden, create_graph=True)[0].sum().backward()


def check_hybrid(world, rank, mesh):
    model = toy()
    hybrid = dist.init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
    compare(sharded(model, model.lm_head, mesh=hybrid), world, rank)


def check_mixed_precision(world, rank, mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for own in (False, True):
        model = toy()
        sharded(model, *([model.lm_head] if own else []), mesh=mesh, mp_policy=policy)
        hidden = kd.last_hidden_state(model, input_ids=batch(rank)[0])
        head = kd.Head.from_model(model, hidden)
        assert head.hidden.dtype == head.weight.dtype == torch.bfloat16
        loss_of(model, rank).backward()
        grad, exact = model.lm_head.weight.grad.full_tensor(), expected(world)[1]["lm_head.weight"]
        assert grad.dtype == torch.float32 and error(grad, exact) < 5e-2


def check_ddp(world, rank, mesh):
    compare(nn.parallel.DistributedDataParallel(toy()), world, rank)


def check_fsdp1(world, rank, mesh):
    """With original parameters the root shows its flat shards after the forward: refused. With its own
    parameters it stays whole: taken. What is not trained serves where it is summoned."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    ids, teacher = batch(rank)
    model = FullyShardedDataParallel(toy(), use_orig_params=True, device_id=torch.device("cpu"))
    hidden = kd.last_hidden_state(model, input_ids=ids)
    assert error(hidden, toy().model(ids)) < 1e-6
    refused(model, r"has shape \(\d+,\).*FSDP1 has flattened.*fully_shard")
    with FullyShardedDataParallel.summon_full_params(model):
        assert error(kd.Head.from_model(model, hidden).weight, toy().lm_head.weight) < 1e-7

    model = FullyShardedDataParallel(toy(), use_orig_params=False, device_id=torch.device("cpu"))
    step = torch.optim.SGD(model.parameters(), lr=1.0)
    loss_of(model, rank).backward()
    step.step()
    with FullyShardedDataParallel.summon_full_params(model):
        for (name, old), new in zip(toy().named_parameters(), model.parameters()):
            assert error(old - new, expected(world)[1][name]) < 1e-5, name


def check_peft(world, rank, mesh):
    """LoRA on a sharded head, after the adapted model is sharded."""
    if find_spec("peft") is None:
        pytest.skip("peft is not installed")
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(1)
        model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["lm_head", "layers.0"], lora_bias=True))
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(0, 0.3)
        return model

    whole = adapted()
    sum(loss_of(whole, r) for r in range(world)).div(world).backward()
    exact = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
    for own, reduction in ((False, "mean"), (True, "mean"), (True, "none")):
        model = adapted()
        inner = model.get_base_model()
        sharded(inner, *([inner.lm_head] if own else []), mesh=mesh)
        loss_of(model, rank, reduction).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert set(trained) == set(exact) and len(exact) == 6
        for name, p in trained.items():
            assert error(p.grad.full_tensor(), exact[name]) < 1e-5, name


def check_backbone_called_past_ddp(world, rank, mesh):
    """Why last_hidden_state calls the wrapper: past it, nothing is averaged."""
    model = nn.parallel.DistributedDataParallel(toy())
    ids, teacher = batch(rank)
    head = kd.Head.from_model(model, model.module.model(ids))
    kd.distill(head, teacher, OBJECTIVE).backward()
    grad = model.module.model.norm.weight.grad
    assert error(grad, expected(world)[1]["model.norm.weight"]) > 1e-2


def refused(model: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kd.Head.from_model(model, torch.randn(3, WIDTH))


def check_tensor_parallel(world, rank, mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    words = "sharded by tensor parallelism.*vocab_group.*full_tensor"
    for style in (ColwiseParallel(), RowwiseParallel()):
        model = toy()
        parallelize_module(model.lm_head, mesh, style)
        refused(model, words)
        both = dist.init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
        model = toy()
        parallelize_module(model.lm_head, both["tp"], style)
        refused(sharded(model, model.lm_head, mesh=both["dp"]), words)
    model = toy()
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Replicate()]))
    head = kd.Head.from_model(model, torch.randn(3, WIDTH))
    assert error(head.weight, toy().lm_head.weight) < 1e-7
    with pytest.raises(TypeError, match=r"Head\.from_model: hidden is a DTensor; pass hidden\.to_local"):
        kd.Head.from_model(model, distribute_tensor(torch.randn(4, WIDTH), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="weight is a DTensor.*from_model"):
        kd.Head(torch.randn(3, WIDTH), model.lm_head.weight)


def four_resharded_to_two(world, rank, mesh):
    """After a forward the layer holds temporary tensors over two ranks: the gradient must not go there."""
    for group in ("own", "root"):
        for reduction in ("mean", "none"):
            model = toy()
            own = [model.lm_head] if group == "own" else []
            sharded(model, *own, mesh=mesh, reshard_after_forward=2)
            kd.last_hidden_state(model, input_ids=batch(rank)[0])
            assert model.lm_head.weight.device_mesh.ndim == 2, "the test is about these temporary tensors"
            compare(model, world, rank, reduction)
    frozen = toy()
    frozen.lm_head.requires_grad_(False)
    sharded(frozen, frozen.lm_head, mesh=mesh, reshard_after_forward=2)
    kd.last_hidden_state(frozen, input_ids=batch(rank)[0])
    # The temporary tensors of torch 2.11 want a gradient whatever they stand for, and are exchanged like
    # trained ones; others stay where their next forward finds them on few ranks.
    stays = not frozen.lm_head.weight.requires_grad
    assert stays or TORCH < (2, 13)
    loss = loss_of(frozen, rank)
    assert (frozen.lm_head.weight.device_mesh.ndim == 2) == stays
    assert abs(loss.item() - expected(world)[0][rank]) < 1e-6


def four_hybrid(world, rank, mesh):
    hybrid = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for reduction in ("mean", "none"):
        model = toy()
        compare(sharded(model, model.lm_head, mesh=hybrid), world, rank, reduction)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_checks(2, tmp_path_factory, __name__, "check_")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_checks(4, tmp_path_factory, __name__, "four_")


@pytest.mark.parametrize("name", checks_of(__name__, "check_"))
def test_two_processes(name, two):
    read(two, 2, name)


@pytest.mark.parametrize("name", checks_of(__name__, "four_"))
def test_four_processes(name, four):
    read(four, 4, name)
