"""No call waits for its device where nothing says that it does: shown without one, and on one."""

from dataclasses import dataclass

import pytest
import torch
from elsewhere import DEVICE, Waits, there

import kd_kernels as kd
from kd_kernels import problems

N, V, D = 12, 40, 8


@dataclass
class Inputs:
    device: torch.device

    def tensor(self, *shape, grad=False):
        return torch.rand(*shape, device=self.device).requires_grad_(grad)

    def ids(self, *shape):
        return torch.zeros(*shape, device=self.device, dtype=torch.int64)

    def mask(self, *shape):
        return torch.ones(*shape, device=self.device, dtype=torch.bool)

    def head(self, grad=False, vocab=V):
        return kd.Head(self.tensor(N, D, grad=grad), self.tensor(vocab, D, grad=grad))

    def logits(self, grad=False):
        return self.tensor(3, 4, V, grad=grad)

    def sparse(self, *lead):
        return kd.SparseTarget(self.ids(*lead, 5), logprobs=self.tensor(*lead, 5).log_softmax(-1))

    def points(self):
        return self.tensor(N, D, grad=True), self.tensor(N, D)


def distil(*arguments, **options):
    return kd.distill(*arguments, compact=False, **options)


CALLS = {
    "heads": lambda x: distil(x.head(True), x.head(), kd.ForwardKL(), temperature=2.0),
    "labels": lambda x: distil(
        x.head(True), x.head(), kd.JensenShannon(), labels=x.ids(N), hard_weight=0.5, token_weight=x.tensor(N)
    ),
    "logits": lambda x: distil(x.logits(True), x.logits(), kd.SkewKL(), mask=x.mask(3, 4)),
    "teacher learns": lambda x: distil(x.head(True), x.tensor(N, V), kd.ReverseKL(), teacher_grad=True),
    "sparse": lambda x: distil(x.head(True), x.sparse(N), kd.ForwardKL(), labels=x.ids(N), hard_weight=0.5),
    "sparse, logits": lambda x: distil(x.logits(True), x.sparse(3, 4), kd.ForwardKL()),
    "sorted": lambda x: distil(x.head(True), x.head(vocab=30), kd.SortedWasserstein()),
    "sorted, top-K": lambda x: distil(x.logits(True), x.logits(), kd.SortedWasserstein(top_k=4)),
    "batch": lambda x: distil(x.head(True), x.head(), kd.SinkhornBatch(), temperature=2.0),
    "batch, logits": lambda x: distil(
        x.logits(True), x.logits(), kd.SinkhornBatch(), labels=x.ids(3, 4), hard_weight=1.0
    ),
    "logprobs": lambda x: kd.linear_logprobs(x.head(True), x.ids(N, 3), temperature=2.0, compact=False).sum(),
    "logprobs, logits": lambda x: kd.linear_logprobs(x.logits(True), x.ids(3, 4), compact=False).sum(),
    "topk": lambda x: kd.linear_topk(
        x.head(), 4, temperature=[1.0, 2.0], targets=x.ids(N), samples=3, seed=1
    ),
    "rank": lambda x: kd.linear_rank(x.head(), x.ids(N, 3)),
    "score": lambda x: kd.score(x.head(), x.head(), temperature=2.0),
    "relational distance": lambda x: kd.relational_distance(*x.points(), mask=x.mask(N)),
    "relational angle": lambda x: kd.relational_angle(*x.points(), mask=x.mask(N)),
    "features": lambda x: kd.feature_transport(*x.points(), epsilon=0.1, mask=x.mask(N)),
    "sequences": lambda x: kd.sequence_transport(
        x.tensor(2, N, D, grad=True), x.tensor(2, N, D), epsilon=0.1
    ),
    "classes": lambda x: kd.class_transport(*x.points(), x.tensor(D, D), x.ids(N), target_weight=0.5),
    "sinkhorn": lambda x: kd.sinkhorn(x.tensor(2, N, D, grad=True), epsilon=0.1, tolerance=1e-3).value.sum(),
    "sinkhorn, one cost": lambda x: kd.sinkhorn(
        x.tensor(N, D, grad=True),
        x.tensor(3, N),
        x.tensor(3, D),
        epsilon=0.1,
        iterations=5,
        domain="scaling",
        gradient="unrolled",
    ).transport_cost.sum(),
    "sinkhorn, one cost, implicit": lambda x: kd.sinkhorn(
        x.tensor(N, D, grad=True), x.tensor(3, N), epsilon=0.1, iterations=5, tolerance=1e-3, domain="scaling"
    ).transport_cost.sum(),
}


def run(name, device):
    found = CALLS[name](Inputs(device))
    if getattr(found, "requires_grad", False):
        found.backward()


@pytest.mark.parametrize("name", CALLS)
def test_no_call_waits_for_its_device(name, monkeypatch):
    there(monkeypatch)
    monkeypatch.setattr(problems, "CG_STEPS", 20)  # no answer comes that would end them
    with Waits() as waits:
        run(name, DEVICE)
    assert not waits.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
@pytest.mark.parametrize("name", CALLS)
def test_no_call_waits_for_a_gpu(name):
    device = torch.device("cuda", 0)
    run(name, device)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["heads", "batch", "logprobs", "topk", "score"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_a_number_on_the_host_is_checked_whatever_the_device(name, wrong, monkeypatch):
    there(monkeypatch)
    x = Inputs(DEVICE)
    calls = {
        "heads": lambda: distil(x.head(True), x.head(), kd.ForwardKL(), temperature=wrong),
        "batch": lambda: distil(x.head(True), x.head(), kd.SinkhornBatch(), temperature=wrong),
        "logprobs": lambda: kd.linear_logprobs(x.head(True), x.ids(N), temperature=wrong, compact=False),
        "topk": lambda: kd.linear_topk(x.head(), 4, temperature=wrong),
        "score": lambda: kd.score(x.head(), x.head(), temperature=wrong),
    }
    with Waits(), pytest.raises(ValueError, match="temperature must be finite and > 0"):
        calls[name]()
