"""torch.library, torch.compile, autocast, GradScaler, DDP."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from cases import OBJECTIVES, Batch, error, leaves
from plain import gradients, widened

import kd_kernels as kd
from kd_kernels.reference import dense_distill

IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x).replace("torch.", "")}
JS = kd.JensenShannon(0.3)


def opcheck(op, args, **tolerances) -> None:
    """torch's, which takes tolerances since 2.7."""
    known = inspect.signature(torch.library.opcheck).parameters
    torch.library.opcheck(op, args, **{name: x for name, x in tolerances.items() if name in known})


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of our ops as the dispatcher sees them."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kd_kernels":
            self.calls.setdefault(func, args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kinds", [("head", "head"), ("head", "logits"), ("logits", "logits")], ids="x".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
def test_opcheck(kinds, reduction, dtype, backend):
    batch = Batch(lead=(2, 3), vocab=37)
    student, teacher = (batch.source(side, kind, dtype) for side, kind in zip(("student", "teacher"), kinds))
    with _Recorder() as recorder:
        loss = kd.distill(
            student, teacher, JS, labels=batch.labels, hard_weight=0.5, temperature=batch.temperature,
            reduction=reduction, teacher_grad=True, backend=backend,
        )  # fmt: skip
        loss.sum().backward()
    seen = {str(op) for op in recorder.calls}
    deferred = reduction == "none" or kinds == ("logits", "logits")
    second = "row_divergence_backward" if deferred else "scale_gradient"
    assert seen == {"kd_kernels.row_divergence.default", f"kd_kernels.{second}.default"}
    torch.use_deterministic_algorithms(False)  # opcheck compares uninitialised empties otherwise
    for op, args in recorder.calls.items():
        forward = op is torch.ops.kd_kernels.row_divergence.default  # the others have no autograd, by design
        args = tuple(
            a.detach().requires_grad_(forward and a.requires_grad) if isinstance(a, torch.Tensor) else a
            for a in args
        )
        opcheck(op, args, rtol=1e-4, atol=1e-5)


def _step(student, teacher, objective, temperature, labels, hard_weight):
    h_s, w_s = student
    loss = kd.distill(
        kd.Head(torch.tanh(h_s), w_s, softcap=5.0), kd.Head(*teacher), objective,
        labels=kd.next_token_labels(labels), temperature=temperature, hard_weight=hard_weight,
    )  # fmt: skip
    return loss * 2


def _models(tokens=6, vocab=41):
    batch = Batch(lead=(2, tokens), vocab=vocab)
    student = batch.source("student", "head", torch.float32)
    teacher = batch.source("teacher", "head", torch.float32, grad=False)
    return batch, (student.hidden, student.weight), (teacher.hidden, teacher.weight)


@pytest.mark.parametrize("dynamic", [False, True, None], ids=str)
def test_compiled_step_equals_eager(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (6, 9, 4):
        batch, student, teacher = _models(tokens)
        eager = _step(student, teacher, JS, 2.0, batch.labels, 0.5)
        loss = compiled(student, teacher, JS, 2.0, batch.labels, 0.5)
        assert torch.equal(loss, eager)
        for x, y in zip(torch.autograd.grad(loss, student), torch.autograd.grad(eager, student)):
            assert torch.equal(x, y)


def test_compiled_with_inductor():
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    batch, student, teacher = _models()
    eager = _step(student, teacher, JS, 2.0, batch.labels, 0.5)
    loss = torch.compile(_step, fullgraph=True)(student, teacher, JS, 2.0, batch.labels, 0.5)
    assert error(loss, eager) < 1e-6
    for x, y in zip(torch.autograd.grad(loss, student), torch.autograd.grad(eager, student)):
        assert error(x, y) < 1e-5


def test_no_recompilation_per_value():
    """Twelve temperatures, betas and weights: the graph is made once with constants, once with numbers."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_step, fullgraph=True, backend=counter)
    batch, student, teacher = _models()
    for i in range(12):
        arguments = (kd.JensenShannon(0.05 + 0.07 * i), 1.0 + 0.13 * i, batch.labels, 0.1 + 0.05 * i)
        loss = compiled(student, teacher, *arguments)
        assert torch.equal(loss, _step(student, teacher, *arguments))
    assert counter.frame_count <= 2

    def made_inside(alpha):
        return kd.distill(kd.Head(*student), kd.Head(*teacher), kd.SkewKL(alpha))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made_inside, fullgraph=True, backend=counter)
    for i in range(12):
        assert torch.equal(compiled(0.05 * i), made_inside(0.05 * i))
    assert counter.frame_count <= 2
    with pytest.raises(ValueError, match="alpha must be in"):
        compiled(1.5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_logits_and_none(reduction):
    torch._dynamo.reset()
    batch = Batch()

    def step(values, teacher):
        return kd.distill(
            values * 1.5, teacher, kd.ReverseKL(), reduction=reduction, labels=batch.labels
        ).sum()

    values, teacher = (batch.source(side, "logits", torch.float32).values for side in ("student", "teacher"))
    eager, compiled = (
        step(values, teacher),
        torch.compile(step, fullgraph=True, backend="aot_eager")(values, teacher),
    )
    assert torch.equal(eager, compiled)
    assert torch.equal(*(torch.autograd.grad(x, values)[0] for x in (eager, compiled)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], **IDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_behaves_as_linear(dtype, reduction):
    """float32 masters: computed in the autocast dtype, gradients float32, error at most twice plain's."""
    batch = Batch()

    def models(wide=torch.float32):
        return [batch.source(side, "head", wide, bias=True) for side in ("student", "teacher")]

    ours, plain = models(), models()
    exact = [widened(widened(m, dtype), torch.float64) for m in models()]
    with torch.autocast("cpu", dtype=dtype):
        loss = kd.distill(*ours, JS, reduction=reduction)
        logits = [torch.nn.functional.linear(m.hidden, m.weight, m.bias) for m in plain]
        assert logits[0].dtype == dtype
    theirs = dense_distill(*(kd.Logits(z.float()) for z in logits), JS, reduction=reduction)
    truth = dense_distill(*exact, JS, reduction=reduction)
    assert loss.dtype == torch.float32
    up = batch.upstream
    results = [(loss, *gradients(loss, ours[:1], up)), (theirs, *gradients(theirs, plain[:1], up)),
               (truth, *gradients(truth, exact[:1], up))]  # fmt: skip
    for x, y, z in zip(*results):
        assert x.dtype == torch.float32
        assert error(x, z) <= 2 * error(y, z) + 1e-4


def test_autocast_leaves_logits_and_float64_alone():
    batch = Batch()
    for kind, dtype in (("logits", torch.float32), ("head", torch.float64)):
        sources = [batch.source(side, kind, dtype) for side in ("student", "teacher")]
        expected = kd.distill(*sources, JS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kd.distill(*sources, JS), expected)


def test_grad_scaler():
    batch = Batch()
    student = batch.source("student", "head", torch.float32)
    teacher = batch.source("teacher", "head", torch.float32, grad=False)
    optimizer = torch.optim.SGD(leaves(student), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = kd.distill(student, teacher, kd.ForwardKL())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


_DDP = """
import os, sys, torch, torch.distributed as dist
import kd_kernels as kd
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 53)
    def forward(self, x, teacher):
        head = kd.Head(torch.tanh(self.body(x)), self.lm_head.weight, self.lm_head.bias)
        return kd.distill(head, teacher, kd.ForwardKL())
model, x, z = Student(), torch.randn(4, 6, 8), torch.randn(4, 6, 53)
model(x, z).backward()
whole = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
half = slice(2 * rank, 2 * rank + 2)
parallel = torch.nn.parallel.DistributedDataParallel(model)
parallel(x[half], z[half]).backward()
for p, g in zip(model.parameters(), whole):
    assert torch.allclose(p.grad, g, rtol=1e-4, atol=1e-6), (p.grad - g).abs().max()
dist.destroy_process_group()
print("equal", flush=True)
os._exit(0)  # gloo's threads may abort the interpreter's own end on a busy machine
"""


def test_ddp_with_two_processes():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", _DDP, str(rank), port], env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    for run in runs:
        out, err = run.communicate(timeout=240)
        assert run.returncode == 0 and "equal" in out, err[-3000:]


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_a_tiny_student_converges(objective):
    """Fifty steps of SGD bring every divergence down, on the same curve as plain torch."""
    batch = Batch(lead=(64,), vocab=50)
    curves = []
    for loss_of in (kd.distill, dense_distill):
        student = batch.source("student", "head", torch.float32)
        teacher = batch.source("teacher", "head", torch.float32, grad=False)
        optimizer = torch.optim.SGD(leaves(student), lr=10.0)
        curve = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = loss_of(student, teacher, objective)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert error(*curves) < 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: kd.distill(x, y, kd.SinkhornBatch()),
        lambda x, y: kd.feature_transport(x, y, epsilon=0.3),
        lambda x, y: kd.feature_transport(x, y, epsilon=0.3, gradient="unrolled"),
        lambda x, y: kd.relational_angle(x, y),
        lambda x, y: kd.relational_distance(x, y),
        lambda x, y: kd.distill(x, y, kd.SortedWasserstein()),
    ],
)
def test_checkpointed_losses_between_rows(loss, reentrant):
    x, y = torch.randn(6, 11, requires_grad=True), torch.randn(6, 11)
    (want,) = torch.autograd.grad(loss(x, y), x)
    torch.utils.checkpoint.checkpoint(loss, x, y, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, want)


def test_another_default_device():
    """What is made inside lies with the inputs, or on the host, wherever torch would put a new tensor."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, other = randn(2, 5, 8), randn(40, 8), randn(2, 5, 40)
    head, mask, points = kd.Head(hidden, weight), torch.ones(2, 5, dtype=torch.bool), randn(2, 6, 4)
    labels = torch.randint(40, (2, 5), generator=generator)
    logprobs, ids = other.log_softmax(-1).topk(4)
    cost, matches = torch.cdist(*points), torch.tensor([[1, 2], [3, 4]])
    calls = {
        "objective": lambda: kd.distill(head, other, kd.JensenShannon(0.3), labels=labels, hard_weight=0.5),
        "sparse": lambda: kd.distill(head, kd.SparseTarget(ids, logprobs), kd.ForwardKL()),
        "sorted": lambda: kd.distill(head, other[..., :30], kd.SortedWasserstein()),
        "sinkhorn batch": lambda: kd.distill(head, other, kd.SinkhornBatch()),
        "sinkhorn": lambda: kd.sinkhorn(cost, epsilon=0.5, epsilon_schedule=[2.0]).transport_cost,
        "features": lambda: kd.feature_transport(*points, epsilon=0.5),
        "classes": lambda: kd.class_transport(points[0], points[1], cost[:4, :4], epsilon=1.0),
        "distance": lambda: kd.relational_distance(*points),
        "angle": lambda: kd.relational_angle(*points),
        "levels": lambda: kd.multi_level_transport(head, other, student_mask=mask, teacher_mask=mask),
        "hybrid": lambda: kd.hybrid_uld(head, other, matches),
        "logprobs": lambda: kd.linear_logprobs(head, labels),
        "ranks": lambda: kd.linear_rank(head, labels, k=3),
        "top-k": lambda: kd.linear_topk(head, 3, samples=5, seed=1),
        "score": lambda: kd.score(head, other, labels=labels),
    }
    for name, call in calls.items():
        want = call()
        with torch.device("meta"):
            found = call()
        torch.testing.assert_close(tensors(found), tensors(want), rtol=0, atol=0, equal_nan=True, msg=name)


def tensors(result):
    """All that a call returned."""
    if isinstance(result, torch.Tensor):
        return [result]
    if result is None or isinstance(result, (int, float, str, bool)):
        return []
    inner = result if isinstance(result, (tuple, list)) else vars(result).values()
    return [x for part in inner for x in tensors(part)]


def test_a_graph_made_without_a_gradient_says_so():
    """What is exported knows which gradients it was made with; no backward pass may leave one out."""

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(19, 8))

        def forward(self, hidden, teacher):
            return kd.distill(kd.Head(hidden, self.weight), teacher, kd.ForwardKL())

    teacher, step = torch.randn(4, 19), Step()
    for example in (False, True):
        exported = torch.export.export(step, (torch.randn(4, 8, requires_grad=example), teacher)).module()
        hidden = torch.randn(4, 8, requires_grad=True)
        loss = exported(hidden, teacher)
        if example:
            loss.backward()
            want = torch.autograd.grad(step(hidden, teacher), hidden)[0]
            assert torch.equal(hidden.grad, want)
        else:
            with pytest.raises(RuntimeError, match="export or trace it with example inputs that require one"):
                loss.backward()


def test_forward_mode_is_refused_of_every_argument():
    z, ones = torch.randn(4, 9), torch.ones(4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(ones, ones)
        for call in ({"token_weight": dual}, {"temperature": dual}, {"teacher_temperature": dual}):
            with pytest.raises(TypeError, match="forward-mode derivative"):
                kd.distill(z, z, kd.ForwardKL(), **call)
        with pytest.raises(TypeError, match="forward-mode derivative"):
            kd.distill(z, z, kd.WeightedKL(dual, 1.0))
