"""RKD distance and angle against the published form: difference tensors in float64, and autograd."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FLOOR, error
from jobs import backends_of, kernel_of
from watch import Largest

import kd_kernels as kd
from kd_kernels.drivers.angle import walk_angles
from kd_kernels.drivers.distance import walk_distances
from kd_kernels.drivers.points import squared_distances
from kd_kernels.rows import GRADIENT, STATISTICS, TERMS, DistanceJob

BACKENDS = backends_of("angle")
assert backends_of("distance") == BACKENDS


def published_angle(student, teacher, beta=1.0):
    """The ``[N, N, D]`` form, but for the gradient of an edge without length: 0, not 1e12 times too much."""

    def cosines(x):
        edges = x[None] - x[:, None]
        nothing = (edges == 0).all(-1)
        length = torch.where(nothing, 1.0, edges.pow(2).sum(-1)).sqrt()
        unit = torch.where(nothing[..., None], 0.0, edges / length[..., None])
        return unit @ unit.transpose(1, 2)

    return F.smooth_l1_loss(cosines(student), cosines(teacher), beta=beta)


def published_distance(student, teacher, beta=1.0, eps=1e-12):
    def relative(x):
        edges = (x[:, None] - x[None]).pow(2).sum(-1)
        near = edges <= eps
        d = torch.where(near, eps**0.5, torch.where(near, 1.0, edges).sqrt()) * (1 - torch.eye(len(x)))
        return d / d[d > 0].mean()

    return F.smooth_l1_loss(relative(student), relative(teacher), beta=beta)


CALLS = {
    "angle": (kd.relational_angle, published_angle),
    "distance": (kd.relational_distance, published_distance),
}


def points(n, dtype=torch.float64, widths=(12, 20), seed=0):
    g = torch.Generator().manual_seed(seed)
    made = []
    for i, width in enumerate(widths):
        x = torch.randn(n, width, generator=g, dtype=torch.float64) * (1.0 + i) + 2.0
        x[: n // 2] *= 0.4  # clusters of two sizes
        made.append(x.to(dtype).requires_grad_())
    return made


def run(function, inputs, upstream=0.7, **options):
    loss = function(*inputs, **options)
    return [loss, *torch.autograd.grad(loss * upstream, inputs)]


def wide(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_value_and_gradients_of_both_models(call, dtype):
    ours, published = CALLS[call]
    inputs = points(37, dtype)
    exact = run(published, wide(inputs), beta=0.3)
    try:
        plain = run(published, inputs, beta=0.3)
    except RuntimeError as refusal:
        if "not implemented for 'Half'" not in str(refusal):
            raise
        pytest.skip(f"this torch cannot run the published form in float16: {refusal}")
    found = run(ours, inputs, beta=0.3, teacher_grad=True)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for x, y, z in zip(found, plain, exact):
        assert error(x, z) <= 2 * error(y, z) + FLOOR[dtype]
        assert z.abs().max() > 1e-6


@pytest.mark.parametrize("n", [2, 3, 8, 17, 33])
@pytest.mark.parametrize("call", CALLS)
def test_backends(call, backend, n):
    ours, published = CALLS[call]
    inputs = points(n)
    exact = run(published, wide(inputs), beta=0.2)
    found = run(ours, inputs, beta=0.2, teacher_grad=True, backend=backend)
    for x, z in zip(found, exact):
        assert (x - z).abs().max() <= 1e-12 * (1 + z.abs().max())


@pytest.mark.parametrize("call", CALLS)
def test_backends_of_one_model(call, backend):
    """Each gradient alone, and none, are the same numbers."""
    function = CALLS[call][0]
    student, teacher = points(19)
    both = run(function, (student, teacher), teacher_grad=True, backend=backend)
    alone = function(student, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(alone * 0.7, student)
    assert torch.equal(alone, both[0]) and torch.allclose(gradient, both[1], rtol=1e-13, atol=1e-16)
    fixed = student.detach()
    alone = function(fixed, teacher, teacher_grad=True, backend=backend)
    (gradient,) = torch.autograd.grad(alone * 0.7, teacher)
    assert torch.equal(alone, both[0]) and torch.allclose(gradient, both[2], rtol=1e-13, atol=1e-16)
    with torch.no_grad():
        assert torch.equal(function(student, teacher, backend=backend), both[0])


@pytest.mark.parametrize("call", CALLS)
def test_models_that_agree(call, backend):
    """Zero, not some rounding, also beside a row that does not count and rows that coincide."""
    student, _ = points(11, torch.float32)
    with torch.no_grad():
        student[2] = student[3]
    teacher = student.detach().clone().requires_grad_()
    options = {"mask": torch.arange(11) != 5, "teacher_grad": True, "backend": backend}
    for x in run(CALLS[call][0], (student, teacher), **options):
        assert (x == 0).all()


EPS = 1e-12


def hostile_squares(n):
    g = torch.Generator().manual_seed(n)
    s = 10.0 ** (40 * torch.randn(n, n + -n % 8, generator=g, dtype=torch.float64))
    s[torch.rand(s.shape, generator=g) < 0.2] = -1.0
    s[torch.rand(s.shape, generator=g) < 0.2] = 0.0
    s[torch.rand(s.shape, generator=g) < 0.1] = 5e-324
    s[torch.rand(s.shape, generator=g) < 0.1] = EPS
    s[:, n:] = -1.0
    return s


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("eps", [0.0, EPS])
@pytest.mark.parametrize("n", [1, 7, 24])
def test_distance_kernel_phase_by_phase(backend, n, eps, nan):
    """Numbers that no points have: what is no pair in one model only, lengths from the smallest to 1e90."""
    squared = [hostile_squares(n), hostile_squares(n + 1)[:n, : n + -n % 8].contiguous()]
    squared[1][:, n:] = -1.0
    if nan:
        squared[0][n // 2, n // 3] = math.nan
    numbers = torch.tensor([0.3, eps, 1e7, 3.0, 0.02, -0.3], dtype=torch.float64)

    def results(kernel):
        made = [torch.full(x, 7.0, dtype=torch.float64) for x in ((4, n), (3, n))]
        made += [torch.full_like(x, 7.0) for x in squared]
        job = DistanceJob(n, numbers, *squared, *made)
        for i, phase in enumerate((STATISTICS, TERMS, GRADIENT)):
            kernel(job, phase)
            assert all((x == 7.0).all() for x in made[i + 1 : 2]), "another phase's"
        return [x[:, :n] for x in made]

    expected = results(kernel_of("distance", "reference"))
    if backend == "reference":
        for squares, gradient in zip(squared, expected[2:]):
            assert (gradient[(squares <= eps)[:, :n]] == 0).all()
    for x, z in zip(results(kernel_of("distance", backend)), expected):
        torch.testing.assert_close(x, z, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("call", CALLS)
def test_the_teacher_is_a_constant(call):
    student, teacher = points(6)
    loss = CALLS[call][0](student, teacher)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)
    assert not CALLS[call][0](student.detach(), teacher).requires_grad


@pytest.mark.parametrize("call", CALLS)
def test_rows_that_do_not_count(call, backend):
    function = functools.partial(CALLS[call][0], backend=backend)
    inputs = points(21)
    mask = torch.rand(21) < 0.6
    kept = run(function, [x.detach()[mask].requires_grad_() for x in inputs], teacher_grad=True)
    with torch.no_grad():
        inputs[0][~mask], inputs[1][~mask] = math.nan, math.inf
    found = run(function, inputs, mask=mask, teacher_grad=True)
    assert torch.allclose(found[0], kept[0], rtol=1e-13)
    for x, y in zip(found[1:], kept[1:]):
        assert torch.allclose(x[mask], y, rtol=1e-11, atol=1e-15)
        assert (x[~mask] == 0).all()


@pytest.mark.parametrize("call", CALLS)
def test_nan_shows(call, backend):
    function = functools.partial(CALLS[call][0], backend=backend)
    student, teacher = points(9)
    with torch.no_grad():
        student[3, 2] = math.nan
    for inputs in ((student, teacher), (teacher, student)):
        assert all(x.isnan().any() for x in run(function, inputs, teacher_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_that_coincide_have_no_angle_and_no_gradient_along_their_edge(backend, dtype):
    student, teacher = points(12, dtype, widths=(300, 200))
    with torch.no_grad():
        student[4], student[9] = student[1], student[1]
        teacher[5] = teacher[2]
    exact = run(published_angle, wide((student, teacher)))
    found = run(kd.relational_angle, (student, teacher), teacher_grad=True, backend=backend)
    for x, z in zip(found, exact):
        assert x.isfinite().all() and error(x, z) <= FLOOR[dtype] + 1e-12


def test_all_rows_coincide(backend):
    flat, teacher = torch.ones(5, 3, requires_grad=True), points(5)[1].detach()
    for call, _ in CALLS.values():
        for options in [{}] if call is kd.relational_angle else [{}, {"eps": 0.0}]:
            loss = call(flat, teacher, backend=backend, **options)
            assert loss.isfinite() and loss > 0
            assert (torch.autograd.grad(loss, flat)[0] == 0).all()


def test_rows_that_coincide_are_the_published_eps_apart(backend):
    student, teacher = points(10)
    with torch.no_grad():
        student[4] = student[1]
    for eps in (1e-12, 0.5, 0.0):
        exact = run(published_distance, wide((student, teacher)), eps=eps)
        options = {"eps": eps, "teacher_grad": True, "backend": backend}
        found = run(kd.relational_distance, (student, teacher), **options)
        for x, z in zip(found, exact):
            assert error(x, z) <= 1e-12
    counted = kd.relational_distance(student, teacher)
    assert abs(counted - kd.relational_distance(student, teacher, eps=0.0)) > 1e-4  # the mean has two more


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows(call, n, backend):
    inputs = points(n)
    for x in run(CALLS[call][0], inputs, teacher_grad=True, backend=backend):
        assert (x == 0).all()
    inputs, options = points(4), {"teacher_grad": True, "backend": backend}
    for x in run(CALLS[call][0], inputs, mask=torch.arange(4) < n, **options):
        assert (x == 0).all()


@pytest.mark.parametrize("dtype, offset", [(torch.float32, 1e4), (torch.float64, 1e6)])
def test_an_offset_costs_no_digits(dtype, offset):
    """The uncentred Gram matrix has none left here."""
    student, teacher = points(24, dtype, widths=(64, 64))
    shifted = [(x.detach() + offset).requires_grad_() for x in (student, teacher)]
    exact = run(published_angle, wide(shifted))
    for x, z in zip(run(kd.relational_angle, shifted, teacher_grad=True), exact):
        assert error(x, z) <= 10 * FLOOR[dtype]


def test_rows_that_coincide_stay_together_in_large_products():
    """Where the product adds up equal rows in another order, their distance is some rounding, not 0."""
    student, teacher = points(150, torch.float32, widths=(1500, 700))
    copies = torch.randint(0, 150, (150,))
    with torch.no_grad():
        student.copy_(student[copies])
    squared, _ = squared_distances(student, None, len(student))
    same = (student[:, None, :8] == student[None, :, :8]).all(-1)
    assert (squared[same] <= 0).all() and (squared[~same] > 0).all() and same.sum() > 200


@pytest.mark.parametrize("call", CALLS)
def test_gradcheck(call):
    function = CALLS[call][0]
    inputs = points(5, widths=(3, 4))
    assert torch.autograd.gradcheck(lambda s, t: function(s, t, beta=0.15, teacher_grad=True), inputs)


@pytest.mark.parametrize("walk, n", [(walk_angles, 67), (walk_distances, 203)])
def test_threads_change_no_bit(walk, n):
    student, teacher = (x.detach() for x in points(n, torch.float32))
    squared = [torch.cdist(x.double(), x.double()).square() for x in (student, teacher)]
    numbers = (0.2,) if walk is walk_angles else (0.2, 1e-12)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        total, gradients = walk(*squared, *numbers, "cpu", (True, True))
        results.append([total, *gradients])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.parametrize("call", CALLS)
def test_no_tensor_is_larger_than_the_inputs_or_the_pairs(call):
    n, width = 96, 160
    inputs = points(n, torch.float32, widths=(width, width))
    with Largest() as seen:
        run(CALLS[call][0], inputs, teacher_grad=True)
    assert seen.numel <= n * max(n, width)


@pytest.mark.parametrize("call", CALLS)
def test_op(call):
    op = getattr(torch.ops.kd_kernels, call)
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.3, 1e-12)[: 1 + (call == "distance")]]
    for dtype, mask in ((torch.float64, None), (torch.bfloat16, torch.arange(6) != 2)):
        student, teacher = points(6, dtype)
        for needs in ([True, True], [True, False], [False, False]):
            rows = (student if needs[0] else student.detach(), teacher if needs[1] else teacher.detach())
            torch.library.opcheck(op, (*rows, mask, *numbers, "cpu", needs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_op_of_the_backward_pass(dtype):
    made = torch.ops.kd_kernels.found_gradient, (torch.tensor(0.7), X.detach(), dtype, "relational")
    torch.library.opcheck(*made)
    assert torch.equal(made[0](*made[1]), (0.7 * X).to(dtype))


@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_breaks(call):
    function = CALLS[call][0]
    inputs = points(9, torch.float32)
    mask = torch.arange(9) != 4
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = run(function, inputs, mask=mask, beta=0.4, teacher_grad=True)
    for x, y in zip(run(compiled, inputs, mask=mask, beta=0.4, teacher_grad=True), expected):
        assert torch.allclose(x, y, rtol=1e-5)


@pytest.mark.parametrize("call", CALLS)
def test_double_backward_raises_by_name(call):
    student, teacher = points(5)
    (gradient,) = torch.autograd.grad(CALLS[call][0](student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match=f"relational_{call}: double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("call", CALLS)
def test_backward_twice(call):
    student, teacher = points(7)
    loss = CALLS[call][0](student, teacher)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss * 2.0, student)[0], 2.0 * first)


X, Y = torch.randn(4, 3), torch.randn(4, 5)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X[0], Y), {}, ValueError, r"student must be \[N, D\], got \(3,\)"),
        ((X, Y[:3]), {}, ValueError, "same rows, got 4 and 3"),
        ((X, Y.long()), {}, TypeError, "teacher must be floating"),
        (([1.0], Y), {}, TypeError, "student must be a tensor, got list"),
        ((X, Y), {"beta": 0.0}, ValueError, "beta must be a finite number > 0, got 0.0"),
        ((X, Y), {"beta": math.nan}, ValueError, "beta must be"),
        ((X, Y), {"mask": torch.ones(4)}, TypeError, "mask must be a bool tensor"),
        ((X, Y), {"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask must have the shape \(4,\)"),
        ((X, Y.to("meta")), {}, ValueError, "teacher is on the meta device"),
    ],
)
def test_bad_input(call, arguments, options, error, message):
    with pytest.raises(error, match=message):
        CALLS[call][0](*arguments, **options)


def test_bad_input_of_one():
    with pytest.raises(ValueError, match="eps must be a finite number >= 0, got -1"):
        kd.relational_distance(X, Y, eps=-1)
    for call, _ in CALLS.values():
        with pytest.raises(ValueError, match="backend must be one of"):
            call(X, Y, backend="fast")
        with pytest.raises(TypeError, match="backend must be a name or None, got 3"):
            call(X, Y, backend=3)
        with pytest.raises(kd.BackendUnavailable, match="cuda"):
            call(X, Y, backend="cuda")
        with pytest.raises(TypeError, match=rf"kd_kernels\.{call.__name__} does not work under torch.func"):
            torch.func.grad(call)(X, Y)
