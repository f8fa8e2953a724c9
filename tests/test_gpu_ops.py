"""Every public call on a GPU as on the CPU, in numbers. ``pytest -m gpu``."""

import pytest
import torch
from cases import DTYPES, FLOOR, OPTIONS, SHAPING, Batch, error
from gpu import wants_gpu
from plain import compare, widened
from test_score import BAR as SCORE_BAR
from test_score import compare as compare_scores
from test_score import dense as dense_scores
from test_score import labels_for
from test_score import models as scored_models
from test_sparse import PAIR_IDS, PAIRS, options_for, target_of
from test_topk import BAR as TOPK_BAR
from test_topk import FLOATS, close
from test_topk import plain as plain_topk
from test_torch_integration_losses import LOSSES, inputs
from torch import Tensor
from transport import ORDERS

import kd_kernels as kd
from kd_kernels.counter_random import uniforms

pytestmark = wants_gpu
DEVICE = "cuda"
IDS = {"ids": lambda x: str(x).replace("torch.", "")}
SMALL = {"workspace_bytes": 3 << 10}  # several chunks, the last one ragged
# Kernels take seconds to compile: what they do in other types, tests of their own show.
USUAL = [torch.float32, torch.bfloat16]
WIDE = [torch.float32, torch.float64]


def outcome(call, given: dict, trained: tuple[str, ...], device: str, *dtypes: torch.dtype) -> list[Tensor]:
    """Results and gradients, of numbers that were rounded to each of ``dtypes`` in turn."""
    here = {}
    for name, x in given.items():
        for dtype in dtypes if x.is_floating_point() else ():
            x = x.to(dtype)
        here[name] = x.to(device).detach().clone().requires_grad_(name in trained)
    found = call(here)
    found = found if isinstance(found, tuple) else (found,)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=torch.float64).cos().view(x.shape) for x in found]
    total = sum((x * w.to(device, x.dtype)).sum() for x, w in zip(found, weights))
    return [x.detach().cpu() for x in (*found, *torch.autograd.grad(total, [here[k] for k in trained]))]


def as_on_the_cpu(call, given: dict, trained: tuple[str, ...], dtype: torch.dtype, floor: float) -> None:
    """Against float64: at most three times the CPU's error."""
    exact = outcome(call, given, trained, "cpu", dtype, torch.float64)
    plain, found = (outcome(call, given, trained, device, dtype) for device in ("cpu", DEVICE))
    for i, (x, y, z) in enumerate(zip(found, plain, exact)):
        assert z.any(), f"{i}: the test is vacuous"
        bar = 3 * error(y, z) + floor
        assert error(x, z) <= bar, f"{i}: error {error(x, z):.2e}, bar {bar:.2e}"


def test_single_numbers_of_another_device():
    """A trainer's count of items may be wherever it likes: the loss stays with the tokens."""
    z, w = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
    here = kd.distill(z, w, kd.ForwardKL(), num_items=3, temperature=2.0, token_weight=0.5)
    numbers = {"num_items": 3, "temperature": 2.0, "token_weight": 0.5}
    for device, other in (("cpu", DEVICE), (DEVICE, "cpu")):
        single = {name: torch.tensor(x, device=other) for name, x in numbers.items()}
        loss = kd.distill(z.to(device), w.to(device), kd.ForwardKL(), **single)
        assert loss.device.type == device
        assert error(loss.cpu(), here) < 1e-12


# --- losses of a loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss = LOSSES[name]
    # To a tolerance of 1e-5: an iteration more or less may do.
    as_on_the_cpu(loss.of, inputs(), loss.trained, torch.float32, 1e-4 if name == "sinkhorn" else 1e-5)


def head(d: dict, side: str = "student", **shaping) -> kd.Head:
    return kd.Head(d[f"{side} hidden"], d[f"{side} weight"], d[f"{side} bias"], **shaping)


HEAD = ("student hidden", "student weight", "student bias")
BOTH = (*HEAD, "teacher hidden", "teacher weight", "teacher bias")
LOGPROBS = {
    "of a head": (
        lambda d: kd.linear_logprobs(
            head(d, scale=1.3, softcap=6.0), d["ids"], temperature=d["temperature"], entropy=True, **SMALL
        ),
        HEAD,
    ),
    "of logits": (
        lambda d: kd.linear_logprobs(
            kd.Logits(d["student logits"], softcap=5.0), d["labels"], temperature=1.6, entropy=True,
            compact=False,
        ),
        ("student logits",),
    ),
}  # fmt: skip


def given(batch: Batch) -> dict[str, Tensor]:
    ids = torch.randint(0, batch.vocab, (*batch.lead, 6), generator=torch.Generator().manual_seed(0))
    flat = ids.view(-1, 6)
    flat[0, 2] = flat[0, 5]  # twice
    flat[1, 3], flat[2, 1], flat[3] = -1, -100, -100
    return {**batch.tensors, "labels": batch.labels, "temperature": batch.temperature, "ids": ids}


@pytest.mark.parametrize("dtype", USUAL, **IDS)
@pytest.mark.parametrize("name", LOGPROBS)
def test_log_probabilities(name, dtype):
    call, trained = LOGPROBS[name]
    as_on_the_cpu(call, given(Batch()), trained, dtype, FLOOR[dtype])


def test_sinkd_of_uneven_groups():
    """Tokens of one group apart from each other, one group of a single token, both models learning."""
    groups = torch.tensor([[0, 2, 0, 2, 2], [5, 0, 2, 0, 0], [0, 0, 7, 2, 0]])

    def call(d):
        options = {"labels": d["labels"], "hard_weight": 0.4, "temperature": 1.7, "groups": d["groups"]}
        return kd.distill(head(d), head(d, "teacher"), kd.SinkhornBatch(), teacher_grad=True, **options)

    as_on_the_cpu(call, {**given(Batch()), "groups": groups}, BOTH, torch.float32, 1e-5)


@pytest.mark.parametrize("missing, objective", PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("dtype", USUAL, **IDS)
def test_sparse_teachers(missing, objective, dtype):
    """With ids that repeat and places unused."""
    batch = Batch(seed=2)
    options = {**options_for(missing, OPTIONS["everything"](batch)), **SMALL, "device": DEVICE}
    target = target_of(batch, missing)
    compare(
        batch, batch.source("student", "head", dtype, **SHAPING["all"]), target, objective, None, **options
    )
    student = batch.source("student", "logits", dtype, scale=1.3, softcap=6.0)
    compare(batch, student, target, objective, None, **options)


# --- measures -------------------------------------------------------------------------------------------


def moved(found, device: str):
    """A (named) tuple of tensors, and of such tuples."""
    if isinstance(found, tuple):
        parts = (moved(x, device) for x in found)
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
    return found.to(device) if isinstance(found, Tensor) else found


def there(source):
    return widened(source, source.tensors()[0].dtype, DEVICE)


@pytest.mark.parametrize("dtype", USUAL, **IDS)
@pytest.mark.parametrize("kind", ["mixed", "logits"])
def test_scores(dtype, kind):
    """A student beside three teachers, or one; and how calibrated it is."""
    sources = scored_models(dtype, kind)
    labels, mask = labels_for(sources[0]), Batch().mask
    options = {"labels": labels.to(DEVICE), "mask": mask.to(DEVICE), "temperature": 1.7, **SMALL}
    ours = kd.score(*(there(x) for x in sources), **options)
    exact = dense_scores(sources, labels, mask, 1.7)
    compare_scores(moved(ours, "cpu"), exact, SCORE_BAR[dtype])
    summary, want = ours.summary(), exact.summary()
    assert summary.keys() == want.keys() and len(want) == 5 + 8 * (len(sources) - 1)
    assert all(abs(summary[k] - want[k]) <= SCORE_BAR[dtype] * abs(want[k]) for k in want)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_calibration(dtype):
    g = torch.Generator().manual_seed(0)
    confidence = torch.rand(3000, generator=g).to(dtype)
    confidence[:16] = torch.arange(16) / 15  # edges of bins
    correct, mask = (torch.rand(3000, generator=g) < share for share in (0.6, 0.8))
    confidence[3 * torch.arange(900)[~mask[:2700:3]]] = torch.nan
    here, found = (
        kd.calibration(*(x.to(device) for x in (confidence, correct)), mask=mask.to(device))
        for device in ("cpu", DEVICE)
    )
    assert here.bin_count.sum() == mask.sum() and (here.bin_count > 0).all()
    assert torch.equal(found.bin_count.cpu(), here.bin_count)
    for x, y in zip(found, here):
        assert x.device.type == torch.device(DEVICE).type and error(x.cpu(), y) < 1e-12


# --- what is saved of a teacher ---------------------------------------------------------------------------


def draws(found: kd.TopK, vocab: int) -> Tensor:
    """``[N, V]``: how often each was drawn."""
    ids, counts = (x.cpu().flatten(0, -2).long() for x in (found.sample_ids, found.sample_counts))
    used = ids >= 0
    assert used.equal(counts > 0) and ((ids[:, 1:] > ids[:, :-1]) | ~used[:, 1:]).all()
    return torch.zeros(len(ids), vocab, dtype=torch.int64).scatter_add_(1, ids.clamp(min=0), counts)


@pytest.mark.parametrize("dtype", WIDE, **IDS)
@pytest.mark.parametrize("kind", ["head", "logits"])
def test_a_saved_teacher(kind, dtype):
    """Everything that linear_topk gives, in several chunks, at two temperatures."""
    batch = Batch(lead=(4, 25))
    source = batch.source("teacher", kind, dtype, scale=1.3, softcap=6.0)
    options = {"temperature": (1.3, 0.7), "samples": 40, "seed": 5}
    found = kd.linear_topk(there(source), 7, targets=batch.labels.to(DEVICE), **options, **SMALL)
    here = kd.linear_topk(source, 7, targets=batch.labels, **options)
    found = moved(found, "cpu")
    bar = TOPK_BAR[dtype]
    for i, temperature in enumerate(options["temperature"]):
        want = plain_topk(source, 7, temperature, batch.labels)
        for name in FLOATS:
            got = getattr(found, name)
            close(got if got.shape == want[name].shape else got[..., i], want[name], bar)
    if dtype == torch.float64:
        assert torch.equal(found.ids.long(), want["ids"])
        assert torch.equal(found.target_rank.long(), want["target_rank"])
    ours, theirs = (draws(x, batch.vocab) for x in (found, here))
    assert (ours.sum(1) == 40).all()
    # The same uniforms; where two entries meet, float32 may round either way.
    assert (ours - theirs).abs().sum() <= (0 if dtype == torch.float64 else 0.01 * ours.sum())


def test_draws_at_a_real_vocabulary():
    z = 3 * torch.randn(50, 50257)
    found, here = (kd.linear_topk(z.to(device), 4, samples=64, seed=3) for device in (DEVICE, "cpu"))
    ours, theirs = (draws(x, 50257) for x in (found, here))
    assert (ours.sum(1) == 64).all() and (ours > 0).sum() > 500
    assert (ours - theirs).abs().sum() <= 0.01 * ours.sum()
    other = draws(kd.linear_topk(z.to(DEVICE), 4, samples=64, seed=4), 50257)
    assert (ours - other).abs().sum() > 0.1 * ours.sum()


def test_uniforms_are_the_same_bits():
    tokens = torch.tensor([0, 1, 2, 99, 1 << 31, (1 << 40) + 7])
    for seed in (0, 9, -9, (1 << 62) + 3):
        here, found = (uniforms(torch.tensor(seed), tokens.to(device), 50) for device in ("cpu", DEVICE))
        assert torch.equal(here, found.cpu()) and here.unique().numel() == here.numel()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_ranks(dtype):
    """Of logits, which no product rounds: 16-bit ones are full of ties."""
    z = (3 * torch.randn(30, 5003, dtype=torch.float64)).to(dtype)
    z[1, 7:], z[2] = -torch.inf, torch.nan
    ids = torch.randint(0, 5003, (30, 9))
    ids[3, 2], ids[4, 0], ids[5] = -1, -100, z[5].argmax()
    found = kd.linear_rank(z.to(DEVICE), ids.to(DEVICE), 2000)
    place = z.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    want = torch.where(ids >= 0, place.gather(-1, ids.clamp(min=0)) + 1, 0)
    want[2] = 0
    assert torch.equal(found.rank.cpu().long(), want)
    member = (want >= 1) & (want <= 2000) & (z.gather(-1, ids.clamp(min=0)) > -torch.inf)
    assert torch.equal(found.member.cpu(), member) and 0 < member.sum() < (want > 0).sum()


# --- transport ------------------------------------------------------------------------------------------


def transported(d: dict, gradient: str, **options) -> tuple[Tensor, ...]:
    """Of marginals that keep their mass, so that every kind of gradient to them is one."""
    found = kd.sinkhorn(
        d["cost"], d["u"].softmax(-1), d["v"].softmax(-1), epsilon=0.1, gradient=gradient, return_plan=True,
        iterations=10 if gradient == "unrolled" else 150, **options,
    )  # fmt: skip
    return (found.value,) if gradient == "envelope" else (found.transport_cost, found.value, found.plan)


def problems(count: int, rows: int, columns: int, shared: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    cost = torch.rand(*(() if shared else (count,)), rows, columns, generator=g, dtype=torch.float64)
    u, v = (torch.randn(count, size, generator=g, dtype=torch.float64) for size in (rows, columns))
    return {"cost": cost, "u": u, "v": v}


def solves(dtype: torch.dtype) -> float:
    return 1e-8 if dtype == torch.float64 else 3e-5


@pytest.mark.parametrize("dtype", WIDE, **IDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gradient", ["implicit", "unrolled", "envelope"])
@pytest.mark.parametrize("domain", ["auto", "scaling", "log"])
def test_one_cost_for_all(domain, gradient, order, dtype):
    """For the half-step kernel, and for more problems than it takes."""
    for count in (5, 70):
        as_on_the_cpu(
            lambda d: transported(d, gradient, domain=domain, order=order),
            problems(count, 37, 45, shared=True), ("cost", "u", "v"), dtype, solves(dtype),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", WIDE, **IDS)
@pytest.mark.parametrize("gradient", ["implicit", "unrolled", "envelope"])
def test_columns_first(gradient, dtype):
    as_on_the_cpu(
        lambda d: transported(d, gradient, order="columns_rows"),
        problems(4, 37, 45, shared=False), ("cost", "u", "v"), dtype, solves(dtype),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", WIDE, **IDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
def test_lengths(gradient, order, dtype):
    """NaN beyond them; a problem of one row, and one without any."""
    d = problems(4, 20, 30, shared=False)
    rows, columns = torch.tensor([20, 7, 1, 0]), torch.tensor([11, 30, 5, 9])
    for i in range(4):
        d["cost"][i, rows[i] :], d["cost"][i, :, columns[i] :] = torch.nan, torch.nan
    d = {"cost": d["cost"], "rows": rows, "columns": columns}

    def call(d):
        found = kd.sinkhorn(
            d["cost"], epsilon=0.1, lengths=(d["rows"], d["columns"]), order=order, gradient=gradient,
            iterations=10 if gradient == "unrolled" else 150, return_plan=True,
        )  # fmt: skip
        return found.transport_cost, found.value, found.plan

    as_on_the_cpu(call, d, ("cost",), dtype, solves(dtype))


@pytest.mark.parametrize("dtype", WIDE, **IDS)
@pytest.mark.parametrize("order", ORDERS)
def test_divergence(order, dtype):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, size, 3, generator=g, dtype=torch.float64) for size in (8, 6))
    d = {"x": x, "y": y + 0.5, "rows": torch.tensor([8, 5]), "columns": torch.tensor([4, 6])}

    def call(d):
        pairs = [(d["x"], d["y"]), (d["x"], d["x"]), (d["y"], d["y"])]
        costs = [(p[:, :, None] - q[:, None]).square().sum(3) for p, q in pairs]
        options = {"epsilon": 2.0, "iterations": 100, "order": order}
        return (
            kd.sinkhorn_divergence(*costs, **options),
            kd.sinkhorn_divergence(*costs, lengths=(d["rows"], d["columns"]), **options),
        )

    as_on_the_cpu(call, d, ("x", "y"), dtype, solves(dtype))
