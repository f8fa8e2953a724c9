"""Class-cost transport (WKD-L): against the published form, and what it does at the edges."""

import math
import threading

import pytest
import torch
from cases import DTYPES, FLOOR, error
from test_torch_integration import _Recorder, opcheck
from test_transport import classes, leaves, normal, run, unrolled
from watch import Largest

import kd_kernels as kd
from kd_kernels.drivers.sinkhorn import Call, solve_and_differentiate
from kd_kernels.problems import SCALING


def published_classes(
    z, y, cost, labels, epsilon=0.05, iterations=10, temperature=2.0, tiny=1e-8, target=0.0
):
    """WKD-L as published: the label's class cut out of logits and of a copy of the cost for every sample."""
    n, c = z.shape
    keep = torch.ones_like(z, dtype=torch.bool).scatter_(1, labels[:, None], False)
    a, b = ((x[keep].reshape(n, c - 1) / temperature).softmax(1) for x in (z, y))
    costs = cost.repeat(n, 1, 1)[keep[:, :, None] & keep[:, None, :]].reshape(n, c - 1, c - 1)
    kernel = (-costs / epsilon).exp()
    u = torch.full_like(a, 1 / (c - 1))[:, :, None]
    for _ in range(iterations):
        v = b[:, :, None] / (kernel.transpose(1, 2) @ u + tiny)
        u = a[:, :, None] / (kernel @ v + tiny)
    transport = (u * kernel * v.transpose(1, 2) * costs).sum((1, 2))
    at = lambda x: x.gather(1, labels[:, None])[:, 0]  # noqa: E731
    return transport - target * at(y.softmax(1)) * at(z.log_softmax(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [0.0, 0.4])
def test_classes(dtype, target):
    inputs = leaves(3 * normal(6, 23), 3 * normal(6, 23, seed=1), dtype=dtype)
    labels = torch.randint(0, 23, (6,))
    wide = torch.promote_types(dtype, torch.float32)

    def exact(z, y):
        return published_classes(z, y, classes(23, z.dtype), labels, target=target).mean()

    wanted, plain = run(exact, leaves(*inputs)), run(exact, leaves(*inputs, dtype=wide))
    found = run(
        kd.class_transport, inputs, cost=classes(23, dtype).to(wide), labels=labels,
        target_weight=target, denominator_eps=1e-8, teacher_grad=True,
    )  # fmt: skip
    rough = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 0.0)  # the cost was rounded
    for x, y, z in zip(found, plain, wanted):
        assert error(x, z) <= 2 * error(y, z) + 10 * FLOOR[dtype] + rough
    assert found[0].dtype == wide


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.2},
        {"iterations": 3},
        {"temperature": 0.8},
        {"order": "rows_columns"},
        {"denominator_eps": 0.1},
    ],
)
def test_class_options_matter_and_agree(options):
    z, y, labels = 3 * normal(4, 9), 3 * normal(4, 9, seed=1), torch.tensor([0, 3, 8, 3])
    published = {"denominator_eps": "tiny"}
    usual = kd.class_transport(z, y, classes(9), labels, reduction="none")
    found = kd.class_transport(z, y, classes(9), labels, reduction="none", **options)
    assert (found - usual).abs().max() > 1e-6
    if "order" not in options:
        wanted = published_classes(
            z, y, classes(9), labels, **({"tiny": 0.0} | {published.get(k, k): v for k, v in options.items()})
        )
        assert error(found, wanted) < 1e-12


def test_class_reductions_and_samples_that_do_not_count():
    z, y = leaves(normal(5, 7), normal(5, 7, seed=1))
    labels = torch.tensor([1, -100, 6, 0, -100])
    with torch.no_grad():
        z[1], y[4] = math.nan, math.inf
    each = kd.class_transport(
        z, y, classes(7), labels, reduction="none", teacher_grad=True, target_weight=0.5
    )
    counted = labels >= 0
    wanted = published_classes(z[counted], y[counted], classes(7), labels[counted], tiny=0.0, target=0.5)
    assert error(each[counted], wanted) < 1e-12 and (each[~counted] == 0).all()
    options = {"teacher_grad": True, "target_weight": 0.5}
    mean = run(kd.class_transport, (z, y), cost=classes(7), labels=labels, **options)
    assert (
        error(mean[0], wanted.mean()) < 1e-12
        and error(kd.class_transport(z, y, classes(7), labels, reduction="sum", **options), wanted.sum())
        < 1e-12
    )
    for g in mean[1:]:
        assert g.isfinite().all() and (g[~counted] == 0).all() and (g[counted] != 0).any()
    nobody = torch.full((5,), -100)
    assert kd.class_transport(z, y, classes(7), nobody) == 0


def test_a_label_that_nobody_checked_makes_its_sample_nan(monkeypatch):
    """As on a GPU, where looking at the numbers would wait for it."""
    monkeypatch.setattr("kd_kernels.transport.checks_values", lambda device: False)
    z, y, labels = normal(4, 6), normal(4, 6, seed=1), torch.tensor([1, 6, -7, -100])
    found = kd.class_transport(z, y, classes(6), labels, reduction="none")
    assert found.isnan().tolist() == [False, True, True, False]


def test_all_classes_without_labels():
    z, y, cost = *leaves(2 * normal(3, 6), 2 * normal(3, 6, seed=1)), classes(6)
    found = run(kd.class_transport, (z, y), cost=cost, iterations=20, epsilon=0.3, teacher_grad=True)

    def exact(z, y):
        one = [
            unrolled(cost, (a / 2).softmax(0), (b / 2).softmax(0), 0.3, 20, "columns_rows")
            for a, b in zip(z, y)
        ]
        return torch.stack(one).mean()

    for x, e in zip(found, run(exact, leaves(z, y))):
        assert error(x, e) < 1e-10


def test_banned_classes():
    """A logit of -inf is a marginal of 0 too."""
    z, y = leaves(normal(2, 6), normal(2, 6, seed=1))
    with torch.no_grad():
        z[:, 4] = y[:, 4] = -math.inf
    kept = [0, 1, 2, 3, 5]
    found = run(kd.class_transport, (z, y), cost=classes(6), teacher_grad=True, iterations=200)
    cut = leaves(z[:, kept], y[:, kept])
    wanted = run(kd.class_transport, cut, cost=classes(6)[kept][:, kept], teacher_grad=True, iterations=200)
    assert error(found[0], wanted[0]) < 1e-9
    for g, h in zip(found[1:], wanted[1:]):
        assert error(g[:, kept], h) < 1e-7 and (g[:, 4] == 0).all()


def test_class_gradcheck():
    inputs = leaves(normal(3, 5), normal(3, 5, seed=1))
    labels = torch.tensor([2, 0, -100])
    assert torch.autograd.gradcheck(
        lambda z, y: kd.class_transport(z, y, classes(5), labels, teacher_grad=True, target_weight=0.3),
        inputs,
    )


def test_the_cost_is_never_copied_for_each_sample():
    n, c = 60, 40
    a, b, cost = normal(n, c).softmax(1), normal(n, c, seed=1).softmax(1), classes(c)
    call = Call(cost, a, b, torch.full((10,), 0.05, dtype=torch.float64), 0.0, SCALING, True, None)
    with Largest() as seen:
        solve_and_differentiate(call)
    # The scalings of ten iterations, and scratch memory in bytes for two matrices.
    assert seen.numel == max(2 * 8 * c * c, n * 10 * c) < n * c * c


@pytest.mark.parametrize("teacher_grad", [False, True])
def test_the_backward_pass_multiplies_what_the_forward_found(teacher_grad):
    """Nothing but the gradients is kept between them: no cost, no iteration."""
    n, c = 4, 30
    z, y = leaves(normal(n, c), normal(n, c, seed=1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = kd.class_transport(z, y, classes(c), iterations=50, teacher_grad=teacher_grad)
    assert max(kept) == n * c
    with pytest.raises(RuntimeError, match="kd_kernels.class_transport: double backward"):
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize("teacher_grad", [False, True])
@pytest.mark.parametrize("domain", ["scaling", "log"])
def test_opcheck(domain, teacher_grad, backend):
    z, y = leaves(normal(3, 6), normal(3, 6, seed=1), dtype=torch.float32)
    options = {"domain": domain, "teacher_grad": teacher_grad, "backend": backend}
    with _Recorder() as recorder:
        kd.class_transport(z, y, classes(6, torch.float32), **options).backward()
    ops = torch.ops.kd_kernels
    assert set(recorder.calls) == {ops.class_cost.default, ops.found_gradient.default}
    torch.use_deterministic_algorithms(False)  # opcheck compares uninitialised empties otherwise
    args = recorder.calls[ops.class_cost.default]
    args = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in args]
    opcheck(ops.class_cost.default, args, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "reach, domain", [(59.9, "scaling"), (86, "scaling"), (59.9, "log"), (1000, "log"), (1000, "auto")]
)
@pytest.mark.parametrize("size", [2, 20])
def test_confident_samples_whatever_the_range_of_the_cost(reach, domain, size):
    cost = torch.rand(size, size).fill_diagonal_(0.0)
    cost = 0.05 * reach * cost / cost.max()
    z, y = (200 * torch.randn(64, size) for _ in range(2))

    def found(z, y, cost, domain):
        return run(kd.class_transport, leaves(z, y), cost=cost, domain=domain, teacher_grad=True)

    wanted = found(z.double(), y.double(), cost.double(), "log")
    for x, e in zip(found(z, y, cost, domain), wanted):
        assert x.isfinite().all() and error(x, e) < 2e-3  # marginals of 1e-40 have few digits
    with pytest.raises(ValueError, match="too far apart"):
        kd.class_transport(z, y, cost * 90 / reach)


@pytest.mark.parametrize("order", ["rows_columns", "columns_rows"])
@pytest.mark.parametrize("dtype, reach", [(torch.float32, 87), (torch.float64, 707)])
@pytest.mark.parametrize("banned", [-math.inf, -400.0])
def test_a_class_far_from_all_others_at_the_end_of_the_room(dtype, reach, order, banned):
    """Where a scaling over its mass has no room any more, though both do."""
    cost = torch.zeros(200, 200, dtype=dtype)
    cost[-1, :-1] = cost[:-1, -1] = 1.0
    z, y = (torch.zeros(2, 200, dtype=dtype) for _ in range(2))
    z[0, -1], y[0, -1] = -30.0, banned
    for sides in ((z, y), (y, z)):
        options = {"epsilon": 1 / reach, "order": order, "teacher_grad": True}
        found = run(kd.class_transport, leaves(*sides, dtype=dtype), cost=cost, **options)
        wanted = run(kd.class_transport, leaves(*sides, dtype=dtype), cost=cost, domain="log", **options)
        for x, e in zip(found, wanted):
            assert x.isfinite().all() and torch.allclose(x, e, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("order", ["rows_columns", "columns_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"denominator_eps": 0.3}, {"domain": "log"}], ids=str)
def test_classes_on_every_backend(backend, order, dtype, options):
    """A cost that is no metric, with a sample that does not count."""
    inputs = leaves(3 * normal(5, 11), 3 * normal(5, 11, seed=1))
    cost, labels = torch.rand(11, 11, dtype=torch.float64) + 0.1, torch.tensor([3, 0, -100, 10, 3])

    def exact(z, y):
        a, b = (
            torch.where(labels[:, None] == torch.arange(11), -torch.inf, x / 2).softmax(1) for x in (z, y)
        )
        kernel, tiny = (cost / -0.2).exp(), options.get("denominator_eps", 0.0)
        u = v = (torch.arange(11) != labels[:, None]).double() / 10
        for _ in range(3):
            for half in order.split("_"):
                if half == "rows":
                    u = a / (v @ kernel.t() + tiny)
                else:
                    v = b / (u @ kernel + tiny)
        each = (u * (v @ (kernel * cost).t())).sum(1)
        return each[labels >= 0].mean()

    wanted = run(exact, inputs)
    found = run(
        kd.class_transport, leaves(*inputs, dtype=dtype), cost=cost.to(dtype), labels=labels, epsilon=0.2,
        iterations=3, order=order, teacher_grad=True, backend=backend, **options,
    )  # fmt: skip
    for x, e in zip(found, wanted):
        assert error(x, e) < 10 * FLOOR[dtype]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_small_label_types_do_not_wrap(dtype):
    label = torch.tensor([156, 3, 199])
    cost, student, teacher = torch.rand(200, 200), torch.randn(3, 200), torch.randn(3, 200)
    want = kd.class_transport(student, teacher, cost, label, reduction="none")
    assert torch.equal(kd.class_transport(student, teacher, cost, label.to(dtype), reduction="none"), want)


@pytest.mark.parametrize("order", ["rows_columns", "columns_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_costs_of_any_stride(dtype, order, backend):
    whole = torch.rand(24, 24, dtype=dtype)
    whole[0, 0] = 0.0  # or the cost is copied, less its least entry
    row = whole[0, ::2]
    views = (
        *(whole[:12, :12], whole[:12, :12].t(), whole[::2, ::2], whole[:12, ::2], whole[::2, :12].t()),
        *(row.expand(12, 12), row[:, None].expand(12, 12), row[:1].expand(12, 12)),
    )
    inputs = leaves(3 * normal(3, 12), 3 * normal(3, 12, seed=1), dtype=dtype)
    for cost in views:
        found, wanted = (
            run(kd.class_transport, inputs, cost=c, order=order, teacher_grad=True, backend=backend)
            for c in (cost, cost.contiguous())
        )
        for x, e in zip(found, wanted):
            assert torch.allclose(x, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("poisoned", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_without_a_distribution_is_nan_in_both_gradients(value, poisoned):
    inputs = leaves(normal(4, 6), normal(4, 6, seed=1))
    with torch.no_grad():
        inputs[poisoned][2, 1] = value
        inputs[0][:, 5] = -math.inf  # a class that is out of the question is nothing of the kind
    loss, *gradients = run(kd.class_transport, inputs, cost=classes(6), teacher_grad=True, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False]
    for gradient in gradients:
        assert gradient[2].isnan().all() and gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("domain", ["scaling", "log"])
def test_costs_far_from_zero(domain):
    inputs, cost = leaves(3 * normal(4, 9), 3 * normal(4, 9, seed=1), dtype=torch.float32), torch.rand(9, 9)
    cost = (cost * 1024).round() / 1024  # which the sum can hold
    near, far = (
        run(kd.class_transport, inputs, cost=cost + offset, domain=domain, teacher_grad=True)
        for offset in (0.0, 1000.0)
    )
    assert error(far[0] - 1000, near[0]) < 1e-3
    for x, e in zip(far[1:], near[1:]):
        assert error(x, e) < 1e-4


def test_nothing_is_kept_where_nothing_is_differentiated():
    z, y, cost = torch.randn(50, 20), torch.randn(50, 20), torch.rand(20, 20)
    with Largest() as seen:
        kd.class_transport(z, y, cost, iterations=30)
    assert seen.numel <= 50 * 20


def test_a_label_that_nobody_believes_in_leaves_gradients_finite():
    z, y = leaves(normal(3, 5), normal(3, 5, seed=1))
    with torch.no_grad():
        z[0, 2] = y[0, 2] = -math.inf
    labels = torch.tensor([2, 1, 0])
    found = run(
        kd.class_transport, (z, y), cost=classes(5), labels=labels, target_weight=1.0, teacher_grad=True
    )
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("eps", [-1.0, math.nan, math.inf, torch.tensor(1.0)], ids=str)
def test_what_may_be_added_to_denominators(eps):
    with pytest.raises(ValueError, match="denominator_eps must be a finite number >= 0"):
        kd.class_transport(normal(2, 3), normal(2, 3), classes(3), denominator_eps=eps)


def test_a_cost_too_wide_with_something_in_denominators():
    with pytest.raises(ValueError, match='domain="log".* takes any, without denominator_eps'):
        kd.class_transport(normal(2, 9), normal(2, 9), 1e3 * classes(9), denominator_eps=1e-8, backend="cpu")


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1"])
def test_what_a_target_may_weigh(weight):
    with pytest.raises(ValueError, match="target_weight must be a finite number"):
        kd.class_transport(normal(2, 3), normal(2, 3), classes(3), torch.tensor([0, 1]), target_weight=weight)


def test_threads_leave_the_precision_of_products_as_it_was():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        setting = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
        found = getattr(setting, "fp32_precision", None)
        z, y, cost = torch.randn(4, 30), torch.randn(4, 30), torch.rand(30, 30)

        def work():
            for _ in range(30):
                kd.class_transport(z, y, cost)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert getattr(setting, "fp32_precision", None) == found
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("iterations", [3, 300])
def test_parts_say_how_far_the_plan_is(iterations):
    """Of a cost so wide that few iterations leave the plan far from its marginals."""
    z, y, labels = 3 * normal(4, 9), 3 * normal(4, 9, seed=1), torch.tensor([0, 3, 8, 3])
    cost = 3 * classes(9)
    options = {"iterations": iterations, "domain": "log"}
    loss, parts = kd.class_transport(z, y, cost, labels, target_weight=0.5, return_parts=True, **options)
    removed = labels[:, None] == torch.arange(9)
    a, b = (torch.where(removed, -torch.inf, x / 2).softmax(1) for x in (z, y))
    wanted = kd.sinkhorn(cost, a, b, epsilon=0.05, order="columns_rows", **options)
    assert loss.dim() == 0 and not torch.equal(loss, parts.loss.mean())
    assert error(parts.loss, wanted.transport_cost) < 1e-6
    assert error(parts.product_gap, wanted.product_gap) < 1e-6
    assert error(parts.marginal_error, wanted.marginal_error) < 1e-6
    assert (parts.marginal_error.max() > 0.01) == (iterations == 3)


def test_compiles_with_sizes_that_change():
    step = torch.compile(
        lambda z, y, cost: kd.class_transport(z, y, cost, epsilon=0.5),
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    for n, c in ((3, 5), (4, 7)):
        z, y = leaves(normal(n, c), normal(n, c, seed=1))
        assert error(step(z, y, classes(c)), kd.class_transport(z, y, classes(c), epsilon=0.5)) < 1e-12
