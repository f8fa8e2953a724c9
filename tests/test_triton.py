"""What the shared tests (``backend="triton"``, interpreted) do not see of the Triton kernels."""

import subprocess
import sys

import pytest
import torch
from cases import OBJECTIVES, Batch, error
from jobs import gather_job, ids_for, side, topk_job
from plain import compare

import kd_kernels as kd
from kd_kernels import rows as R
from kd_kernels import triton_runtime as runtime
from kd_kernels import triton_topk
from kd_kernels.backends import TABLE
from kd_kernels.reference.dense import dense_distill

IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x)}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("size", ["small", "large"])
def test_each_configuration_alone(wide, size, monkeypatch):
    """Several blocks a row, the last one ragged, in every configuration that a call may take."""
    chosen = {
        (False, "small"): runtime.SMALL,
        (False, "large"): runtime.LARGE,
        (True, "small"): runtime.SMALL_WIDE,
        (True, "large"): runtime.LARGE_WIDE,
    }[wide, size]
    monkeypatch.setattr(runtime, "configuration", lambda vocab, wide: chosen)
    batch = Batch(lead=(3,), vocab=2 * chosen.block + 77)
    dtype = torch.float64 if wide else torch.float32
    student, teacher = (batch.source(side, "head", dtype, bias=True) for side in ("student", "teacher"))
    for objective in OBJECTIVES:
        compare(batch, student, teacher, objective, "triton", reduction="sum")


def test_a_row_beyond_2_to_the_31():
    """An offset that int32 cannot hold, on a view that takes no memory: a crash if it is cut."""
    code = """
import torch, kd_kernels as kd
from kd_kernels import rows as R, triton_runtime
vocab, far = 64, 3 << 30
memory = torch.empty(far + vocab, dtype=torch.float16)  # never touched but for its ends
memory[:vocab], memory[far:] = torch.randn(vocab) * 3, torch.randn(vocab) * 3
offsets = torch.tensor([0, far])
one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
statistics, terms = torch.zeros(2, 10, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
teacher = torch.randn(2, vocab)
sides = R.Rows(memory, offsets, one), R.Rows(teacher, torch.tensor([0, vocab]), one)
job = R.RowJob("reverse_kl", 2, vocab, *sides, zero, zero, None, one, zero, statistics, terms, False)
triton_runtime.row_divergence(job, R.STATISTICS | R.TERMS)
student = torch.stack([memory[:vocab], memory[far:]]).double()
want = kd.distill(student, teacher.double(), kd.ReverseKL(), reduction="none")
assert torch.allclose(terms[:, R.SOFT], want, rtol=1e-5), (terms, want)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class _Recorder:
    """Stands in for the kernel and keeps what a launch would specialise on."""

    def __init__(self) -> None:
        self.seen: set[tuple] = set()

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            vocab = arguments[-1]
            kinds = tuple(
                x.dtype if isinstance(x, torch.Tensor) else type(x) for x in arguments if x is not vocab
            )
            self.seen.add((kinds, vocab % 16 == 0, vocab == 1, *sorted(map(str, constants.items()))))

        return launch


def test_no_recompilation_per_value(monkeypatch):
    """Vocabulary, temperature, beta, weights, softcap and token counts are run-time arguments."""
    recorder = _Recorder()
    monkeypatch.setattr(runtime._load()[0].row_divergence, "row_divergence", recorder)
    monkeypatch.setattr(runtime, "why_not", lambda device: [])
    monkeypatch.setitem(TABLE["row_divergence"], "triton", (runtime.row_divergence, runtime.why_not))

    def call(vocab: int, tokens: int, temperature: float, beta: float, weight: float, softcap: float) -> None:
        logits = torch.randn(tokens, vocab)
        kd.distill(
            kd.Logits(logits, softcap=softcap),
            torch.randn(tokens, vocab),
            kd.JensenShannon(beta),
            temperature=temperature,
            soft_weight=weight,
            backend="triton",
        )

    call(4800, 3, 1.0, 0.5, 1.0, 30.0)
    assert len(recorder.seen) == 1
    call(6400, 5, 2.5, 0.1, 0.3, 20.0)
    call(32000, 2, 0.7, 0.9, 2.0, 50.0)
    assert len(recorder.seen) == 1
    call(5001, 3, 1.0, 0.5, 1.0, 30.0)  # rows that no wide load fits: one more
    call(7003, 3, 1.0, 0.5, 1.0, 30.0)
    assert len(recorder.seen) == 2


@pytest.mark.parametrize("name", ["gather", "walk", "largest", "draw"])
def test_no_recompilation_per_value_of_the_sparse_kernels(name, monkeypatch):
    """Also numbers of ids up to the same power of two, of targets and of draws are run-time arguments."""
    recorder, op = _Recorder(), "gather" if name == "gather" else "topk"
    for kernel in ("gather",) if op == "gather" else ("walk", "largest", "draw"):
        other = recorder if kernel == name else _Recorder()
        monkeypatch.setattr(getattr(runtime._load()[0], op), kernel, other)

    def call(vocab: int, n: int, k: int, scale: float, softcap: float, some: int) -> None:
        rows = side(torch.randn(n, vocab), torch.float32, scale=scale, softcap=softcap, grad="elsewhere")
        if op == "gather":
            runtime.gather(gather_job(rows, ids_for(n, vocab, k, unused=False), vocab), R.STATISTICS)
        else:
            triton_topk.topk(topk_job(rows, vocab, k, (scale,), targets=some, draws=some))

    call(4800, 3, 64, 1.3, 30.0, 2)
    call(6400, 5, 33, 0.5, 20.0, 7)
    call(32000, 2, 50, 0.7, 50.0, 16)
    assert len(recorder.seen) == 1
    call(32000, 2, 65, 0.7, 50.0, 16)
    assert len(recorder.seen) == (2 if name in ("gather", "largest") else 1)
    call(32000, 2, 50, 1.0, 50.0, 16)  # nothing to multiply by
    assert len(recorder.seen) == {"gather": 3, "walk": 2, "largest": 2, "draw": 1}[name]


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_a_long_row(objective):
    batch = Batch(lead=(2,), vocab=70001, student_width=16, teacher_width=16)
    student, teacher = (batch.source(side, "logits", torch.float32) for side in ("student", "teacher"))
    compare(batch, student, teacher, objective, "triton")


def test_refuses_what_it_cannot_serve(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(kd.BackendUnavailable, match="serves GPU tensors, got cpu"):
        kd.distill(torch.randn(2, 5), torch.randn(2, 5), kd.ForwardKL(), backend="triton")


def test_inside_a_compiled_graph():
    batch = Batch()
    student, teacher = (batch.source(side, "head", torch.float32) for side in ("student", "teacher"))

    def loss(hidden, temperature):
        return kd.distill(
            kd.Head(hidden, student.weight),
            teacher,
            kd.ReverseKL(),
            temperature=temperature,
            backend="triton",
        )

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(student.hidden, 1.7)
    (grad,) = torch.autograd.grad(got, student.hidden)
    hidden = student.hidden.detach().double().requires_grad_()
    wide = [
        kd.Head(hidden, student.weight.double()),
        kd.Head(teacher.hidden.double(), teacher.weight.double()),
    ]
    want = dense_distill(*wide, kd.ReverseKL(), temperature=1.7)
    assert error(got, want) < 1e-5 and error(grad, torch.autograd.grad(want, hidden)[0]) < 1e-5
