"""The pairwise_l1 kernel of every backend that has one, against the reference in float64."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from cases import DTYPES
from jobs import SPREAD, backends_of, close, kernel_of, side

from kd_kernels import rows as R
from kd_kernels import triton_transport as runtime
from kd_kernels.backends import PAIRWISE_L1_SCRATCH
from kd_kernels.reference.pairwise_l1 import pairwise_l1 as reference

BACKENDS = backends_of("pairwise_l1")
EACH = pytest.mark.parametrize("name", BACKENDS)
IDS = {"ids": lambda x: str(x).replace("torch.", "")}
SIZES, VOCAB = (5, 1, 3), 67  # rows of each group
# Of sums over the vocabulary, and of a stored gradient.
SUM = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
STORE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def test_there_is_something_to_test():
    assert {"cpu", "triton", "reference"} <= set(BACKENDS)


def model(
    n: int,
    vocab: int,
    dtype: torch.dtype,
    layout: str = "rows",
    grad: str | None = "elsewhere",
    z: torch.Tensor | None = None,
    **shape,
) -> R.Rows:
    z = torch.randn(n, vocab, dtype=torch.float64) * SPREAD if z is None else z
    temperature = torch.rand(n, dtype=torch.float64) + 0.6
    return side(z, dtype, layout, temperature=temperature, grad=grad, **shape)


def statistics_of(rows: R.Rows, n: int, vocab: int) -> torch.Tensor:
    z = rows.read(n, vocab).double() * rows.scale
    if rows.softcap:
        z = rows.softcap * torch.tanh(z / rows.softcap)
    top = z.amax(1)
    logz = torch.logsumexp((z - top[:, None]) / rows.temperature[:, None], 1)
    return torch.stack([top, logz], 1).contiguous()


def pair_job(student: R.Rows, teacher: R.Rows, sizes: tuple[int, ...], vocab: int) -> R.PairwiseL1Job:
    """A job over the whole vocabulary whose sums begin at 1, and at NaN where nothing belongs."""
    n, longest = sum(sizes), max(sizes)
    present = torch.arange(longest) < torch.tensor(sizes)[:, None]
    pairs = present[:, :, None] & present[:, None, :]
    cost = torch.where(pairs, 1.0, torch.nan).double()
    d_cost = torch.where(pairs, torch.randn(pairs.shape, dtype=torch.float64), torch.nan)
    d_cost[torch.rand(pairs.shape) < 0.1] = 0
    return R.PairwiseL1Job(
        n,
        vocab,
        student,
        teacher,
        torch.tensor([0, *torch.tensor(sizes).cumsum(0)]),
        statistics_of(student, n, vocab),
        statistics_of(teacher, n, vocab),
        cost,
        cost.clone(),
        d_cost,
        torch.randn(n, dtype=torch.float64),
        torch.randn(n, dtype=torch.float64),
    )


def wide_side(rows: R.Rows, n: int, vocab: int) -> R.Rows:
    shape = {"scale": rows.scale, "softcap": rows.softcap, "temperature": rows.temperature}
    return side(rows.read(n, vocab).double(), torch.float64, grad="elsewhere", **shape)


def widened(job: R.PairwiseL1Job) -> R.PairwiseL1Job:
    """The same job in memory of its own, its logits and gradients in float64."""
    both = {name: wide_side(getattr(job, name), job.n, job.vocab) for name in ("student", "teacher")}
    return replace(copy.deepcopy(replace(job, student=None, teacher=None)), **both)


def gradient(rows: R.Rows, n: int, vocab: int) -> torch.Tensor:
    return R.Rows(rows.grad, rows.grad_offsets, rows.temperature).read(n, vocab).double()


def moved(job: R.PairwiseL1Job, device: str) -> R.PairwiseL1Job:
    there: dict[int, torch.Tensor] = {}

    def move(x):
        if isinstance(x, R.Rows):
            return replace(x, **{f.name: move(getattr(x, f.name)) for f in fields(x)})
        return there.setdefault(id(x), x.to(device)) if isinstance(x, torch.Tensor) else x

    return replace(job, **{f.name: move(getattr(job, f.name)) for f in fields(job)})


def probabilities(rows: R.Rows, statistics: torch.Tensor, n: int, vocab: int) -> torch.Tensor:
    z = rows.read(n, vocab) * rows.scale
    if rows.softcap:
        z = rows.softcap * torch.tanh(z / rows.softcap)
    return ((z - statistics[:, :1]) / rows.temperature[:, None] - statistics[:, 1:]).exp()


def undecided(job: R.PairwiseL1Job, rounding: float) -> tuple[torch.Tensor, ...]:
    """What rounding can change in the sums of signs and in both gradients: a sign, where a probability is
    that close to the other one (one of thousands is, in some pair of many rows), and weights that cancel."""
    p = probabilities(job.student, job.student_statistics, job.n, job.vocab)
    q = probabilities(job.teacher, job.teacher_statistics, job.n, job.vocab)
    signs, of_p, of_q = torch.zeros_like(job.d_cost), torch.zeros_like(p), torch.zeros_like(q)
    weights = job.d_cost.abs().nan_to_num(0.0)
    for g, (start, stop) in enumerate(zip(job.starts[:-1], job.starts[1:])):
        size, rows = stop - start, slice(start, stop)
        apart = (p[rows, None] - q[None, rows]).abs()
        near = ((apart > 0) & (apart <= rounding * p[rows, None])).double()  # an exact tie has the sign 0
        weight = weights[g, :size, :size]
        signs[g, :size, :size] = 2 * torch.einsum("iv,ijv->ij", p[rows], near)
        of_p[rows] = 2 * torch.einsum("ij,ijv->iv", weight, near)
        of_q[rows] = 2 * torch.einsum("ij,ijv->jv", weight, near)
        of_p[rows] += rounding / 20 * (weight.sum(1) + job.student_means[rows].abs())[:, None]
        of_q[rows] += rounding / 20 * (weight.sum(0) + job.teacher_means[rows].abs())[:, None]
    slopes = (abs(x.scale) / x.temperature[:, None] for x in (job.student, job.teacher))
    return signs, *(x * y * slope for x, y, slope in zip((p, q), (of_p, of_q), slopes))


def check(job: R.PairwiseL1Job, name: str, device: str = "cpu") -> R.PairwiseL1Job:
    """Both phases against the reference; returns the reference's job."""
    want, kernel = widened(job), kernel_of("pairwise_l1", name)
    for phase in (R.TERMS, R.GRADIENT):
        reference(want, phase)
    there = moved(job, device)
    for phase in (R.TERMS, R.GRADIENT):
        kernel(there, phase)
    job = moved(there, "cpu")
    dtypes = {job.student.logits.dtype, job.teacher.logits.dtype}
    bar = SUM[torch.float64] if torch.float64 in dtypes else SUM[torch.float32]
    signs, *spare = undecided(want, bar)
    close(job.cost, want.cost, bar)
    if job.signs is not None:
        close(job.signs, want.signs, bar, signs)
    for got, true, turned in zip((job.student, job.teacher), (want.student, want.teacher), spare):
        if got.grad is not None:
            exact = gradient(true, job.n, job.vocab)
            close(gradient(got, job.n, job.vocab), exact, max(bar, STORE[got.grad.dtype]), turned)
    return want


@EACH
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("grad", ["in place", "elsewhere"])
@pytest.mark.parametrize("layout", ["rows", "scattered rows"])
def test_dtypes_and_layouts(name, dtype, grad, layout):
    n = sum(SIZES)
    student, teacher = (model(n, VOCAB, dtype, layout, grad) for _ in range(2))
    check(pair_job(student, teacher, SIZES, VOCAB), name)


@EACH
@pytest.mark.parametrize("shape", [(1.3, 0.0), (-0.7, 0.0), (0.6, 5.0), (-1.2, 6.0)], **IDS)
def test_scale_and_softcap(name, shape):
    n, (scale, softcap) = sum(SIZES), shape
    student = model(n, VOCAB, torch.float64, scale=scale, softcap=softcap, grad="in place")
    teacher = model(n, VOCAB, torch.float32, scale=-scale, grad="in place")
    check(pair_job(student, teacher, SIZES, VOCAB), name)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], **IDS)
@pytest.mark.parametrize("sizes", [(1,), (32,), (33, 2), (70,), (1, 1, 1, 1)], **IDS)
def test_group_sizes(name, sizes, dtype):
    """Whole tiles of Triton's and ragged ones; 20 entries are enough, as pairs are what is meant."""
    student, teacher = (model(sum(sizes), 20, dtype) for _ in range(2))
    check(pair_job(student, teacher, sizes, 20), name)


@EACH
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 257, 517])
def test_vocabularies(name, vocab):
    student, teacher = (model(3, vocab, torch.float32) for _ in range(2))
    check(pair_job(student, teacher, (3,), vocab), name)


@EACH
def test_what_is_wanted(name):
    """Sums of signs, and either gradient, are left out where not asked for."""
    for grads in ((None, "elsewhere"), ("elsewhere", None)):
        student, teacher = (model(4, VOCAB, torch.float32, grad=grad) for grad in grads)
        job = pair_job(student, teacher, (4,), VOCAB)
        job.signs = None
        check(job, name)


@EACH
def test_slabs_add_up(name):
    student, teacher = (model(4, VOCAB, torch.float64) for _ in range(2))
    job = pair_job(student, teacher, (3, 1), VOCAB)
    want, kernel = widened(job), kernel_of("pairwise_l1", name)
    reference(want, R.TERMS)
    for start, stop in ((0, 24), (24, 25), (25, VOCAB)):
        parts = (replace(x, offsets=x.offsets + start, multiple=1) for x in (job.student, job.teacher))
        kernel(replace(job, vocab=stop - start, **dict(zip(("student", "teacher"), parts))), R.TERMS)
    close(job.cost, want.cost, 1e-13)
    close(job.signs, want.signs, 1e-13)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], **IDS)
def test_ties(name, dtype):
    """The same rows on both sides: sign(0) is 0, exactly; beside it, few values that often coincide."""
    z = torch.randint(0, 3, (4, VOCAB)).double()
    student, teacher = (side(z, dtype, grad="elsewhere") for _ in range(2))
    job = pair_job(student, teacher, (4,), VOCAB)
    job.cost.zero_(), job.signs.zero_(), job.student_means.zero_(), job.teacher_means.zero_()
    job.d_cost = torch.diag(torch.randn(4, dtype=torch.float64))[None]
    for phase in (R.TERMS, R.GRADIENT):
        kernel_of("pairwise_l1", name)(job, phase)
    for sums in (job.cost, job.signs):
        assert (sums[0].diagonal() == 0).all() and sums.isfinite().all()
    for rows in (student, teacher):
        assert (gradient(rows, 4, VOCAB) == 0).all()
    z[1] += z[0] == 1  # some of the entries differ now
    student = side(z, dtype, grad="elsewhere")
    check(pair_job(student, teacher, (4,), VOCAB), name)


@EACH
def test_banned_entries(name):
    z = [torch.randn(4, VOCAB, dtype=torch.float64) for _ in range(2)]
    z[0][:, ::3] = z[1][:, 1::3] = z[0][:, :9] = z[1][:, :9] = -torch.inf
    check(pair_job(*(model(4, VOCAB, torch.float32, z=x) for x in z), (4,), VOCAB), name)


@EACH
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], **IDS)
def test_a_row_without_distribution_stays_among_its_group(name, value):
    z = torch.randn(6, VOCAB, dtype=torch.float64)
    z[1, 7] = value
    if value < 0:
        z[1] = value
    job = pair_job(model(6, VOCAB, torch.float32, z=z), model(6, VOCAB, torch.float32), (3, 3), VOCAB)
    job.student_statistics[1, R.PAIRWISE_LOGZ] = torch.nan
    job.d_cost[0] = torch.nan
    want, kernel = widened(job), kernel_of("pairwise_l1", name)
    for phase in (R.TERMS, R.GRADIENT):
        reference(want, phase)
        kernel(job, phase)
    assert job.cost[0, 1].isnan().all() and job.signs[0, 1].isnan().all()
    close(job.cost, want.cost, 1e-5)
    for got, true in ((job.student, want.student), (job.teacher, want.teacher)):
        got, true = gradient(got, 6, VOCAB), gradient(true, 6, VOCAB)
        assert got[:3].isnan().all()
        close(got[3:], true[3:], 1e-5)


@EACH
def test_a_weight_of_0_silences_its_pair(name):
    """Also of a row that holds NaN, whose own gradient is 0 then."""
    z = torch.randn(4, VOCAB, dtype=torch.float64)
    z[1] = torch.nan
    job = pair_job(model(4, VOCAB, torch.float32, z=z), model(4, VOCAB, torch.float32), (4,), VOCAB)
    job.d_cost[:, 1] = 0
    job.student_means[1] = torch.nan
    want = widened(job)
    reference(want, R.GRADIENT)
    kernel_of("pairwise_l1", name)(job, R.GRADIENT)
    assert (gradient(job.student, 4, VOCAB)[1] == 0).all()
    for got, true in ((job.student, want.student), (job.teacher, want.teacher)):
        close(gradient(got, 4, VOCAB), gradient(true, 4, VOCAB), 1e-5)


@EACH
def test_a_gradient_narrower_than_the_logits(name):
    student, teacher = (model(5, VOCAB, torch.float32, grad_dtype=torch.bfloat16) for _ in range(2))
    check(pair_job(student, teacher, (5,), VOCAB), name)


@EACH
def test_no_rows(name):
    empty = (model(0, VOCAB, torch.float32) for _ in range(2))
    job = pair_job(*empty, (0,), VOCAB)
    for phase in (R.TERMS, R.GRADIENT):
        kernel_of("pairwise_l1", name)(job, phase)


# --- what Triton's has of its own -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [(6, 2, 1 << 12), (6, 2, 1 << 16), (1 << 20, 1 << 20, 1)],
    ids=["rounds", "many shares", "one share"],
)
def test_shares_of_the_vocabulary(limits, monkeypatch):
    """Several rounds of several shares, the last ones ragged; and one program for all of it."""
    for limit, value in zip(("_MOST_IN_A_SHARE", "_LEAST_IN_A_SHARE", "_PAIR_SUMS"), limits):
        monkeypatch.setattr(runtime, limit, value)
    student, teacher = (model(4, VOCAB, torch.float32) for _ in range(2))
    check(pair_job(student, teacher, (3, 1), VOCAB), "triton")


@pytest.mark.parametrize("sizes", [(1,), (256,), (5, 1, 3), (1,) * 40, (300, 1, 1)], **IDS)
@pytest.mark.parametrize("vocab", [1, 1000, 151936])
def test_plans(sizes, vocab):
    """Every place and line is inside the scratch memory, and all lines have a share."""
    for wide in (False, True):
        plan = runtime._PairwisePlan(sum(sizes), len(sizes), max(sizes), vocab, wide)
        start, place = 0, 0
        for group, size in enumerate(sizes):
            granule = runtime.PAIR_GRANULE
            begin = start // granule * granule + group * granule
            assert begin >= place and begin % granule == 0
            start, place = start + size, begin + size
            assert begin + runtime._up(size, plan.pairs.TILE) <= plan.places
        assert plan.lines >= vocab and plan.share <= runtime._MOST_IN_A_SHARE
        assert all(x % runtime.PAIR_UNROLL == 0 for x in (plan.lines, plan.share))
        for phase in (R.TERMS, R.GRADIENT):
            arguments = (sum(sizes), len(sizes), max(sizes), vocab, wide, phase)
            assert PAIRWISE_L1_SCRATCH["triton"](*arguments) == plan.bytes[phase]
