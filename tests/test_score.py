"""kd.score against plain torch in float64, and kd.calibration against a loop over the bins."""

import math

import pytest
import torch
from cases import DTYPES, FLOOR, Batch, error, leaves
from plain import widened
from watch import in_a_process

import kd_kernels as kd
from kd_kernels.backends import TABLE
from kd_kernels.drivers import score as driver
from kd_kernels.drivers.sides import HeadSide
from kd_kernels.reference.dense import divergence, logits_of

# The ``backend`` fixture runs over these: a named backend must serve both kernels.
BACKENDS = [name for name in ("cpu", "reference", "triton") if TABLE["topk"][name][0] is not None]
IDS = {"ids": lambda x: str(x).replace("torch.", "")}
# |x - x64| / |x64|. Logits are float32 whatever the inputs, and the inputs' own rounding is in x64 too.
BAR = {dtype: 1e-12 if dtype == torch.float64 else 1e-5 for dtype in DTYPES}
FIELDS = ("nll", "entropy", "confidence")
DIVERGENCES = {
    "forward_kl": kd.ForwardKL(), "reverse_kl": kd.ReverseKL(), "jensen_shannon": kd.JensenShannon(0.5)
}  # fmt: skip


def models(dtype=torch.float32, kind="mixed", **options) -> list[kd.Head | kd.Logits]:
    """A student and teachers of other widths and shapings; the last one often agrees with it."""
    batch, other = Batch(**options), Batch(seed=1, **{"student_width": 16, **options})
    student = (
        batch.source("student", "logits", dtype, scale=1.1)
        if kind == "logits"
        else batch.source("student", "head", dtype, bias=True, scale=1.2)
    )
    near = logits_of(student).detach()
    near = kd.Logits((near + 0.8 * torch.randn_like(near)).to(dtype).requires_grad_(True), scale=0.9)
    if kind == "logits":
        return [student, near]
    wide = other.source("student", "head", dtype, bias=True)
    return [student, batch.source("teacher", "head", dtype, softcap=4.0), wide, near]


def labels_for(student, batch=None) -> torch.Tensor:
    """A third of the labels ignored, half of the others the student's own first choice."""
    batch = Batch() if batch is None else batch
    labels, flat = batch.labels.clone(), torch.arange(batch.labels.numel()).reshape(batch.labels.shape)
    labels = torch.where(flat % 2 == 0, logits_of(student).detach().argmax(-1), labels)
    return torch.where(flat % 3 == 0, -100, labels)


def dense(sources, labels=None, mask=None, temperature=1.0, vocab=None) -> kd.Scores:
    """What the definitions say, in float64 with all logits at once."""
    z = [logits_of(widened(source, torch.float64)).detach()[..., :vocab] / temperature for source in sources]
    counted = torch.ones(z[0].shape[:-1], dtype=torch.bool)
    if labels is not None:
        counted = counted & (labels != -100)
    if mask is not None:
        counted = counted & mask

    def keep(x):
        return torch.where(counted, x, torch.zeros((), dtype=x.dtype))

    measured = []
    for x in z:
        log_p = x.log_softmax(-1)
        p, top1 = log_p.exp(), log_p.argmax(-1)
        nll = correct = None
        if labels is not None:
            index = labels.clamp(min=0)
            nll = keep(-log_p.gather(-1, index[..., None])[..., 0])
            correct = keep(top1 == labels)
        entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
        measured.append(kd.ModelScore(nll, keep(entropy), keep(p.amax(-1)), keep(top1), correct))
    pairs = [
        kd.PairScore(
            *(keep(divergence(objective, z[0], x)) for objective in DIVERGENCES.values()),
            top1_agreement=keep(x.argmax(-1) == z[0].argmax(-1)),
        )
        for x in z[1:]
    ]
    return kd.Scores(tuple(measured), tuple(pairs), counted, counted.sum())


def compare(ours: kd.Scores, exact: kd.Scores, bar: float) -> None:
    assert torch.equal(ours.counted, exact.counted) and ours.valid_tokens == exact.valid_tokens
    assert (len(ours.models), len(ours.pairs)) == (len(exact.models), len(exact.pairs))
    for x, y in zip(ours.models + ours.pairs, exact.models + exact.pairs):
        for name, mine, theirs in zip(x._fields, x, y):
            if theirs is None:
                assert mine is None, name
            elif theirs.is_floating_point():
                assert theirs.abs().sum() > 0, f"{name}: the test is vacuous"
                assert error(mine, theirs) <= bar, f"{name}: {error(mine, theirs):.2e} > {bar:.0e}"
                assert (mine[~ours.counted] == 0).all(), name
            else:
                assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("kind", ["mixed", "logits"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_against_float64(dtype, kind, temperature, backend):
    sources = models(dtype, kind)
    labels, mask = labels_for(sources[0]), Batch().mask
    options = {"labels": labels, "mask": mask, "temperature": temperature}
    ours, exact = kd.score(*sources, **options, backend=backend), dense(sources, **options)
    assert 0 < exact.models[0].correct.sum() < exact.valid_tokens < labels.numel()
    assert 0 < exact.pairs[-1].top1_agreement.sum()
    compare(ours, exact, BAR[dtype])
    assert ours.models[0].nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for tensor in (x for part in ours.models + ours.pairs for x in part):
        assert tensor.shape == labels.shape and tensor.is_contiguous()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_models_without_labels(count, backend):
    sources = models()[:count]
    ours = kd.score(*sources, backend=backend)
    compare(ours, dense(sources), BAR[torch.float32])
    assert ours.models[0].nll is None and ours.models[0].correct is None
    assert ours.valid_tokens == 15 and len(ours.pairs) == count - 1


def test_models_of_different_dtypes():
    batch = Batch()
    sources = [
        batch.source("student", "head", torch.bfloat16),
        batch.source("teacher", "head", torch.float32),
        batch.source("teacher", "logits", torch.float16),
    ]
    compare(kd.score(*sources, backend="cpu"), dense(sources), 1e-5)
    wide = kd.score(*sources, batch.source("teacher", "logits", torch.float64), backend="cpu")
    assert {x.entropy.dtype for x in wide.models} == {torch.float64}


def test_logits_in_the_heads_own_dtype(backend):
    sources = [Batch().source(side, "head", torch.bfloat16) for side in ("student", "teacher")]
    ours = kd.score(*sources, logits_dtype=torch.bfloat16, backend=backend)
    exact = dense(sources)
    for mine, theirs in zip(ours.models, exact.models):
        assert 1e-5 < error(mine.entropy, theirs.entropy) < FLOOR[torch.bfloat16]
        assert error(mine.confidence, theirs.confidence) < 0.03  # logits near 8 are rounded by up to 0.03


def test_one_token_without_leading_dimensions(backend):
    sources = [kd.Logits(x.values[1, 2]) for x in models(kind="logits")]
    label = torch.tensor(5)
    compare(kd.score(*sources, labels=label, backend=backend), dense(sources, labels=label), 1e-5)


@pytest.mark.parametrize("lead", [(7,), (2, 1, 3)], **IDS)
def test_leading_shapes(lead, backend):
    sources = models(lead=lead)
    labels = torch.zeros(lead, dtype=torch.int64)
    compare(
        kd.score(*sources, labels=labels, backend=backend), dense(sources, labels=labels), BAR[torch.float32]
    )


def test_truncate(backend):
    batch, wider, widest = Batch(), Batch(vocab=209), Batch(vocab=250)
    sources = [
        wider.source("student", "head", torch.float32, bias=True),
        widest.source("teacher", "logits", torch.float32),
        batch.source("teacher", "head", torch.float32),
    ]
    ours = kd.score(*sources, labels=batch.labels, vocab="truncate", backend=backend)
    compare(ours, dense(sources, labels=batch.labels, vocab=203), BAR[torch.float32])


def test_strided_logits(backend):
    whole = torch.randn(3, 6, 64)
    views = [whole[:, :-1], whole[:, 1:], torch.randn(64, 5, 3).permute(2, 1, 0)]
    compare(kd.score(*views, backend=backend), dense(list(map(kd.Logits, views))), BAR[torch.float32])


def test_tokens_that_do_not_count_reach_nothing(backend):
    sources = models()
    labels = labels_for(sources[0])
    clean = kd.score(*sources, labels=labels, backend=backend)
    with torch.no_grad():
        for source in sources:
            source.tensors()[0][labels == -100] = torch.nan
    dirty = kd.score(*sources, labels=labels, backend=backend)
    for x, y in zip(clean.models + clean.pairs, dirty.models + dirty.pairs):
        for a, b in zip(x, y):
            assert torch.equal(a, b)


@pytest.mark.parametrize("silence", ["mask", "ignore_index"])
def test_token_zero_is_not_right_where_nothing_counts(silence, backend):
    labels = torch.tensor([0, 3, 0])
    options = {"ignore_index": 0} if silence == "ignore_index" else {"mask": labels != 0}
    result = kd.score(torch.randn(3, 9), torch.randn(3, 9), labels=labels, backend=backend, **options)
    assert result.counted.tolist() == [False, True, False] and result.valid_tokens == 1
    assert not result.models[0].correct[::2].any() and not result.pairs[0].top1_agreement[::2].any()


def test_chunking_changes_nothing(monkeypatch):
    sources = models()
    labels = labels_for(sources[0])
    once = kd.score(*sources, labels=labels, backend="cpu")
    sizes, cut = [], driver.cut
    monkeypatch.setattr(driver, "cut", lambda *args: sizes.append(cut(*args)) or sizes[-1])
    for budget in (3 * 203 * 4 + 200, 9 * 203 * 4 + 600):  # three heads: one row each, three rows each
        parts = kd.score(*sources, labels=labels, workspace_bytes=budget, backend="cpu")
        assert sizes[-1][0] in (1, 3) and sizes[-1][1] <= budget
        compare(parts, once, 1e-6)  # the products may differ in the last bit
    assert [chunk for chunk, _ in sizes] == [1, 3]
    with pytest.raises(ValueError, match="holds less than one row of 203 logits"):
        kd.score(*sources, workspace_bytes=3 * 203 * 4 - 1, backend="cpu")


def test_each_model_is_projected_once_a_chunk(backend, monkeypatch):
    calls, project = [], HeadSide.project
    monkeypatch.setattr(
        HeadSide, "project", lambda self, *args: calls.append(args[:2]) or project(self, *args)
    )
    kd.score(*models(), backend=backend, workspace_bytes=9 * 203 * 4 + 600)
    assert sorted(calls) == sorted([(i, min(15, i + 3)) for i in range(0, 15, 3)] * 3)


def test_no_graph_is_kept(backend):
    sources = models()
    assert all(x.requires_grad for x in leaves(*sources))
    result = kd.score(*sources, labels=labels_for(sources[0]), backend=backend)
    for part in result.models + result.pairs:
        assert not any(x.requires_grad for x in part)
    with torch.inference_mode():
        kd.score(*models(), backend=backend)


@pytest.mark.parametrize("lead", [(0,), (2, 0)], **IDS)
def test_empty_batch(lead, backend):
    sources = models(lead=lead)
    result = kd.score(*sources, labels=torch.zeros(lead, dtype=torch.int64), backend=backend)
    assert result.valid_tokens == 0 and result.models[3].nll.shape == lead
    assert result.pairs[2].forward_kl.shape == lead and result.mean(result.models[0].nll) == 0


def test_no_token_counts(backend):
    sources = models()
    result = kd.score(*sources, mask=torch.zeros(3, 5, dtype=torch.bool), backend=backend)
    assert set(result.summary().values()) == {0.0}
    assert not result.counted.any()


def test_impossible_tokens_and_broken_rows(backend):
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    student[0, 3] = -torch.inf  # a label without probability
    teacher[1, 4] = -torch.inf  # forward KL finite, reverse not
    student[2, 5] = torch.nan
    student[3] = -torch.inf
    teacher[4, 2] = torch.inf
    result = kd.score(student, teacher, labels=torch.full((5,), 3), backend=backend)
    mine, theirs = result.models
    pair = result.pairs[0]
    assert mine.nll[0] == torch.inf and pair.forward_kl[0] == torch.inf and pair.reverse_kl[0].isfinite()
    assert pair.reverse_kl[1] == torch.inf and pair.forward_kl[1].isfinite()
    assert 0 < pair.jensen_shannon[0] < math.log(2) and mine.entropy[0].isfinite()
    for row in (2, 3):
        assert all(x[row].isnan() for x in (mine.nll, mine.entropy, mine.confidence))
        assert mine.top1[row] == -1 and not mine.correct[row] and not pair.top1_agreement[row]
    assert theirs.confidence[4].isnan() and theirs.top1[4] == -1 and pair.forward_kl[4].isnan()
    both = kd.score(student, student, backend=backend)  # two rows without a distribution do not agree
    assert both.pairs[0].top1_agreement.tolist() == [True, True, False, False, True]


def test_ties_take_the_smallest_id(backend):
    z = torch.zeros(2, 40)
    z[0, [7, 30]] = 2.0
    result = kd.score(z, labels=torch.tensor([30, 0]), backend=backend)
    assert result.models[0].top1.tolist() == [7, 0] and result.models[0].correct.tolist() == [False, True]


def test_near_agreement_keeps_its_digits(backend):
    z = torch.randn(4, 500)
    shift = 1e-4 * torch.randn(4, 500)
    pair = kd.score(z, z + shift, backend=backend).pairs[0]
    exact = divergence(kd.ForwardKL(), z.double(), (z + shift).double())
    assert 0 < exact.max() < 1e-7 and error(pair.forward_kl, exact) < 1e-4
    same = kd.score(z, z, backend=backend).pairs[0]
    assert all((x == 0).all() for x in same[:3]) and same.top1_agreement.all()


def test_agrees_with_distill(backend):
    sources = models()
    labels = labels_for(sources[0])
    result = kd.score(*sources[:2], labels=labels, backend=backend)
    for name, objective in DIVERGENCES.items():
        loss, parts = kd.distill(
            *sources[:2], objective, labels=labels, hard_weight=0.0, return_parts=True, backend=backend
        )
        assert error(getattr(result.pairs[0], name), parts.soft) < 1e-5
        assert abs(result.mean(getattr(result.pairs[0], name)) - loss) < 1e-5 * loss
    assert error(result.models[0].nll, parts.hard) < 1e-5
    assert error(result.models[1].entropy, parts.teacher_entropy) < 1e-5


def test_summary():
    sources = models(kind="logits")
    labels = labels_for(kd.Logits(sources[0].values))
    result = kd.score(*sources, labels=labels, backend="reference")
    summary, counted = result.summary(), labels != -100
    assert set(summary) == {
        *(f"{m}/{x}" for m in ("student", "teacher0") for x in (*FIELDS, "accuracy")),
        *(f"teacher0/{x}" for x in (*DIVERGENCES, "top1_agreement")),
        "valid_tokens",
    }
    assert summary["valid_tokens"] == counted.sum() == result.valid_tokens
    student, pair = result.models[0], result.pairs[0]
    for name, values in (
        ("student/nll", student.nll),
        ("student/accuracy", student.correct),
        ("teacher0/reverse_kl", pair.reverse_kl),
        ("teacher0/top1_agreement", pair.top1_agreement),
    ):
        assert summary[name] == pytest.approx(values[counted].double().mean().item())
    assert "student/nll" not in kd.score(sources[0], backend="reference").summary()


def test_autocast(backend):
    batch = Batch()
    sources = [batch.source(side, "head", torch.float32, grad=False) for side in ("student", "teacher")]
    with torch.autocast("cpu", torch.bfloat16):
        ours = kd.score(*sources, backend=backend)
    rounded = [kd.Head(*(x.bfloat16() for x in s.tensors() if x is not None)) for s in sources]
    compare(ours, dense(rounded), 1e-5)


def test_compiled_whole():
    sources = models(kind="logits")
    head = Batch().source("student", "head", torch.float32)
    labels = labels_for(head)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def nll_and_kl(hidden, weight, teacher, labels, temperature):
        result = kd.score(
            kd.Head(hidden, weight), teacher, labels=labels, temperature=temperature, backend="cpu"
        )
        return result.models[0].nll, result.pairs[0].forward_kl

    for temperature in (1.0, 1.7):
        got = nll_and_kl(head.hidden, head.weight, sources[1].values, labels, temperature)
        want = kd.score(head, sources[1].values, labels=labels, temperature=temperature, backend="cpu")
        assert torch.equal(got[0], want.models[0].nll) and torch.equal(got[1], want.pairs[0].forward_kl)


def test_opcheck():
    sources = [x.detach() for x in (Batch().tensors["student logits"], Batch().tensors["teacher logits"])]
    head = Batch().source("student", "head", torch.float64, bias=True, grad=False)
    scalars = torch.tensor([1.0, 0.0, 0.9, 3.0, 1.0, 0.0, 1.4], dtype=torch.float64)
    torch.use_deterministic_algorithms(False)  # opcheck compares uninitialised empties otherwise
    labels = Batch().labels.reshape(-1)
    args = (
        [*sources, head.hidden], [None, None, head.weight], [None, None, head.bias], labels != -100, labels,
        scalars, None, None, "cpu", None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kd_kernels.score, args)


# --- wrong inputs -------------------------------------------------------------------------------------

H, W, Z = torch.randn(3, 4), torch.randn(9, 4), torch.randn(3, 9)
LABELS = torch.tensor([1, 2, 8])
WRONG = {
    "student": (lambda: kd.score([1.0]), TypeError, "student must be kd.Head"),
    "teacher": (lambda: kd.score(Z, "x"), TypeError, "teacher must be kd.Head"),
    "second teacher": (lambda: kd.score(Z, Z, "x"), TypeError, "teacher 1 must be kd.Head"),
    "tokens": (lambda: kd.score(Z, Z, Z[:2]), ValueError, r"student and teacher 1 must have the same tokens"),
    "vocabularies": (lambda: kd.score(Z, Z[:, :7]), ValueError, "entries and teacher 7.*truncate"),
    "vocab option": (lambda: kd.score(Z, vocab="pad"), ValueError, "vocab must be"),
    "mixed head": (lambda: kd.score(kd.Head(H, W.double())), TypeError, "student: hidden is torch.float32"),
    "labels dtype": (lambda: kd.score(Z, labels=LABELS.float()), TypeError, "labels must be integers"),
    "labels shape": (lambda: kd.score(Z, labels=LABELS[:2]), ValueError, "labels must have the leading"),
    "label too large": (lambda: kd.score(Z, labels=LABELS + 1), ValueError, r"labels must be in \[0, 9\).*9"),
    "label cut off": (
        lambda: kd.score(Z, Z[:, :7], labels=LABELS, vocab="truncate"), ValueError, r"labels must be in .0, 7"
    ),
    "label negative": (lambda: kd.score(Z, labels=LABELS - 3), ValueError, "got -2"),
    "mask": (lambda: kd.score(Z, mask=LABELS), TypeError, "mask must be bool"),
    "ignore_index": (lambda: kd.score(Z, ignore_index=None), TypeError, "ignore_index must be an int"),
    "temperature 0": (lambda: kd.score(Z, temperature=0), ValueError, "temperature must be finite and > 0"),
    "temperature nan": (lambda: kd.score(Z, temperature=math.nan), ValueError, "temperature must be finite"),
    "temperatures": (lambda: kd.score(Z, temperature=torch.ones(3)), ValueError, "one number for all tokens"),
    "temperature type": (lambda: kd.score(Z, temperature="2"), TypeError, "temperature must be a number"),
    "workspace": (lambda: kd.score(Z, workspace_bytes=1.5), TypeError, "workspace_bytes must be an int"),
    "backend": (lambda: kd.score(Z, backend="gpu"), ValueError, "backend must be one of"),
    "backend type": (lambda: kd.score(Z, backend=1), TypeError, "backend must be a name"),
    "unserved backend": (lambda: kd.score(Z, backend="cuda"), kd.BackendUnavailable, "topk on cpu: cuda"),
    "logits_dtype": (
        lambda: kd.score(kd.Head(H, W), logits_dtype=torch.float16, backend="reference"),
        ValueError,
        "logits_dtype must be None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    call, exception, words = WRONG[case]
    with pytest.raises(exception, match=words):
        call()


@pytest.mark.filterwarnings("ignore:kd_kernels runs on its plain-torch reference")
def test_backend_may_be_left_open():
    sources = models()
    compare(kd.score(*sources), kd.score(*sources, backend="reference"), 1e-5)


def test_temperature_may_be_a_tensor_with_grad():
    temperature = torch.tensor(1.7, requires_grad=True)
    got = kd.score(Z, temperature=temperature, backend="reference").models[0].entropy
    assert not got.requires_grad
    assert error(got, dense([kd.Logits(Z)], temperature=1.7).models[0].entropy) < 1e-6


# --- memory -------------------------------------------------------------------------------------------

_STEP = """
import torch, kd_kernels as kd
from dataclasses import replace
from kd_kernels.backends import TABLE
from kd_kernels.rows import TopkJob

def row_by_row(job):
    # The driver's memory is the matter, not that of the plain kernel with its copies of a whole chunk.
    plain = TABLE["topk"]["reference"][0]
    for i in range(job.n):
        row = slice(i, i + 1)
        names = ("ids", "values", "statistics", "targets", "target_values", "target_ranks", "uniforms",
                 "samples")
        plain(replace(job, n=1, side=replace(job.side, offsets=job.side.offsets[row]),
                      **{name: getattr(job, name)[row] for name in names}))

if TABLE["topk"]["cpu"][0] is None:
    TABLE["topk"]["cpu"] = (row_by_row, lambda device: [])
torch.set_num_threads(1)
tokens, vocab, workspace = 320, 32000, 12 << 20

def head(n, v, width):
    return kd.Head(torch.randn(n, width, requires_grad=True), torch.randn(v, width, requires_grad=True))

def step(*models):
    labels = torch.zeros(models[0].leading_shape, dtype=torch.int64)
    return kd.score(*models, labels=labels, workspace_bytes=workspace, backend="cpu")

step(head(8, 500, 32), head(8, 500, 48), head(8, 500, 32))  # libraries load and make their pools
kd.release_workspace()
models = head(tokens, vocab, 32), head(tokens, vocab, 48), head(tokens, vocab, 32)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(*models)
print(status("VmHWM") - before - workspace)
"""


def test_memory_within_the_workspace():
    """[tokens, vocab] in float32 would be 39 MiB for each of three models; the budget for all is 12 MiB."""
    above = in_a_process(_STEP)
    assert above <= 16 << 20, f"{above / 2**20:.0f} MiB above the workspace"


# --- calibration --------------------------------------------------------------------------------------


def by_hand(confidence, correct, bins):
    """Guo et al. 2017, equations 2 to 5, bin by bin."""
    ece, mce, rows = 0.0, 0.0, []
    for m in range(1, bins + 1):
        inside = [
            i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins or (m == 1 and c == 0)
        ]
        conf = sum(confidence[i] for i in inside) / max(len(inside), 1)
        acc = sum(correct[i] for i in inside) / max(len(inside), 1)
        rows.append((conf, acc, len(inside)))
        ece += len(inside) / max(len(confidence), 1) * abs(acc - conf)
        mce = max(mce, abs(acc - conf)) if inside else mce
    return ece, mce, rows


@pytest.mark.parametrize("bins", [1, 7, 10, 15])
def test_calibration_against_the_definition(bins):
    confidence = torch.cat([torch.rand(400, dtype=torch.float64) ** 2, torch.arange(11).double() / 10])
    correct = torch.rand(411) < confidence * 0.8
    got = kd.calibration(confidence, correct, bins)
    ece, mce, rows = by_hand(confidence.tolist(), correct.tolist(), bins)
    assert got.ece.item() == pytest.approx(ece) and got.mce.item() == pytest.approx(mce) and ece > 0.05
    assert got.bin_count.tolist() == [n for _, _, n in rows]
    assert got.bin_confidence.tolist() == pytest.approx([c for c, _, _ in rows])
    assert got.bin_accuracy.tolist() == pytest.approx([a for _, a, _ in rows])


def test_calibration_at_the_ends():
    got = kd.calibration(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([False, True, False]), bins=4)
    assert got.bin_count.tolist() == [1, 0, 0, 2] and got.bin_accuracy.tolist() == [0, 0, 0, 0.5]
    assert got.ece == pytest.approx(1 / 3) and got.mce == 0.5
    assert got.bin_confidence.tolist() == [0, 0, 0, 1]


def test_calibration_without_tokens():
    for confidence, correct, mask in (
        (torch.zeros(0), torch.zeros(0, dtype=torch.bool), None),
        (torch.rand(4), torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)),
    ):
        got = kd.calibration(confidence, correct, mask=mask)
        assert got.ece == 0 and got.mce == 0 and got.bin_count.sum() == 0 and got.bin_count.shape == (15,)


def test_calibration_never_reads_what_is_masked_out():
    confidence, correct = torch.rand(3, 5), torch.rand(3, 5) < 0.5
    mask = torch.rand(3, 5) < 0.6
    want = kd.calibration(confidence[mask], correct[mask])
    confidence[~mask] = torch.nan
    got = kd.calibration(confidence.requires_grad_(), correct, mask=mask)
    assert all(torch.equal(x, y) for x, y in zip(got, want)) and not got.ece.requires_grad


def test_calibration_of_scores():
    sources = models(kind="logits")
    labels = labels_for(sources[0])
    result = kd.score(*sources, labels=labels, backend="reference")
    model = result.models[0]
    got = kd.calibration(model.confidence, model.correct, mask=result.counted)
    counted = labels != -100
    want = kd.calibration(model.confidence[counted], model.correct[counted])
    assert got.bin_count.sum() == result.valid_tokens and torch.equal(got.ece, want.ece)
    # One bin: the gap of the means.
    means = result.mean(model.confidence) - result.mean(model.correct)
    assert kd.calibration(model.confidence, model.correct, 1, result.counted).ece == pytest.approx(
        means.abs().item()
    )


C, OK = torch.rand(4), torch.ones(4, dtype=torch.bool)
WRONG_CALIBRATION = {
    "confidence type": (lambda: kd.calibration([0.5], OK), TypeError, "confidence must be a tensor"),
    "confidence dtype": (lambda: kd.calibration(OK, OK), TypeError, "confidence must be floating"),
    "confidence above 1": (lambda: kd.calibration(C + 1, OK), ValueError, r"confidence must be in \[0, 1\]"),
    "confidence NaN": (lambda: kd.calibration(C * math.nan, OK), ValueError, "got nan"),
    "correct dtype": (lambda: kd.calibration(C, OK.long()), TypeError, r"use correct.bool\(\)"),
    "correct missing": (lambda: kd.calibration(C, None), TypeError, "correct must be a tensor, got NoneType"),
    "correct shape": (lambda: kd.calibration(C, OK[:3]), ValueError, "correct must have the shape"),
    "mask shape": (lambda: kd.calibration(C, OK, mask=OK[:3]), ValueError, "mask must have the shape"),
    "mask dtype": (lambda: kd.calibration(C, OK, mask=C), TypeError, "mask must be bool"),
    "bins": (lambda: kd.calibration(C, OK, 0), ValueError, "bins must be >= 1"),
    "bins type": (lambda: kd.calibration(C, OK, 1.5), TypeError, "bins must be an int"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CALIBRATION)
def test_wrong_calibration_input(case):
    call, exception, words = WRONG_CALIBRATION[case]
    with pytest.raises(exception, match=words):
        call()
