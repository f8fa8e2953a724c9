"""What only a GPU can prove. ``pytest -m gpu``; elsewhere each test says why it is skipped."""

import pytest
import torch
from cases import DTYPES, FLOOR, OBJECTIVES, OPTIONS, SHAPING, SOURCES, Batch, error, leaves
from gpu import wants_cuda_kernels, wants_gpu
from jobs import gather_job, ids_for, side, topk_job
from plain import compare, copy, gradients, widened
from test_gather_kernel import check as check_gather
from test_pairwise_l1_kernel import check as check_pairs
from test_pairwise_l1_kernel import model as pair_model
from test_pairwise_l1_kernel import moved as pairs_moved
from test_pairwise_l1_kernel import pair_job
from test_topk_kernel import check as check_topk

import kd_kernels as kd
from kd_kernels import rows as R
from kd_kernels import triton_transport
from kd_kernels.backends import TABLE
from kd_kernels.reference.dense import dense_distill

pytestmark = wants_gpu
IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x).replace("torch.", "")}
SMALL = {"workspace_bytes": 8 << 10}  # three chunks and more of 15 tokens of two heads


class GpuBatch(Batch):
    """The shared random models, on the GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tensors = {name: tensor.cuda() for name, tensor in self.tensors.items()}
        for name in ("labels", "mask", "weight", "temperature", "upstream"):
            setattr(self, name, getattr(self, name).cuda())


def heads(tokens: int, vocab: int, dtype: torch.dtype, grad: bool = True) -> tuple[kd.Head, kd.Head]:
    batch = GpuBatch(lead=(tokens,), vocab=vocab, student_width=64, teacher_width=96)
    return batch.source("student", "head", dtype), batch.source("teacher", "head", dtype, grad=False)


def step(student: kd.Head, teacher: kd.Head, objective: kd.Objective, **options) -> list[torch.Tensor]:
    loss = kd.distill(student, teacher, objective, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [student.hidden, student.weight])]


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("kinds", SOURCES, ids="x".join)
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_sources_and_dtypes(objective, kinds, dtype):
    batch = GpuBatch()
    student, teacher = (batch.source(side, kind, dtype) for side, kind in zip(("student", "teacher"), kinds))
    for compact in (True, False):
        options = OPTIONS["cross-entropy"](batch)
        compare(batch, student, teacher, objective, "triton", compact=compact, **SMALL, **options)


@pytest.mark.parametrize("k", [None, 7])
@pytest.mark.parametrize("option", OPTIONS)
def test_sorted_l1(k, option):
    """Vocabularies of two sizes: torch.sort for the exact form, the topk and gather kernels for the top K."""
    batch = GpuBatch(seed=1)
    student = batch.source("student", "head", torch.float32)
    teacher = GpuBatch(vocab=131, seed=2).source("teacher", "head", torch.float32)
    compare(batch, student, teacher, kd.SortedWasserstein(top_k=k), "triton", **OPTIONS[option](batch))


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(objective, option):
    batch = GpuBatch(seed=1)
    for kinds in SOURCES:
        student, teacher = (
            batch.source(side, kind, torch.float32) for side, kind in zip(("student", "teacher"), kinds)
        )
        compare(batch, student, teacher, objective, "triton", **SMALL, **OPTIONS[option](batch))


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("shaping", SHAPING)
def test_bias_scale_softcap(objective, shaping):
    batch = GpuBatch(seed=2)
    for kinds in SOURCES:
        student, teacher = (
            batch.source(side, kind, torch.float64, **SHAPING[shaping])
            for side, kind in zip(("student", "teacher"), kinds)
        )
        compare(batch, student, teacher, objective, "triton", **SMALL, **OPTIONS["everything"](batch))


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
def test_real_vocabularies(objective, vocab, dtype):
    batch = GpuBatch(lead=(70,), vocab=vocab, student_width=32, teacher_width=48)
    student = batch.source("student", "head", dtype)
    teacher = batch.source("teacher", "head", dtype, grad=False)
    compare(batch, student, teacher, objective, "triton")


def test_more_than_2_to_the_31_logits():
    tokens, vocab = 17000, 131072
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    logits = torch.randn(tokens, vocab, device="cuda", dtype=torch.bfloat16)
    teacher = logits.roll(1, 0)
    last = slice(tokens - 8, tokens)
    value = kd.distill(logits, teacher, kd.JensenShannon(), reduction="none", backend="triton")
    exact = dense_distill(
        kd.Logits(logits[last].double()),
        kd.Logits(teacher[last].double()),
        kd.JensenShannon(),
        reduction="none",
    )
    assert error(value[last], exact) < 1e-4


def test_a_hundred_runs_are_bitwise_equal():
    student, teacher = heads(300, 32000, torch.bfloat16)
    first = step(student, teacher, kd.JensenShannon())
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, step(student, teacher, kd.JensenShannon())))


@pytest.mark.parametrize("compact", [True, False])
def test_host_synchronisations(compact):
    """None with compact=False; with compact=True one, for the number of tokens that count."""
    student, teacher = heads(64, 1000, torch.bfloat16)
    labels = torch.randint(0, 1000, (64,), device="cuda")
    labels[::3] = -100
    options = {"labels": labels, "hard_weight": 0.5, "temperature": 2.0, "compact": compact}
    step(student, teacher, kd.JensenShannon(), **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if not compact else "warn")
    try:
        with pytest.warns() if compact else _nothing() as caught:
            step(student, teacher, kd.JensenShannon(), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if compact:
        assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *exception):
        return None


def test_graph_capture_and_replay():
    student, teacher = heads(128, 4000, torch.bfloat16)
    options = {"compact": False, "mask": torch.rand(128, device="cuda") < 0.7}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(student, teacher, kd.SkewKL(), **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(student, teacher, kd.SkewKL(), **options)
    with torch.no_grad():
        student.hidden.copy_(torch.randn_like(student.hidden))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(student, teacher, kd.SkewKL(), **options)))


def test_two_streams_and_no_growth():
    student, teacher = heads(256, 8000, torch.bfloat16)
    expected = step(student, teacher, kd.ReverseKL())
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(step(student, teacher, kd.ReverseKL()))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for result in results for a, b in zip(expected, result))
    del results
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        step(student, teacher, kd.ReverseKL())
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_peak_memory_stays_within_the_workspace():
    student, teacher = heads(4096, 64000, torch.bfloat16)
    budget = 256 << 20
    step(student, teacher, kd.JensenShannon(), workspace_bytes=budget)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, d_hidden, d_weight = step(student, teacher, kd.JensenShannon(), workspace_bytes=budget)
    torch.cuda.synchronize()
    gradients = d_hidden.nbytes + d_weight.nbytes + 4 * d_weight.numel()
    assert torch.cuda.max_memory_allocated() - before <= budget + gradients + (32 << 20)


def test_compilations_do_not_grow_with_values():
    from kd_kernels.triton_kernels.row_divergence import row_divergence

    def compiled() -> int:
        return sum(len(cache[0]) for cache in row_divergence.device_caches.values())

    def call(vocab: int, temperature: float, beta: float) -> None:
        step(*heads(8, vocab, torch.float32), kd.JensenShannon(beta), temperature=temperature)

    call(32000, 1.0, 0.5)
    before = compiled()
    for vocab, temperature, beta in ((32016, 1.5, 0.3), (64000, 2.0, 0.1), (128256, 3.7, 0.9)):
        call(vocab, temperature, beta)
    assert compiled() == before
    call(50257, 1.0, 0.5)  # not divisible: one more
    call(50259, 1.0, 0.5)
    assert compiled() <= before + 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_guard():
    batch = Batch()
    on = {name: tensor.to("cuda:1", torch.float32) for name, tensor in batch.tensors.items()}
    loss = kd.distill(
        kd.Head(on["student hidden"], on["student weight"]),
        kd.Head(on["teacher hidden"], on["teacher weight"]),
        kd.ForwardKL(),
    )
    assert loss.device == torch.device("cuda:1") and torch.isfinite(loss)


def test_grad_scaler_and_autocast():
    model = torch.nn.Linear(64, 4000, bias=False, device="cuda")
    hidden = torch.randn(96, 64, device="cuda", requires_grad=True)
    teacher = torch.randn(96, 4000, device="cuda")
    exact = dense_distill(
        kd.Head(hidden.double(), model.weight.double()), kd.Logits(teacher.double()), kd.ReverseKL()
    )
    (want,) = torch.autograd.grad(exact, model.weight)
    for dtype in (torch.float16, torch.bfloat16):
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        with torch.autocast("cuda", dtype):
            loss = kd.distill(kd.Head(hidden, model.weight), teacher, kd.ReverseKL())
        model.zero_grad()
        scaler.scale(loss).backward()
        got = model.weight.grad / scaler.get_scale()
        assert got.dtype == torch.float32 and error(got, want) < 2e-2


def test_a_tiny_student_converges_as_the_reference_does():
    torch.manual_seed(0)
    teacher = torch.randn(512, 2000, device="cuda") * 2
    inputs = torch.randn(512, 48, device="cuda")
    curves = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Tanh()).cuda()
        head = torch.nn.Linear(64, 2000, device="cuda")
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
        curve = []
        for _ in range(60):
            loss = kd.distill(
                kd.Head(model(inputs), head.weight, head.bias),
                teacher,
                kd.JensenShannon(0.3),
                backend=backend,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves[backend] = torch.tensor(curve)
    assert curves["triton"][-1] < 0.8 * curves["triton"][0]
    assert torch.allclose(curves["triton"], curves["reference"], rtol=1e-3)


def test_a_bad_label_is_never_read(monkeypatch):
    student, teacher = heads(16, 500, torch.float32)
    labels = torch.randint(0, 500, (16,), device="cuda")
    labels[3] = 10**9
    value = kd.distill(student, teacher, kd.ForwardKL(), labels=labels, hard_weight=1.0, reduction="none")
    assert torch.isnan(value[3]) and torch.isfinite(value[:3]).all() and torch.isfinite(value[4:]).all()
    monkeypatch.setenv("KD_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="labels must be in"):
        kd.distill(student, teacher, kd.ForwardKL(), labels=labels, hard_weight=1.0)


def test_backward_of_per_token_losses():
    batch = GpuBatch()
    student, teacher = (batch.source(side, "head", torch.float32) for side in ("student", "teacher"))
    sources = [copy(student), copy(teacher)]
    loss = kd.distill(*sources, kd.SkewReverseKL(), reduction="none", teacher_grad=True)
    exact = [widened(student, torch.float64), widened(teacher, torch.float64)]
    want = dense_distill(*exact, kd.SkewReverseKL(), reduction="none")
    for got, true in zip(gradients(loss, sources, batch.upstream), gradients(want, exact, batch.upstream)):
        assert error(got, true) < 1e-4
    assert len(leaves(*sources)) == 4


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", ["rows", "scattered rows"])
@pytest.mark.parametrize("vocab", [203, 4099, 128256])
def test_the_gather_kernel(dtype, layout, vocab):
    z = torch.randn(33, vocab, dtype=torch.float64) * 3
    temperature = torch.rand(33, dtype=torch.float64) + 0.6
    for k, softcap, grad in ((0, 0.0, "elsewhere"), (64, 0.0, "in place"), (200, 5.0, "in place")):
        rows = side(z, dtype, layout, temperature=temperature, softcap=softcap, grad=grad)
        for together in (False, True):
            job = gather_job(rows, ids_for(33, vocab, k, unused=True), vocab)
            check_gather(job, "triton", together, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", ["rows", "scattered rows"])
@pytest.mark.parametrize("vocab", [203, 4099, 128256, 151936])  # groups of one run, two and four
def test_the_topk_kernel(dtype, layout, vocab):
    z = torch.randn(33, vocab, dtype=torch.float64) * 3
    z[1] = z[1].sort().values  # the last groups have all of the largest
    z[2], z[3] = z[2].round(), 0.5  # ties
    for k, temperatures, targets, draws in ((0, (1.0,), 7, 0), (64, (1.0,), 1, 5), (200, (1.5, 1.0), 0, 5)):
        rows = side(z, dtype, layout)
        check_topk(topk_job(rows, vocab, k, temperatures, targets, draws), "triton", device="cuda")
    if vocab > 1024:
        check_topk(topk_job(side(z, dtype, layout), vocab, 1024), "triton", device="cuda")
        # What takes the most registers, and with 16 warps has the fewest.
        check_topk(
            topk_job(side(z, dtype, layout), vocab, 1024, targets=8, draws=50), "triton", device="cuda"
        )
    softcapped = side(z, dtype, layout, softcap=5.0, scale=1.2)
    check_topk(topk_job(softcapped, vocab, 64, targets=3, draws=3), "triton", exact=False, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", ["rows", "scattered rows"])
@pytest.mark.parametrize("sizes", [(3,), (32, 7), (64, 1, 65), (16,) * 5], **IDS)
def test_the_pairwise_l1_kernel(dtype, layout, sizes):
    for softcap, grad in ((0.0, "elsewhere"), (5.0, "in place")):
        models = (pair_model(sum(sizes), 4099, dtype, layout, grad, softcap=softcap) for _ in range(2))
        check_pairs(pair_job(*models, sizes, 4099), "triton", device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
@pytest.mark.parametrize("vocab", [32000, 151936])
@pytest.mark.parametrize("sizes", [(256,), (200, 3, 53)], **IDS)
def test_the_pairwise_l1_kernel_at_real_vocabularies(dtype, vocab, sizes):
    """Against the reference on the GPU in the same arithmetic: it holds ``[rows, 256, vocab]`` in parts."""
    found = []
    models = [pair_model(256, vocab, dtype) for _ in range(2)]
    job = pair_job(*models, sizes, vocab)
    for kernel in (triton_transport.pairwise_l1, TABLE["pairwise_l1"]["reference"][0]):
        there = pairs_moved(job, "cuda")
        for phase in (R.TERMS, R.GRADIENT):
            kernel(there, phase)
        sums = [torch.nan_to_num(x) for x in (there.cost, there.signs)]  # NaN where nothing belongs
        found.append([*sums, there.student.grad[:, :vocab], there.teacher.grad[:, :vocab]])
    rounding = 1e-4 if dtype == torch.float32 else 5e-3
    for ours, theirs, bar in zip(*found, (1e-5, 1e-5, rounding, rounding)):
        assert error(ours, theirs) < bar


def test_the_pairwise_l1_kernel_repeats_its_bits_and_never_waits():
    job = pairs_moved(
        pair_job(*(pair_model(130, 32000, torch.float32) for _ in range(2)), (130,), 32000), "cuda"
    )
    first = None
    for _ in range(100):
        job.cost.zero_(), job.signs.zero_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if first is None else "error")  # the first one compiles
        try:
            for phase in (R.TERMS, R.GRADIENT):
                triton_transport.pairwise_l1(job, phase)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results = [x.clone() for x in (job.cost, job.signs, job.student.grad, job.teacher.grad)]
        first = first or results
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
@pytest.mark.parametrize("objective", [kd.ForwardKL(), kd.ReverseKL(), kd.JensenShannon()], **IDS)
def test_a_cached_teacher(dtype, objective):
    """Written by linear_topk, read by distill; the reference backend is the measure of both."""
    student, teacher = heads(70, 32000, dtype, grad=False)
    results = []
    for backend in ("triton", "reference"):
        top = kd.linear_topk(teacher, 64, backend=backend)
        logprobs = top.logits - top.lse.reshape(-1, 1)
        target = kd.SparseTarget(top.ids, logprobs=logprobs, missing="tail")
        results.append((top.ids, step(student, target, objective, backend=backend)))
    (ids, ours), (want_ids, want) = results
    assert (ids == want_ids).float().mean() > 0.99  # GEMMs may round near ties differently
    assert all(error(x, y) < 2e-2 for x, y in zip(ours, want))


# --- transport ------------------------------------------------------------------------------------------


def problems(count: int, n: int, m: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Costs with a forbidden pair, marginals with absent rows and columns."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    cost = torch.rand(count, n, m, device="cuda", dtype=torch.float64)
    cost[0, 1, 2] = float("inf")
    a, b = (torch.rand(count, size, device="cuda", dtype=torch.float64) + 0.1 for size in (n, m))
    a[:, n // 2], b[-1, m // 3] = 0.0, 0.0
    a, b = (x / x.sum(1, keepdim=True) for x in (a, b))
    return [x.to(kind).requires_grad_() for x, kind in zip((cost, a, b), (dtype, state, state))]


def transported(leaves: list[torch.Tensor], **options) -> list[torch.Tensor]:
    found = kd.sinkhorn(*leaves, return_plan=True, **options)
    slopes = torch.linspace(-1, 1, leaves[0].shape[-1], device="cuda")
    loss = found.transport_cost.sum() + 0.3 * found.value.sum() + (found.plan * slopes).sum()
    gradients = list(torch.autograd.grad(loss, leaves))
    for i in (1, 2):  # up to a constant that one marginal gains and the other loses
        gradients[i] = torch.where(leaves[i] == 0, 0.0, gradients[i] - gradients[i].mean(1, keepdim=True))
    numbers = (found.transport_cost, found.value, found.product_gap, found.plan)
    return [*(x.detach() for x in numbers), *gradients]


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("shape", [(3, 17, 40), (5, 256, 256), (2, 40, 1500), (1, 700, 33)], **IDS)
@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_the_sinkhorn_kernels(dtype, shape, gradient, epsilon):
    leaves = problems(*shape, dtype)
    options = {"epsilon": epsilon, "gradient": gradient, "iterations": 15}
    ours = transported(leaves, backend="triton", **options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = transported(wide, backend="reference", **options)
    single = transported(leaves, backend="reference", **options)
    bar = 1e-8 if dtype == torch.float64 else 2e-5
    for i, (got, want, plain) in enumerate(zip(ours, exact, single)):
        allowed = max(bar, FLOOR[dtype]) if i >= 4 else bar
        assert error(got, want) <= 3 * error(plain, want) + allowed, i


@pytest.mark.parametrize("order", ["rows_columns", "columns_rows"])
def test_sinkhorn_to_a_tolerance_on_the_device(order):
    leaves = problems(6, 90, 70, torch.float32)
    options = {"epsilon": 0.05, "tolerance": 1e-4, "order": order, "epsilon_schedule": [0.5, 0.2]}
    kd.sinkhorn(*leaves, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = kd.sinkhorn(*leaves, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = kd.sinkhorn(*(x.detach().double() for x in leaves), backend="reference", **options)
    assert (found.iterations - want.iterations).abs().max() <= 1
    assert 3 < found.iterations.min() and found.iterations.max() < 1000
    assert error(found.transport_cost.detach(), want.transport_cost) < 1e-3
    again = kd.sinkhorn(*leaves, **options)
    assert torch.equal(found.f, again.f) and torch.equal(found.g, again.g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
@pytest.mark.parametrize("kind", ["head", "logits"])
@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_sinkhorn_batch(dtype, kind, tolerance):
    """SinKD from heads and from logits: the reference backend in float64 is the measure."""
    batch = GpuBatch(lead=(4, 24), vocab=5000, student_width=64, teacher_width=96)
    objective = kd.SinkhornBatch(iterations=20 if tolerance is None else 2000, tolerance=tolerance)
    groups = torch.arange(4, device="cuda")[:, None].expand(4, 24)
    found = []
    for backend, kinds in (("triton", dtype), ("reference", torch.float64), ("reference", dtype)):
        student, teacher = (batch.source(side, kind, dtype) for side in ("student", "teacher"))
        sources = [widened(x, kinds) if kinds != dtype else copy(x) for x in (student, teacher)]
        loss = kd.distill(*sources, objective, temperature=2.0, groups=groups, backend=backend)
        found.append([loss.detach(), *gradients(loss, sources[:1])])
    for got, want, plain in zip(*found):
        assert error(got, want) <= 2 * error(plain, want) + (1e-4 if dtype == torch.float32 else 2e-2)


# --- the CUDA kernels beside Triton's ---------------------------------------------------------------------


@wants_cuda_kernels
@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("kinds", SOURCES, ids="x".join)
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_the_cuda_kernels(objective, kinds, dtype):
    batch = GpuBatch()
    student, teacher = (batch.source(side, kind, dtype) for side, kind in zip(("student", "teacher"), kinds))
    for option in ("cross-entropy at temperature", "none", "everything"):
        compare(batch, student, teacher, objective, "cuda", **SMALL, **OPTIONS[option](batch))


@wants_cuda_kernels
@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("vocab", [1, 31, 32000, 50257, 128256, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
def test_the_cuda_kernels_at_real_vocabularies(objective, vocab, dtype):
    batch = GpuBatch(lead=(70,), vocab=vocab, student_width=32, teacher_width=48)
    student = batch.source("student", "head", dtype)
    teacher = batch.source("teacher", "head", dtype, grad=False)
    if vocab > 1:  # one entry has nothing to learn: its gradients are 0, and so is what they are measured by
        compare(batch, student, teacher, objective, "cuda")
    ours = kd.distill(student, teacher, objective, backend="cuda")
    theirs = kd.distill(student, teacher, objective, backend="triton")
    assert abs(ours - theirs) <= 1e-5 * abs(theirs) + 1e-7


@wants_cuda_kernels
@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("vocab", [50257, 128257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], **IDS)
def test_the_cuda_kernels_on_16_bit_logits_of_a_cluster(objective, vocab, dtype):
    """At odd addresses, labels in every block's slice, a softcap, the phases together and apart."""
    batch = GpuBatch(vocab=vocab)
    student, teacher = (batch.source(side, "logits", dtype, softcap=8.0) for side in ("student", "teacher"))
    for option in ("everything", "none"):
        compare(batch, student, teacher, objective, "cuda", **OPTIONS[option](batch))


@wants_cuda_kernels
@pytest.mark.parametrize(
    "vocab", [50257, 128256, 500000]
)  # not aligned, held by a cluster, beyond its memory
def test_a_hundred_runs_of_the_cuda_kernels_are_bitwise_equal(vocab):
    student, teacher = heads(40, vocab, torch.float32)
    first = step(student, teacher, kd.JensenShannon(), backend="cuda")
    for _ in range(100):
        again = step(student, teacher, kd.JensenShannon(), backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@wants_cuda_kernels
def test_the_cuda_kernels_beyond_2_to_the_31_logits():
    tokens, vocab = 17000, 131072
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    logits = torch.randn(tokens, vocab, device="cuda", dtype=torch.bfloat16)
    teacher = logits.roll(1, 0)
    ours, theirs = (
        kd.distill(logits, teacher, kd.JensenShannon(), reduction="none", backend=backend)
        for backend in ("cuda", "triton")
    )
    assert error(ours, theirs) < 1e-4


@wants_cuda_kernels
def test_the_cuda_kernels_in_a_graph():
    student, teacher = heads(128, 40000, torch.bfloat16)
    options = {"compact": False, "backend": "cuda"}
    side_stream = torch.cuda.Stream()
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            step(student, teacher, kd.SkewKL(), **options)
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(student, teacher, kd.SkewKL(), **options)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(student, teacher, kd.SkewKL(), **options)))
