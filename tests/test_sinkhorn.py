"""kd.sinkhorn's results against a dense float64 version, and against POT."""

import numpy
import ot
import pytest
import torch
from cases import DTYPES, error
from transport import BACKENDS, BAR, NAMES, ORDERS, Problems, agree, converged, dense  # noqa: F401

import kd_kernels as kd

IDS = {"ids": lambda x: str(x).replace("torch.", "")}
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own cost", "shared cost"])


def compare(found, exact, bar):
    for name in NAMES:
        agree(getattr(found, name), getattr(exact, name), bar, name)
    # Potentials are known up to a constant between them.
    together = [x.f[:, :, None] + x.g[:, None] for x in (found, exact)]
    agree(*(x * (exact.plan > 0) for x in together), bar, "f + g")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("domain", ["auto", "scaling", "log"])
@pytest.mark.parametrize("order", ORDERS)
@SHARED
def test_a_fixed_number_of_iterations(dtype, domain, order, shared, backend):
    problems = Problems(shared=shared)
    problems.cost = problems.cost.to(dtype).double()
    cost, a, b = problems.leaves(dtype)
    found = kd.sinkhorn(
        cost, a, b, epsilon=0.1, iterations=5, domain=domain, order=order, return_plan=True, backend=backend
    )
    state = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.plan.dtype == found.f.dtype == found.value.dtype == found.marginal_error.dtype == state
    assert found.iterations.dtype == torch.int64 and found.iterations.tolist() == [5] * 3
    exact = dense(problems.cost, problems.a, problems.b, [0.1] * 5, order)
    compare(found, exact, BAR[dtype])
    # The marginal of the last half-step is exact; the other's error is what is said.
    rows, columns = exact.plan.sum(2) - problems.a, exact.plan.sum(1) - problems.b
    left, right = (rows, columns) if order == ORDERS[0] else (columns, rows)
    assert right.abs().max() < 1e-12 and left.abs().max() > 1e-4
    agree(found.marginal_error, left.abs().sum(1), BAR[dtype] * 100, "marginal_error")
    product = problems.a[:, :, None] * problems.b[:, None] / problems.mass
    gap = torch.xlogy(exact.plan, exact.plan / product).sum((1, 2)) / problems.mass
    agree(found.product_gap, gap, BAR[dtype] * 10, "product_gap")


@pytest.mark.parametrize("epsilon", [0.5, 0.02, 2e-3])
@SHARED
def test_small_and_large_epsilon(epsilon, shared, backend):
    """At 2e-3, with costs up to 1 or more than 60 epsilon, "auto" iterates on logarithms."""
    problems = Problems(shared=shared)
    exact = dense(problems.cost, problems.a, problems.b, [epsilon] * 50)
    for dtype, bar in ((torch.float64, 1e-9), (torch.float32, 3e-4 if epsilon < 0.01 else 2e-5)):
        found = kd.sinkhorn(
            *problems.leaves(dtype), epsilon=epsilon, iterations=50, return_plan=True, backend=backend
        )
        compare(found, exact, bar)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (2, 3), (33, 17), (70, 130)])
@pytest.mark.parametrize("domain", ["scaling", "log"])
def test_sizes(size, domain, backend):
    problems = Problems(2, *size)
    exact = dense(problems.cost, problems.a, problems.b, [0.1] * 4)
    for dtype in (torch.float32, torch.float64):
        found = kd.sinkhorn(
            *problems.leaves(dtype),
            epsilon=0.1,
            iterations=4,
            domain=domain,
            return_plan=True,
            backend=backend,
        )
        for name in NAMES:
            agree(getattr(found, name), getattr(exact, name), BAR[dtype], name)


@SHARED
def test_epsilon_schedule(shared, backend):
    problems = Problems(shared=shared)
    schedule = [1.0, 0.5, 0.5, 0.2]
    for domain in ("scaling", "log"):
        for order in ORDERS:
            found = kd.sinkhorn(
                *problems.leaves(), epsilon=0.1, iterations=3, epsilon_schedule=schedule, domain=domain,
                order=order, return_plan=True, backend=backend,
            )  # fmt: skip
            exact = dense(problems.cost, problems.a, problems.b, [*schedule, *[0.1] * 3], order)
            compare(found, exact, 1e-10)
            assert found.iterations.tolist() == [7] * 3


@SHARED
@pytest.mark.parametrize("domain", ["scaling", "log"])
def test_a_tolerance_is_not_met_within_a_schedule(shared, domain, backend):
    """Each of the schedule's epsilons is solved long before its end; only the last one's solution counts."""
    problems = Problems(shared=shared)
    for schedule in ([2.0] * 30, [0.1, 2.0, 2.0, 2.0], [0.1] * 40 + [2.0] * 30):
        found = kd.sinkhorn(
            *problems.leaves(), epsilon=0.1, tolerance=1e-8, epsilon_schedule=schedule, domain=domain,
            return_plan=True, backend=backend,
        )  # fmt: skip
        compare(found, converged(problems, 0.1, count=200), 1e-7)


# --- masses and shapes --------------------------------------------------------------------------------


def test_marginals_not_given(backend):
    problems = Problems(count=2, rows=5, columns=5)
    ones = torch.ones(2, 5, dtype=torch.float64)
    for mass, each in (("probability", 0.2), ("unit", 1.0)):
        found = kd.sinkhorn(
            problems.cost, epsilon=0.1, iterations=20, mass=mass, return_plan=True, backend=backend
        )
        compare(found, dense(problems.cost, each * ones, each * ones, [0.1] * 20), 1e-10)
    given = kd.sinkhorn(problems.cost, each * ones, epsilon=0.1, iterations=20, mass="probability",
                        backend=backend, b=ones)  # fmt: skip
    assert torch.equal(given.value, found.value)


def test_published_form_of_unit_marginals(backend):
    """SinKD's loop: rows, then columns, of exp(-C / epsilon), each divided by its sum."""
    cost = 2 * torch.rand(12, 12, dtype=torch.float64)
    plan = (-cost / 0.1).exp()
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    found = kd.sinkhorn(cost, epsilon=0.1, iterations=20, mass="unit", return_plan=True, backend=backend)
    agree(found.transport_cost, (plan * cost).sum(), 1e-12)
    agree(found.plan, plan, 1e-12)


def test_published_form_with_one_class_cost(backend):
    """WKD's: one cost between classes, softmax marginals, the label's class without mass; columns first."""
    cost = torch.rand(11, 11, dtype=torch.float64)
    a, b = (2 * torch.randn(2, 6, 11, dtype=torch.float64)).softmax(2)
    rest = torch.arange(11) != torch.randint(0, 11, (6,))[:, None]
    a, b = ((x * rest) / (x * rest).sum(1, keepdim=True) for x in (a, b))
    found = kd.sinkhorn(cost, a, b, epsilon=0.05, iterations=10, order="columns_rows", backend=backend)
    agree(found.transport_cost, dense(cost, a, b, [0.05] * 10, "columns_rows").transport_cost, 1e-10)


def test_one_problem_has_no_leading_dimension(backend):
    problems = Problems(count=1)
    cost, a, b = (x[0] for x in problems.leaves())
    found = kd.sinkhorn(cost, a, b, epsilon=0.1, iterations=5, return_plan=True, backend=backend)
    batch = kd.sinkhorn(*problems.leaves(), epsilon=0.1, iterations=5, return_plan=True, backend=backend)
    for name in kd.Transport.__dataclass_fields__:
        assert torch.equal(getattr(found, name), getattr(batch, name)[0]), name
    assert found.value.dim() == 0 and found.f.shape == (7,) and found.plan.shape == (7, 9)


def test_the_plan_only_when_asked(backend):
    assert kd.sinkhorn(torch.rand(3, 4), epsilon=0.1, iterations=2, backend=backend).plan is None


@pytest.mark.parametrize("form", ["n", "m", "both", "one for all"])
def test_which_costs_are_shared(form, backend):
    problems = Problems(shared=True)
    a = problems.a if form in ("n", "both") else problems.a[0]
    b = problems.b if form in ("m", "both") else problems.b[0]
    cost = problems.cost.expand(3, -1, -1) if form == "one for all" else problems.cost
    found = kd.sinkhorn(cost, a, b, epsilon=0.1, iterations=5, return_plan=True, backend=backend)
    exact = dense(problems.cost, a.expand(3, 7), b.expand(3, 9), [0.1] * 5)
    compare(found, exact, 1e-10)


@pytest.mark.parametrize("layout", ["transposed", "every second", "narrowed"])
def test_non_contiguous_costs(layout, backend):
    problems = Problems()
    cost = {
        "transposed": lambda c: c.mT.contiguous().mT,
        "every second": lambda c: c.repeat_interleave(2, 2)[:, :, ::2],
        "narrowed": lambda c: torch.nn.functional.pad(c, (2, 3, 1, 1), value=torch.nan)[:, 1:-1, 2:-3],
    }[layout](problems.cost)
    assert not cost.is_contiguous() and torch.equal(cost, problems.cost)
    for order in ORDERS:
        found = kd.sinkhorn(
            cost,
            problems.a,
            problems.b,
            epsilon=0.1,
            iterations=5,
            order=order,
            return_plan=True,
            backend=backend,
        )
        compare(found, dense(problems.cost, problems.a, problems.b, [0.1] * 5, order), 1e-10)


# --- absent entries and forbidden pairs ---------------------------------------------------------------


@pytest.mark.parametrize("garbage", [0.0, -100.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("domain", ["auto", "scaling", "log"])
@pytest.mark.parametrize("given", [False, True], ids=["marginals not given", "given"])
@pytest.mark.parametrize("pair", [False, True], ids=["[B, 2]", "pair"])
def test_ragged(garbage, domain, given, pair, backend):
    """Each problem as if it were alone; what lies beyond is never used."""
    problems = Problems()
    rows, columns = torch.tensor([7, 4, 1]), torch.tensor([5, 9, 6])
    cost, a, b = problems.cost.clone(), problems.a.clone(), problems.b.clone()
    for i, (n, m) in enumerate(zip(rows.tolist(), columns.tolist())):
        cost[i, n:], cost[i, :, m:], a[i, n:], b[i, m:] = garbage, garbage, garbage, garbage
        a[i, :n], b[i, :m] = a[i, :n].softmax(0), b[i, :m].softmax(0)
    lengths = (rows, columns) if pair else torch.stack([rows, columns], 1)
    marginals = (a, b) if given else (None, None)
    for order in ORDERS:
        found = kd.sinkhorn(
            cost, *marginals, epsilon=0.1, iterations=6, lengths=lengths, domain=domain, order=order,
            return_plan=True, backend=backend,
        )  # fmt: skip
        for i, (n, m) in enumerate(zip(rows.tolist(), columns.tolist())):
            own = (a[i, :n], b[i, :m]) if given else (None, None)
            alone = kd.sinkhorn(
                cost[i, :n, :m], *own, epsilon=0.1, iterations=6, domain="log", order=order, return_plan=True,
                backend="reference",
            )  # fmt: skip
            for name in ("transport_cost", "value", "product_gap", "marginal_error"):
                assert torch.allclose(getattr(found, name)[i], getattr(alone, name), atol=1e-12), name
            for name, inner in (("plan", (slice(n), slice(m))), ("f", slice(n)), ("g", slice(m))):
                padded = torch.zeros_like(getattr(found, name)[i])
                padded[inner] = getattr(alone, name)
                assert torch.allclose(getattr(found, name)[i], padded, atol=1e-11), name


@SHARED
@pytest.mark.parametrize("domain", ["scaling", "log"])
def test_zero_marginals_are_absent_entries(shared, domain, backend):
    problems = Problems(shared=shared)
    problems.a[:, 2], problems.b[1, :3], problems.b[2, 8] = 0, 0, 0
    problems.a, problems.b = (3 * x / x.sum(1, keepdim=True) for x in (problems.a, problems.b))
    for order in ORDERS:
        found = kd.sinkhorn(
            problems.cost, problems.a, problems.b, epsilon=0.1, iterations=6, domain=domain, order=order,
            return_plan=True, backend=backend,
        )  # fmt: skip
        compare(found, dense(problems.cost, problems.a, problems.b, [0.1] * 6, order), 1e-10)
        assert (found.plan[:, 2] == 0).all() and (found.f[:, 2] == 0).all()


@SHARED
@pytest.mark.parametrize("domain", ["auto", "scaling", "log"])
def test_forbidden_pairs(shared, domain, backend):
    problems = Problems(shared=shared)
    first = problems.cost if shared else problems.cost[0]
    first[0, 1:], first[3, :4], first[6, 0] = torch.inf, torch.inf, torch.inf
    problems.a[:, 0] *= 0.2  # column 0 can take all of row 0
    problems.a = 3 * problems.a / problems.a.sum(1, keepdim=True)
    exact = dense(problems.cost, problems.a, problems.b, [0.1] * 6)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = kd.sinkhorn(
            *problems.leaves(dtype),
            epsilon=0.1,
            iterations=6,
            domain=domain,
            return_plan=True,
            backend=backend,
        )
        if dtype == torch.bfloat16:
            assert all(getattr(found, name).isfinite().all() for name in NAMES)
        else:
            compare(found, exact, BAR[dtype])
        assert (found.plan[first.isinf().expand_as(found.plan) & (problems.cost.isinf())] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 4, 5), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
def test_nothing_to_transport(sizes, gradient, backend):
    count, n, m = sizes
    for order in ORDERS:
        cost, a, b = (torch.rand(s, requires_grad=True) for s in ((count, n, m), (count, n), (count, m)))
        found = kd.sinkhorn(
            cost,
            a,
            b,
            epsilon=0.1,
            iterations=3,
            gradient=gradient,
            order=order,
            return_plan=True,
            backend=backend,
        )
        assert found.plan.shape == sizes and found.f.shape == (count, n) and found.value.shape == (count,)
        for name in ("transport_cost", "value", "marginal_error", "product_gap"):
            assert (getattr(found, name) == 0).all()
        (found.transport_cost.sum() + found.value.sum()).backward()
        assert cost.grad.shape == cost.shape and (cost.grad == 0).all()
    shared = kd.sinkhorn(
        torch.rand(4, 5), torch.rand(0, 4), torch.rand(0, 5), epsilon=0.1, iterations=3, backend=backend
    )
    assert shared.value.shape == (0,)


def test_a_problem_without_mass(backend):
    """Its plan is 0, and beside it another problem is as it would be."""
    problems = Problems(count=2)
    problems.a[0], problems.b[0] = 0, 0
    for domain in ("scaling", "log"):
        cost, a, b = problems.leaves()
        found = kd.sinkhorn(
            cost, a, b, epsilon=0.1, iterations=5, domain=domain, return_plan=True, backend=backend
        )
        for name in (*NAMES, "f", "g", "marginal_error", "product_gap"):
            assert (getattr(found, name)[0] == 0).all(), name
        agree(found.plan, dense(cost, a, b, [0.1] * 5).plan, 1e-10)
        (found.transport_cost.sum() + found.value.sum() + found.plan.square().sum()).backward()
        assert all(x.grad[0].abs().max() == 0 and x.grad[1].isfinite().all() for x in (cost, a, b))


# --- tolerance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], **IDS)
@pytest.mark.parametrize("domain", ["scaling", "log"])
@SHARED
def test_tolerance(dtype, domain, shared, backend):
    """Each problem ends by itself, with the error that is said, and not later than it must."""
    problems = Problems(shared=shared)
    if not shared:
        problems.cost[1] *= 3  # takes longer
    cost, a, b = problems.leaves(dtype)
    options = {"epsilon": 0.1, "domain": domain, "return_plan": True, "backend": backend}
    for tolerance in (1e-2, 1e-4):
        found = kd.sinkhorn(cost, a, b, tolerance=tolerance, **options)
        assert len(set(found.iterations.tolist())) > 1
        error_now = (found.plan.double().sum(2) - problems.a).abs().sum(1)
        assert (error_now <= tolerance * problems.mass * 1.01).all()
        agree(found.marginal_error, error_now, 1e-10 if dtype == torch.float64 else 2e-2, "marginal_error")
        for i, taken in enumerate(found.iterations.tolist()):
            fixed = kd.sinkhorn(cost, a, b, iterations=taken, **options)
            agree(found.plan[i], fixed.plan[i], BAR[dtype])
            if taken > 1:
                earlier = kd.sinkhorn(cost, a, b, iterations=taken - 1, **options)
                assert earlier.marginal_error[i] > tolerance * problems.mass * 0.99


def test_iterations_bound_a_tolerance(backend):
    problems = Problems()
    found = kd.sinkhorn(
        *problems.leaves(), epsilon=0.01, iterations=7, tolerance=1e-12, return_plan=True, backend=backend
    )
    assert found.iterations.tolist() == [7] * 3 and (found.marginal_error > 1e-12).all()
    agree(found.plan, dense(problems.cost, problems.a, problems.b, [0.01] * 7).plan, 1e-10)


def test_what_neither_means(backend):
    """Neither iterations nor tolerance: to the dtype's own tolerance."""
    problems = Problems()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        found = kd.sinkhorn(*problems.leaves(dtype), epsilon=0.1, backend=backend)
        assert (found.marginal_error <= tolerance * problems.mass).all() and (found.iterations < 100).all()


# --- what a plan is -----------------------------------------------------------------------------------


def test_pot(backend):
    """POT's solution of the same problem: plan, cost, value with KL to the product, potentials."""
    problems = Problems(mass=1.0)
    for shared in (False, True):
        cost = problems.cost[0] if shared else problems.cost
        for epsilon, domain in ((0.3, "scaling"), (0.1, "log")):
            found = kd.sinkhorn(
                cost, problems.a, problems.b, epsilon=epsilon, domain=domain, tolerance=1e-12,
                iterations=5000, return_plan=True, backend=backend,
            )  # fmt: skip
            for i in range(3):
                c, a, b = (
                    x.numpy() for x in (problems.cost[0 if shared else i], problems.a[i], problems.b[i])
                )
                plan = ot.sinkhorn(a, b, c, epsilon, method="sinkhorn_log", stopThr=1e-12, numItermax=10000)
                assert numpy.abs(found.plan[i].numpy() - plan).max() < 1e-9
                theirs = ot.solve(c, a, b, reg=epsilon, reg_type="KL", tol=1e-12, max_iter=10000)
                assert abs(found.transport_cost[i].item() - theirs.value_linear) < 1e-9
                assert abs(found.value[i].item() - theirs.value) < 1e-8


def test_small_epsilon_nears_the_exact_transport(backend):
    problems = Problems(mass=1.0)
    exact = [ot.emd2(*(x[i].numpy() for x in (problems.a, problems.b, problems.cost))) for i in range(3)]
    found = kd.sinkhorn(
        *problems.leaves(), epsilon=2e-3, tolerance=1e-3, iterations=3000, backend=backend,
        epsilon_schedule=[0.5**i for i in range(9)],
    )  # fmt: skip
    assert torch.allclose(found.transport_cost, torch.tensor(exact, dtype=torch.float64), atol=2e-3)


def test_product_gap_says_when_epsilon_makes_the_cost_constant(backend):
    problems = Problems()
    mean = torch.einsum("bi,bj,bij->b", problems.a, problems.b, problems.cost) / problems.mass
    gaps = []
    for epsilon in (100.0, 1.0, 0.1):
        found = kd.sinkhorn(*problems.leaves(), epsilon=epsilon, tolerance=1e-12, backend=backend)
        gaps.append(found.product_gap)
    assert (gaps[0] < 1e-5).all() and (gaps[1] > gaps[0]).all() and (gaps[2] > 0.1).all()
    wide = kd.sinkhorn(*problems.leaves(), epsilon=100.0, tolerance=1e-12, backend=backend)
    agree(wide.transport_cost, mean, 1e-2)


def test_identical_clouds(backend):
    """Costs of 0 on the diagonal, down to a cloud of one repeated point, where all costs are 0."""
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    x[1] = x[1, :1]
    cost = (torch.cdist(x, x) ** 2).requires_grad_()
    for gradient, iterations in (("implicit", None), ("unrolled", 30)):
        for domain in ("auto", "log") if backend != "triton" else ("auto",):  # which is "log" to its kernel
            found = kd.sinkhorn(
                cost, epsilon=0.5, domain=domain, gradient=gradient, iterations=iterations, return_plan=True,
                backend=backend,
            )  # fmt: skip
            assert found.plan.isfinite().all() and found.transport_cost[1] == 0
            assert torch.allclose(found.plan[1], torch.full((6, 6), 1 / 36, dtype=torch.float64))
            assert found.plan[0].diagonal().sum() > 0.5
            for result in (found.transport_cost, found.value):
                (slope,) = torch.autograd.grad(result.sum(), cost, retain_graph=True)
                assert slope.isfinite().all() and slope.abs().sum() > 0
                agree(slope[1], torch.full((6, 6), 1 / 36, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_divergence(order, backend):
    """Of a cloud from itself 0, from another positive, and three values put together."""
    x, y = (torch.randn(2, 8, 3, dtype=torch.float64) for _ in range(2))
    y = y + 0.5

    def divergence(x, y, **options):
        costs = [torch.cdist(*pair) ** 2 for pair in ((x, y), (x, x), (y, y))]
        return kd.sinkhorn_divergence(
            *costs, epsilon=6.0, tolerance=1e-11, order=order, backend=backend, **options
        )

    apart = divergence(x, y)
    values = [converged_value(torch.cdist(*pair) ** 2, 6.0) for pair in ((x, y), (x, x), (y, y))]
    agree(apart, values[0] - values[1] / 2 - values[2] / 2, 1e-8)
    assert (apart > 0.1).all() and divergence(x, x).abs().max() < 1e-10
    rows, columns = torch.tensor([8, 5]), torch.tensor([6, 8])
    ragged = divergence(x, y, lengths=(rows, columns))
    agree(ragged[1:], divergence(x[1:, :5], y[1:]), 1e-9)


def converged_value(cost, epsilon):
    uniform = [torch.full((cost.shape[0], size), 1 / size, dtype=torch.float64) for size in cost.shape[1:]]
    return dense(cost, *uniform, [epsilon] * 300).value


# --- no numbers that depend on the machine ------------------------------------------------------------


@pytest.mark.parametrize("domain", ["scaling", "log"])
@pytest.mark.parametrize("shared", [False, True])
def test_threads_change_no_bit(shared, domain):
    """But for the gradient of a cost shared in scalings, torch's matrix product, which promises nothing."""
    problems = Problems(7, 70, 90, shared=shared)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cost, a, b = problems.leaves(torch.float32)
            for gradient in ("implicit", "unrolled"):
                found = kd.sinkhorn(
                    cost,
                    a,
                    b,
                    epsilon=0.1,
                    iterations=10,
                    domain=domain,
                    gradient=gradient,
                    backend=BACKENDS[0],
                )
                (found.transport_cost.square().sum() + found.value.sum()).backward()
            of_cost = () if shared and domain == "scaling" else (cost.grad,)
            results.append((found.transport_cost, found.f, found.g, a.grad, b.grad, *of_cost))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.parametrize("seed", range(20))
def test_random_problems(seed, backend):
    """Sizes, masses, absent entries, forbidden pairs, domains, orders and epsilons, all drawn."""
    g = torch.Generator().manual_seed(100 + seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    problems = Problems(draw(1, 4), draw(2, 40), draw(2, 40), shared=bool(draw(0, 2)), seed=seed)
    for mass in (problems.a, problems.b):
        mass[torch.rand(mass.shape, generator=g) < 0.2] = 0
        mass[:, 0] = 1.0
        mass *= problems.mass / mass.sum(1, keepdim=True)
    cost = problems.cost
    inner = cost[..., 1:, 1:]  # the first row and column stay open, or nothing need be feasible
    inner[torch.rand(inner.shape, generator=g) < 0.1] = torch.inf
    epsilon, order = 10.0 ** -draw(0, 3), ORDERS[draw(0, 2)]
    exact = dense(cost, problems.a, problems.b, [epsilon] * 8, order)
    for dtype in (torch.float64, torch.float32):
        bar = 1e-9 if dtype == torch.float64 else 1e-4
        found = kd.sinkhorn(
            *problems.leaves(dtype),
            epsilon=epsilon,
            iterations=8,
            order=order,
            return_plan=True,
            backend=backend,
        )
        for name in NAMES:
            assert error(getattr(found, name), getattr(exact, name)) < bar, (name, dtype, epsilon)
