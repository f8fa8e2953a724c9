"""Where a call's time goes on a GPU, for gpu_check.py: device time of its kernels, and the host's time to
launch it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kd_kernels as kd

LARGE, SMALL = (8192, 128256, 2048, 4096), (64, 1024, 64, 64)  # tokens, vocabulary, both widths
LOGITS, SINKD = (4096, 128256), (256, 151936)
TOPK_K = 64
MOST = 8  # kernels listed of a call


def heads(tokens: int, vocab: int, student: int, teacher: int) -> tuple[kd.Head, kd.Head]:
    def head(width: int, grad: bool) -> kd.Head:
        hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        weight = (2.5 * torch.randn(vocab, width, device="cuda") / width**0.5).to(torch.bfloat16)
        return kd.Head(hidden.requires_grad_(grad), weight.requires_grad_(grad))

    return head(student, True), head(teacher, False)


def head_step(student: kd.Head, teacher: kd.Head, objective: kd.Objective, **options) -> tuple[Tensor, ...]:
    loss = kd.distill(student, teacher, objective, **options)
    return torch.autograd.grad(loss, (student.hidden, student.weight))


def kernels(call: Callable, repeats: int = 3) -> dict[str, str]:
    """Milliseconds and launches of a call's kernels, the longest first."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    rows = [(e.device_time_total / repeats / 1e3, e.count / repeats, e.key) for e in found.key_averages()]
    return {key[:60]: f"{ms:.3f} ms, {count:g} launches" for ms, count, key in sorted(rows)[::-1][:MOST]}


def host(call: Callable, repeats: int = 100) -> float:
    """Milliseconds until a call returns, the device being left behind."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return round(1e3 * elapsed / repeats, 3)


def check() -> dict[str, object]:
    found: dict[str, object] = {}
    student, teacher = heads(*LARGE)
    for objective in (kd.ForwardKL(), kd.JensenShannon()):
        found[f"kernels of a head step, {objective.name}"] = kernels(
            lambda o=objective: head_step(student, teacher, o)
        )
    found["kernels of linear_topk"] = kernels(lambda: kd.linear_topk(teacher, TOPK_K))
    del student, teacher
    for dtype in (torch.bfloat16, torch.float32):
        s, t = (3 * torch.randn(*LOGITS, device="cuda", dtype=dtype) for _ in range(2))
        s.requires_grad_()
        for objective in (kd.ForwardKL(), kd.JensenShannon()):
            found[f"kernels of a step on {dtype} logits, {objective.name}"] = kernels(
                lambda o=objective, s=s, t=t: torch.autograd.grad(kd.distill(s, t, o), s)
            )
        del s, t
    s, t = (3 * torch.randn(*SINKD, device="cuda") for _ in range(2))
    s.requires_grad_()
    found["kernels of a SinKD step"] = kernels(
        lambda: torch.autograd.grad(kd.distill(s, t, kd.SinkhornBatch()), s)
    )
    student, teacher = heads(*SMALL)
    s, t = (torch.randn(*SMALL[:2], device="cuda") for _ in range(2))
    s.requires_grad_()
    cost = torch.rand(8, 64, 64, device="cuda")
    found["host ms a call"] = {
        "head step": host(lambda: head_step(student, teacher, kd.ForwardKL())),
        "logits step": host(lambda: torch.autograd.grad(kd.distill(s, t, kd.ForwardKL()), s)),
        "linear_topk": host(lambda: kd.linear_topk(teacher, 8)),
        "sinkhorn": host(lambda: kd.sinkhorn(cost, epsilon=0.1, iterations=5)),
        "SinKD step": host(lambda: torch.autograd.grad(kd.distill(s, t, kd.SinkhornBatch()), s), 30),
    }
    return found
