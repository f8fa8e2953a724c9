"""kd.linear_topk and kd.linear_rank against torch in float64; draws against the softmax they come from."""

import pytest
import torch
from cases import DTYPES, OBJECTIVES, SHAPING, Batch, batch_for, error
from plain import widened

import kd_kernels as kd
from kd_kernels.counter_random import uniforms
from kd_kernels.reference.dense import logits_of

IDS = {"ids": lambda x: str(x).replace("torch.", "")}
# Logits come from a float32 product whatever the inputs are.
BAR = {dtype: 1e-12 if dtype == torch.float64 else 3e-6 for dtype in DTYPES}
SMALL = {"workspace_bytes": 3 << 10}  # of float64 logits a row at a time, of float32 three
FLOATS = ("logits", "lse", "max", "entropy", "log_tail_mass", "target_logprob")


def plain(source, k, temperature, targets):
    """Every result from materialised logits, in float64; ids by a stable sort, which is the tie rule."""
    z = logits_of(widened(source, torch.float64)).detach()
    values, order = z.sort(dim=-1, descending=True, stable=True)
    log_p = (z / temperature).log_softmax(-1)
    place = order.argsort(-1)
    index = targets.clamp(min=0)[..., None]
    known = targets >= 0
    return {
        "ids": order[..., :k],
        "logits": values[..., :k],
        "lse": (z / temperature).logsumexp(-1),
        "max": values[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_tail_mass": log_p.gather(-1, order[..., k:]).logsumexp(-1),
        "target_logprob": torch.where(known, log_p.gather(-1, index)[..., 0], 0.0),
        "target_rank": torch.where(known, place.gather(-1, index)[..., 0] + 1, 0),
    }


def close(x, y, bar):
    assert torch.allclose(x.double(), y, rtol=bar, atol=bar), (x.double() - y).abs().max()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("shaping", SHAPING)
@pytest.mark.parametrize("k", [1, 7, 64])
def test_everything_from_a_head(dtype, shaping, k, backend):
    batch = batch_for(backend)
    source = batch.source("teacher", "head", dtype, **SHAPING[shaping])
    found = kd.linear_topk(source, k, temperature=1.3, targets=batch.labels, backend=backend, **SMALL)
    want = plain(source, k, 1.3, batch.labels)
    assert found.ids.dtype == torch.int32 and found.ids.shape == (*batch.lead, k)
    assert found.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(found.logits, want["logits"], BAR[dtype])
    z = logits_of(widened(source, torch.float64)).detach()
    close(z.gather(-1, found.ids.long()), want["logits"], BAR[dtype])  # ties of rounding aside
    for name in FLOATS[1:]:
        close(getattr(found, name), want[name], BAR[dtype])
    assert not any(x.requires_grad for x in found if isinstance(x, torch.Tensor))
    if dtype == torch.float64:
        assert torch.equal(found.ids.long(), want["ids"])
        assert torch.equal(found.target_rank.long(), want["target_rank"])


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_ties_go_to_the_smaller_id(dtype, backend):
    """A few distinct values: nearly everything is a tie."""
    z = torch.randint(0, 6, (3, 1500)).to(dtype) / 2
    targets = torch.tensor([0, 700, 1499])
    found = kd.linear_topk(z, 300, targets=targets, backend=backend)
    want = plain(kd.Logits(z), 300, 1.0, targets)
    assert torch.equal(found.ids.long(), want["ids"])
    assert torch.equal(found.target_rank.long(), want["target_rank"])


@pytest.mark.parametrize("gap", [12.0, 26.0, 300.0])
def test_the_tail_of_a_sure_teacher(gap, backend):
    """A true tail of 5e-3, 4e-9 and 5e-128: 1 minus the rest has lost it."""
    z = torch.randn(2, 1000, dtype=torch.float64) - gap
    z[:, [3, 999]] = torch.tensor([1.0, 0.5], dtype=torch.float64)
    z = z.float().double()
    want = z.log_softmax(-1)
    want[:, [3, 999]] = -torch.inf
    for dtype in (torch.float32, torch.float64):
        found = kd.linear_topk(z.to(dtype), 2, backend=backend)
        assert found.ids.tolist() == [[3, 999]] * 2
        assert torch.allclose(found.log_tail_mass.double(), want.logsumexp(-1), rtol=1e-6)


def test_several_temperatures(backend):
    batch = batch_for(backend)
    source = batch.source("teacher", "head", torch.float64)
    temperatures = (0.5, 1.0, 3.0)
    found = kd.linear_topk(source, 5, temperature=temperatures, targets=batch.labels, backend=backend)
    assert found.ids.shape == (*batch.lead, 5) and found.max.shape == batch.lead
    for i, temperature in enumerate(temperatures):
        want = plain(source, 5, temperature, batch.labels)
        for name in ("lse", "entropy", "log_tail_mass", "target_logprob"):
            close(getattr(found, name)[..., i], want[name], 1e-12)
    one = kd.linear_topk(source, 5, temperature=[1.0], backend=backend)
    assert one.lse.shape == (*batch.lead, 1)


def test_absent_and_poisoned_logits(backend):
    z = torch.randn(5, 90)
    z[0, 4:] = -torch.inf  # four tokens, all else banned
    z[1, 50], z[2, 60], z[3] = torch.nan, torch.inf, -torch.inf
    found = kd.linear_topk(z, 6, targets=torch.tensor([80, 1, 1, 1, 1]), samples=4, seed=1, backend=backend)
    assert (found.ids[0, 4:] == -1).all() and (found.logits[0, 4:] == -torch.inf).all()
    assert set(found.ids[0, :4].tolist()) == {0, 1, 2, 3}
    assert found.log_tail_mass[0] == -torch.inf and found.target_logprob[0] == -torch.inf
    for name in ("lse", "entropy", "log_tail_mass", "target_logprob"):
        assert getattr(found, name)[1:4].isnan().all() and getattr(found, name)[4].isfinite(), name
    assert found.ids.max() < 90 and found.sample_ids.max() < 90
    assert set(found.sample_ids[0].tolist()) <= {-1, 0, 1, 2, 3}
    assert (found.sample_ids[1:4] == -1).all() and (found.sample_counts[1:4] == 0).all()


@pytest.mark.parametrize("k", [0, 203])
def test_none_and_all(k, backend):
    batch = batch_for(backend)
    source = batch.source("teacher", "head", torch.float64)
    found = kd.linear_topk(source, k, backend=backend)
    assert found.ids.shape == (*batch.lead, k)
    if k:
        assert (found.log_tail_mass == -torch.inf).all()
    else:
        assert found.log_tail_mass.abs().max() < 1e-12  # everything is the tail
    assert found.target_rank is None and found.sample_ids is None


def test_ranks(backend):
    batch = batch_for(backend)
    source = batch.source("teacher", "head", torch.float64, bias=True)
    ids = torch.randint(0, batch.vocab, (*batch.lead, 4))
    ids.view(-1, 4)[1, 2], ids.view(-1, 4)[2, 0] = -1, -100
    z = logits_of(source).detach()
    place = z.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    want = torch.where(ids >= 0, place.gather(-1, ids.clamp(min=0)) + 1, 0)
    found = kd.linear_rank(source, ids, 20, backend=backend, **SMALL)
    assert torch.equal(found.rank.long(), want)
    assert torch.equal(found.member, (want >= 1) & (want <= 20)) and found.member.any()
    one = kd.linear_rank(source, ids[..., 3], backend=backend)
    assert torch.equal(one.rank.long(), want[..., 3]) and one.member is None


def test_ranks_of_banned_tokens_and_broken_rows(backend):
    z = torch.tensor([[-torch.inf, 1.0, -torch.inf], [torch.nan, 1.0, 2.0], [-torch.inf] * 3])
    found = kd.linear_rank(z, torch.tensor([[0, 1, 2]] * 3), k=2, backend=backend)
    assert found.rank[0].tolist() == [2, 1, 3] and found.member[0].tolist() == [False, True, False]
    assert (found.rank[1:] == 0).all() and not found.member[1:].any()


# --- draws --------------------------------------------------------------------------------------------


def test_draws_follow_the_softmax(backend):
    """Chi-squared of all draws, at a temperature: 39 degrees of freedom, within 5 sigma above and 3 below."""
    z = torch.randn(40)
    rows, draws = (4, 200) if backend == "triton" else (200, 200)
    found = kd.linear_topk(z.expand(rows, -1), 0, temperature=1.7, samples=draws, seed=5, backend=backend)
    ids, counts = found.sample_ids, found.sample_counts
    assert (counts.sum(-1) == draws).all() and ((ids >= 0) == (counts > 0)).all()
    assert ((ids[:, 1:] > ids[:, :-1]) | (ids[:, 1:] == -1)).all()  # each once, ascending
    total = torch.zeros(40, dtype=torch.float64)
    total.scatter_add_(0, ids.clamp(min=0).long().view(-1), counts.double().view(-1))
    expected = (z.double() / 1.7).softmax(-1) * rows * draws
    chi = ((total - expected) ** 2 / expected).sum().item()
    assert 39 - 3 * 78**0.5 < chi < 39 + 5 * 78**0.5, chi
    # tokens are independent of each other: the rows' own counts scatter as they should
    if rows > 100:
        own = torch.zeros(rows, 40, dtype=torch.float64)
        own.scatter_add_(1, ids.clamp(min=0).long(), counts.double())
        p = expected / (rows * draws)
        assert torch.allclose(own.var(0), draws * p * (1 - p), rtol=0.6)


def test_draws_do_not_depend_on_the_chunks():
    batch = Batch(lead=(50,), vocab=3000)
    source = batch.source("teacher", "head", torch.float32)
    results = [
        kd.linear_topk(source, 3, samples=20, seed=9, workspace_bytes=w)
        for w in (1 << 26, 3 * 3000 * 4 + 999)
    ]
    assert torch.equal(results[0].sample_ids, results[1].sample_ids)
    assert torch.equal(results[0].sample_counts, results[1].sample_counts)
    for seed in (10, 9 + (1 << 40), -9):  # all of its bits matter
        other = kd.linear_topk(source, 3, samples=20, seed=seed)
        assert not torch.equal(results[0].sample_ids, other.sample_ids)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        first = kd.linear_topk(source, 0, samples=20).sample_ids
        second = kd.linear_topk(source, 0, samples=20).sample_ids
        torch.manual_seed(4)
        assert torch.equal(first, kd.linear_topk(source, 0, samples=20).sample_ids)
    assert not torch.equal(first, second)


def test_draws_agree_between_backends():
    z = torch.randn(20, 5000) * 3
    a, b = (kd.linear_topk(z, 0, samples=30, seed=2, backend=x) for x in ("cpu", "reference"))
    assert (a.sample_ids != b.sample_ids).float().mean() < 0.01  # up to rounding


def test_uniforms_are_uniform_and_have_no_state():
    seed = torch.tensor(3)
    u = uniforms(seed, torch.arange(2000), 50)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    assert abs(((counts - expected) ** 2 / expected).sum() - 63) < 5 * 126**0.5
    for pair in ((u[:, 0], u[:, 1]), (u[:-1].reshape(-1), u[1:].reshape(-1))):  # slots, tokens
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.1
    assert torch.equal(uniforms(seed, torch.arange(7, 9), 20), u[7:9, :20])
    assert not torch.equal(uniforms(torch.tensor(4), torch.arange(2000), 50), u)


# --- from there to a loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_a_saved_teacher_distils(objective, backend):
    """All of the vocabulary saved is the teacher itself; part of it is less."""
    batch = batch_for(backend, vocab=61)
    student, teacher = (batch.source(side, "head", torch.float64) for side in ("student", "teacher"))
    for temperature in (1.0, 1.6):
        options = {"temperature": temperature, "backend": backend}
        dense = kd.distill(student, teacher, objective, **options)
        saved = kd.linear_topk(teacher, 61, temperature=temperature, backend=backend).target()
        assert error(kd.distill(student, saved, objective, **options), dense) < 1e-11
        some = kd.linear_topk(teacher, 20, temperature=(3.0, temperature), backend=backend)
        loss = kd.distill(student, some.target(index=1), objective, **options)
        assert 0 < loss < dense


def test_a_sure_teacher_keeps_its_tail():
    """In float32, 1 minus what its two tokens have is 0 or rounding; the recorded tail is neither."""
    z = torch.randn(6, 61) - 20
    z[:, [3, 40]] = torch.tensor([1.0, 0.5])
    student = torch.randn(6, 61, dtype=torch.float64)
    want = kd.distill(student, kd.linear_topk(z.double(), 2).target(), kd.ReverseKL())
    target = kd.linear_topk(z, 2).target()
    assert error(kd.distill(student, target, kd.ReverseKL()), want) < 1e-6
    without = kd.SparseTarget(target.ids, target.logprobs)
    assert error(kd.distill(student, without, kd.ReverseKL()), want) > 1e-3


def test_the_file_of_the_docs_round_trips(tmp_path):
    """docs/topk.md: what it writes down is the teacher that ``target()`` makes."""
    z, student = torch.randn(2, 3, 61), torch.randn(2, 3, 61)
    saved = kd.linear_topk(z, 9, temperature=2.0)
    record = {
        "ids": saved.ids,
        "logprobs": saved.target().logprobs,
        "log_tail_mass": saved.log_tail_mass,
        "temperature": saved.temperature,
    }
    torch.save(record, tmp_path / "teacher.pt")
    r = torch.load(tmp_path / "teacher.pt", weights_only=True)
    target = kd.SparseTarget(
        r["ids"], r["logprobs"], temperature=r["temperature"], log_tail_mass=r["log_tail_mass"]
    )
    losses = [kd.distill(student, t, kd.ForwardKL(), temperature=2.0) for t in (target, saved.target(), z)]
    assert torch.equal(losses[0], losses[1]) and 0 < losses[0] < losses[2]


def test_saved_draws_distil():
    batch = Batch(vocab=61)
    student, teacher = (batch.source(side, "head", torch.float64) for side in ("student", "teacher"))
    target = kd.linear_topk(teacher, 0, samples=5000, seed=3, temperature=(1.4, 9.0)).sampled()
    loss = kd.distill(student, target, kd.ForwardKL(), temperature=1.4)
    assert abs(loss / kd.distill(student, teacher, kd.ForwardKL(), temperature=1.4) - 1) < 0.05


# --- form ---------------------------------------------------------------------------------------------


def assert_same(found, other):
    for name, x, y in zip(found._fields, found, other):
        assert x is y is None or name == "temperature" or torch.equal(x, y), name


def test_strides():
    z = torch.randn(4, 6, 900).transpose(0, 1)[:, 1:]
    whole = kd.linear_topk(z.contiguous(), 9, samples=3, seed=1)
    assert_same(kd.linear_topk(z, 9, samples=3, seed=1), whole)


def test_threads_do_not_change_a_bit():
    """So many rows that every thread gets some (a team wakes slowly: 100 rows are gone before), and so unlike
    that what one leaves shows in others."""
    rows = torch.arange(400.0)
    z = torch.randn(400, 3000) * (1 + rows % 5)[:, None] + 40 * (rows % 3)[:, None]
    targets = torch.randint(3000, (400,))
    options = {"temperature": (1.0, 0.7), "targets": targets, "samples": 9, "seed": 1}
    one = kd.linear_topk(z, 9, **options)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        other = kd.linear_topk(z, 9, **options)
        torch.set_num_threads(1)
        assert_same(other, one)


def test_a_head_computes_in_the_dtypes_asked_for(backend):
    batch = batch_for(backend)
    source = batch.source("teacher", "head", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under = kd.linear_topk(source, 5, backend=backend)
    narrow = kd.Head(source.hidden.bfloat16(), source.weight.bfloat16())
    wide = kd.linear_topk(narrow, 5, backend=backend)
    assert torch.equal(under.logits, wide.logits)
    rounded = kd.linear_topk(narrow, 5, backend=backend, logits_dtype=torch.bfloat16).logits
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(rounded, wide.logits)


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()], ids=str)
def test_shapes(lead):
    head = kd.Head(torch.randn(*lead, 8), torch.randn(30, 8))
    found = kd.linear_topk(head, 4, samples=2, targets=torch.zeros(lead, dtype=torch.int64))
    assert found.ids.shape == (*lead, 4) and found.lse.shape == found.target_rank.shape == lead
    assert kd.linear_rank(head, torch.zeros(*lead, 3, dtype=torch.int32)).rank.shape == (*lead, 3)


def test_opcheck_and_compile():
    batch = Batch()
    source = batch.source("teacher", "head", torch.float32)
    one, seed = torch.ones(2, dtype=torch.float64), torch.tensor(3)
    labels = batch.labels.clamp(min=0).reshape(
        -1, 1
    )  # opcheck takes NaN, as a missing target has, for unequal
    call = (source.hidden.detach(), source.weight.detach(), None, labels, one, one * 0 + 1, seed, 4, 3)
    torch.library.opcheck(torch.ops.kd_kernels.linear_topk.default, (*call, None, None, None, None))

    def find(hidden, weight):
        return kd.linear_topk(kd.Head(hidden, weight), 4, targets=batch.labels, samples=3, seed=1)

    tensors = source.hidden.detach(), source.weight.detach()
    plainly, compiled = find(*tensors), torch.compile(find, fullgraph=True, backend="aot_eager")(*tensors)
    for x, y in zip(plainly[:-1], compiled[:-1]):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda z: kd.linear_topk(z, 91), r"k must be in \[0, 90\]"),
        (lambda z: kd.linear_topk(z, -1), "k must be in"),
        (lambda z: kd.linear_topk(z, 2.0), "k must be an int"),
        (lambda z: kd.linear_topk(z, 2, samples=-3), "samples must be >= 0"),
        (lambda z: kd.linear_topk(z, 2, samples=3, seed=1.5), "seed must be an int"),
        (lambda z: kd.linear_topk(z, 2, temperature=0.0), "temperature must be finite and > 0"),
        (lambda z: kd.linear_topk(z, 2, temperature=[1.0, -1.0]), "temperature must be finite and > 0"),
        (lambda z: kd.linear_topk(z, 2, temperature=[]), "at least one number"),
        (lambda z: kd.linear_topk(z, 2, temperature=torch.ones(3)), "use .tolist"),
        (lambda z: kd.linear_topk(z, 2, temperature="warm"), "temperature must be a number.*got str"),
        (lambda z: kd.linear_topk(z, 2, temperature=[1.0, None]), "temperature must be a number.*NoneType"),
        (lambda z: kd.linear_topk(z, 2, temperature=torch.ones(3).numpy()), "use .tolist"),
        (lambda z: kd.linear_topk(z, 2, temperature=2.0).target(index=1), "one of the 1 temperatures"),
        (lambda z: kd.linear_topk(z, 2, temperature=(1.0, 2.0)).target(index=-1), "one of the 2 temp"),
        (lambda z: kd.linear_topk(z, 0).target(), "K > 0"),
        (lambda z: kd.linear_topk(kd.Head(z, z), 2, workspace_bytes=8), "less than one row"),
        (lambda z: kd.linear_topk(z, 2, targets=torch.zeros(4).long()), "leading shape"),
        (lambda z: kd.linear_topk(z, 2, targets=torch.zeros(3)), "must be integers"),
        (lambda z: kd.linear_topk(z, 2, targets=torch.full((3,), 90)), r"must be in \[0, 90\)"),
        (lambda z: kd.linear_topk(z, 2, backend="gpu"), "backend must be one of"),
        (lambda z: kd.linear_topk([1.0], 2), "must be kd.Head"),
        (lambda z: kd.linear_topk(z, 2).sampled(), "there are no draws"),
        (lambda z: kd.linear_rank(z, torch.full((3, 2), -7)), "or ignore_index .*got -7"),
        (lambda z: kd.linear_rank(z, torch.zeros(2, 3).long()), "leading shape"),
        (lambda z: kd.linear_rank(z, torch.zeros(3).long(), 91), "k must be in"),
    ],
    ids=range(25),
)
def test_refusals(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(torch.randn(3, 90))


def test_what_a_collate_function_makes_of_results_is_named():
    options = {"samples": 2, "targets": torch.tensor([1, 2, 3])}
    saved = [kd.linear_topk(torch.randn(3, 9), 2, temperature=t, **options) for t in (1.0, 2.0)]
    together = torch.utils.data.default_collate(saved)
    for call in (together.target, together.sampled):
        with pytest.raises(TypeError, match="temperature must be a number or a tuple of them, got tensor"):
            call()
    for wrong in (0.0, True, 1):
        with pytest.raises(
            ValueError, match=f"index must be an integer, one of the 1 temperatures .* got {wrong}"
        ):
            saved[0].target(index=wrong)
    assert torch.equal(saved[0].target(index=torch.tensor(0)).logprobs, saved[0].target().logprobs)
