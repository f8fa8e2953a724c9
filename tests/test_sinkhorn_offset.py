"""What all costs of a problem have in common moves no plan: kd.sinkhorn has to give what it gives without it,
and its part of the results."""

import pytest
import torch
from cases import error
from transport import BACKENDS, NAMES, ORDERS, Problems, dense, gradients  # noqa: F401

import kd_kernels as kd

SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own cost", "shared cost"])
LEAVES = ("cost", "a", "b")
# float32 holds costs in 1/512, and these plus 1000 as they are.
STEP, OFFSET, EPSILON, ITERATIONS = 2.0**-9, 1000.0, 0.1, 30


def problems(shared):
    made = Problems(shared=shared)
    made.cost = (made.cost / STEP).round() * STEP
    return made


def solve(leaves, order, backend, **options):
    options = {"gradient": "unrolled", "iterations": ITERATIONS, "return_plan": True, **options}
    return kd.sinkhorn(*leaves, epsilon=EPSILON, order=order, backend=backend, **options)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
@pytest.mark.parametrize("domain", ["auto", "log"])
@pytest.mark.parametrize("order", ORDERS)
@SHARED
def test_results_and_gradients_have_it_as_float64_says(sign, gradient, domain, order, shared, backend):
    made = problems(shared)
    made.cost = sign * (made.cost + OFFSET)
    iterations = 150 if gradient == "implicit" else ITERATIONS
    ours, theirs = made.leaves(torch.float32), made.leaves()
    found = solve(ours, order, backend, gradient=gradient, domain=domain, iterations=iterations)
    exact = dense(*theirs, [EPSILON] * iterations, order)
    for name in (*NAMES, "f", "g"):
        assert error(getattr(found, name), getattr(exact, name)) < 3e-6, name
    for name in NAMES:
        # To marginals the implicit one is right up to a constant that one gains and the other loses.
        pairs = list(zip(LEAVES, gradients(found, name, ours), gradients(exact, name, theirs)))
        for leaf, mine, wanted in pairs[:1] if gradient == "implicit" else pairs:
            # A marginal's holds the offset itself, to which float32 rounds.
            assert error(mine, wanted) < (1e-4 if leaf == "cost" else 1e-3), f"{name} to {leaf}"


@SHARED
def test_what_is_absent_or_forbidden_has_no_say(shared, backend):
    """Garbage beyond the masses, a pair forbidden, one problem without an offset, one without anything."""
    made = problems(shared)
    made.a[:, -1], made.b[:, -1] = 0.0, 0.0
    made.a, made.b = (made.mass * x / x.sum(1, keepdim=True) for x in (made.a, made.b))
    made.cost[..., 2, 3] = torch.inf
    if not shared:
        made.a[2], made.b[2] = 0.0, 0.0
    apart = torch.tensor([OFFSET, 0.0, OFFSET])[:, None, None] if not shared else torch.tensor(OFFSET)
    lower, higher = made.leaves(torch.float32), made.leaves(torch.float32)
    with torch.no_grad():
        higher[0].add_(apart)
        for garbage, cost in ((0.0, lower[0]), (-1e30, higher[0])):
            cost[..., -1, :], cost[..., :, -1] = garbage, garbage
    below, above = (solve(x, "rows_columns", backend) for x in (lower, higher))
    more = apart.reshape(-1) * made.b.sum(1)
    assert error(above.plan, below.plan) < 1e-6
    assert error(above.transport_cost, (below.transport_cost + more).float()) < 1e-6
    mine, wanted = gradients(above, "transport_cost", higher), gradients(below, "transport_cost", lower)
    assert error(mine[0], wanted[0]) < 1e-5
    for name in NAMES:
        of_a, of_b = gradients(above, name, higher)[1:]
        assert not of_a[higher[1] == 0].any() and not of_b[higher[2] == 0].any()
        assert of_a[:2].any() and of_b[:2].any()


def test_the_tolerance_is_met(backend):
    cost = problems(False).cost.float()
    near, far = (kd.sinkhorn(x, epsilon=EPSILON, backend=backend) for x in (cost, cost + OFFSET))
    assert torch.equal(near.iterations, far.iterations) and far.marginal_error.max() <= 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_a_compiled_call_takes_it_out_too(shared, backend):
    made = problems(shared)
    call = torch.compile(
        lambda *leaves: solve(leaves, "rows_columns", backend).transport_cost.sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    lower, higher = made.leaves(torch.float32), made.leaves(torch.float32)
    higher[0].data.add_(OFFSET)
    for leaves in (lower, higher):
        call(*leaves).backward()
    assert error(higher[0].grad, lower[0].grad) < 1e-5
