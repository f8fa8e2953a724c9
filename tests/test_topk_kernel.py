"""The topk kernel of every backend that has one, against the reference in float64."""

import pytest
import torch
from cases import DTYPES
from jobs import SPREAD, backends_of, kernel_of, moved, side, topk_job
from jobs import widened as wide_job

import kd_kernels as kd
from kd_kernels import rows as R
from kd_kernels import triton_runtime as runtime
from kd_kernels import triton_topk
from kd_kernels.backends import TABLE
from kd_kernels.reference.topk import topk as reference

BACKENDS = backends_of("topk")
EACH = pytest.mark.parametrize("name", BACKENDS)
IDS = {"ids": lambda x: str(x).replace("torch.", "")}
N, VOCAB = 4, 611  # three blocks of Triton's, the last one ragged
# Absolute, of logarithms and entropies.
SUM = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def test_there_is_something_to_test():
    assert {"triton", "reference"} <= set(BACKENDS)


def logits(n: int = N, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(n, vocab, dtype=torch.float64) * SPREAD


def check(job: R.TopkJob, name: str, exact: bool = True, device: str = "cpu") -> R.TopkJob:
    """Everything against the reference, which runs on the same rounded logits; returns the reference's job.

    ``exact``: z of the kernel is that of the reference, so the order is too.
    """
    before = job.side.read(job.n, job.vocab).clone()
    there = moved(job, device)
    kernel_of("topk", name)(there)
    job = moved(there, "cpu")
    assert torch.equal(job.side.read(job.n, job.vocab).nan_to_num(7), before.nan_to_num(7))
    want = wide_job(job)
    reference(want)
    bar = SUM[job.side.logits.dtype]
    if exact:
        assert torch.equal(job.ids, want.ids)
        assert torch.equal(job.target_ranks, want.target_ranks)
    close = {"rtol": 1e-13 if exact else 1e-5, "atol": 0 if exact else 1e-5, "equal_nan": True}
    torch.testing.assert_close(job.values, want.values, **close)
    torch.testing.assert_close(job.target_values, want.target_values, **close)
    torch.testing.assert_close(job.statistics, want.statistics, atol=bar, rtol=bar, equal_nan=True)
    check_samples(job, bar)
    return want


def check_samples(job: R.TopkJob, bar: float) -> None:
    """Each draw is where its uniform falls in the exact cumulated probability, up to rounding."""
    if not job.samples.numel():
        return
    wide = wide_job(job)
    z = wide.side.read(job.n, job.vocab) * job.side.scale
    if job.side.softcap:
        z = job.side.softcap * torch.tanh(z / job.side.softcap)
    p = torch.softmax(z / job.temperatures[0], -1)
    reached = torch.nn.functional.pad(p.cumsum(-1), (1, 0))
    drawn = job.samples.long()
    assert (p.gather(1, drawn) > 0).all()
    assert (reached.gather(1, drawn) - bar <= job.uniforms).all()
    assert (job.uniforms <= reached.gather(1, drawn + 1) + bar).all()


@EACH
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", ["rows", "scattered rows"])
def test_dtypes_and_layouts(name, dtype, layout):
    job = topk_job(side(logits(), dtype, layout), VOCAB, 7, (1.3,), targets=5, draws=4)
    want = check(job, name)
    assert want.target_ranks.amax() > 100 and want.target_ranks[0, 2] == 0


@EACH
@pytest.mark.parametrize("shape", [(1.3, 0.0), (-0.7, 0.0), (0.6, 5.0), (-1.2, 6.0)], **IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], **IDS)
def test_scale_and_softcap(name, shape, dtype):
    scale, softcap = shape
    rows = side(logits(), dtype, scale=scale, softcap=softcap)
    check(topk_job(rows, VOCAB, 7, (0.8,), targets=3, draws=3), name, exact=False)


@EACH
@pytest.mark.parametrize("k", [0, 1, 2, 33, 128])
def test_number_of_entries(name, k):
    check(topk_job(side(logits(), torch.float32), VOCAB, k, targets=k // 4), name)


@EACH
@pytest.mark.parametrize("temperatures", [(0.5, 1.0), (1.0, 2.0, 0.3), (1.0, 4.0, 0.7, 2.0, 3.0)], **IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], **IDS)
def test_temperatures(name, temperatures, dtype):
    check(topk_job(side(logits(), dtype), VOCAB, 5, temperatures, draws=2), name)


@EACH
@pytest.mark.parametrize("vocab", [1, 2, 7, 256, 257, 512])
@pytest.mark.parametrize("k", [0, 3, 7])
def test_small_vocabularies(name, vocab, k):
    """Also as many entries as k: the tail is empty."""
    k = min(k, vocab)
    want = check(topk_job(side(logits(vocab=vocab), torch.float32), vocab, k, targets=2, draws=2), name)
    if vocab == k:
        assert (want.statistics[:, R.topk_column(R.TOPK_LOG_TAIL)] == -torch.inf).all()


@EACH
@pytest.mark.parametrize("k", [5, 20])
def test_order_of_equal_entries(name, k, monkeypatch):
    """By id ascending, across blocks, at the end of the k too, and for -0 and 0; many cuts of the buffer."""
    usual = triton_topk.largest_launch

    def small(*shape):
        return triton_topk.Launch(usual(*shape).constants | {"P": 4, "BLOCK": 32, "CAPACITY": 64}, 1)

    monkeypatch.setattr(triton_topk, "largest_launch", small)
    ramp = torch.arange(VOCAB, dtype=torch.float64) / 64
    z = torch.stack(
        [
            (logits(1)[0] / 2).round(),
            torch.zeros(VOCAB, dtype=torch.float64),
            torch.randint(0, 2, (VOCAB,)) * -0.0,
            ramp,
            ramp.flip(0).floor(),
            -ramp.sqrt().round(),
        ]
    )
    z[2, ::3] = 0.0
    for dtype in (torch.float32, torch.float64):
        check(topk_job(side(z, dtype), VOCAB, k, targets=6), name)


@EACH
def test_a_tail_far_below_one(name):
    """What 1 - sum would lose: a tail of probability 1e-30."""
    z = logits()
    z[:, 5:9] += 70
    want = check(topk_job(side(z, torch.float32), VOCAB, 4), name)
    assert (want.statistics[:, R.topk_column(R.TOPK_LOG_TAIL)] < -40).all()


@EACH
def test_the_digits_of_a_small_tail(name):
    """A tail of probability 4.6e-12: to 1e-6 of itself, where 1 - sum is 0."""
    z = torch.randn(N, VOCAB, dtype=torch.float64).float().double()
    z[:, 300] = z.logsumexp(-1) - torch.tensor(4.6e-12, dtype=torch.float64).log()
    job = topk_job(side(z, torch.float32), VOCAB, 1)
    want = wide_job(job)
    reference(want)
    kernel_of("topk", name)(job)
    column = R.topk_column(R.TOPK_LOG_TAIL)
    assert (want.statistics[:, column].exp() / 4.6e-12 - 1).abs().max() < 0.2
    error = (job.statistics[:, column] - want.statistics[:, column]).expm1()
    assert error.abs().max() < 1e-6, error


@EACH
def test_large_logits(name):
    rows = side(logits() * 1000 + 1e4, torch.float32)
    check(topk_job(rows, VOCAB, 5, (1.0, 0.5), draws=2), name)


@EACH
def test_banned_entries(name):
    """-inf is never among the k largest, but can be a target."""
    z = logits()
    z[:, ::3] = -torch.inf
    z[1, 4:] = -torch.inf  # three finite ones
    z[2, :300] = -torch.inf  # a whole block of none
    job = topk_job(side(z, torch.float32), VOCAB, 5, targets=4, draws=3)
    job.targets[:, 0], job.targets[:, 3] = 6, 600
    want = check(job, name)
    assert want.ids[1].tolist()[3:] == [-1] * 2 or want.ids[1].tolist()[2:] == [-1] * 3
    softcapped = side(z, torch.float64, softcap=5.0)
    check(topk_job(softcapped, VOCAB, 5, draws=3), name, exact=False)


@EACH
def test_what_has_no_distribution(name):
    """NaN, +inf, nothing finite: NaN statistics, ids and samples in range or -1, other rows untouched."""
    z = logits(6)
    z[0, 300], z[1, 17], z[2] = torch.nan, torch.inf, -torch.inf
    z[3, 5] = z[3, 400] = torch.inf
    job = topk_job(side(z, torch.float32), VOCAB, 5, (1.0, 2.0), targets=2, draws=3)
    kernel_of("topk", name)(job)
    assert job.statistics[:4, 1:].isnan().all()
    assert job.ids[2].tolist() == [-1] * 5
    for ids in (job.ids, job.samples):
        assert ((ids >= -1) & (ids < VOCAB)).all()
    good = topk_job(side(z[4:], torch.float32), VOCAB, 5, (1.0, 2.0), targets=2, draws=3)
    good.targets, good.uniforms = job.targets[4:], job.uniforms[4:]
    kernel_of("topk", name)(good)
    for ours, alone in ((job.ids, good.ids), (job.statistics, good.statistics), (job.samples, good.samples)):
        assert torch.equal(ours[4:], alone)


@EACH
def test_the_ends_of_a_draw(name):
    """Uniforms of 0 and next to 1, and what has no probability at either end of a row and of a block."""
    z = logits()
    z[:, :2] = z[:, 254:258] = z[:, -200:] = -torch.inf
    job = topk_job(side(z, torch.float64), VOCAB, 0, draws=3)
    job.uniforms[:, 0], job.uniforms[:, 1] = 0, 1 - 2**-53
    check(job, name)
    assert (job.samples[:, 0] == 2).all() and (job.samples[:, 1] == VOCAB - 201).all()


@EACH
def test_draws_follow_the_distribution(name):
    """Evenly spread uniforms draw each id as often as its probability says, within one."""
    z = torch.randn(1, 40, dtype=torch.float64) * 1.5
    draws = 400 if name == "triton" else 4000
    job = topk_job(side(z, torch.float32), 40, 0, draws=draws)
    job.uniforms.copy_((torch.arange(draws) + 0.5) / draws)
    kernel_of("topk", name)(job)
    counts = torch.bincount(job.samples[0], minlength=40)
    assert (counts - torch.softmax(z.float().double(), -1)[0] * draws).abs().max() <= 1.001


@EACH
def test_no_rows(name):
    kernel_of("topk", name)(topk_job(side(logits(0), torch.float32), VOCAB, 3, targets=1, draws=1))


@pytest.mark.parametrize("wide", [False, True])
def test_large_blocks_of_triton(wide):
    block = (runtime.LARGE_WIDE if wide else runtime.LARGE).block
    vocab = runtime._SMALL_VOCABULARY + block + 77
    z = logits(2, vocab).round()
    z[1] = z[1].sort().values
    rows = side(z, torch.float64 if wide else torch.float32)
    check(topk_job(rows, vocab, 40, targets=2, draws=2), "triton")


@pytest.mark.parametrize("vocab", [70001, 140003])
def test_groups_of_several_runs_of_triton(vocab):
    """Rounded numbers: ties across runs and groups. A ramp: the last group has all of the largest."""
    z = logits(2, vocab).round()
    z[1] = torch.arange(vocab) / 4096
    launch = triton_topk.walk_launch(vocab, 1, 1, wide=False)
    assert launch.constants["RUNS"] == (2 if vocab < 2**17 else 4)
    check(topk_job(side(z, torch.float32), vocab, 40, (0.9, 2.0), targets=3, draws=3), "triton")


@pytest.mark.parametrize("kind", ["constant", "all but one", "rounded"])
def test_rows_of_equal_entries_cost_triton_no_more(kind, monkeypatch):
    """A few groups are read again, and candidates cut once or twice, as in a row of any numbers."""
    vocab = 140003  # what is read again is several blocks
    z = {
        "constant": torch.zeros(1, vocab),
        "all but one": torch.where(torch.arange(vocab) == 7000, 5.0, 0.0)[None],
        "rounded": torch.randn(1, vocab).mul(3).round().clamp(max=6),
    }[kind].double()
    module, calls = runtime.kernels().topk, {"cut": 0, "load_groups": 0}

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    check(topk_job(side(z, torch.bfloat16), vocab, 40), "triton")
    group = triton_topk.group_of(triton_topk.walk_launch(vocab, 1, 0, wide=False))
    block = triton_topk.largest_launch(vocab, 40, group, wide=False).constants["BLOCK"]
    assert calls["cut"] <= 2 and (kind == "rounded" or calls["cut"] > 0)
    assert (
        0 < calls["load_groups"] <= 2 * -(-50 * group // block)
    )  # to find the largest, and to sum up the others


def test_scratch_of_triton_is_bounded(monkeypatch):
    """Rows beyond it wait for the next launch; the results are the same bits."""
    job = topk_job(side(logits(9), torch.float32), VOCAB, 5, (1.0, 0.5), targets=2, draws=3)
    triton_topk.topk(job)
    names = ("ids", "values", "statistics", "target_values", "target_ranks", "samples")
    want = {name: getattr(job, name).clone() for name in names}
    rows, launch = [], triton_topk._launch
    monkeypatch.setattr(triton_topk, "_launch", lambda job, *rest: rows.append(job.n) or launch(job, *rest))
    groups, capacity = 20, triton_topk.largest_launch(VOCAB, 5, 32, wide=False).constants["CAPACITY"]
    row = groups * (4 * (1 + 2 * 2) + 4 + 8) + 4 * capacity
    for room, parts in ((0, [1] * 9), (7 * row, [4, 4, 1]), (64 * row, [9])):
        monkeypatch.setattr(triton_topk, "_SCRATCH", room)
        for name in names:
            getattr(job, name).fill_(7)
        rows.clear()
        triton_topk.topk(job)
        assert rows == parts
        assert all(torch.equal(getattr(job, name), values) for name, values in want.items())


def test_the_buffer_of_candidates_always_has_room():
    for k in (1, 15, 64, 65, 512, 1000, 1024):
        for vocab in (1, 100, 32000, 151936, 2**20, 2**23):
            for temperatures in (1, 3, 20):
                for wide in (False, True):
                    group = triton_topk.group_of(triton_topk.walk_launch(vocab, temperatures, 1, wide))
                    plan = triton_topk.largest_launch(vocab, k, group, wide).constants
                    block, capacity = plan["BLOCK"], plan["CAPACITY"]
                    assert block % group == 0 and plan["GP"] * group >= vocab
                    assert capacity >= runtime.power_of_two(k) + 1.5 * block and plan["MANY"] >= k
                    assert capacity & (capacity - 1) == 0


@pytest.mark.parametrize("call", ["linear_topk", "sorted"])
def test_triton_says_how_many_it_takes(call):
    z = torch.randn(2, 2000)

    def run(backend):
        if call == "linear_topk":
            return kd.linear_topk(z, 1025, backend=backend).logits
        return kd.distill(z, z.flip(0), kd.SortedWasserstein(top_k=1025), backend=backend)

    with pytest.raises(
        kd.BackendUnavailable, match="triton: keeps 1024 entries of a row at most, 1025 are wanted"
    ):
        run("triton")
    assert torch.equal(run(None), run("cpu"))
    small, objective = torch.randn(2, 100), kd.SortedWasserstein(top_k=2000)  # 100 of 100
    both = [
        kd.distill(small, small[:, :60].flip(0), objective, backend=backend) for backend in ("triton", "cpu")
    ]
    assert abs(both[0] - both[1]) < 1e-6
    gpu = torch.device("cuda")
    serves = [objections(gpu, k=1025) for _, objections in TABLE["topk"].values()]
    assert serves[-1] == [] and all(serves[:-1]), "the reference, and nobody before it"
