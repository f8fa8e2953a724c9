"""Rows and matrices that lie further apart than 32 bits can say, in memory of which a few pages are touched.

In a process of their own: what cuts an offset off reads or writes somewhere else.
"""

from __future__ import annotations

import copy
import mmap
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import interpreter
import pytest
import test_gather_kernel
import test_pairwise_l1_kernel
import test_topk_kernel
import torch
from jobs import SPREAD, close, gather_job, ids_for, side, topk_job
from torch import Tensor

from kd_kernels import problems as P
from kd_kernels import rows as R
from kd_kernels import triton_runtime
from kd_kernels.backends import TABLE, VOCABULARY_MAJOR

# Of the second row. What 32 bits keep of it, signed or not, is a place within the first.
FAR = (1 << 32) + 24
# From row to row of a matrix: 32 bits hold it, but not twice it.
STEP = (1 << 30) + 8
N, VOCAB = 3, 300  # two blocks of Triton's
BAR = 1e-5


def untouched(dtype: torch.dtype, count: int) -> Tensor:
    """Zeros, of which only those written to take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)


def apart(x: Tensor) -> Tensor:
    """The same matrices, rows of each ``STEP`` apart."""
    step = [STEP] if x.dim() == 2 else [STEP + (1 << 20), STEP]  # no two rows at one place
    end = sum((size - 1) * by for size, by in zip(x.shape, step)) + x.shape[-1]
    return untouched(x.dtype, end).as_strided(x.shape, (*step, 1)).copy_(x)


def logits(layout: str = "rows", grad: bool = True) -> R.Rows:
    """Random rows, and room for their gradient elsewhere."""
    temperature = torch.rand(N, dtype=torch.float64) + 0.6
    if layout == "vocabulary-major":
        z = apart(torch.randn(6, N) * SPREAD)
        return R.Rows(z, None, temperature, 1.3, 6.0, apart(torch.full_like(z, torch.nan)))
    offsets = torch.arange(N) * 304
    offsets[1:] += FAR
    memory = [untouched(torch.float32, int(offsets[-1]) + VOCAB) for _ in range(1 + grad)]
    for offset in offsets.tolist():
        memory[0][offset : offset + VOCAB] = torch.randn(VOCAB) * SPREAD
    rows = R.Rows(memory[0], offsets, temperature, 1.3, 6.0, multiple=8)
    if grad:
        rows.grad, rows.grad_offsets, rows.grad_multiple = memory[1], offsets, 8
    return rows


def near(rows: R.Rows, vocab: int) -> R.Rows:
    shape = {"temperature": rows.temperature, "scale": rows.scale, "softcap": rows.softcap}
    return side(rows.read(N, vocab).double(), torch.float64, grad="elsewhere", **shape)


def gradient(rows: R.Rows, vocab: int) -> Tensor:
    return R.Rows(rows.grad, rows.grad_offsets, rows.temperature).read(N, vocab).double()


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.1


# --- what is run, each against the reference on float64 numbers side by side ----------------------------


def row_divergence(name: str) -> None:
    for layout in ["rows"] + ["vocabulary-major"] * (name in VOCABULARY_MAJOR):
        for objective in ("jensen_shannon", "forward_kl"):  # forward KL writes its gradient among the terms
            for phases in ([7], [R.STATISTICS | R.TERMS, R.GRADIENT]):
                student, teacher = logits(layout), logits(layout)
                if objective == "forward_kl":
                    teacher.grad = None
                vocab = VOCAB if layout == "rows" else 6
                labels = torch.tensor([5, 0, vocab - 1])
                columns = [R.STATISTIC_COLUMNS, R.TERM_COLUMNS]
                results = [torch.zeros(N, k, dtype=torch.float64) for k in columns]
                parameters, weights = [0.5 * drawn(N), drawn(N)], [drawn(N), drawn(N)]
                job = R.RowJob(
                    objective, N, vocab, student, teacher, *parameters, labels, *weights, *results, True
                )
                rest = copy.deepcopy(replace(job, student=None, teacher=None))
                want = replace(rest, student=near(student, vocab), teacher=near(teacher, vocab))
                TABLE["row_divergence"]["reference"][0](want, 7)
                for phase in phases:
                    TABLE["row_divergence"][name][0](job, phase)
                close(job.terms, want.terms, BAR)
                for got, exact in ((student, want.student), (teacher, want.teacher)):
                    if got.grad is not None:
                        close(gradient(got, vocab), gradient(exact, vocab), BAR)


def gather(name: str) -> None:
    for together in (False, True):
        job = gather_job(logits(), ids_for(N, VOCAB, 9, unused=True), VOCAB)
        test_gather_kernel.check(job, name, together)


def topk(name: str) -> None:
    job = topk_job(replace(logits(grad=False), softcap=0.0), VOCAB, 7, (1.0, 0.7), targets=4, draws=5)
    test_topk_kernel.check(job, name, exact=False)


def pairwise_l1(name: str) -> None:
    job = test_pairwise_l1_kernel.pair_job(logits(), logits(), (2, 1), VOCAB)
    test_pairwise_l1_kernel.check(job, name)


def sorted_l1(name: str) -> None:
    def ranked(rows: R.Rows, statistics: Tensor, mass: Tensor) -> R.SortedSide:
        return R.SortedSide(
            rows, VOCAB, *(x.clone() for x in statistics.unbind(1)), mass, torch.zeros(N, dtype=torch.float64)
        )

    def columns(job: R.SortedL1Job) -> list[Tensor]:
        return [job.loss, job.student.sum, job.teacher.sum]

    models, masses, weight = [logits(), logits()], [drawn(N), drawn(N)], drawn(N)
    statistics = [test_pairwise_l1_kernel.statistics_of(x, N, VOCAB) for x in models]
    jobs = []
    for op, rows in (("reference", [near(x, VOCAB) for x in models]), (name, models)):
        sides = [ranked(*x) for x in zip(rows, statistics, masses)]
        jobs.append(R.SortedL1Job(N, *sides, weight, torch.zeros(N, dtype=torch.float64)))
        TABLE["sorted_l1"][op][0](jobs[-1])
    want, job = jobs
    for x, y in zip(columns(job), columns(want)):
        close(x, y, BAR)
    for got, exact in ((job.student, want.student), (job.teacher, want.teacher)):
        close(gradient(got.rows, VOCAB), gradient(exact.rows, VOCAB), BAR)


def squares() -> Tensor:
    """``[N, 8]``, no pair beyond column N."""
    x = drawn(N, 8)
    x[:, N:] = -1
    return x.fill_diagonal_(-1)


def angle(name: str) -> None:
    squared = [squares().clamp(min=0) for _ in range(2)]
    given = [y for x in squared for y in (x, torch.where(x > 0, x.rsqrt(), 0.0))]
    results = []
    for op, place in (("reference", torch.clone), (name, apart)):
        made = [torch.zeros(N, dtype=torch.float64), *(place(torch.zeros(N, 8).double()) for _ in range(2))]
        TABLE["angle"][op][0](R.AngleJob(N, 0.5, *map(place, given), *made))
        results.append([x[..., :N] for x in made])
    for x, y in zip(*results):
        close(x, y, 1e-12)


def distance(name: str) -> None:
    given, numbers = [squares(), squares()], torch.tensor([0.3, 1e-12, 0.7, 0.8, 0.1, 0.2]).double()
    results = []
    for op, place in (("reference", torch.clone), (name, apart)):
        made = [torch.zeros(k, N, dtype=torch.float64) for k in (4, 3)]
        made += [place(torch.zeros(N, 8).double()) for _ in range(2)]
        job = R.DistanceJob(N, numbers, *map(place, given), *made)
        for phase in (R.STATISTICS, R.TERMS, R.GRADIENT):
            TABLE["distance"][op][0](job, phase)
        results.append([x[..., :N] for x in made])
    for x, y in zip(*results):
        close(x, y, 1e-12)


def gibbs(name: str) -> None:
    cost, results = drawn(N, 5), []
    for op, place, dtype in (("reference", torch.clone, torch.float64), (name, apart, torch.float32)):
        made = [torch.zeros(N, dtype=dtype) for _ in range(2)]
        made += [place(torch.zeros(N, 5, dtype=dtype)) for _ in range(2)]
        TABLE["gibbs"][op][0](P.GibbsJob(place(cost.to(dtype)), 0.3, *made))
        results.append(made)
    for x, y in zip(*reversed(results)):
        close(x, y, BAR)


def half_step(name: str) -> None:
    for transposed in (False, True):
        kernel, x, y, extra = drawn(N, 5), drawn(4, 5), drawn(4, N), drawn(5 if transposed else N)
        x, weight = (y, x) if transposed else (x, y)
        results = []
        for op, place, dtype in (("reference", torch.clone, torch.float64), (name, apart, torch.float32)):
            given = [place(t.to(dtype)) for t in (kernel, x, weight, torch.zeros_like(weight))]
            job = P.HalfStepJob(*given, transposed, True, extra.to(dtype))
            TABLE["half_step"][op][0](job)
            results.append(job.out)
        close(results[1], results[0], BAR)


def sinkhorn(name: str) -> None:
    """Costs alone may lie apart; everything else of a problem is contiguous."""
    count, n, m, iterations = 3, 3, 5, 4
    cost, a, b = drawn(count, n, m), drawn(count, n), drawn(count, m)
    arriving = [drawn(count), drawn(count, n, m), drawn(count, n), drawn(count, m), drawn(count)]
    results = []
    for op, place, dtype in (("reference", torch.clone, torch.float64), (name, apart, torch.float32)):
        there = place(cost.to(dtype))
        given = [x.to(dtype) for x in (a, b, *arriving)]
        epsilons = torch.full((iterations,), 0.4, dtype=torch.float64)
        of = {"dtype": dtype}
        found = [torch.zeros(count, n, **of), torch.zeros(count, m, **of)]
        numbers = torch.zeros(count, P.NUMBER_COLUMNS, dtype=torch.float64)
        history = [torch.zeros(count, iterations, size, **of) for size in (n, m)]
        job = P.SinkhornJob(there, *given[:2], epsilons, 0.0, P.LOG, *found, numbers, *history, *given[2:])
        made = [*found, numbers[:, P.TRANSPORT]]
        TABLE["sinkhorn"][op][0](job, P.SOLVE)
        for phase in (P.UNROLLED, P.IMPLICIT):
            job.d_cost, job.d_a, job.d_b = (torch.zeros(x.shape, **of) for x in (cost, a, b))
            TABLE["sinkhorn"][op][0](job, phase)
            made += [job.d_cost, job.d_a, job.d_b]
        results.append(made)
    for x, y in zip(*reversed(results)):
        close(x, y, 10 * BAR)


@contextmanager
def programs_from(first: int):
    """A grid's first programs, interpreted as if they were those from ``first`` on."""
    builder = interpreter.interpreter.interpreter_builder
    size, index = builder.set_grid_dim, builder.set_grid_idx
    with (
        patch.object(builder, "set_grid_dim", lambda x, y, z: size(x + first, y, z)),
        patch.object(builder, "set_grid_idx", lambda x, y, z: index(x + first, y, z)),
    ):
        yield


def scale(name: str) -> None:
    """The last two programs of very many."""
    block = triton_runtime.SCALE_BLOCK
    first = FAR // block
    source, out = (untouched(torch.bfloat16, (first + 1) * block + 5) for _ in range(2))
    end = slice(first * block, None)
    source[end] = torch.randn(block + 5)
    module = triton_runtime.kernels().scale
    kernel, launches = module.scale, []

    class Last:
        def __getitem__(self, grid):
            launches.append(grid)
            return last

    def last(*arguments, **constants):
        with programs_from(first):
            kernel[(2,)](*arguments, **constants)

    with patch.object(module, "scale", Last()):
        triton_runtime.scale(source, torch.tensor(0.5, dtype=torch.float64), out)
    assert launches == [(first + 2,)]
    assert source[end].abs().sum() > 0 and torch.equal(out[end], source[end] * 0.5)


KERNELS = [
    row_divergence, gather, topk, pairwise_l1, sorted_l1, angle, distance, gibbs, half_step, sinkhorn, scale
]  # fmt: skip
# Compiled, a walk over points goes on to the stride. Two of Triton's are the reference's; scale is its own.
LEFT_OUT = {"cpu": {angle, distance, scale}, "triton": {sorted_l1, gibbs}, "reference": {scale}}


def run(name: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with interpreter.quick():
        for kernel in KERNELS:
            if kernel not in LEFT_OUT[name]:
                print(kernel.__name__, flush=True)
                kernel(name)


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
def test_beyond_32_bits(name):
    """Every kernel's rows, gradients and strides; which one fails is the last that the output names."""
    code = f"import test_far_offsets; test_far_offsets.run({name!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
