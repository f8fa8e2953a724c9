"""Steps on a GPU, again and again: the same bits, no memory but what is promised, as many launches as are
promised. ``pytest -m gpu``."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from gpu import wants_gpu
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kd_kernels as kd

pytestmark = wants_gpu
DEVICE = "cuda"
TIMES = 100
TOKENS, VOCAB, LONG, WIDE = 300, 32000, 4096, 64000
WORKSPACE, SCRATCH, LITTLE = 256 << 20, 64 << 20, 32 << 20
K = 32


class Inputs:
    """Of ``tokens`` rows; heads in bfloat16."""

    def __init__(self, tokens: int, vocab: int) -> None:
        self.tokens, self.vocab = tokens, vocab
        self.ids = torch.randint(0, vocab, (tokens, K), device=DEVICE)
        self.target = kd.SparseTarget(self.ids, self.random(tokens, 2 * K).log_softmax(1)[:, :K])

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    def head(self, grad: bool = True, vocab: int = 0) -> kd.Head:
        hidden, weight = self.random(self.tokens, 64), self.random(vocab or self.vocab, 64) / 3
        return kd.Head(hidden.bfloat16().requires_grad_(grad), weight.bfloat16().requires_grad_(grad))

    def points(self, rows: int = 100, width: int = 48) -> Tensor:
        return self.random(rows, width).requires_grad_()


def step(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def of_head(head: kd.Head, loss: Tensor) -> list[Tensor]:
    return step(loss, head.hidden, head.weight)


# What a step does, once its inputs are there. All take ``options`` such as a workspace.


def sparse(x: Inputs) -> Callable[..., list[Tensor]]:
    head, objective = x.head(), kd.JensenShannon()
    hard = {"labels": x.ids[:, 0], "hard_weight": 0.5}
    return lambda **options: of_head(head, kd.distill(head, x.target, objective, **hard, **options))


def logprobs(x: Inputs) -> Callable[..., list[Tensor]]:
    head = x.head()

    def call(**options) -> list[Tensor]:
        found, entropy = kd.linear_logprobs(head, x.ids, entropy=True, **options)
        return [found.detach(), *of_head(head, found.sum() + entropy.sum())]

    return call


def topk(x: Inputs) -> Callable[..., list[Tensor]]:
    head = x.head(grad=False)

    def call(**options) -> list[Tensor]:
        return list(kd.linear_topk(head, K, samples=20, seed=1, targets=x.ids[:, 0], **options))[:-1]

    return call


def score(x: Inputs) -> Callable[..., list[Tensor]]:
    heads = [x.head(grad=False) for _ in range(3)]

    def call(**options) -> list[Tensor]:
        found = kd.score(*heads, labels=x.ids[:, 0], **options)
        return [tensor for part in found.models + found.pairs for tensor in part]

    return call


HEADS = {"sparse": sparse, "logprobs": logprobs, "topk": topk, "score": score}


def sorted_l1(top_k: int | None):
    def make(x: Inputs):
        head, teacher = x.head(), x.head(grad=False, vocab=x.vocab + 77)
        objective = kd.SortedWasserstein(top_k=top_k)
        return lambda: of_head(head, kd.distill(head, teacher, objective))

    return make


def sinkd(x: Inputs):
    head, teacher = x.head(), x.head(grad=False)
    return lambda: of_head(head, kd.distill(head, teacher, kd.SinkhornBatch()))


def points(loss):
    def make(x: Inputs):
        student, teacher = x.points(), x.points()
        return lambda: step(loss(student, teacher, teacher_grad=True), student, teacher)

    return make


def classes(count: int):
    def make(x: Inputs):
        student, teacher = (x.points(count, 500) for _ in range(2))
        cost, labels = torch.rand(500, 500, device=DEVICE), torch.arange(count, device=DEVICE)
        return lambda: step(
            kd.class_transport(student, teacher, cost, labels, teacher_grad=True), student, teacher
        )

    return make


def solve(gradient: str, *shape: int):
    def make(x: Inputs):
        cost = torch.rand(*shape, device=DEVICE).requires_grad_()
        a, b = (x.random(20, size).softmax(1).requires_grad_() for size in shape[-2:])
        options = {"epsilon": 0.05, "gradient": gradient, "iterations": 20}
        return lambda: step(kd.sinkhorn(cost, a, b, **options).transport_cost.sum(), cost, a, b)

    return make


REPEATED = {
    **HEADS,
    "sorted": sorted_l1(None),
    "sorted, top-K": sorted_l1(K),
    "SinKD": sinkd,
    "distance": points(kd.relational_distance),
    "angle": points(kd.relational_angle),
    "features": points(lambda *pair, **options: kd.feature_transport(*pair, epsilon=0.1, **options)),
    "classes": classes(16),
    "classes of many": classes(100),
    "sinkhorn, implicit": solve("implicit", 20, 90, 70),
    "sinkhorn, unrolled": solve("unrolled", 20, 90, 70),
    "sinkhorn, one cost": solve("implicit", 90, 70),
    "sinkhorn, one cost, unrolled": solve("unrolled", 90, 70),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_hundred_runs_are_bitwise_equal(name):
    torch.use_deterministic_algorithms(False)  # with it torch's own sums repeat, whatever is called
    call = REPEATED[name](Inputs(TOKENS, VOCAB))
    first = call()
    assert all(x.any() and not x.isnan().any() for x in first if x.is_floating_point())
    for _ in range(TIMES):
        assert all(torch.equal(x, y) for x, y in zip(first, call()))


# --- memory ---------------------------------------------------------------------------------------------


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak(call: Callable) -> int:
    """Bytes that tensors take at most during ``call``, results included."""
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    found = call()
    torch.cuda.synchronize()
    del found
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", HEADS)
def test_memory_is_the_workspace_and_the_gradients(name):
    """``[tokens, vocab]`` in bfloat16 would be twice the workspace."""
    x = Inputs(LONG, WIDE)
    call = HEADS[name](x)
    call(workspace_bytes=WORKSPACE)  # libraries take what they keep
    taken = peak(lambda: call(workspace_bytes=WORKSPACE))
    # A weight's gradient is added up in float32 and given in bfloat16.
    gradients = (4 + 2) * x.vocab * 64 if name in ("sparse", "logprobs") else SCRATCH
    assert WORKSPACE // 2 < taken <= WORKSPACE + gradients + LITTLE, taken / 2**20


@pytest.mark.parametrize("name", [*HEADS, "SinKD", "sorted, top-K", "classes", "sinkhorn, implicit"])
def test_memory_does_not_grow(name):
    call = REPEATED[name](Inputs(TOKENS, VOCAB))
    call()
    before = allocated()
    for _ in range(TIMES):
        call()
    assert allocated() == before


# --- launches -------------------------------------------------------------------------------------------


def launches(call: Callable) -> Counter:
    """How many kernels of each name ran on the device, as its profiler saw them; copies and fillings by the
    system are among them."""
    call()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return Counter(e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA)


OURS = ("solve", "unrolled", "implicit", "half_step", "walk", "largest", "draw")


def ours(found: Counter) -> dict[str, int]:
    return {name: found[name] for name in OURS if found[name]}


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("shape", [(3, 17, 40), (20, 90, 70), (2, 40, 1500)], ids=str)
def test_problems_are_solved_in_one_launch(shape, gradient):
    """And differentiated in one more; what else is launched does not depend on the iterations either."""
    cost = torch.rand(*shape, device=DEVICE).requires_grad_()
    found = {}
    for iterations in (5, 25):
        options = {"epsilon": 0.1, "gradient": gradient, "iterations": iterations}
        with torch.no_grad():
            alone = launches(lambda o=options: kd.sinkhorn(cost, **o))
        both = launches(lambda o=options: step(kd.sinkhorn(cost, **o).transport_cost.sum(), cost))
        assert ours(alone) == {"solve": 1} and ours(both) == {"solve": 1, gradient: 1}
        found[iterations] = alone.total(), both.total()
    assert found[5] == found[25]
    if gradient == "implicit":
        to_a_tolerance = launches(lambda: kd.sinkhorn(cost, epsilon=0.1, tolerance=1e-4))
        assert ours(to_a_tolerance) == {"solve": 1}


def test_half_steps_of_one_cost_are_a_launch_each():
    """For all problems together: two an iteration, and a few more for what is reported."""
    cost, a = torch.rand(90, 70, device=DEVICE), torch.rand(20, 90, device=DEVICE).softmax(1)
    counts = []
    for iterations in (5, 25):
        options = {"epsilon": 0.1, "iterations": iterations, "domain": "scaling"}
        found = ours(launches(lambda o=options: kd.sinkhorn(cost, a, **o)))
        assert found.keys() == {"half_step"}
        counts.append(found["half_step"])
    assert counts[1] - counts[0] == 2 * 20 and counts[0] <= 2 * 5 + 4


def test_the_adjoint_of_one_cost_ends():
    """Some 20 steps do, of the 1000 that it may take."""
    cost, a = torch.rand(90, 70, device=DEVICE).requires_grad_(), torch.rand(20, 90, device=DEVICE).softmax(1)
    options = {"epsilon": 0.1, "iterations": 20, "domain": "scaling"}
    found = launches(lambda: step(kd.sinkhorn(cost, a, **options).transport_cost.sum(), cost))
    assert ours(found)["half_step"] < 2 * 20 + 2 * 200


def test_the_top_k_is_three_launches():
    """Of a chunk; here there is one."""
    call = topk(Inputs(TOKENS, VOCAB))
    assert ours(launches(call)) == {"walk": 1, "largest": 1, "draw": 1}
