"""Memory that a thread keeps between calls: never one that somebody still looks at."""

import mmap
import re
import threading
from pathlib import Path

import pytest
import torch

import kd_kernels as kd
from kd_kernels.drivers import workspace
from kd_kernels.drivers.chunks import chunk_rows

SHAPE, CPU = torch.Size([9 << 10, 1 << 10]), torch.device("cpu")  # 36 MiB in float32


def lent(shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    return workspace.lend(shape, dtype, CPU)


def test_lent_memory_comes_back_with_the_last_reference():
    first = lent().fill_(1.0)
    second = lent().fill_(2.0)
    assert first.shape == SHAPE and first.dtype == torch.float32 and first.is_contiguous()
    assert (first == 1).all() and (second == 2).all()
    place, row = first.data_ptr(), first[7]
    del first
    assert lent().data_ptr() != place and (row == 1).all()  # a view holds it
    del row
    assert lent().data_ptr() == place
    assert lent(dtype=torch.float64).data_ptr() != place  # of another size


def test_lent_memory_returns_to_the_thread_that_lent_it():
    mine = lent()
    place, found = mine.data_ptr(), []

    def elsewhere():
        found.append(lent().data_ptr())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    holder = [mine]
    del mine
    thread = threading.Thread(target=holder.clear)  # as autograd's threads do
    thread.start()
    thread.join()
    assert found[0] != place and lent().data_ptr() == place


def test_released_memory_is_not_lent_again():
    kept = lent()
    kd.release_workspace()
    del kept  # on loan while it was released: freed, not kept
    assert not vars(workspace._store).get("returned")


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system lends no huge pages")
def test_gradients_of_logits_lie_in_huge_pages():
    logits = torch.randn(9, 1 << 20).requires_grad_()  # 36 MiB
    kd.distill(logits, torch.randn(9, 1 << 20), kd.ForwardKL()).backward()
    middle, inside = logits.grad.data_ptr() + (16 << 20), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(place[1], 16) <= middle < int(place[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    pytest.fail("the gradient is in no mapping")


def test_gradients_of_several_steps_at_once():
    """Accumulators of losses whose backward passes are yet to come, in any order, and twice."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16).requires_grad_(), torch.randn(1 << 19, 16).requires_grad_()
    teachers = [torch.randn(6, 1 << 19) for _ in range(2)]

    def loss(teacher):
        return kd.distill(kd.Head(hidden, weight), teacher, kd.ForwardKL())

    alone = [torch.autograd.grad(loss(teacher), weight)[0] for teacher in teachers]
    for _ in range(2):
        pending = [loss(teacher) for teacher in teachers]
        for i in (1, 0, 1):
            assert torch.equal(torch.autograd.grad(pending[i], weight, retain_graph=True)[0], alone[i])


IDS = torch.randint(0, 300, (6,), generator=torch.Generator().manual_seed(0))
# What leaves its gradients to the backward pass.
DEFERRED = {
    "log-probabilities": lambda head, other, size: kd.linear_logprobs(head, IDS, workspace_bytes=size),
    "per token": lambda head, other, size: kd.distill(
        head, other, kd.ForwardKL(), reduction="none", workspace_bytes=size
    ),
    "sorted": lambda head, other, size: kd.distill(
        head, other, kd.SortedWasserstein(), reduction="none", workspace_bytes=size
    ),
    "sorted, top-K": lambda head, other, size: kd.distill(
        head, other, kd.SortedWasserstein(8), reduction="none", workspace_bytes=size
    ),
    "of existing student logits": lambda head, other, size: kd.distill(
        other, head, kd.JensenShannon(), reduction="none", teacher_grad=True, workspace_bytes=size
    ),
    "saved teacher": lambda head, other, size: kd.distill(
        head, kd.SparseTarget(IDS[:, None], torch.full((6, 1), -0.5)), kd.ForwardKL(), reduction="none",
        workspace_bytes=size,
    ),
    "batch": lambda head, other, size: kd.distill(
        head, other, kd.SinkhornBatch(), labels=IDS, hard_weight=1.0, workspace_bytes=size
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", DEFERRED)
def test_the_workspace_that_a_refusal_asks_for_does_for_both_passes(name, dtype):
    hidden, weight = (torch.randn(n, 5, dtype=dtype).requires_grad_() for n in (6, 300))
    other = torch.randn(6, 300, dtype=dtype)

    def call(size):
        return DEFERRED[name](kd.Head(hidden, weight), other, size)

    size = 1
    for _ in range(3):  # the distances of a batch first, then its cross-entropy
        try:
            found = call(size)
        except ValueError as refusal:
            size = int(re.search(r"at least (\d+) bytes", str(refusal))[1])
    assert size > 1
    for gradient in torch.autograd.grad(found.sum(), [hidden, weight]):
        assert gradient.isfinite().all() and gradient.any()
    with pytest.raises(ValueError, match="workspace_bytes"):
        call(size - 1)


@pytest.mark.parametrize("vocabulary_major", [False, True])
@pytest.mark.parametrize(
    "vocab, itemsizes", [(7, [8, 8]), (203, [4, 4]), (50257, [4, 2, 4]), (131072, [4, 4])]
)
def test_a_chunk_fills_the_workspace_and_is_found_at_once(vocab, itemsizes, vocabulary_major):
    budget, asked = 64 << 20, []

    def room(tokens):
        asked.append(tokens)
        shape = (vocab, tokens) if vocabulary_major else (tokens, vocab)
        return sum(workspace.footprint(*shape, size) for size in itemsizes)

    rows = chunk_rows(10**9, vocab, itemsizes, budget, room, granule=1)
    assert len(asked) < 40, "rows filled up to whole cache lines are no reason to try every number"
    assert room(rows) <= budget < room(rows + 1 + rows // 100)  # all chunks are of one size
    few = chunk_rows(3, vocab, itemsizes, budget, room, granule=128)
    assert few == 3, "whole tiles are no reason to hold logits of tokens that are not there"
