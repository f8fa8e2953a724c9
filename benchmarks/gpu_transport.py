"""Transport on a GPU, for gpu_check.py: Sinkhorn problems beside one read of their costs, and SinKD beside
``torch.cdist``. Medians in milliseconds."""

from __future__ import annotations

import torch
from bench_sinkhorn_batch import published
from harness import Timed, run_rounds
from torch import Tensor

import kd_kernels as kd

SINKHORN = ((64, 256, 20), (8, 1024, 50))  # problems, size, iterations
SINKD = ((64, 32000), (256, 151936))  # rows, vocabulary
# Least instructions per pair of entries: subtract and add the absolute value; a gradient: compare,
# select, add. At 128 lanes a multiprocessor and clock.
FORWARD, BACKWARD = 2, 3


def medians(timed: list[Timed], rounds: int) -> dict[str, object]:
    run_rounds(timed, rounds=rounds, device="cuda", reject=False)
    found: dict[str, object] = {}
    for provider in timed:
        spread = provider.spread()
        found[provider.name] = round(1e3 * spread.median, 4) if spread else provider.failure
    return found


def sinkhorn(count: int, size: int, iterations: int, rounds: int) -> dict[str, object]:
    cost = torch.rand(count, size, size, device="cuda")
    leaf = cost.clone().requires_grad_()
    options = {"epsilon": 0.1, "iterations": iterations}

    def plain() -> Tensor:
        """On logarithms, as one writes it."""
        f, g = cost.new_zeros(count, size), cost.new_zeros(count, size)
        mass = -torch.log(torch.full((), float(size)))
        for _ in range(iterations):
            f = mass - torch.logsumexp(g[:, None] - cost / 0.1, 2)
            g = mass - torch.logsumexp(f[:, :, None] - cost / 0.1, 1)
        return ((f[:, :, None] + g[:, None] - cost / 0.1).exp() * cost).sum((1, 2))

    def back(gradient: str) -> Tensor:
        found = kd.sinkhorn(leaf, gradient=gradient, **options)
        return torch.autograd.grad(found.transport_cost.sum(), leaf)[0]

    assert torch.allclose(kd.sinkhorn(cost, **options).transport_cost, plain(), rtol=1e-4)
    timed = [
        Timed("one read of the costs", lambda: cost.sum()),
        Timed("solve", lambda: kd.sinkhorn(cost, **options)),
        Timed("solve, gradient unrolled", lambda: back("unrolled")),
        Timed("solve, gradient implicit", lambda: back("implicit")),
        Timed("torch, solve", plain),
    ]
    return medians(timed, rounds)


def sinkd(tokens: int, vocab: int, rounds: int) -> dict[str, object]:
    student, teacher = (3 * torch.randn(tokens, vocab, device="cuda") for _ in range(2))
    student.requires_grad_()

    def ours() -> Tensor:
        loss = kd.distill(student, teacher, kd.SinkhornBatch(), temperature=2.0, reduction="sum")
        return torch.autograd.grad(loss, student)[0]

    def plain() -> Tensor:
        return torch.autograd.grad(published(student, teacher), student)[0]

    timed = [Timed("kd", ours), Timed("torch.cdist", plain)]
    device = torch.cuda.get_device_properties(0)
    clock = 1e3 * getattr(device, "clock_rate", 1_980_000)  # kHz
    lanes = 128 * device.multi_processor_count * clock
    found = medians(timed, rounds)
    found["bound by instructions"] = round(1e3 * tokens**2 * vocab * (FORWARD + BACKWARD) / lanes, 4)
    return found


def check(rounds: int = 20) -> dict[str, object]:
    found: dict[str, object] = {}
    for count, size, iterations in SINKHORN:
        found[f"sinkhorn {count} x {size} x {size}, {iterations} iterations"] = sinkhorn(
            count, size, iterations, rounds
        )
    for tokens, vocab in SINKD:
        found[f"sinkd {tokens} x {tokens}, V = {vocab}"] = sinkd(tokens, vocab, rounds)
    return found
