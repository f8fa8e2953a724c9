"""kd.hybrid_uld against TRL's GOLD itself, value and gradients, and against the formula."""

from types import SimpleNamespace

import pytest
import torch
from cases import DTYPES, FLOOR, error
from test_alignment import aligned, answers, gold
from watch import Largest

import kd_kernels as kd
from kd_kernels.dense_chunks import _Product

SIZES = (41, 29)


def vocabularies(shared=17, sizes=SIZES):
    """Of each model, id by token: the first ``shared`` of the teacher's tokens are the student's too."""
    g = torch.Generator().manual_seed(1)
    own, other = (torch.randperm(size, generator=g).tolist() for size in sizes)
    return [
        {f"{i}" if i < shared else f"{name} {i}": id for i, id in enumerate(ids)}
        for name, ids in (("student", own), ("teacher", other))
    ]


def tokenizers(*shared):
    return [SimpleNamespace(get_vocab=lambda ids=ids: ids) for ids in vocabularies(*shared)]


def test_matches_are_the_tokens_spelt_alike():
    own, other = {"a": 3, "b": 0, "c": 7}, {"x": 0, "c": 1, "a": 5}
    assert kd.match_vocabularies(own, other).tolist() == [[7, 1], [3, 5]]
    assert kd.match_vocabularies(own, {"x": 0}).shape == (0, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights", [None, (0.3, 1.9)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_the_loss_of_trl(merge, beta, weights):
    own, other = answers()
    config = dict(zip(("uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight"), weights or ()))
    theirs = gold(
        own,
        other,
        tokenizers(),
        beta=beta,
        uld_use_hybrid_loss=True,
        uld_token_merge_strategy=merge,
        **config,
    )
    heads, masses, weight = aligned(own, other, merge, late=int(merge == "observed"))
    loss = kd.hybrid_uld(
        *heads, kd.match_vocabularies(*vocabularies()), beta=beta, weights=weights, temperature=1.3,
        student_log_mass=masses[0], teacher_log_mass=masses[1], teacher_temperature=0.8,
        token_weight=weight, teacher_grad=True,
    )  # fmt: skip
    assert error(loss, theirs) < 1e-12
    wanted = [own.hidden, own.weight, other.hidden, other.weight]
    for got, want in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(theirs, wanted)):
        assert error(got, want) < 1e-11 and want.any()


def test_rows_outside_the_pairs_may_hold_anything():
    losses = []
    for prompt in (0.0, torch.nan):
        own, other = answers()
        with torch.no_grad():
            own.hidden[:, 0], other.hidden[:, 0] = prompt, prompt
        heads, log_masses, weight = aligned(own, other, "bayesian")
        loss = kd.hybrid_uld(
            *heads, kd.match_vocabularies(*vocabularies()), student_log_mass=log_masses[0],
            teacher_log_mass=log_masses[1].detach(), token_weight=weight,
        )  # fmt: skip
        losses.append(run(loss, [own.hidden, own.weight]))
    assert all(torch.equal(x, y) for x, y in zip(*losses)) and (losses[1][1][:, 0] == 0).all()


# --- the formula -----------------------------------------------------------------------------------------


def heads(dtype=torch.float64, pairs=7, scale=1.0):
    g = torch.Generator().manual_seed(0)
    made = []
    for size in SIZES:
        for shape in ((pairs, 8), (size, 8)):
            x = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
            made.append(x.to(dtype).requires_grad_())
    return made


def formula(h, w, g, v, matches, beta, temperature, own_mass, other_mass):
    """``[P, 2]``, of probabilities, written as GOLD has it."""
    q = (h @ w.T / temperature).softmax(-1) * own_mass[:, None]
    p = (g @ v.T / temperature).softmax(-1) * other_mass[:, None]
    own, other = matches.unbind(1)
    a, b = q[:, own].clamp(min=1e-8), p[:, other].clamp(min=1e-8)
    m = beta * b + (1 - beta) * a
    direct = (beta * b * (b / m).log() + (1 - beta) * a * (a / m).log()).sum(1)
    rest = [
        x[:, [i for i in range(x.shape[1]) if i not in ids.tolist()]] for x, ids in ((q, own), (p, other))
    ]
    rest = [x.sort(dim=1, descending=True, stable=True).values for x in rest]
    width = max(x.shape[1] for x in rest)
    rest = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in rest]
    return torch.stack([direct, (rest[0] - rest[1]).abs().sum(1)], 1)


def masses(pairs, dtype=torch.float64):
    return [(torch.arange(pairs, dtype=dtype) / pairs - 1.0 - i).requires_grad_() for i in range(2)]


def run(loss, leaves):
    return [loss, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, backend):
    pairs = 3 if backend == "triton" else 7
    matches = kd.match_vocabularies(*vocabularies())

    def in_plain_torch(kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in heads(dtype, pairs)]
        log_masses = masses(pairs, kind)
        terms = formula(*leaves, matches, 0.3, 1.7, *(x.exp() for x in log_masses))
        return run((terms @ torch.tensor([0.4, 0.6], dtype=kind)).sum(), [*leaves, *log_masses])

    wide = torch.promote_types(dtype, torch.float32)
    exact, plain = in_plain_torch(torch.float64), in_plain_torch(wide)
    leaves, (own, other) = heads(dtype, pairs), masses(pairs, wide)
    loss = kd.hybrid_uld(
        kd.Head(*leaves[:2]), kd.Head(*leaves[2:]), matches, beta=0.3, weights=(0.4, 0.6), temperature=1.7,
        student_log_mass=own, teacher_log_mass=other, reduction="sum", teacher_grad=True, backend=backend,
    )  # fmt: skip
    found = run(loss, [*leaves, own, other])
    assert loss.dtype == wide
    for x, y, z in zip(found, plain, exact):
        assert error(x, z) <= 2 * error(y, z) + 10 * FLOOR[x.dtype]


def test_reductions_parts_and_chunks():
    h, w, g, v = heads(pairs=6)
    matches = kd.match_vocabularies(*vocabularies())
    student, teacher = kd.Head(h.view(2, 3, 8), w), kd.Head(g.view(2, 3, 8), v)
    each, parts = kd.hybrid_uld(student, teacher, matches, reduction="none", return_parts=True)
    ones = torch.ones(6, dtype=torch.float64)
    wanted = formula(h, w, g, v, matches, 0.5, 1.0, ones, ones)
    assert (
        error(parts.matched.flatten(), wanted[:, 0]) < 1e-12 > error(parts.unmatched.flatten(), wanted[:, 1])
    )
    assert error(each.flatten(), wanted @ torch.tensor([17 / 29, 12 / 29], dtype=torch.float64)) < 1e-12
    weight = torch.rand(2, 3, dtype=torch.float64)
    for reduction, total in (("mean", (each * weight).mean()), ("sum", (each * weight).sum())):
        found = kd.hybrid_uld(student, teacher, matches, reduction=reduction, token_weight=weight)
        assert error(found, total) < 1e-13
    whole, cut = (
        run(kd.hybrid_uld(student, teacher, matches, workspace_bytes=size), [h, w]) for size in (None, 1)
    )
    assert all(error(x, y) < 1e-12 for x, y in zip(cut, whole))
    assert torch.autograd.grad(whole[0] + each.sum(), [g, v], allow_unused=True) == (None, None)


def test_models_of_different_dtypes():
    """The result is float64 for the student's sake; a 16-bit teacher's logits are, too."""
    matches = kd.match_vocabularies(*vocabularies())
    h, w, g, v = heads()
    g, v = (x.detach().bfloat16() for x in (g, v))
    found = kd.hybrid_uld(kd.Head(h, w), kd.Head(g, v), matches)
    exact = kd.hybrid_uld(kd.Head(h, w), kd.Head(g.double(), v.double()), matches)
    assert found.dtype == torch.float64 and error(found, exact) < 1e-13
    for x, y in zip(torch.autograd.grad(found, [h, w]), torch.autograd.grad(exact, [h, w])):
        assert error(x, y) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_many_chunks_add_up_in_float32(dtype):
    matches = kd.match_vocabularies(*vocabularies())

    def gradients(kind, workspace=None):
        h, w, g, v = (x.detach().to(dtype).to(kind).requires_grad_() for x in heads(pairs=400))
        bias = torch.linspace(-2, 2, SIZES[0]).to(dtype).to(kind).requires_grad_()
        student = kd.Head(h, w, bias)
        loss = kd.hybrid_uld(student, kd.Head(g, v), matches, workspace_bytes=workspace, teacher_grad=True)
        return torch.autograd.grad(loss, [w, bias, v])

    exact = gradients(torch.float64)
    for whole, cut, x in zip(gradients(dtype), gradients(dtype, workspace=1), exact):
        assert error(cut, x) < 1.2 * error(whole, x) + FLOOR[dtype]


@pytest.mark.parametrize("workspace", [None, 1], ids=["one chunk", "many"])
@pytest.mark.parametrize("changed", ["h", "w", "b", "g", "v", "mass", "matches"])
def test_an_input_changed_in_place_is_noticed(changed, workspace):
    """The weights above all: a constant teacher's, after a step of its moving average, too."""
    h, w, b, g, v = (torch.randn(*shape) for shape in ((6, 3), (12, 3), (12,), (6, 4), (9, 4)))
    mass, matches = -torch.rand(6), torch.tensor([[0, 1], [3, 2]])
    h.requires_grad_()
    loss = kd.hybrid_uld(
        kd.Head(h, w, b), kd.Head(g, v), matches,
        student_log_mass=mass, teacher_log_mass=mass.double(), workspace_bytes=workspace,
    )  # fmt: skip
    with torch.no_grad():
        locals()[changed].mul_(2)
    if changed in ("b", "g", "v", "mass") and workspace is None:
        loss.backward()  # only added, or a constant's
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("workspace", [None, 1], ids=["one chunk", "many"])
def test_masses_of_inference_mode(workspace):
    """As a teacher's are."""
    z, w = torch.randn(6, 12).requires_grad_(), torch.randn(6, 9)
    with torch.inference_mode():
        mass = -torch.rand(6)
    given = [mass, mass.clone()]
    found = [
        torch.autograd.grad(
            kd.hybrid_uld(
                z, w, torch.tensor([[0, 1], [3, 2]]), teacher_log_mass=x, workspace_bytes=workspace
            ),
            z,
        )[0]
        for x in given
    ]
    assert torch.equal(*found) and found[0].any()


def test_no_tensor_holds_all_logits():
    leaves, matches = heads(torch.float32, pairs=200), kd.match_vocabularies(*vocabularies())
    with Largest() as seen:
        loss = kd.hybrid_uld(
            kd.Head(*leaves[:2]), kd.Head(*leaves[2:]), matches, workspace_bytes=1 << 16, teacher_grad=True
        )
        torch.autograd.grad(loss, leaves)
    assert seen.numel <= max(x.numel() for x in leaves)


def test_all_or_no_tokens_match():
    h, w, g, v = heads()
    student, teacher = kd.Head(h, w), kd.Head(g, v)
    none = torch.zeros(0, 2, dtype=torch.int64)
    found = run(kd.hybrid_uld(student, teacher, none), [h, w])
    wanted = run(kd.distill(student, teacher, kd.SortedWasserstein()), [h, w])
    assert all(error(x, y) < 1e-12 for x, y in zip(found, wanted))
    every = torch.arange(29)[:, None].expand(-1, 2)  # the teacher has no others: as TRL, no second term
    _, parts = kd.hybrid_uld(student, teacher, every, return_parts=True)
    assert (parts.unmatched == 0).all() and (parts.matched != 0).all()


def test_banned_tokens():
    """Logits of -inf, matched or not; also where nothing else is unmatched, as of padded vocabularies."""
    z, y = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    z[:, 7:] = y[:, 7:] = -torch.inf
    z[0, 2] = -torch.inf
    z.requires_grad_()
    matches = torch.arange(7)[:, None].expand(-1, 2)
    loss, parts = kd.hybrid_uld(z, y, matches, return_parts=True)
    (gradient,) = torch.autograd.grad(loss, z)
    assert (parts.unmatched == 0).all() and loss > 0 and gradient.isfinite().all() and gradient.any()
    kept = kd.hybrid_uld(z[1:, :7], y[1:, :7], matches, beta=0.5, weights=(7 / 8, 0.0), reduction="none")
    each = kd.hybrid_uld(z, y, matches, reduction="none")
    assert error(each[1:], kept) < 1e-13


def test_nan_is_its_own_row_s():
    z, y = torch.randn(4, 9), torch.randn(4, 8)
    usual = kd.hybrid_uld(z, y, torch.tensor([[0, 1]]), reduction="none")
    z[1, 3] = y[2, 5] = torch.nan
    found = kd.hybrid_uld(z, y, torch.tensor([[0, 1]]), reduction="none")
    assert found.isnan().tolist() == [False, True, True, False]
    assert torch.equal(found[[0, 3]], usual[[0, 3]])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nan_leaves_the_hidden_states_of_others(wrong):
    """A head's gradient has one scale for all rows of a chunk."""
    h, w, g, v = (x.detach() for x in heads())
    h[1, 0] = wrong
    h.requires_grad_()
    loss = kd.hybrid_uld(kd.Head(h, w), kd.Head(g, v), torch.tensor([[0, 1]]), reduction="none")
    rest = torch.arange(len(h)) != 1
    (gradient,) = torch.autograd.grad(loss[rest].sum(), h)
    assert gradient[rest].isfinite().all() and gradient[rest].any()


def test_a_small_weight_in_float16():
    """1 / tokens times what there is may be less than float16 has, and count for much under large weights."""
    gradient = torch.randn(3, 9) * 1e-7
    hidden, weight = torch.randn(3, 5).half(), (torch.randn(9, 5) * 1e4).half()
    d_hidden, d_weight, _ = _Product.back(gradient, hidden, weight, (True, False, False))
    assert d_weight is None and error(d_hidden, gradient.double() @ weight.double()) < 2e-3


def test_no_pairs():
    z = torch.randn(0, 9, requires_grad=True)
    loss = kd.hybrid_uld(z, torch.randn(0, 5), torch.tensor([[1, 2]]))
    assert loss == 0 and torch.autograd.grad(loss, z)[0].shape == (0, 9)


def test_gradcheck():
    h, w, g, v = (x[:3, :2].detach().requires_grad_() for x in heads())
    matches = torch.tensor([[0, 2], [1, 0]])

    def loss(h, w, g, v):
        return kd.hybrid_uld(kd.Head(h, w), kd.Head(g, v), matches, beta=0.4, teacher_grad=True)

    assert torch.autograd.gradcheck(loss, (h, w, g, v), fast_mode=True)


Z, Y, PAIRS = torch.randn(3, 7), torch.randn(3, 5), torch.tensor([[1, 2], [0, 4]])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"matches": PAIRS.float()}, TypeError, "matches must be an integer tensor"),
        ({"matches": PAIRS[0]}, ValueError, r"matches must be \[M, 2\]"),
        ({"matches": PAIRS + 3}, ValueError, "teacher's id 7, but its vocabulary has 5"),
        ({"matches": PAIRS - 1}, ValueError, "student's id -1"),
        ({"matches": PAIRS[[0, 0]]}, ValueError, "more than once"),
        ({"teacher": Y[:2]}, ValueError, "same tokens"),
        ({"beta": 1.5}, ValueError, "beta must be in"),
        ({"temperature": 0}, ValueError, "temperature must be"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be"),
        ({"reduction": "all"}, ValueError, "reduction must be"),
        ({"token_weight": Z[:, :2]}, ValueError, "token_weight must have the leading shape"),
        ({"backend": "fast"}, ValueError, "backend"),
        ({"backend": 3}, TypeError, "backend must be a name or None, got 3"),
        ({"workspace_bytes": "1GB"}, TypeError, "workspace_bytes must be an int or None"),
        ({"weights": (2.0,)}, ValueError, "weights must be two finite numbers"),
        ({"weights": 0.5}, ValueError, "weights must be two finite numbers"),
        ({"weights": (2.0, float("nan"))}, ValueError, "weights must be two finite numbers"),
        ({"student_log_mass": Z[0]}, ValueError, "student_log_mass must have the leading shape"),
        ({"student_log_mass": 0.5}, ValueError, "student_log_mass must be <= 0, the logarithm of a mass"),
        ({"teacher_log_mass": torch.full((3,), 0.5)}, ValueError, "teacher_log_mass must be <= 0"),
        ({"teacher_log_mass": "0"}, TypeError, "teacher_log_mass must be a number or a tensor, got str"),
    ],
)
def test_bad_input(change, error, message):
    call = {"student": Z, "teacher": Y, "matches": PAIRS, **change}
    with pytest.raises(error, match=message):
        kd.hybrid_uld(call.pop("student"), call.pop("teacher"), call.pop("matches"), **call)
