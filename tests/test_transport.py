"""Transport between features, sequences and classes against the published loops, in float64 and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FLOOR, error

import kd_kernels as kd
from kd_kernels.transport import COSTS


def normal(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def run(function, inputs, upstream=0.7, **options):
    loss = function(*inputs, **options)
    return [loss, *torch.autograd.grad(loss.sum() * upstream, inputs)]


def leaves(*tensors, dtype=torch.float64):
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


# --- the loop ----------------------------------------------------------------------------------------


def unrolled(cost, a, b, epsilon, iterations, order="rows_columns", entropic=False):
    """Sinkhorn's loop of one problem as everybody writes it, for autograd."""
    kernel = (-cost / epsilon).exp()
    u, v = torch.ones_like(a), torch.ones_like(b)
    for _ in range(iterations):
        if order == "columns_rows":
            v = b / (kernel.t() @ u)
        u = a / (kernel @ v)
        if order == "rows_columns":
            v = b / (kernel.t() @ u)
    plan = u[:, None] * kernel * v
    value = (plan * cost).sum()
    product = a[:, None] * b
    return value + (epsilon * (plan * (plan / product).log() - plan + product).sum() if entropic else 0.0)


def classes(c, dtype=torch.float64, seed=5):
    x = F.normalize(normal(c, 6, seed=seed), dim=1)
    return (1 - (-(1 - x @ x.t()).clamp(min=0)).exp()).fill_diagonal_(0.0).to(dtype)


# --- features -----------------------------------------------------------------------------------------


def cost_between(x, y, name):
    if name == "cosine":
        return 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).t()
    if name == "attention":
        return 1 - (x @ y.t() / x.shape[-1] ** 0.5).softmax(-1)
    if name == "l1":
        return (x[:, None] - y[None]).abs().sum(-1)
    return (x[:, None] - y[None]).square().sum(-1).sqrt()


def uniform(n):
    return torch.full((n,), 1.0 / n, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_features(cost, dtype):
    inputs = leaves(normal(9, 24), normal(7, 24, seed=1) + 0.3, dtype=dtype)
    epsilon = {"cosine": 0.2, "attention": 0.1, "euclidean": 1.0, "l1": 4.0}[cost]

    def exact(x, y):
        return unrolled(cost_between(x, y, cost), uniform(9).to(x), uniform(7).to(x), epsilon, 400)

    wanted = run(exact, leaves(*inputs))
    plain = run(exact, leaves(*inputs, dtype=torch.promote_types(dtype, torch.float32)))
    found = run(kd.feature_transport, inputs, cost=cost, epsilon=epsilon, iterations=400, teacher_grad=True)
    for x, y, z in zip(found, plain, wanted):
        assert error(x, z) <= 4 * error(y, z) + 10 * FLOOR[dtype]
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)


def test_masked_features():
    mask = torch.tensor([True, False, True, True, False, True])
    x, y = leaves(normal(6, 8), normal(6, 8, seed=1))
    kept = run(kd.feature_transport, leaves(x[mask], y[mask]), epsilon=0.2, teacher_grad=True)
    with torch.no_grad():
        x[~mask], y[~mask] = math.nan, math.inf
    found = run(kd.feature_transport, (x, y), epsilon=0.2, teacher_grad=True, mask=mask)
    assert error(found[0], kept[0]) < 1e-13
    for g, h in zip(found[1:], kept[1:]):
        assert error(g[mask], h) < 1e-11 and (g[~mask] == 0).all()
    for g in run(kd.feature_transport, (x, y), epsilon=0.2, teacher_grad=True, mask=mask & False):
        assert (g == 0).all()


def test_the_teacher_is_a_constant():
    x, y = leaves(normal(4, 3), normal(4, 3, seed=1))
    loss = kd.feature_transport(x, y, epsilon=0.2)
    assert torch.autograd.grad(loss, y, allow_unused=True) == (None,)


def test_states_of_zeros_and_equal_states_have_finite_gradients():
    x, y = leaves(normal(5, 4), normal(5, 4, seed=1))
    with torch.no_grad():
        x[2], y[1], y[3] = 0.0, 0.0, x[0]
    for cost in ("cosine", "euclidean"):
        found = run(kd.feature_transport, (x, y), cost=cost, epsilon=0.5, teacher_grad=True)
        assert all(g.isfinite().all() for g in found)
    assert (run(kd.feature_transport, (x, y), epsilon=0.5, teacher_grad=True)[1][2] == 0).all()


def test_an_offset_costs_euclidean_distances_no_digits():
    x, y = leaves(normal(40, 24) + 1e4, normal(40, 24, seed=1) + 1e4, dtype=torch.float32)
    options = {"cost": "euclidean", "epsilon": 1.0, "teacher_grad": True}
    for found, exact in zip(*(run(kd.feature_transport, pair, **options) for pair in ((x, y), leaves(x, y)))):
        assert error(found, exact) < 1e-5


def test_half_precision_autocast_changes_nothing():
    x, y = (normal(6, 8, seed=s, dtype=torch.float32) for s in (0, 1))
    logits = [normal(3, 5, seed=s, dtype=torch.float32) for s in (0, 1)]
    plain = kd.feature_transport(x, y, epsilon=0.1), kd.class_transport(*logits, classes(5, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = (
            kd.feature_transport(x, y, epsilon=0.1),
            kd.class_transport(*logits, classes(5, torch.float32)),
        )
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


# --- sequences ----------------------------------------------------------------------------------------


LENGTHS = [(6, 4), (1, 5), (3, 3), (0, 2), (2, 0)]


def sequences(dtype=torch.float64, poison=True):
    x, y = normal(5, 6, 8, dtype=dtype), normal(5, 5, 8, seed=1, dtype=dtype)
    masks = [
        torch.arange(z.shape[1]) < torch.tensor([pair[i] for pair in LENGTHS])[:, None]
        for i, z in enumerate((x, y))
    ]
    if poison:
        x[~masks[0]], y[~masks[1]] = math.nan, -math.inf
    return leaves(x, y, dtype=dtype), masks


def moderate(cost: str) -> dict:
    """An epsilon at which the plan says something and few iterations are not enough."""
    return {"cost": cost, "epsilon": 3.0 if cost == "l1" else 0.4, "teacher_grad": True}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("entropic", [False, True])
def test_ragged_sequences(cost, entropic):
    (x, y), masks = sequences()
    options = {**moderate(cost), "iterations": 300, "entropic": entropic}
    ragged = {"student_mask": masks[0], "teacher_mask": masks[1]}
    each = kd.sequence_transport(x, y, reduction="none", **options, **ragged)
    gradients = torch.autograd.grad(each.sum(), (x, y))
    for i, (n, m) in enumerate(LENGTHS):
        if n * m == 0:
            assert each[i] == 0 and all((g[i] == 0).all() for g in gradients)
            continue
        alone = leaves(x[i, :n], y[i, :m])
        loss = unrolled(
            cost_between(*alone, cost),
            uniform(n),
            uniform(m),
            options["epsilon"],
            600,
            "columns_rows",
            entropic,
        )
        assert error(each[i], loss) < 1e-9
        for g, h in zip(gradients, torch.autograd.grad(loss, alone)):
            assert (g[i, : len(h)] - h).abs().max() < 1e-7 and (g[i, len(h) :] == 0).all()
    total = kd.sequence_transport(x, y, reduction="sum", **options, **ragged)
    assert torch.equal(total, each.sum())
    assert error(kd.sequence_transport(x, y, **options, **ragged), total / 3) < 1e-14  # two have no positions


@pytest.mark.parametrize("order", ["rows_columns", "columns_rows"])
@pytest.mark.parametrize("cost", COSTS)
def test_gradient_of_the_number_returned(cost, order, backend):
    """After few iterations, which the converged coupling's gradient is not that of."""
    lengths = LENGTHS[:2] if backend == "triton" else LENGTHS
    (x, y), masks = sequences()
    x, y = leaves(x[: len(lengths)], y[: len(lengths)])
    ragged = {"student_mask": masks[0][: len(lengths)], "teacher_mask": masks[1][: len(lengths)]}
    options = {**moderate(cost), "iterations": 2, "order": order, **ragged}
    found = run(
        kd.sequence_transport, (x, y), gradient="unrolled", reduction="sum", backend=backend, **options
    )
    alone = [leaves(x[i, :n], y[i, :m]) for i, (n, m) in enumerate(lengths) if n * m]
    losses = [unrolled(cost_between(*pair, cost), uniform(len(pair[0])), uniform(len(pair[1])), options["epsilon"], 2, order)
              for pair in alone]  # fmt: skip
    assert error(found[0], sum(losses)) < 1e-12
    for i, (pair, loss) in enumerate(zip(alone, losses)):
        for g, h in zip(found[1:], torch.autograd.grad(0.7 * loss, pair)):
            assert (g[i, : len(h)] - h).abs().max() < 1e-12 and (g[i, len(h) :] == 0).all()
    if cost != "attention":
        implicit = run(kd.sequence_transport, (x, y), reduction="sum", backend=backend, **options)
        assert error(implicit[1], found[1]) > 1e-3


@pytest.mark.parametrize("entropic", [False, True])
def test_backends(entropic, backend):
    """Features and sequences are solved by the backend that is named."""
    x, y = leaves(normal(5, 8), normal(4, 8, seed=1))
    options = {"epsilon": 0.3, "iterations": 30, "entropic": entropic, "teacher_grad": True}
    found = run(kd.feature_transport, (x, y), backend=backend, order="columns_rows", **options)
    exact = run(
        lambda x, y: unrolled(
            cost_between(x, y, "cosine"), uniform(5), uniform(4), 0.3, 30, "columns_rows", entropic
        ),
        leaves(x, y),
    )
    assert all(error(g, h) < 1e-6 for g, h in zip(found, exact))
    each = kd.sequence_transport(x[None], y[None], backend=backend, **options)
    assert torch.equal(each, found[0])


def test_projector_gets_its_gradient():
    x, hidden = normal(2, 5, 8), normal(2, 4, 12, seed=1)
    weight = normal(8, 12, seed=2).requires_grad_()
    loss = kd.sequence_transport(x, F.linear(hidden, weight), epsilon=0.1, teacher_grad=True)
    assert torch.autograd.grad(loss, weight)[0].abs().max() > 1e-3


@pytest.mark.parametrize("cost", COSTS)
def test_sequence_gradcheck(cost):
    (x, y), masks = sequences(poison=False)
    function = lambda x, y: kd.sequence_transport(  # noqa: E731
        x,
        y,
        cost=cost,
        epsilon=1.0,
        iterations=200,
        teacher_grad=True,
        student_mask=masks[0],
        teacher_mask=masks[1],
    )
    assert torch.autograd.gradcheck(
        function,
        (x[:, :, :3].detach().requires_grad_(), y[:, :, :3].detach().requires_grad_()),
        fast_mode=True,
    )


def published_cot(x, y, alpha=0.1, iterations=100):
    """CoT2Align's term of one layer and pair, columns first, sum over the batch / (4 B)."""
    total = 0.0
    for one, other in zip(x, y):
        total = total + unrolled(
            cost_between(one, other, "attention"),
            uniform(len(one)),
            uniform(len(other)),
            1 / alpha,
            iterations,
            "columns_rows",
        )
    return total / (4 * len(x))


def test_published_attention_cost_is_nearly_constant():
    """docs/transport.md: at epsilon 10 the plan is the product coupling, and the cost 1 - 1/m, whatever
    the student does; at 0.1 it is not."""
    x, y = leaves(normal(2, 40, 64), normal(2, 30, 64, seed=1))
    wanted = run(published_cot, leaves(x, y))
    options = {"cost": "attention", "teacher_grad": True, "return_parts": True}
    loss, parts = kd.sequence_transport(x, y, epsilon=10, iterations=100, **options)
    found = torch.autograd.grad(0.25 * loss * 0.7, (x, y))
    assert error(0.25 * loss, wanted[0]) < 1e-12
    assert all(error(g, h) < 1e-6 for g, h in zip(found, wanted[1:]))
    assert (parts.product_gap < 1e-5).all()
    for one, other in zip(x, y):
        options_of_one = {"epsilon": 10.0, "iterations": 100, "order": "columns_rows", "return_plan": True}
        plan = kd.sinkhorn(cost_between(one, other, "attention").detach(), **options_of_one).plan
        assert (plan - 1 / plan.numel()).abs().sum() / 2 < 1.5e-3  # total variation
    assert (parts.loss - (1 - 1 / 30)).abs().max() < 2e-3 * parts.loss.max()
    other, _ = kd.sequence_transport(-3 * x, y, epsilon=10, iterations=100, **options)
    assert abs(loss - other) < 1e-2 * loss  # another student altogether
    _, parts = kd.sequence_transport(5 * x, y, epsilon=0.1, iterations=100, **options)
    assert (parts.product_gap > 1.5).all()


# --- all ----------------------------------------------------------------------------------------------


CALLS = {
    "features": lambda x, y: kd.feature_transport(x, y, epsilon=0.2),
    "sequences": lambda x, y: kd.sequence_transport(x[None], y[None], epsilon=0.2),
    "unrolled": lambda x, y: kd.sequence_transport(
        x[None], y[None], cost="l1", epsilon=3.0, iterations=5, gradient="unrolled"
    ),
    "classes": lambda x, y: kd.class_transport(x, y, torch.eye(4).neg().add(1.0), torch.arange(5) % 4),
}


@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_breaks(call):
    x, y = leaves(normal(5, 4), normal(5, 4, seed=1), dtype=torch.float32)
    compiled = torch.compile(CALLS[call], fullgraph=True, backend="aot_eager")
    found, wanted = compiled(x, y), CALLS[call](x, y)
    assert torch.allclose(found, wanted, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (found, wanted)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("call", ["features", "sequences", "unrolled"])
def test_double_backward_raises(call):
    x, y = leaves(normal(5, 4), normal(5, 4, seed=1))
    (gradient,) = torch.autograd.grad(CALLS[call](x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"kd_kernels\.\w+_transport: double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("call", CALLS)
def test_nan_shows(call):
    x, y = normal(5, 4), normal(5, 4, seed=1)
    x[2, 1] = math.nan
    assert CALLS[call](x, y).isnan()


X, Y = normal(4, 3), normal(4, 3, seed=1)
C = torch.tensor([[0.1, 0.6, 0.2], [0.9, 0.1, 0.4], [0.3, 0.7, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize(
    "function, arguments, options, error, message",
    [
        (kd.feature_transport, (X, Y[:, :2]), {"epsilon": 1}, ValueError, "same width, got 3 and 2; project"),
        (kd.feature_transport, (X, Y), {"epsilon": 0}, ValueError, "epsilon must be a finite number > 0, got 0"),
        (kd.feature_transport, (X, Y), {"epsilon": 1, "cost": "l2"}, ValueError, "cost must be one of cosine"),
        (kd.feature_transport, (X, Y), {"epsilon": 1, "gradient": "envelope"}, ValueError, "gradient must be one of"),
        (kd.feature_transport, (X, Y), {"epsilon": 1, "backend": "fast"}, ValueError, "backend must be one of"),
        (kd.feature_transport, (X, Y), {"epsilon": 1, "order": "rows"}, ValueError, "order must be one of"),
        (kd.feature_transport, (X, Y), {"epsilon": 1, "iterations": 0}, ValueError, "iterations must be an int"),
        (kd.feature_transport, (X, Y[:2]), {"epsilon": 1, "mask": X[:, 0] > 0}, ValueError, "mask needs as many"),
        (kd.feature_transport, (X[None], Y), {"epsilon": 1}, ValueError, r"student must be \[N, D\]"),
        (kd.sequence_transport, (X, Y), {"epsilon": 1}, ValueError, r"student must be \[B, T, D\]"),
        (kd.sequence_transport, (X[None], Y.expand(2, 4, 3)), {"epsilon": 1}, ValueError, "same B, got 1 and 2"),
        (kd.sequence_transport, (X[None], Y[None]), {"epsilon": 1, "student_mask": X > 0}, ValueError, "student_mask"),
        (kd.sequence_transport, (X[None], Y[None]), {"epsilon": 1, "teacher_mask": X}, TypeError, "teacher_mask"),
        (kd.sequence_transport, (X[None], Y[None]), {"epsilon": 1, "reduction": "all"}, ValueError, "reduction must"),
        (kd.class_transport, (X, Y[:2], C), {}, ValueError, "same shape"),
        (kd.class_transport, (X, Y, C[:2]), {}, ValueError, r"cost must be \[C, C\] = \(3, 3\)"),
        (kd.class_transport, (X, Y, C * math.inf), {}, ValueError, "pairs are all forbidden"),
        (kd.class_transport, (X, Y, C * math.nan), {}, ValueError, "cost holds NaN"),
        (kd.class_transport, (X, Y, C * 100), {}, ValueError, "too far apart for this epsilon in scalings; domain=\"log\""),
        (kd.class_transport, (X, Y, C), {"denominator_eps": 1.0, "domain": "log"}, ValueError, "denominator_eps needs"),
        (kd.class_transport, (X, Y, C), {"domain": "linear"}, ValueError, "domain must be one of"),
        (kd.class_transport, (X, Y, C), {"backend": "fast"}, ValueError, "backend must be one of"),
        (kd.class_transport, (X, Y, C.clone().requires_grad_()), {}, ValueError, "cost requires grad"),
        (kd.class_transport, (X, Y, C, torch.tensor([0, 1, 2, 3])), {}, ValueError, r"labels must be in \[0, 3\)"),
        (kd.class_transport, (X, Y, C, X[:, 0]), {}, TypeError, "labels must be integers"),
        (kd.class_transport, (X, Y, C, [0, 1, 2, 0]), {}, TypeError, "labels must be a tensor, got list"),
        (kd.class_transport, (X, Y, C, torch.zeros(4).long()), {"ignore_index": "x"}, TypeError, "ignore_index must be an int"),
        (kd.class_transport, (X, Y, C, torch.zeros(3).long()), {}, ValueError, r"labels must be \[N\] = \(4,\)"),
        (kd.class_transport, (X, Y, C), {"temperature": -1}, ValueError, "temperature must be"),
        (kd.class_transport, (X, Y, C), {"target_weight": 1.0}, ValueError, "target_weight needs labels"),
        (kd.class_transport, (X[:, :1], Y[:, :1], C[:1, :1], torch.zeros(4).long()), {}, ValueError, "at least 2"),
    ],
)  # fmt: skip
def test_bad_input(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


@pytest.mark.parametrize("cost", COSTS)
def test_inference_tensors(cost):
    x = torch.randn(2, 6, 4, requires_grad=True)
    with torch.inference_mode():
        y, mask = torch.randn(2, 6, 4), torch.rand(2, 6) < 0.7
    kd.sequence_transport(x, y, cost=cost, epsilon=0.3, student_mask=mask, teacher_mask=mask).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("cost", COSTS)
def test_an_infinite_state_spoils_its_sequence_only(cost):
    x, y = torch.randn(3, 6, 4), torch.randn(3, 5, 4)
    want = kd.sequence_transport(x, y, cost=cost, epsilon=0.3, reduction="none")
    x[1, 2, 3] = torch.inf
    got = kd.sequence_transport(x, y, cost=cost, epsilon=0.3, reduction="none")
    assert got[1].isnan() and torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_cosines_of_states_of_any_size(size):
    x, y = torch.randn(6, 4), torch.randn(5, 4)
    want = kd.feature_transport(x, y, epsilon=0.3)
    assert torch.allclose(kd.feature_transport(size * x, y / size, epsilon=0.3), want, rtol=1e-5)
