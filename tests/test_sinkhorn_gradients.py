"""kd.sinkhorn's three kinds of gradient, against autograd through a dense float64 version."""

import pytest
import torch
from cases import DTYPES, error
from transport import BACKENDS, GRADIENT_BAR, NAMES, ORDERS, Problems, agree, dense, gradients  # noqa: F401

import kd_kernels as kd
from kd_kernels import triton_transport

IDS = {"ids": lambda x: str(x).replace("torch.", "")}
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own cost", "shared cost"])
LEAVES = ("cost", "a", "b")
ENOUGH = 150  # iterations for 1e-12 at epsilon 0.1


def slopes(result, *leaves):
    return torch.autograd.grad(result.sum(), leaves, retain_graph=True)


def check(found, ours, exact, theirs, bar, names=NAMES):
    for name in names:
        pairs = zip(LEAVES, gradients(found, name, ours), gradients(exact, name, theirs))
        for leaf, mine, wanted in pairs:
            assert mine.dtype == ours[LEAVES.index(leaf)].dtype
            agree(mine, wanted, bar, f"{name} to {leaf}")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("domain", ["scaling", "log"])
@pytest.mark.parametrize("order", ORDERS)
@SHARED
def test_implicit(dtype, domain, order, shared, backend):
    """Of the solution: autograd through iterations until nothing changes."""
    problems = Problems(shared=shared)
    problems.cost = problems.cost.to(dtype).double()
    ours, theirs = problems.leaves(dtype), problems.leaves()
    found = kd.sinkhorn(
        *ours, epsilon=0.1, iterations=ENOUGH, domain=domain, order=order, return_plan=True, backend=backend
    )
    check(found, ours, dense(*theirs, [0.1] * ENOUGH, order), theirs, GRADIENT_BAR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("domain", ["scaling", "log"])
@pytest.mark.parametrize("order", ORDERS)
@SHARED
def test_unrolled(dtype, domain, order, shared, backend):
    """Of the number returned, far from the solution: autograd through the same iterations."""
    problems = Problems(shared=shared)
    problems.cost = problems.cost.to(dtype).double()
    ours, theirs = problems.leaves(dtype), problems.leaves()
    for iterations in (1, 4):
        found = kd.sinkhorn(
            *ours, epsilon=0.1, iterations=iterations, domain=domain, order=order, gradient="unrolled",
            return_plan=True, backend=backend,
        )  # fmt: skip
        exact = dense(*theirs, [0.1] * iterations, order)
        check(found, ours, exact, theirs, GRADIENT_BAR[dtype])
        # To marginals they are exact, constants included: the iterations see each by itself.
        for name in NAMES:
            pairs = ((found, ours), (exact, theirs))
            mine, wanted = (slopes(getattr(x, name).square(), *leaves[1:]) for x, leaves in pairs)
            agree(torch.cat(mine, 1), torch.cat(wanted, 1), GRADIENT_BAR[ours[1].dtype], name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], **IDS)
@SHARED
def test_envelope(dtype, shared, backend):
    """Of the value: the plan, and the potentials. Cost and plan carry none."""
    problems = Problems(shared=shared)
    ours, theirs = problems.leaves(dtype), problems.leaves()
    found = kd.sinkhorn(
        *ours, epsilon=0.1, iterations=ENOUGH, gradient="envelope", return_plan=True, backend=backend
    )
    carried = [getattr(found, name).requires_grad for name in ("value", "transport_cost", "plan")]
    assert carried == [True, False, False]
    check(found, ours, dense(*theirs, [0.1] * ENOUGH), theirs, GRADIENT_BAR[dtype], ["value"])
    d_cost, d_a, d_b = torch.autograd.grad(found.value.sum(), ours)
    agree(d_cost, found.plan.sum(0) if shared else found.plan, 1e-5, "the plan")
    agree(d_a, found.f, 1e-4, "f")
    agree(d_b, found.g, 1e-4, "g")


def test_the_rest_carries_no_gradient(backend):
    """f, g, the error and the gap say that they have none; they are not silently wrong."""
    for gradient in ("implicit", "envelope", "unrolled"):
        leaves = Problems().leaves()
        found = kd.sinkhorn(*leaves, epsilon=0.1, iterations=3, gradient=gradient, backend=backend)
        for name in ("f", "g", "marginal_error", "product_gap", "iterations"):
            assert not getattr(found, name).requires_grad, name


def test_the_plan_is_not_the_gradient_of_the_transport_cost(backend):
    """P as the gradient of <P, C> to C, as an envelope has it, is a quarter off; it is the value's."""
    problems = Problems(4, 9, 7)
    cost, a, b = problems.leaves()
    found = kd.sinkhorn(cost, a, b, epsilon=0.1, iterations=400, return_plan=True, backend=backend)
    right, of_value = (slopes(x, cost)[0] for x in (found.transport_cost, found.value))
    exact = dense(cost, a, b, [0.1] * 400)
    (wanted,) = torch.autograd.grad(exact.transport_cost.sum(), cost)
    agree(right, wanted, 1e-8)
    agree(of_value, found.plan, 1e-8)
    assert 0.2 < error(found.plan, wanted) < 0.35


def test_implicit_is_nearer_to_the_solution_than_unrolled(backend):
    """After few iterations, of the solution's gradient: what docs/sinkhorn.md says of fixed iterations."""
    problems = Problems(4, 9, 7)
    leaves = problems.leaves()
    (wanted,) = torch.autograd.grad(dense(*leaves, [0.1] * 400).transport_cost.sum(), leaves[0])
    off = {}
    for gradient in ("implicit", "unrolled"):
        found = kd.sinkhorn(*leaves, epsilon=0.1, iterations=10, gradient=gradient, backend=backend)
        off[gradient] = error(torch.autograd.grad(found.transport_cost.sum(), leaves[0])[0], wanted)
    assert 0 < off["implicit"] < 0.6 * off["unrolled"]


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("epsilon", [0.5, 0.02, 4e-3])
@SHARED
def test_small_and_large_epsilon(gradient, epsilon, shared, backend):
    """Shared and at 4e-3 the problems leave scalings, and go to the kernel one by one."""
    problems = Problems(shared=shared)
    iterations = {0.5: 60, 0.02: 3000, 4e-3: 6000}[epsilon] if gradient == "implicit" else 6
    if backend == "triton":  # interpreted; the linear system is that of any plan with exact columns
        iterations = min(iterations, 150)
    ours, theirs = problems.leaves(), problems.leaves()
    found = kd.sinkhorn(
        *ours, epsilon=epsilon, iterations=iterations, gradient=gradient, return_plan=True, backend=backend
    )
    if gradient == "unrolled":
        check(found, ours, dense(*theirs, [epsilon] * iterations), theirs, 1e-8)
        return
    # Autograd through thousands of iterations takes long: through the linear system written out instead.
    cost = problems.cost.expand(3, 7, 9)
    d_cost, *_ = gradients(found, "transport_cost", ours)
    weights = torch.randn(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1.5
    wanted = [w * solved(c, p.detach(), epsilon) for w, c, p in zip(weights, cost, found.plan)]
    agree(d_cost, sum(wanted) if shared else torch.stack(wanted), 1e-6, "cost")


def solved(cost, plan, epsilon):
    """The gradient of <P, C> to C by the pseudo-inverse of the equations of docs/sinkhorn.md."""
    rows, columns = plan.sum(1), plan.sum(0)
    system = torch.cat([torch.cat([rows.diag(), plan], 1), torch.cat([plan.T, columns.diag()], 1)])
    right = torch.cat([(plan * cost).sum(1), (plan * cost).sum(0)])
    x, y = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:, 0].split(plan.shape)
    return plan - plan * (cost - x[:, None] - y) / epsilon


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("domain", ["scaling", "log"])
@SHARED
def test_absent_entries_and_forbidden_pairs(gradient, domain, shared, backend):
    """No gradient reaches them, and none of theirs anything else."""
    problems = Problems(shared=shared)
    problems.a[:, 2], problems.b[1, :3] = 0, 0
    problems.a, problems.b = (3 * x / x.sum(1, keepdim=True) for x in (problems.a, problems.b))
    problems.cost[..., 5, 8] = torch.inf
    problems.cost[..., 0, 6] = torch.inf
    iterations = 600 if gradient == "implicit" else 4
    ours, theirs = problems.leaves(), problems.leaves()
    found = kd.sinkhorn(
        *ours, epsilon=0.1, iterations=iterations, gradient=gradient, domain=domain, return_plan=True,
        backend=backend,
    )  # fmt: skip
    check(found, ours, dense(*theirs, [0.1] * iterations), theirs, 1e-7)
    (d_cost,) = torch.autograd.grad(found.transport_cost.sum(), ours[0])
    assert (d_cost[..., 2, :] == 0).all() and (d_cost[..., 5, 8] == 0).all()


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@SHARED
def test_scalings_that_only_a_forbidden_pair_keeps_apart(gradient, shared, backend):
    """A chain of forbidden pairs between the largest scaling of a row and that of a column: their product is
    beyond float32, and so no factor of a gradient that is 0 there."""
    n = 6
    cost = torch.full((n, n), torch.inf).fill_diagonal_(0.0)
    cost.diagonal(1).fill_(20.0)
    a = torch.full((2, n), 1 / n)
    b = a.clone()
    a[:, 0] += 0.05
    b[:, -1] += 0.05
    a, b = (x / x.sum(1, keepdim=True) for x in (a, b))
    leaf = (cost if shared else cost.repeat(2, 1, 1)).requires_grad_()
    found = kd.sinkhorn(leaf, a, b, epsilon=1.0, iterations=400, gradient=gradient, backend=backend)
    (d_cost,) = torch.autograd.grad(found.transport_cost.sum(), leaf)
    assert d_cost.isfinite().all() and (d_cost[..., cost.isinf()] == 0).all()


def test_large_masses_far_apart(backend):
    mass = 1e12
    cost = torch.tensor([[0.0, 59.0], [3.0, 1.0]], requires_grad=True)
    a, b = mass * torch.tensor([1.0, 0.01]), mass * torch.tensor([0.01, 1.0])
    found = kd.sinkhorn(cost, a, b, epsilon=1.0, iterations=10, gradient="unrolled", backend=backend)
    (d_cost,) = torch.autograd.grad(found.transport_cost, cost)
    assert d_cost[0, 1].item() == pytest.approx(9.9e11, rel=1e-3)


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("order", ORDERS)
def test_ragged(gradient, order, backend):
    """NaN beyond the lengths, in cost and marginals; their gradient is 0."""
    problems = Problems(mass=1.0)
    rows, columns = torch.tensor([7, 4, 3]), torch.tensor([5, 9, 6])
    ours = problems.leaves()
    with torch.no_grad():
        for i, (n, m) in enumerate(zip(rows.tolist(), columns.tolist())):
            ours[0][i, n:], ours[0][i, :, m:], ours[1][i, n:], ours[2][i, m:] = (torch.nan,) * 4
            for mass, size in ((ours[1], n), (ours[2], m)):
                mass[i, :size] /= mass[i, :size].sum()
    iterations = 200 if gradient == "implicit" else 4
    options = {"epsilon": 0.1, "iterations": iterations, "gradient": gradient, "order": order}
    found = kd.sinkhorn(*ours, lengths=(rows, columns), return_plan=True, backend=backend, **options)
    for name in ("transport_cost", "value"):
        whole = slopes(getattr(found, name), *ours)
        for i, (n, m) in enumerate(zip(rows.tolist(), columns.tolist())):
            inner = (ours[0][i, :n, :m], ours[1][i, :n], ours[2][i, :m])
            alone = kd.sinkhorn(*inner, backend="reference", **options)
            wanted = torch.autograd.grad(getattr(alone, name), inner)
            for mine, theirs, part in zip(whole, wanted, ((slice(n), slice(m)), slice(n), slice(m))):
                padded = torch.zeros_like(mine[i])
                padded[part] = theirs
                difference = mine[i] - padded
                if mine.dim() == 2 and gradient == "implicit":
                    present = torch.zeros_like(padded, dtype=torch.bool)
                    present[part] = True
                    difference = difference - present * difference[part].mean()
                assert difference.abs().max() < 1e-8, (name, i)


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
def test_without_marginals(gradient, backend):
    cost = torch.rand(2, 6, 6, dtype=torch.float64, requires_grad=True)
    iterations = 400 if gradient == "implicit" else 5
    found = kd.sinkhorn(
        cost, epsilon=0.1, iterations=iterations, mass="unit", gradient=gradient, backend=backend
    )
    ones = torch.ones(2, 6, dtype=torch.float64)
    exact = dense(cost, ones, ones, [0.1] * iterations)
    for name in ("transport_cost", "value"):
        agree(*(slopes(getattr(x, name), cost)[0] for x in (found, exact)), 1e-8, name)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_any_subset_of_inputs(wanted, backend):
    problems = Problems()
    alone = [x.detach().requires_grad_(on) for x, on in zip(problems.leaves(), wanted)]
    every = problems.leaves()
    for leaves in (alone, every):
        kd.sinkhorn(*leaves, epsilon=0.1, iterations=30, backend=backend).transport_cost.sum().backward()
    for one, x, on in zip(alone, every, wanted):
        assert torch.equal(one.grad, x.grad) if on else one.grad is None


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@SHARED
def test_float16_costs(gradient, shared, backend):
    """Up to the largest a float16 holds, with epsilons to match: finite gradients."""
    for scale in (1e-4, 1.0, 6e4):
        problems = Problems(shared=shared)
        cost, a, b = problems.leaves()
        half = (cost.detach() * scale).half().requires_grad_()
        found = kd.sinkhorn(
            half,
            a.detach(),
            b.detach(),
            epsilon=0.1 * scale,
            iterations=20,
            gradient=gradient,
            backend=backend,
        )
        (d_cost,) = torch.autograd.grad(found.transport_cost.sum(), half)
        assert d_cost.dtype == torch.float16 and d_cost.isfinite().all() and d_cost.abs().max() > 0.01


def test_the_divergence(backend):
    """To points of both clouds: against autograd through three dense solutions."""
    x = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    y = (torch.randn(1, 5, 3, dtype=torch.float64) + 0.5).requires_grad_()

    def costs():
        return [(p[:, :, None] - q[:, None]).square().sum(3) for p, q in ((x, y), (x, x), (y, y))]

    for gradient in ("implicit", "envelope"):
        found = kd.sinkhorn_divergence(
            *costs(), epsilon=2.0, iterations=200, tolerance=1e-12, gradient=gradient, backend=backend
        )
        uniform = [torch.full((1, size), 1 / size, dtype=torch.float64) for size in (6, 5)]
        pairs = [(uniform[0], uniform[1]), (uniform[0],) * 2, (uniform[1],) * 2]
        values = [dense(c, *pair, [2.0] * 200).value for c, pair in zip(costs(), pairs)]
        exact = values[0] - values[1] / 2 - values[2] / 2
        for mine, wanted in zip(slopes(found, x, y), slopes(exact, x, y)):
            agree(mine, wanted, 1e-8)
    # Against itself it is at its least: no slope.
    same = kd.sinkhorn_divergence(*[costs()[1]] * 3, epsilon=2.0, iterations=200, backend=backend)
    assert torch.autograd.grad(same.sum(), x)[0].abs().max() < 1e-8


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@SHARED
def test_gradcheck(gradient, shared, backend):
    """By finite differences, marginals as softmax of free numbers: the whole chain."""
    if backend == "triton":
        pytest.skip("takes the interpreter minutes; its gradients are compared with autograd's elsewhere")
    problems = Problems(2, 3, 4, shared=shared)
    cost = problems.cost.clone().requires_grad_()
    free = [torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in (3, 4)]
    iterations = 200 if gradient == "implicit" else 3

    def results(cost, x, y):
        found = kd.sinkhorn(
            cost, x.softmax(1), y.softmax(1), epsilon=0.2, iterations=iterations, gradient=gradient,
            return_plan=True, backend=backend,
        )  # fmt: skip
        return found.transport_cost, found.value, found.plan

    assert torch.autograd.gradcheck(results, (cost, *free), atol=1e-6)


@pytest.mark.parametrize("gradient", ["envelope", "unrolled", "implicit"])
def test_triton_leaves_the_iterations_of_a_few_large_problems_to_torch(gradient, monkeypatch):
    """Bit for bit the plain version's, and so is the gradient through them."""
    asked = []
    monkeypatch.setattr(triton_transport, "_SINKHORN_LARGE", 62)
    monkeypatch.setattr(
        triton_transport, "kernels", lambda kernels=triton_transport.kernels: asked.append(1) or kernels()
    )
    problems = Problems()
    results = []
    for backend in ("triton", "reference"):
        leaves = problems.leaves()
        found = kd.sinkhorn(*leaves, epsilon=0.1, iterations=ENOUGH, gradient=gradient, backend=backend)
        of = found.value if gradient == "envelope" else found.transport_cost
        results.append((of, found.f, *slopes(of, *leaves)))
    assert bool(asked) == (gradient != "unrolled")
    for i, (ours, theirs) in enumerate(zip(*results)):
        if gradient != "unrolled" and i >= 2:
            agree(ours, theirs, GRADIENT_BAR[torch.float64])
        else:
            assert torch.equal(ours, theirs)
    asked.clear()
    kd.sinkhorn(*problems.leaves(), epsilon=0.1, iterations=9, tolerance=0.1, backend="triton")
    assert asked, "torch's operations would not stop at a tolerance"
    asked.clear()
    monkeypatch.setattr(triton_transport, "_SINKHORN_LARGE", 63)  # pairs of a problem
    kd.sinkhorn(*problems.leaves(), epsilon=0.1, iterations=2, backend="triton")
    assert asked
