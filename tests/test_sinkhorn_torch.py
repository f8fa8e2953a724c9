"""kd.sinkhorn among torch's other parts, and its memory."""

import pytest
import torch
from test_torch_integration import _Recorder, opcheck
from transport import BACKENDS, NAMES, Problems, agree, dense  # noqa: F401
from watch import in_a_process

import kd_kernels as kd
from kd_kernels.drivers.ieee_products import ieee_products

SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own cost", "shared cost"])


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@SHARED
def test_opcheck(gradient, dtype, shared, backend):
    leaves = Problems(2, 4, 5, shared=shared).leaves(dtype)
    with _Recorder() as recorder:
        found = kd.sinkhorn(
            *leaves, epsilon=0.3, iterations=4, gradient=gradient, return_plan=True, backend=backend
        )
        (found.transport_cost.sum() + found.value.sum() + found.plan.square().sum()).backward()
    ops = torch.ops.kd_kernels
    assert set(recorder.calls) == {ops.sinkhorn.default, ops.sinkhorn_backward.default}
    torch.use_deterministic_algorithms(False)  # opcheck compares uninitialised empties otherwise
    for op, args in recorder.calls.items():
        forward = op is ops.sinkhorn.default  # the other has no autograd, by design
        args = tuple(
            x.detach().requires_grad_(forward and x.requires_grad) if isinstance(x, torch.Tensor) else x
            for x in args
        )
        opcheck(op, args, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gradient", ["implicit", "envelope", "unrolled"])
@SHARED
def test_compile(gradient, shared, backend):
    """Whole, with a new epsilon without a new graph for it."""
    torch._dynamo.reset()

    def step(cost, a, b, epsilon):
        found = kd.sinkhorn(
            cost, a.softmax(1), b.softmax(1), epsilon=epsilon, iterations=5, gradient=gradient,
            return_plan=True, backend=backend,
        )  # fmt: skip
        loss = found.value.sum()
        if gradient == "envelope":
            return loss
        return loss + found.transport_cost.sum() + found.plan.square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for epsilon in (0.3, 0.2, 0.1):
        both = []
        for call in (step, compiled):
            leaves = Problems(shared=shared).leaves(torch.float32)
            loss = call(*leaves, epsilon)
            loss.backward()
            both.append([loss.detach(), *(x.grad for x in leaves)])
        for mine, wanted in zip(*both):
            agree(mine, wanted, 1e-6)


@SHARED
def test_compile_of_a_divergence_and_lengths(shared, backend):
    torch._dynamo.reset()

    def step(cost, own, other, lengths):
        options = {"epsilon": 0.3, "iterations": 5, "lengths": lengths, "backend": backend}
        return kd.sinkhorn_divergence(cost, own, other, **options)

    g = torch.Generator().manual_seed(3)
    costs = [torch.rand(*(() if shared else (3,)), n, m, generator=g) for n, m in ((6, 7), (6, 6), (7, 7))]
    lengths = torch.tensor([[6, 4], [2, 7], [3, 3]])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    agree(compiled(*costs, lengths), step(*costs, lengths), 1e-6)


@SHARED
def test_autocast(shared, backend):
    """Changes nothing: the iterations are in float32 anyway, and their products stay there."""
    results = []
    for enabled in (False, True):
        leaves = Problems(shared=shared).leaves(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = kd.sinkhorn(*leaves, epsilon=0.1, iterations=30, return_plan=True, backend=backend)
            loss = found.transport_cost.sum() + found.value.sum() + found.plan.square().sum()
            loss.backward()
        results.append([found.transport_cost, found.plan, *(x.grad for x in leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results))


def test_low_matmul_precision_changes_nothing_and_stays(backend):
    results = []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            leaves = Problems(3, 70, 90, shared=True).leaves(torch.float32)
            results.append(kd.sinkhorn(*leaves, epsilon=0.1, iterations=20, backend=backend).transport_cost)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(*results)


@SHARED
def test_inference_tensors(shared, backend):
    """Made under inference_mode, such as a teacher's costs; in it, too."""
    with torch.inference_mode():
        cost, a, b = (x.detach() for x in Problems(shared=shared).leaves())
        inside = kd.sinkhorn(cost, a, b, epsilon=0.1, iterations=5, backend=backend)
    free = torch.zeros(3, 9, dtype=torch.float64, requires_grad=True)
    found = kd.sinkhorn(cost, a, 3 * free.softmax(1), epsilon=0.1, iterations=5, backend=backend)
    found.transport_cost.sum().backward()
    assert free.grad.abs().sum() > 0 and inside.value.isfinite().all()
    assert not kd.sinkhorn(cost, a, b, epsilon=0.1, iterations=5, backend=backend).value.requires_grad


@pytest.mark.parametrize("gradient", ["implicit", "envelope", "unrolled"])
def test_double_backward(gradient, backend):
    leaves = Problems().leaves()
    found = kd.sinkhorn(*leaves, epsilon=0.1, iterations=5, gradient=gradient, backend=backend)
    (slope,) = torch.autograd.grad(found.value.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="kd_kernels.sinkhorn: double backward"):
        slope.sum().backward()


def test_transforms(backend):
    cost = torch.rand(3, 4)
    with pytest.raises(TypeError, match="torch.func"):
        torch.func.grad(lambda c: kd.sinkhorn(c, epsilon=0.1, backend=backend).value)(cost)


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("order", ["rows_columns", "columns_rows"])
@SHARED
def test_inputs_and_results_are_left_alone(gradient, order, shared, backend):
    """Twice backward, the same; nothing given or returned changes."""
    leaves = Problems(shared=shared).leaves()
    before = [x.detach().clone() for x in leaves]
    found = kd.sinkhorn(
        *leaves, epsilon=0.1, iterations=5, gradient=gradient, order=order, return_plan=True, backend=backend
    )
    kept = [getattr(found, name).detach().clone() for name in (*NAMES, "f", "g")]
    once, twice = (
        torch.autograd.grad(found.transport_cost.sum() + found.value.sum(), leaves, retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(once, twice))
    assert all(torch.equal(x, y) for x, y in zip(leaves, before))
    assert all(torch.equal(getattr(found, name), x) for name, x in zip((*NAMES, "f", "g"), kept))


def test_frozen(backend):
    found = kd.sinkhorn(torch.rand(3, 4), epsilon=0.1, backend=backend)
    with pytest.raises(AttributeError):
        found.value = 1


def test_kinds_of_devices_overlap(monkeypatch):
    """As of two threads. Until torch 2.9 one setting was theirs: neither may change it while the other
    computes, nor leave behind what the other had set."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", None, raising=False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        first, second = (ieee_products(torch.device(kind)) for kind in ("cpu", "cuda"))
        for step, expected in (
            (first.__enter__, "highest"),
            (second.__enter__, "highest"),
            (lambda: first.__exit__(None, None, None), "highest"),
            (lambda: second.__exit__(None, None, None), "medium"),
        ):
            step()
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


# --- memory -------------------------------------------------------------------------------------------

_SHARED_COST = """
import sys, torch, kd_kernels as kd
torch.set_num_threads(1)

def step(count, n, m):
    cost = torch.rand(n, m, requires_grad=True)
    a, b = (torch.randn(count, size).softmax(1).requires_grad_() for size in (n, m))
    for gradient in ("implicit", "unrolled"):
        found = kd.sinkhorn(cost, a, b, epsilon=0.1, iterations=5, gradient=gradient, backend=sys.argv[1])
        (found.transport_cost.sum() + found.value.sum()).backward()

step(4, 30, 30)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(256, 400, 500)
print(status("VmHWM") - before)
"""


def test_a_shared_cost_is_not_repeated(backend):
    """256 problems of 400 x 500: a [B, n, m] takes 195 MiB, all potentials of a step 0.9."""
    above = in_a_process(_SHARED_COST, backend)
    assert above < 80 << 20, above / 2**20
