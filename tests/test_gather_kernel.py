"""The gather kernel of every backend that has one, against the reference in float64."""

import pytest
import torch
from cases import DTYPES
from jobs import (
    SPREAD,
    backends_of,
    close,
    gather_job,
    gradient,
    ids_for,
    keeps_logits,
    kernel_of,
    layouts_of,
    moved,
    side,
)
from jobs import widened as wide_job

from kd_kernels import rows as R
from kd_kernels import triton_runtime as runtime
from kd_kernels.reference.gather import gather as reference

BACKENDS = backends_of("gather")
EACH = pytest.mark.parametrize("name", BACKENDS)
IDS = {"ids": lambda x: str(x).replace("torch.", "")}
N, VOCAB, K = 4, 611, 9  # three blocks of Triton's, the last one ragged
# Of sums, and of a stored gradient: a few roundings of the arithmetic, one of the store.
SUM = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
STORE = {torch.float64: 1e-13, torch.float32: 8e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def test_there_is_something_to_test():
    assert {"triton", "reference"} <= set(BACKENDS)


def logits(n: int = N, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(n, vocab, dtype=torch.float64) * SPREAD


def temperatures(n: int = N) -> torch.Tensor:
    return torch.rand(n, dtype=torch.float64) + 0.6


def check(job: R.GatherJob, name: str, together: bool = False, device: str = "cpu") -> R.GatherJob:
    """Both phases, in one call or in two, against the reference; returns the reference's job."""
    want = wide_job(job)
    reference(want, R.STATISTICS)
    reference(want, R.GRADIENT)
    kernel, before = kernel_of("gather", name), job.side.read(job.n, job.vocab).clone()
    there = moved(job, device)
    if together:
        kernel(there, R.STATISTICS | R.GRADIENT)
    else:
        kernel(there, R.STATISTICS)
        assert keeps_logits(name, moved(there, "cpu"), before)
        kernel(there, R.GRADIENT)
    job = moved(there, "cpu")
    dtype = job.side.logits.dtype
    columns = [R.OTHERS_MAX, R.OTHERS_LOGZ]
    columns += [R.OTHERS_LOGZ_HARD] * job.hard + [R.OTHERS_MEAN] * job.means
    close(job.gathered, want.gathered, SUM[dtype])
    close(job.statistics[:, columns], want.statistics[:, columns], SUM[dtype])
    close(gradient(job), gradient(want), STORE[job.side.grad.dtype])
    return want


@EACH
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("grad", ["in place", "elsewhere"])
def test_dtypes_and_layouts(name, dtype, grad):
    for layout in layouts_of(name):
        rows = side(logits(), dtype, layout, temperature=temperatures(), grad=grad)
        check(gather_job(rows, ids_for(N, VOCAB, K, unused=True), VOCAB), name)


@EACH
@pytest.mark.parametrize("shape", [(1.3, 0.0), (-0.7, 0.0), (0.0, 0.0), (0.6, 5.0), (-1.2, 6.0)], **IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], **IDS)
def test_scale_and_softcap(name, shape, dtype):
    scale, softcap = shape
    for layout in layouts_of(name)[1:]:
        rows = side(
            logits(), dtype, layout, temperature=temperatures(), scale=scale, softcap=softcap, grad="in place"
        )
        check(gather_job(rows, ids_for(N, VOCAB, K, unused=True), VOCAB), name)


@EACH
@pytest.mark.parametrize("k", [0, 1, 16, 100])
def test_number_of_ids(name, k):
    for unused in (False, True):
        rows = side(logits(), torch.float32, temperature=temperatures(), grad="elsewhere")
        check(gather_job(rows, ids_for(N, VOCAB, k, unused), VOCAB), name)


@EACH
@pytest.mark.parametrize("wanted", [(False, False, False), (True, False, False), (False, True, True)], **IDS)
def test_what_is_wanted(name, wanted):
    hard, means, slope = wanted
    rows = side(logits(), torch.float32, temperature=temperatures(), grad="elsewhere")
    ids = ids_for(N, VOCAB, K, unused=True)
    check(gather_job(rows, ids, VOCAB, hard=hard, means=means, slope=slope), name)


@EACH
def test_both_phases_in_one_call(name):
    for softcap in (0.0, 5.0):
        rows = side(logits(), torch.float32, temperature=temperatures(), softcap=softcap, grad="in place")
        check(gather_job(rows, ids_for(N, VOCAB, K, unused=True), VOCAB), name, together=True)


@EACH
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_gradient_of_logits_as_they_were(name, softcap):
    """A driver may project again for the gradient: then nothing is overwritten at the ids."""
    z, ids = logits(), ids_for(N, VOCAB, K, unused=True)
    first = side(z, torch.float32, temperature=temperatures(), softcap=softcap, grad="in place")
    job = gather_job(first, ids, VOCAB)
    want = wide_job(job)
    kernel_of("gather", name)(job, R.STATISTICS)
    job.side = side(
        z, torch.float32, temperature=first.temperature, softcap=softcap, grad="elsewhere"
    )  # fresh memory
    kernel_of("gather", name)(job, R.GRADIENT)
    reference(want, R.STATISTICS)
    reference(want, R.GRADIENT)
    close(gradient(job), gradient(want), STORE[torch.float32])


@EACH
@pytest.mark.parametrize("vocab", [1, 2, 7, 256, 257, 512])
def test_small_vocabularies(name, vocab):
    """With ``unused`` the first row's ids take all entries where there are few: no others."""
    rows = side(logits(vocab=vocab), torch.float64, temperature=temperatures(), grad="in place")
    job = gather_job(rows, ids_for(N, vocab, K, unused=True), vocab)
    want = check(job, name)
    if vocab <= K:
        assert want.statistics[0].tolist() == [-torch.inf, -torch.inf, -torch.inf, 0]


@EACH
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_banned_entries(name, softcap):
    """-inf among the ids and among the others, and nothing else among those of row 1; a softcap makes
    -softcap of it."""
    z, ids = logits(), ids_for(N, VOCAB, K, unused=False)
    z[:, ::3] = -torch.inf
    others = torch.ones(VOCAB, dtype=torch.bool)
    others[ids[1].long()] = False
    z[1, others] = -torch.inf
    z[0, ids[0, :3].long()] = -torch.inf
    for layout in layouts_of(name):
        rows = side(z, torch.float32, layout, temperature=temperatures(), softcap=softcap, grad="in place")
        want = check(gather_job(rows, ids, VOCAB), name)
        assert (want.statistics[1, 0] == -torch.inf) == (softcap == 0)


@EACH
def test_a_logit_far_above_and_far_below(name):
    z, ids = logits() * 1000, ids_for(N, VOCAB, K, unused=True)
    rows = side(z, torch.float32, temperature=temperatures(), grad="elsewhere")
    check(gather_job(rows, ids, VOCAB), name)


@EACH
@pytest.mark.parametrize("value", [torch.nan, torch.inf], **IDS)
def test_what_is_no_number_poisons_its_row_alone(name, value):
    z, ids = logits(n=5), ids_for(5, VOCAB, K, unused=False)
    free = next(i for i in range(300, VOCAB) if i not in ids)
    z[0, free] = z[2, free] = value  # among the others; in row 2 without weight
    z[3, int(ids[3, 4])] = value  # at an id: the others do not notice
    rows = side(z, torch.float32, temperature=temperatures(5), grad="elsewhere")
    job = gather_job(rows, ids, VOCAB)
    job.soft[2] = job.slope[2] = job.hard_weight[2] = 0
    want = wide_job(job)
    reference(want, R.STATISTICS)
    reference(want, R.GRADIENT)
    kernel_of("gather", name)(job, R.STATISTICS)
    kernel_of("gather", name)(job, R.GRADIENT)
    sums = [R.OTHERS_LOGZ, R.OTHERS_LOGZ_HARD, R.OTHERS_MEAN]
    assert job.statistics[0, sums].isnan().all() and job.statistics[2, sums].isnan().all()
    close(job.statistics[[1, 3, 4]], want.statistics[[1, 3, 4]], SUM[torch.float32])
    close(job.gathered, want.gathered, SUM[torch.float32])
    got, expected = gradient(job), gradient(want)
    assert got[0, free].isnan()
    close(got[1:], expected[1:], STORE[torch.float32])
    assert got[2].isfinite().all()


@EACH
def test_a_gradient_narrower_than_the_logits(name):
    for layout in layouts_of(name):
        rows = side(
            logits(),
            torch.float32,
            layout,
            temperature=temperatures(),
            grad="elsewhere",
            grad_dtype=torch.bfloat16,
        )
        check(gather_job(rows, ids_for(N, VOCAB, K, unused=True), VOCAB), name)


@EACH
def test_no_rows(name):
    job = gather_job(side(logits(n=0), torch.float32, grad="elsewhere"), ids_for(0, VOCAB, 0, False), VOCAB)
    kernel_of("gather", name)(job, R.STATISTICS | R.GRADIENT)


@pytest.mark.parametrize("wide", [False, True])
def test_large_blocks_of_triton(wide):
    block = (runtime.LARGE_WIDE if wide else runtime.LARGE).block
    vocab = runtime._SMALL_VOCABULARY + block + 77
    dtype = torch.float64 if wide else torch.float32
    rows = side(logits(2, vocab), dtype, temperature=temperatures(2), grad="in place")
    check(gather_job(rows, ids_for(2, vocab, 70, unused=True), vocab), "triton")
