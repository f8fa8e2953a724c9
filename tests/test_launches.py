"""What the Triton launches ask for, without running anything: compilations and grids. On tensors of the meta
device, so that a job may be as large as it likes."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kd_kernels import problems as P
from kd_kernels import rows as R
from kd_kernels import triton_kernels, triton_runtime, triton_topk, triton_transport

META = torch.device("meta")
# By module, what is launched.
LAUNCHED = {
    "row_divergence": ["row_divergence"],
    "gather": ["gather"],
    "topk": ["walk", "largest", "draw"],
    "angle": ["angle"],
    "distance": ["distance"],
    "scale": ["scale"],
    "half_step": ["half_step"],
    "sinkhorn": ["solve", "unrolled", "implicit"],
    "pairwise_l1": [
        "probabilities", "pair_sums", "add_sums", "pair_weights", "pair_gradient", "logit_gradient"
    ],
}  # fmt: skip


def sources() -> dict[str, ast.Module]:
    folder = Path(triton_kernels.__path__[0])
    return {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}


def test_every_kernel_is_here():
    """Those that ask which program they are; the others are called by them."""
    found = {}
    for name, module in sources().items():
        for function in module.body:
            if isinstance(function, ast.FunctionDef) and "program_id" in ast.unparse(function):
                found.setdefault(name, []).append(function.name)
    assert found == LAUNCHED


class Recorder:
    """Stands in for a kernel and keeps its grids and what Triton would compile anew for: types, constants,
    and of integers that it is not told to leave alone whether they are 1 or a multiple of 16."""

    def __init__(self, kernel) -> None:
        self.names = kernel.arg_names
        # An interpreted kernel has what it was decorated with, a compiled one what became of that.
        options = getattr(kernel, "kwargs", None)
        self.alone = (kernel.do_not_specialize if options is None else options.get("do_not_specialize")) or []
        self.compiled: set[tuple] = set()
        self.grids: list[tuple[int, ...]] = []

    def key(self, name: str, value) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.storage_offset() * value.itemsize % 16 == 0
        if isinstance(value, bool) or not isinstance(value, int):
            return type(value)
        wide = not -(2**31) <= value < 2**31
        return wide if name in self.alone else (wide, value == 1, value % 16 == 0)

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.grids.append(grid)
            given = tuple(self.key(*x) for x in zip(self.names, arguments))
            self.compiled.add((given, *sorted((k, str(v)) for k, v in constants.items())))

        return launch


@pytest.fixture
def recorders(monkeypatch):
    package, found = triton_runtime.kernels(), {}
    for name, functions in LAUNCHED.items():
        for function in functions:
            module = getattr(package, name)
            found[function] = Recorder(getattr(module, function))
            monkeypatch.setattr(module, function, found[function])
    return found


def made(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def integers(*shape: int) -> torch.Tensor:
    return made(*shape, dtype=torch.int64)


def rows(n: int, vocab: int, dtype: torch.dtype = torch.float32, **shape) -> R.Rows:
    z, grad = made(n, vocab, dtype=dtype), made(n, vocab, dtype=dtype)
    return R.Rows(z, integers(n), made(n), grad=grad, grad_offsets=integers(n), **shape)


# --- jobs ------------------------------------------------------------------------------------------------


def row_divergence(n=3, vocab=611) -> None:
    numbers = [made(n) for _ in range(4)]
    job = R.RowJob(
        "jensen_shannon", n, vocab, rows(n, vocab), rows(n, vocab), *numbers[:2], integers(n), *numbers[2:],
        made(n, R.STATISTIC_COLUMNS), made(n, R.TERM_COLUMNS), True,
    )  # fmt: skip
    triton_runtime.row_divergence(job, R.STATISTICS | R.TERMS | R.GRADIENT)


def gather(n=3, vocab=611) -> None:
    of_rows = [made(n, 5), made(n, R.GATHER_COLUMNS)]
    ids, weights = made(n, 5, dtype=torch.int32), [made(n) for _ in range(3)]
    job = R.GatherJob(n, vocab, rows(n, vocab), ids, *of_rows, True, True, *weights, made(n, 5))
    triton_runtime.gather(job, R.STATISTICS | R.GRADIENT)


def topk(n=3, vocab=611) -> None:
    job = R.TopkJob.empty(rows(n, vocab), n, vocab, 7, made(2), integers(n, 3), 4)
    triton_topk.topk(replace(job, uniforms=made(n, 4)))


def angle(n=5, beta=1.0) -> None:
    square = made(n, -(-n // R.ANGLE_PADDING) * R.ANGLE_PADDING)
    triton_runtime.angle(R.AngleJob(n, beta, square, square, square, square, made(n), square, square))


def distance(n=5) -> None:
    square = made(n, -(-n // R.DISTANCE_PADDING) * R.DISTANCE_PADDING)
    job = R.DistanceJob(n, made(6), square, square, made(4, n), made(3, n), square, square)
    for phase in (R.STATISTICS, R.TERMS, R.GRADIENT):
        triton_runtime.distance(job, phase)


def scale(count=1001) -> None:
    triton_runtime.scale(made(count, dtype=torch.float32), made(), made(count, dtype=torch.bfloat16))


def half_step(count=3, n=33, m=70, transposed=False) -> None:
    inner, outer = (n, m) if transposed else (m, n)
    x, weight, extra = (
        made(*shape, dtype=torch.float32) for shape in ((count, inner), (count, outer), (outer,))
    )
    job = P.HalfStepJob(made(n, m, dtype=torch.float32), x, weight, weight, transposed, True, extra)
    triton_transport.half_step(job)


def sinkhorn(count=3, n=33, m=41, iterations=20, epsilon=0.1, tolerance=1e-3) -> None:
    state = {"dtype": torch.float32}
    a, b, cost = made(count, n, **state), made(count, m, **state), made(count, n, m, **state)
    history = [made(count, iterations, size, **state) for size in (n, m)]
    arriving = [made(count, **state), cost, a, b, made(count, **state)]
    job = P.SinkhornJob(
        cost, a, b, torch.full((iterations,), epsilon, dtype=torch.float64), tolerance, P.LOG, a, b,
        made(count, P.NUMBER_COLUMNS), *history, *arriving, cost, a, b,
    )  # fmt: skip
    triton_transport.sinkhorn(job, P.SOLVE | P.UNROLLED | P.IMPLICIT)


def pairwise_l1(groups=2, longest=5, vocab=67, scale=1.3, softcap=5.0) -> None:
    n = groups * longest
    pairs = [made(groups, longest, longest) for _ in range(3)]
    models = [rows(n, vocab, scale=scale, softcap=softcap) for _ in range(2)]
    job = R.PairwiseL1Job(
        n, vocab, *models, integers(groups + 1), made(n, 2), made(n, 2), *pairs, made(n), made(n)
    )
    for phase in (R.TERMS, R.GRADIENT):
        triton_transport.pairwise_l1(job, phase)


# --- compilations: test_triton.py has those of the row kernels --------------------------------------------

# By job: calls that differ in values, counts and sizes alone, and what all of them compile. Both models of
# a pairwise_l1 are read along other steps; each phase of a distance is compiled. Then a call with tiles of
# another size, or whose rows fit wide loads, and what there is with it.
CASES = {
    "angle": ([{"n": 7, "beta": 0.3}, {"n": 20}, {"n": 999}], [1], {"n": 9}, [2]),
    "distance": ([{"n": 7}, {"n": 20}, {"n": 999}], [3], {"n": 9}, [6]),
    "scale": ([{"count": 7}, {"count": 30001}], [1], {"count": 4096}, [2]),
    "half_step": (
        [{"count": 5, "n": 35, "m": 50}, {"count": 63, "n": 300, "m": 999}], [1], {"transposed": True}, [2]
    ),
    "sinkhorn": (
        [
            {"count": 16, "n": 37, "m": 50, "iterations": 7, "epsilon": 0.3, "tolerance": 1e-5},
            {"count": 1, "n": 99, "m": 63, "iterations": 16},
            {"iterations": 1},
        ],
        [1, 1, 1],
        {"m": 70},
        [2, 2, 2],
    ),
    "pairwise_l1": (
        [
            {"groups": 16, "longest": 7, "vocab": 99},
            {"longest": 9, "vocab": 1001, "scale": 0.5, "softcap": 9.0},
            {"groups": 1, "longest": 13, "vocab": 3999},
        ],
        [2, 1, 1, 2, 1, 1],
        {"longest": 33},
        [2, 2, 2, 2, 2, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_no_recompilation_per_value(name, recorders):
    calls, once, other, more = CASES[name]
    for call in ({}, *calls):
        globals()[name](**call)
        assert [len(recorders[kernel].compiled) for kernel in LAUNCHED[name]] == once, call
    globals()[name](**other)
    assert [len(recorders[kernel].compiled) for kernel in LAUNCHED[name]] == more


# --- grids -----------------------------------------------------------------------------------------------

MANY = 200_000
# No job of that many half-steps, nor of angles between more points than memory holds.
LARGE = {
    "row_divergence": {"n": MANY, "vocab": 151936},
    "gather": {"n": MANY, "vocab": 151936},
    "topk": {"n": MANY, "vocab": 64},  # of long rows it takes fewer at once
    "angle": {"n": MANY},
    "distance": {"n": MANY},
    "scale": {"count": 1 << 38},
    "half_step": {"count": 64, "n": MANY, "m": MANY},
    "sinkhorn": {"count": MANY},
    "pairwise_l1": {"groups": MANY, "longest": 2, "vocab": 1 << 20},
}


@pytest.mark.parametrize("name", LARGE)
def test_grids_have_room(name, recorders):
    """A GPU counts to 65535 along the second and the third dimension of a grid, to 2^31 along the first."""
    assert set(LARGE) == set(LAUNCHED)
    globals()[name](**LARGE[name])
    for kernel in LAUNCHED[name]:
        grids = recorders[kernel].grids
        assert grids and all(0 < grid[0] < 2**31 for grid in grids), kernel
        assert all(0 < size <= 65535 for grid in grids for size in grid[1:]), (kernel, grids)
