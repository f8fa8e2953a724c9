"""kd.multi_level_transport against the published loss, written as there over whole tensors, and autograd."""

import gc
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FLOOR, error
from watch import Largest

import kd_kernels as kd
from kd_kernels.multi_level import LOGARITHMS, MATCHES

VOCABS = (41, 29)
LENGTHS = [(5, 4), (2, 6), (3, 3)]  # of the student's and the teacher's answer
OFF = 2  # rows of a prompt ahead of each answer


def sides(dtype=torch.float64, lengths=LENGTHS, seed=0, width=16, scale=2.0):
    """Hidden states and head weight of both models, and which rows predict the answer's tokens."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for vocab, own in zip(VOCABS, zip(*lengths)):
        shape = (len(lengths), OFF + max(own) + 1, width)
        hidden = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
        weight = torch.randn(vocab, width, generator=g, dtype=torch.float64)
        place = torch.arange(shape[1]) - OFF
        mask = (place >= 0) & (place < torch.tensor(own)[:, None])
        made.append([hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), mask])
    return made


def ours(made, **options):
    (h, w, student_mask), (g, v, teacher_mask) = made
    options = {"top_k": 10, "teacher_grad": True, **options}
    return kd.multi_level_transport(
        kd.Head(h, w), kd.Head(g, v), student_mask=student_mask, teacher_mask=teacher_mask, **options
    )


def run(loss, made):
    return [loss, *torch.autograd.grad(loss * 0.7, [x for h, w, _ in made for x in (h, w)])]


# --- as published --------------------------------------------------------------------------------------


def answers(hidden, weight, mask, temperature, length):
    """``[B, length, V]``: softmax of logits over their standard deviation, zeros after the answer."""
    z = hidden @ weight.T
    z = z / (z.std(dim=-1, keepdim=True) + 1e-4)
    rows = [(one[kept] / temperature).softmax(-1) for one, kept in zip(z, mask)]
    return torch.stack([F.pad(one, (0, 0, 0, length - len(one))) for one in rows])


def greedy(p, q):
    """The student's columns, one after the other, that are nearest to the teacher's."""
    found = []
    for own, other in zip(p, q):
        left, columns = list(range(other.shape[1])), []
        for i in range(own.shape[1]):
            best = min(left, key=lambda j: (own[:, i] - other[:, j]).abs().sum().item())
            left.remove(best)
            columns.append(other[:, best])
        found.append(torch.stack(columns, 1))
    return torch.stack(found)


def loop(p, q, epsilon, iterations):
    """SinKD's loop: the teacher's rows first."""
    cost = (p[:, None] - q[None]).abs().sum(-1)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def kept(made, temperature=1.0, teacher_temperature=None, top_k=10, match="order"):
    longest = max(int(mask.sum(1).max()) for *_, mask in made)
    temperatures = (temperature, temperature if teacher_temperature is None else teacher_temperature)
    q, p = (answers(*side, t, longest) for side, t in zip(made, temperatures))
    p = p[:, :, p.sum((0, 1)).argsort(descending=True)[:top_k]]
    if match == "nearest":
        q = greedy(p, q)
    else:
        q = q[:, :, q.sum((0, 1)).argsort(descending=True)[:top_k]]
    width = max(q.shape[2], p.shape[2])
    return (F.pad(x, (0, width - x.shape[2])) for x in (q, p))


def published(made, epsilon=0.1, iterations=10, weights=(0.1, 1e-4), hot=2.0, **options):
    """The distillation term of 2018cx/Multi-Level-OT, without its factor."""
    q, p = kept(made, **options)
    (*_, own), (*_, other) = made
    sizes = torch.minimum(own.sum(1), other.sum(1)).tolist()
    absolute = torch.stack([(a[:n] - b[:n]).abs().sum(-1).mean() for a, b, n in zip(q, p, sizes)]).mean()
    logarithmic = -(q.softmax(-1) * p.log_softmax(-1)).sum(-1).mean()
    soft = zip((p / hot).softmax(-1), (q / hot).softmax(-1))
    return absolute + weights[0] * logarithmic + weights[1] * sum(loop(*x, epsilon, iterations) for x in soft)


def masked(made, epsilon=0.1, iterations=10, weights=(0.1, 1e-4), hot=2.0, **options):
    """The same with the roles as named and no padding: ``iterations`` of Sinkhorn between unequal lengths."""
    q, p = kept(made, **options)
    (*_, own), (*_, other) = made
    absolute, logarithmic, sinkhorn = [], [], []
    for a, b, n, m in zip(q, p, own.sum(1).tolist(), other.sum(1).tolist()):
        a, b, both = a[:n], b[:m], min(n, m)
        if both == 0:
            continue
        absolute.append((a[:both] - b[:both]).abs().sum(-1).mean())
        logarithmic.append(-(b[:both].softmax(-1) * a[:both].log_softmax(-1)).sum(-1).mean())
        cost = ((a / hot).softmax(-1)[:, None] - (b / hot).softmax(-1)[None]).abs().sum(-1)
        kernel, u = (-cost / epsilon).exp(), torch.ones(n, dtype=cost.dtype)
        for _ in range(iterations):
            v = n / m / (u @ kernel)
            u = 1 / (kernel @ v)
        sinkhorn.append((u[:, None] * kernel * v * cost).sum())
    token_level = sum(absolute) + weights[0] * sum(logarithmic)
    return token_level / len(absolute) + weights[1] * sum(sinkhorn)


AS_PUBLISHED = {"padding": True, "log_of": "teacher"}
# So that the last two terms matter.
SHARP = {"epsilon": 0.01, "sinkhorn_temperature": 0.2, "logarithmic_weight": 1.3, "sinkhorn_weight": 0.8}
SHARP_THERE = {"epsilon": 0.01, "hot": 0.2, "weights": (1.3, 0.8)}


@pytest.mark.parametrize("match", ["order", "nearest"])
@pytest.mark.parametrize("sharp", [False, True], ids=["published weights", "sharp"])
def test_the_published_loss(match, sharp, backend):
    lengths = [(2, 3), (3, 1)] if backend == "triton" else LENGTHS
    made = sides(lengths=lengths)
    wanted = run(published(made, match=match, **(SHARP_THERE if sharp else {})), made)
    found = run(ours(made, match=match, backend=backend, **AS_PUBLISHED, **(SHARP if sharp else {})), made)
    for x, y in zip(found, wanted):
        assert y.abs().max() > 1e-3 and error(x, y) < 1e-11


@pytest.mark.parametrize("match", ["order", "nearest"])
def test_answers_of_unequal_length(match, backend):
    """Without padding, and with the student in the logarithm; a sample without an answer does not count."""
    lengths = [(2, 3), (3, 1)] if backend == "triton" else [*LENGTHS, (0, 2), (2, 0)]
    made = sides(lengths=lengths)
    wanted = run(masked(made, match=match, **SHARP_THERE), made)
    found = run(ours(made, match=match, backend=backend, **SHARP), made)
    for x, y in zip(found, wanted):
        assert error(x, y) < 1e-11


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    """Of 16-bit models too the logits are float32: as plain torch in float32 on the same numbers."""
    made = sides(dtype)

    def in_plain_torch(kind):
        cast = [(*(x.detach().to(kind).requires_grad_() for x in (h, w)), mask) for h, w, mask in made]
        return run(masked(cast, **SHARP_THERE), cast)

    exact, plain = (in_plain_torch(torch.promote_types(dtype, x)) for x in (torch.float64, torch.float32))
    found = run(ours(made, **SHARP), made)
    assert found[0].dtype == torch.promote_types(dtype, torch.float32) and found[1].dtype == dtype
    for x, y, z in zip(found, plain, exact):
        assert error(x, z) <= 2 * error(y, z) + 10 * FLOOR[x.dtype]


def test_autocast_is_that_of_the_heads():
    made = sides(torch.float32)
    half = [(*(x.detach().bfloat16().requires_grad_() for x in (h, w)), mask) for h, w, mask in made]
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(made)
    assert torch.equal(loss, ours(half))


@pytest.mark.parametrize("match", ["order", "nearest"])
def test_autocast_leaves_existing_logits_alone(match):
    """Sums in bfloat16 would not tell a third of the entries from their neighbours."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 16, 300, generator=generator).requires_grad_() for _ in range(2))
    mask = torch.ones(4, 16, dtype=torch.bool)

    def found():
        loss = kd.multi_level_transport(student, teacher, student_mask=mask, teacher_mask=mask, match=match)
        return loss, *torch.autograd.grad(loss, student)

    plain = found()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(found(), plain))


def test_a_backward_pass_lets_go_of_the_logits():
    made = sides(torch.float32)
    (hidden, weight, mask), (_, _, other) = made
    logits = hidden @ weight.t()
    place = logits.data_ptr()
    loss = kd.multi_level_transport(
        logits, made[1][0] @ made[1][1].t(), student_mask=mask, teacher_mask=other
    )
    loss.backward()
    del logits
    gc.collect()
    assert not any(type(x) is torch.Tensor and x.data_ptr() == place for x in gc.get_objects())


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.6},
        {"teacher_temperature": 1.7},
        {"top_k": 4},
        {"top_k": 35},
        {"epsilon": 0.05},
        {"iterations": 1},
        {"sinkhorn_temperature": 0.5},
        {"sinkhorn_weight": 0.3},
        {"logarithmic_weight": 0.0},
    ],
    ids=str,
)
def test_options_matter_and_agree(option):
    made = sides()
    there = dict(SHARP_THERE)
    for name, value in option.items():
        if name.endswith("_weight"):
            weights = {"logarithmic_weight": (value, 0.8), "sinkhorn_weight": (1.3, value)}
            there["weights"] = weights[name]
        else:
            there[{"sinkhorn_temperature": "hot"}.get(name, name)] = value
    usual, found = ours(made, **SHARP), ours(made, **{**SHARP, **option})
    assert (found - usual).abs() > 1e-7 and error(found, masked(made, **there)) < 1e-11


def test_conventions_differ():
    made = sides()
    each = product((False, True), LOGARITHMS, MATCHES)
    losses = [ours(made, padding=a, log_of=b, match=c, **SHARP).item() for a, b, c in each]
    assert len({round(x, 6) for x in losses}) == 8


def test_rows_that_do_not_count_may_hold_anything():
    made = sides()
    wanted = run(ours(made), made)
    with torch.no_grad():
        for hidden, _, mask in made:
            hidden[~mask] = math.nan
    found = run(ours(made), made)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted))
    assert all((g[~mask] == 0).all() for g, (*_, mask) in zip(found[1::2], made))


def test_nan_shows():
    for side in range(2):
        made = sides()
        with torch.no_grad():
            made[side][0][1, OFF] = math.nan
        assert ours(made).isnan() and ours(made, match="nearest").isnan()


def test_nothing_counts():
    for mask in (torch.zeros(3, 8, dtype=torch.bool), torch.zeros(0, 8, dtype=torch.bool)):
        logits = torch.randn(*mask.shape, 12, requires_grad=True)
        masks = {"student_mask": mask, "teacher_mask": mask}
        loss = kd.multi_level_transport(logits, logits.detach(), **masks)
        assert loss == 0 and (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_sources():
    """Heads with all they may do to logits, and logits that exist, are the same; so is any workspace."""
    (h, w, student_mask), (g, v, teacher_mask) = sides()
    masks = {"student_mask": student_mask, "teacher_mask": teacher_mask, "top_k": 10, **SHARP}
    bias = torch.randn(VOCABS[0], dtype=torch.float64)
    head = kd.Head(h, w, bias, scale=0.7, softcap=9.0)
    exist = kd.Logits(h @ w.T + bias, scale=0.7, softcap=9.0)
    losses = [
        kd.multi_level_transport(head, kd.Head(g, v), **masks),
        kd.multi_level_transport(exist, g @ v.T, **masks),
        kd.multi_level_transport(head, kd.Head(g, v), workspace_bytes=1, **masks),
    ]
    gradients = [torch.autograd.grad(loss, (h, w)) for loss in losses]
    for loss, found in zip(losses[1:], gradients[1:]):
        assert error(loss, losses[0]) < 1e-13
        assert all(error(x, y) < 1e-12 for x, y in zip(found, gradients[0]))


def test_the_teacher_is_a_constant():
    made = sides()
    loss = ours(made, teacher_grad=False)
    assert torch.autograd.grad(loss, made[1][:2], allow_unused=True) == (None, None)


def test_gradcheck():
    made = sides(lengths=[(2, 1), (1, 2)], width=3)
    leaves = [x for h, w, _ in made for x in (h, w)]

    def loss(h, w, g, v):
        return ours([(h, w, made[0][2]), (g, v, made[1][2])], top_k=5, **SHARP)

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_no_tensor_holds_all_logits():
    made = sides(torch.float32, lengths=[(40, 50), (60, 30)])
    with Largest() as seen:
        run(ours(made, workspace_bytes=8 * 4 * VOCABS[0] * 8), made)
    largest_input = max(x.numel() for h, w, _ in made for x in (h, w))
    assert seen.numel <= max(largest_input, 2 * 60 * 60)  # [B, T, S] costs


def test_parts_and_how_little_the_published_terms_change():
    """docs/transport.md: with the published constants the plan is the product coupling and the logarithmic
    term log 50, whatever the models do."""
    more = torch.randn(60, 16, dtype=torch.float64)
    made = [(h.detach(), torch.cat([w.detach(), more]), mask) for h, w, mask in sides()]
    loss, parts = ours(made, top_k=50, return_parts=True)
    assert error(loss, parts.absolute + 0.1 * parts.logarithmic + 1e-4 * parts.sinkhorn) < 1e-14
    for factor in (1, -3, 1e-6):  # the last with probabilities that are all alike
        (h, w, mask), teacher = made
        _, parts = ours([(factor * h, w, mask), teacher], top_k=50, return_parts=True)
        assert abs(parts.logarithmic - math.log(50)) < 1e-3 * math.log(50)
        assert (parts.product_gap < 1e-4).all()
        assert 1e-4 * parts.sinkhorn / mask.sum() < 2e-6 and parts.absolute > 0.4
    _, parts = ours(made, top_k=50, return_parts=True, **SHARP)
    assert (parts.product_gap > 0.03).all()


MASK = torch.ones(2, 3, dtype=torch.bool)
Z, Y = torch.randn(2, 3, 7), torch.randn(2, 4, 5)
SAVED = kd.SparseTarget(torch.zeros(2, 4, 1).long(), torch.zeros(2, 4, 1))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"student": Z[0]}, ValueError, r"student must have the tokens \[B, T\]"),
        ({"student_mask": MASK[:, :2]}, ValueError, "student_mask must have the leading shape"),
        ({"teacher_mask": torch.ones(2, 4)}, TypeError, "teacher_mask must be a bool"),
        ({"student": Z[:1], "student_mask": MASK[:1]}, ValueError, "same B, got 1 and 2"),
        ({"top_k": 0}, ValueError, "top_k must be an int >= 1"),
        ({"match": "greedy"}, ValueError, "match must be one of order, nearest"),
        ({"log_of": "both"}, ValueError, "log_of must be one of student, teacher"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0"),
        ({"sinkhorn_temperature": -1.0}, ValueError, "sinkhorn_temperature must be"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"teacher": SAVED}, TypeError, "SparseTarget"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    call = {
        "student": Z,
        "teacher": Y,
        "student_mask": MASK,
        "teacher_mask": torch.ones(2, 4).bool(),
        **change,
    }
    with pytest.raises(error, match=message):
        kd.multi_level_transport(call.pop("student"), call.pop("teacher"), **call)
