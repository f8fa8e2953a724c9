"""What kd.sinkhorn refuses, by name; and problems at the edge of what has a solution."""

import pytest
import torch
from cases import error
from transport import BACKENDS, NAMES, Problems, agree, dense  # noqa: F401

import kd_kernels as kd

SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own cost", "shared cost"])
COST, A, B = torch.rand(3, 4, 5), torch.full((3, 4), 0.25), torch.full((3, 5), 0.2)
FULL = torch.tensor([4, 5])
BAD = {
    "a list": (TypeError, "cost must be a floating tensor, got list", {"cost": [[1.0]]}),
    "integers": (TypeError, "cost must be a floating tensor, got torch.int64", {"cost": COST.long()}),
    "a cost of one dimension": (ValueError, r"cost must be \[n, m\] or \[B, n, m\], got \(4,\)", {"cost": torch.rand(4)}),
    "a's size": (ValueError, r"a must be \[4\] or \[B, 4\], got \(3, 5\)", {"a": B}),
    "b's size": (ValueError, r"b must be \[5\] or \[B, 5\], got \(4,\)", {"b": A[0]}),
    "a's dtype": (TypeError, "a must be a floating tensor, got torch.int64", {"a": A.long()}),
    "an array": (TypeError, "cost must be a floating tensor, got ndarray", {"cost": COST.numpy()}),
    "a list for b": (TypeError, "b must be a floating tensor, got list", {"b": [0.5, 0.5]}),
    "batch": (ValueError, r"agree on the number of problems, got \[2, 3\]", {"a": A[:2]}),
    "negative mass": (ValueError, "a must be finite and >= 0, got -0.25", {"a": A - torch.eye(3, 4) * 0.5}),
    "infinite mass": (ValueError, "b must be finite and >= 0, got inf", {"b": B / 0}),
    "NaN mass": (ValueError, "a must be finite and >= 0, got nan", {"a": A * torch.nan}),
    "unequal masses": (ValueError, "a and b must have the same mass; .* 1 and 2", {"b": 2 * B}),
    "no rows": (ValueError, "a and b must have the same mass", {"cost": COST[:, :0], "a": None}),
    "unit with a": (ValueError, 'mass="unit" makes every entry 1; with a= given', {"mass": "unit"}),
    "mass": (ValueError, "mass must be one of probability, unit, got 'one'", {"mass": "one"}),
    "domain": (ValueError, "domain must be one of auto, scaling, log, got 'exp'", {"domain": "exp"}),
    "order": (ValueError, "order must be one of rows_columns, columns_rows", {"order": "rows"}),
    "gradient": (ValueError, "gradient must be one of implicit, envelope, unrolled", {"gradient": "last"}),
    "epsilon 0": (ValueError, "epsilon must be a finite number > 0, got 0", {"epsilon": 0}),
    "epsilon inf": (ValueError, "epsilon must be a finite number > 0, got inf", {"epsilon": float("inf")}),
    "epsilon": (TypeError, "epsilon must be a number, got str", {"epsilon": "0.1"}),
    "iterations 0": (ValueError, "iterations must be an int > 0, got 0", {"iterations": 0}),
    "iterations": (ValueError, "iterations must be an int > 0, got 2.5", {"iterations": 2.5}),
    "iterations bool": (ValueError, "iterations must be an int > 0, got True", {"iterations": True}),
    "epsilon bool": (TypeError, "epsilon must be a number, got bool", {"epsilon": True}),
    "tolerance": (ValueError, "tolerance must be a finite number > 0, got -1", {"tolerance": -1.0}),
    "tolerance inf": (ValueError, "tolerance must be a finite number > 0, got inf", {"tolerance": float("inf")}),
    "tolerance's type": (TypeError, "tolerance must be a number, got str", {"tolerance": "1e-3"}),
    "a schedule's tensor": (
        ValueError,
        r"epsilon_schedule must be finite and > 0, got \[1.0, 0.0\]",
        {"epsilon_schedule": torch.tensor([1.0, 0.0])},
    ),
    "schedule": (ValueError, r"epsilon_schedule must be finite and > 0, got \[0.0\]", {"epsilon_schedule": [0]}),
    "unrolled to a tolerance": (ValueError, '"unrolled" needs iterations= without tolerance=', {"gradient": "unrolled", "tolerance": 0.1}),
    "lengths' shape": (ValueError, r"lengths must be \[B, 2\] integers or a pair", {"lengths": torch.ones(3)}),
    "lengths' dtype": (TypeError, "lengths must be integers", {"lengths": torch.ones(3, 2)}),
    "lengths' number": (ValueError, "agree on the number of problems", {"lengths": torch.ones(2, 2).long()}),
    "lengths too long": (ValueError, r"lengths must be in \[0, 4\], the rows of the cost, got 6", {"lengths": torch.stack([FULL, FULL, FULL + 2])}),
    "lengths < 0": (ValueError, r"lengths must be in \[0, 5\], the columns of the cost, got -1", {"lengths": torch.stack([FULL, FULL - 6, FULL]).clamp(min=torch.tensor([0, -1]))}),
    "backend": (ValueError, "backend must be one of", {"backend": "fpga"}),
    "backend's type": (TypeError, "backend must be a name", {"backend": 3}),
    "another device": (ValueError, "a is on meta, the cost on cpu", {"a": A.to("meta")}),
    "NaN in the cost": (ValueError, "NaN or -infinity in problem 0", {"cost": COST * torch.nan}),
    "-inf in the cost": (ValueError, "NaN or -infinity in problem 0", {"cost": COST - torch.inf}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    kind, message, changes = BAD[case]
    call = {"cost": COST, "a": A, "b": B, "epsilon": 0.1, "iterations": 3, "backend": "reference", **changes}
    with pytest.raises(kind, match=message):
        kd.sinkhorn(call.pop("cost"), call.pop("a"), call.pop("b"), **call)


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
@pytest.mark.parametrize("domain", ["auto", "scaling", "log"])
@SHARED
def test_a_poisoned_cost(poison, domain, shared, backend):
    """One entry; in problem 2 where it can tell."""
    for order in ("rows_columns", "columns_rows"):
        problems = Problems(shared=shared)
        problems.cost[(..., 3, 4) if shared else (2, 3, 4)] = poison
        options = {"epsilon": 0.1, "iterations": 5, "domain": domain, "order": order, "backend": backend}
        with pytest.raises(
            ValueError, match="NaN or -infinity$" if shared else "NaN or -infinity in problem 2"
        ):
            kd.sinkhorn(*problems.leaves(), **options)


@pytest.mark.parametrize("domain", ["auto", "scaling", "log"])
@SHARED
def test_infeasible(domain, shared, backend):
    """A row or a column whose pairs are all forbidden, or one left with columns that have no mass."""
    for case in ("row", "column", "left without mass"):
        for order in ("rows_columns", "columns_rows"):
            problems = Problems(shared=shared)
            if case == "row":
                problems.cost[..., 3, :] = torch.inf
            elif case == "column":
                problems.cost[..., 3] = torch.inf
            else:
                problems.cost[..., 3, 2:] = torch.inf
                problems.b[:, :2] = 0
                problems.b *= 3 / problems.b.sum(1, keepdim=True)
            options = {"epsilon": 0.1, "iterations": 5, "domain": domain, "order": order, "backend": backend}
            with pytest.raises(
                ValueError, match="problem 0 has a row or column with mass whose pairs are all"
            ):
                kd.sinkhorn(*problems.leaves(), **options)


@SHARED
def test_epsilon_too_small_for_scalings(shared, backend):
    """Refused by name where asked for; "auto" and "log" take any."""
    problems, whose = Problems(shared=shared), "cost" if shared else "problem 0"
    for dtype, epsilon in ((torch.float32, 5e-3), (torch.float64, 5e-4)):
        cost, a, b = problems.leaves(dtype)
        options = {"epsilon": epsilon, "iterations": 5, "backend": backend}
        with pytest.raises(
            ValueError, match=rf'{whose} has entries too far apart for this eps.*domain="log"'
        ):
            kd.sinkhorn(cost, a, b, domain="scaling", **options)
        wide = {**options, "epsilon": 1.0}
        kd.sinkhorn(cost, a, b, domain="scaling", **wide)
        with pytest.raises(ValueError, match="too far apart"):  # an epsilon of a schedule is iterated at, too
            kd.sinkhorn(cost, a, b, domain="scaling", epsilon_schedule=[epsilon], **wide)
        exact = dense(*(x.double() for x in (cost, a, b)), [epsilon] * 5)
        for domain in ("auto", "log"):
            found = kd.sinkhorn(cost, a, b, domain=domain, **options)
            agree(found.transport_cost, exact.transport_cost, 1e-4)


@SHARED
@pytest.mark.parametrize(
    "cost, mass, epsilon, schedule",
    [
        ([[0.16, torch.inf], [0.68, 0.92]], [0.09, 0.91], 0.05, [2.0]),
        ([[0.0223, 0.1689], [torch.inf, 0.5185]], [0.399, 0.601], 0.02, [2.0, 0.05]),
        ([[0.0, 0.3], [0.4, 0.1]], [0.6, 0.4], 0.02, [10.0]),
    ],
    ids=str,
)
def test_a_schedule_that_leaves_scalings_no_room(cost, mass, epsilon, schedule, shared, backend):
    """From one epsilon to the next they are raised to a power, whatever the costs."""
    cost, mass = torch.tensor(cost), torch.tensor([mass])
    options = {"epsilon": epsilon, "epsilon_schedule": schedule, "iterations": 20, "return_plan": True}
    cost = cost if shared else cost[None]
    exact = kd.sinkhorn(cost.double(), mass.double(), mass.double(), domain="log", **options).plan
    options["backend"] = backend
    agree(kd.sinkhorn(cost, mass, mass, **options).plan, exact, 1e-5)
    try:
        agree(kd.sinkhorn(cost, mass, mass, domain="scaling", **options).plan, exact, 1e-5)
    except ValueError as refusal:
        assert "too far apart for this epsilon" in str(refusal)


def test_rows_far_from_each_other_have_room(backend):
    """What counts is a row's costs above its least: 1000 epsilon between rows do not matter."""
    problems = Problems()
    problems.cost += 100 * torch.rand(3, 7, 1, dtype=torch.float64)
    found = kd.sinkhorn(
        *problems.leaves(torch.float32), epsilon=0.1, iterations=5, domain="scaling", return_plan=True,
        backend=backend,
    )  # fmt: skip
    cost = problems.cost.float().double()
    agree(found.plan, dense(cost, problems.a, problems.b, [0.1] * 5).plan, 1e-4)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-30])
def test_a_hopeless_epsilon_gives_numbers(epsilon, backend):
    for order in ("rows_columns", "columns_rows"):
        leaves = Problems().leaves(torch.float32)
        found = kd.sinkhorn(
            *leaves, epsilon=epsilon, iterations=5, order=order, return_plan=True, backend=backend
        )
        assert all(getattr(found, name).isfinite().all() for name in (*NAMES, "f", "g"))
        found.transport_cost.sum().backward()
        assert leaves[0].grad.isfinite().all() or epsilon < 1e-20


def test_one_side_without_entries_is_a_problem_of_nothing():
    cost = torch.rand(2, 4, 200, requires_grad=True)
    lengths = torch.tensor([[0, 100], [4, 100]], dtype=torch.int8)
    found = kd.sinkhorn(cost, epsilon=0.1, lengths=lengths)
    found.transport_cost.sum().backward()
    assert found.transport_cost[0] == 0 and found.transport_cost[1] > 0
    assert not cost.grad[0].any() and cost.grad[1].any()
    assert kd.sinkhorn(torch.rand(2, 0, 3), epsilon=0.1).transport_cost.tolist() == [0, 0]


@pytest.mark.parametrize("domain", ["auto", "scaling", "log"])
def test_what_no_problem_has_is_not_read(domain, backend):
    """A row and a column of a shared cost that are absent in all problems, whatever stands there."""
    problems = Problems(shared=True)
    kept = [0, 1, 3, 4, 5, 6]
    problems.a[:, 2] = 0.0
    problems.b[:, 0] = 0.0
    problems.b *= (problems.a.sum(1) / problems.b.sum(1))[:, None]
    options = {"epsilon": 0.2, "iterations": 5, "domain": domain, "backend": backend}
    wanted = kd.sinkhorn(problems.cost[kept][:, 1:], problems.a[:, kept], problems.b[:, 1:], **options)
    for poison in (torch.nan, -torch.inf, 1e30):
        problems.cost[2], problems.cost[:, 0] = poison, poison
        found = kd.sinkhorn(problems.cost, problems.a, problems.b, **options)
        assert error(found.transport_cost, wanted.transport_cost) < 1e-10


def test_a_schedule_from_far_above(backend):
    cost, a, b = (x.detach() for x in Problems(shared=True).leaves(torch.float32))
    options = {"epsilon": 0.02, "iterations": 12, "epsilon_schedule": [3.0], "backend": backend}
    found = kd.sinkhorn(cost, a, b, domain="scaling", **options)
    wanted = kd.sinkhorn(cost, a, b, domain="log", **options)
    assert error(found.transport_cost, wanted.transport_cost) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masses_that_forbidden_pairs_keep_apart(backend, dtype):
    """With one cost for all, as with a cost each: the error stays large, and the other problem is solved."""
    cost = torch.tensor([[0.0, torch.inf], [0.0, 0.0]], dtype=dtype)
    a, b = torch.tensor([[[0.7, 0.3], [0.2, 0.8]], [[0.3, 0.7], [0.5, 0.5]]], dtype=dtype)
    found = []
    for shared in (True, False):
        own = (cost if shared else cost.expand(2, 2, 2)).clone().requires_grad_()
        solved = kd.sinkhorn(own, a, b, epsilon=0.1, backend=backend)
        (gradient,) = torch.autograd.grad(solved.transport_cost[1], own)
        found.append((solved.marginal_error, gradient if shared else gradient.sum(0)))
    for one, each in zip(*found):
        torch.testing.assert_close(one, each)
    assert found[0][0][0] > 0.5 and found[0][0][1] < 1e-4
