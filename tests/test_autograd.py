"""Gradients for any subset of inputs, both modes, and the rules of the house around autograd."""

import itertools
import threading

import pytest
import torch
from cases import DTYPES, OBJECTIVES, Batch, batch_for, error, leaves
from plain import compare, gradients, widened
from torch.utils.checkpoint import checkpoint

import kd_kernels as kd
from kd_kernels.reference import dense_distill

IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x)}
JS = kd.JensenShannon(0.3)


def pair(dtype=torch.float64, seed=0, **shape):
    batch = Batch(seed=seed)
    return batch, *(batch.source(side, "head", dtype, bias=True, **shape) for side in ("student", "teacher"))


def test_a_count_of_inference_mode_or_of_another_dtype():
    z, y = torch.randn(2, 4, 7).unbind()
    z.requires_grad_()
    with torch.inference_mode():
        count = torch.tensor(3)
    for number in (count, torch.tensor(3.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float16)):
        loss = kd.distill(z, y, kd.ForwardKL(), num_items=number)
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss, z)
        assert torch.equal(gradient, torch.autograd.grad(kd.distill(z, y, kd.ForwardKL(), num_items=3), z)[0])


@pytest.mark.parametrize("number", [0, 0.0, torch.tensor(0)], ids=repr)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_count_of_no_items(compiled, number):
    """As a trainer gives, where all of a batch is ignored: a loss of 0, and no NaN in a weight."""

    def loss(hidden, weight, labels, count):
        head, teacher = kd.Head(hidden, weight), hidden[..., :1] + weight[:, 0]
        return kd.distill(head, teacher, JS, labels=labels, num_items=count)

    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    hidden, weight = torch.randn(2, 3, 5).requires_grad_(), torch.randn(9, 5).requires_grad_()
    found = call(hidden, weight, torch.full((2, 3), -100), number)
    assert found == 0 and not any(x.any() for x in torch.autograd.grad(found, [hidden, weight]))
    if not compiled:
        with pytest.raises(ValueError, match="num_items must be > 0, got 0.0; 0 is taken where no token"):
            call(hidden, weight, torch.tensor([[-100, -100, -100], [-100, 4, -100]]), number)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=6)), ids=lambda w: "".join("01"[x] for x in w)
)
def test_any_subset_of_inputs(wanted, reduction):
    batch, student, teacher = pair()
    for x, want in zip(leaves(student, teacher), wanted):
        x.requires_grad_(want)
    if not any(wanted):
        assert not kd.distill(student, teacher, JS, reduction=reduction, teacher_grad=True).requires_grad
        return
    compare(batch, student, teacher, JS, None, reduction=reduction, labels=batch.labels)


@pytest.mark.parametrize(
    "kinds", [("head", "logits"), ("logits", "head"), ("logits", "logits")], ids="x".join
)
@pytest.mark.parametrize("wanted", [(False, True), (True, False)], ids=str)
def test_one_side_only(kinds, wanted):
    batch = Batch()
    student, teacher = (
        batch.source(side, kind, torch.float64, grad=grad)
        for side, kind, grad in zip(("student", "teacher"), kinds, wanted)
    )
    for reduction in ("sum", "none"):
        compare(batch, student, teacher, JS, None, reduction=reduction)


def test_teacher_is_a_constant_by_default():
    _, student, teacher = pair()
    loss = kd.distill(student, teacher, JS)
    given = torch.autograd.grad(loss, leaves(student, teacher), allow_unused=True)
    assert [g is not None for g in given] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction):
    batch, student, teacher = pair()
    loss = kd.distill(student, teacher, JS, reduction=reduction, labels=batch.labels)
    upstream = torch.rand_like(loss)
    first = torch.autograd.grad(loss, leaves(student), upstream, retain_graph=True)
    second = torch.autograd.grad(loss, leaves(student), upstream, retain_graph=True)
    doubled = torch.autograd.grad(loss, leaves(student), 2 * upstream)
    for x, y, z in zip(first, second, doubled):
        assert torch.equal(x, y)
        assert torch.equal(2 * x, z)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["head", "logits"])
def test_double_backward_raises(reduction, kind):
    batch = Batch()
    student, teacher = (batch.source(side, kind, torch.float64) for side in ("student", "teacher"))
    values = student.tensors()[0]
    loss = kd.distill(student, teacher, JS, reduction=reduction).sum()
    (g,) = torch.autograd.grad(loss, values, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward .* kd_kernels.reference.dense_distill"):
        (loss + g.pow(2).sum()).backward()


@pytest.mark.parametrize("objective", [*OBJECTIVES, kd.SortedWasserstein()], **IDS)
def test_what_that_error_names_is_twice_differentiable(objective):
    batch = Batch(lead=(3,), vocab=7, student_width=4)
    student = batch.source("student", "head", torch.float64)
    teacher = batch.tensors["teacher logits"]  # bare, as kd.distill takes it

    def loss(hidden, weight):
        return dense_distill(kd.Head(hidden, weight), teacher, objective, temperature=1.7)

    assert loss(*leaves(student)).isfinite()
    assert torch.autograd.gradgradcheck(loss, leaves(student))


def test_parts_are_not_differentiable():
    _, student, teacher = pair()
    _, parts = kd.distill(student, teacher, JS, return_parts=True)
    assert not any(x.requires_grad for x in parts)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.functionalize])
def test_func_transforms_are_refused(transform):
    _, student, teacher = pair()

    def loss(hidden):
        return kd.distill(kd.Head(hidden, student.weight), kd.Head(teacher.hidden, teacher.weight), JS)

    with pytest.raises(TypeError, match="torch.func"):
        transform(loss)(student.hidden.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inference_mode_teacher(reduction):
    batch, student, _ = pair()
    with torch.inference_mode():
        teacher = batch.source("teacher", "head", torch.float64, bias=True, grad=False)
    loss = kd.distill(student, teacher, JS, reduction=reduction)
    exact = dense_distill(
        student, batch.source("teacher", "head", torch.float64, bias=True), JS, reduction=reduction
    )
    for x, y in zip(gradients(loss, [student], batch.upstream), gradients(exact, [student], batch.upstream)):
        assert error(x, y) < 1e-13


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_grad_and_frozen_heads_compute_nothing_extra(reduction, monkeypatch):
    """Count the products: 2 forward only, 3 with a frozen head, 4 in all (6 where recomputed)."""
    from kd_kernels.drivers import sides

    calls = []
    matmul = sides.matmul
    monkeypatch.setattr(sides, "matmul", lambda *a, **k: (calls.append(1), matmul(*a, **k)))
    batch = Batch()
    teacher = batch.source("teacher", "head", torch.float64, grad=False)

    def count(student, grad=True):
        calls.clear()
        with torch.set_grad_enabled(grad):
            loss = kd.distill(student, teacher, JS, reduction=reduction).sum()
        if loss.requires_grad:
            loss.backward()
        return len(calls)

    recomputed = 2 if reduction == "none" else 0
    student = batch.source("student", "head", torch.float64)
    assert count(student, grad=False) == 2
    assert count(student) == 4 + recomputed
    frozen = kd.Head(student.hidden, student.weight.detach())
    assert count(frozen) == 3 + recomputed
    assert frozen.weight.grad is None
    assert count(kd.Head(student.hidden.detach(), student.weight)) == 3 + recomputed


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    batch, student, teacher = pair()
    hidden, weight, bias = student.tensors()

    def loss(h):
        return kd.distill(kd.Head(torch.tanh(h), weight, bias), teacher, JS, labels=batch.labels)

    plain = torch.autograd.grad(loss(hidden), [hidden, weight, bias])
    hidden.grad = weight.grad = bias.grad = None
    checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    for x, y in zip(plain, (hidden.grad, weight.grad, bias.grad)):
        assert torch.equal(x, y)


def test_gradient_accumulation_does_not_depend_on_the_split():
    batch, student, teacher = pair()
    whole = kd.distill(student, teacher, JS, labels=batch.labels, num_items=(batch.labels != -100).sum())
    expected = gradients(whole, [student])
    hidden, weight, bias = student.tensors()
    for rows in (slice(0, 1), slice(1, 3)):
        part = kd.distill(
            kd.Head(hidden[rows], weight, bias),
            kd.Head(teacher.hidden[rows], teacher.weight, teacher.bias),
            JS,
            labels=batch.labels[rows],
            num_items=(batch.labels != -100).sum(),
        )
        part.backward()
    for x, y in zip(leaves(student), expected):
        assert error(x.grad, y) < 1e-13


def test_tied_weight_gets_both_gradients():
    batch = Batch(teacher_width=24)
    student = batch.source("student", "head", torch.float64)
    teacher = kd.Head(batch.tensors["teacher hidden"], student.weight)
    loss = kd.distill(student, teacher, JS, teacher_grad=True)
    exact = dense_distill(student, teacher, JS)
    assert error(*(torch.autograd.grad(x, student.weight)[0] for x in (loss, exact))) < 1e-13


def everything(batch, **options):
    """Of every option that is a tensor, one."""
    given = {"labels": batch.labels, "mask": batch.mask, "temperature": batch.temperature, "hard_weight": 0.5}
    return {**given, "token_weight": batch.weight, **options}


def coupled(batch, **options):
    options = {k: v for k, v in everything(batch, **options).items() if k != "token_weight"}
    return {**options, "temperature": 2.0, "groups": batch.labels, "reduction": "sum"}


def logprobs(batch, source, ids, backend):
    return torch.cat([
        x.flatten()
        for x in kd.linear_logprobs(source, ids, temperature=batch.temperature, entropy=True, backend=backend)
    ])  # fmt: skip


# By call: its result, of a batch, two models, a sparse teacher and options. What overwrites rows is Triton's
# gather, which sparse teachers, the top-K form and log-probabilities use.
CALLS = {
    "dense": lambda b, s, t, _, o: kd.distill(s, t, JS, teacher_grad=True, **everything(b, **o)),
    "sparse": lambda b, s, _, p, o: kd.distill(s, p, JS, **everything(b, **o, teacher_temperature=1.0)),
    "sorted": lambda b, s, t, _, o: kd.distill(s, t, kd.SortedWasserstein(), **everything(b, **o)),
    "sorted top_k": lambda b, s, t, _, o: kd.distill(s, t, kd.SortedWasserstein(7), **everything(b, **o)),
    "sinkhorn_batch": lambda b, s, t, _, o: kd.distill(s, t, kd.SinkhornBatch(0.4, 3), **coupled(b, **o)),
    "logprobs": lambda b, s, _, p, o: logprobs(b, s, p.ids, o["backend"]),
    "topk": lambda b, s, _, p, o: kd.linear_topk(s, 5, targets=b.labels, samples=3, backend=o["backend"]),
    "rank": lambda b, s, _, p, o: kd.linear_rank(s, p.ids, 5, backend=o["backend"]),
    "score": lambda b, s, t, _, o: kd.score(s, t, labels=b.labels, mask=b.mask, backend=o["backend"]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", [("head", "head"), ("head", "logits"), ("logits", "logits")], ids="x".join)
@pytest.mark.parametrize("call", CALLS)
def test_inputs_are_unchanged(call, kinds, dtype, backend):
    """Nor is what lies between the rows of existing logits."""
    batch = batch_for(backend)
    models, watched = [], [batch.labels, batch.mask, batch.weight, batch.temperature]
    for side, kind in zip(("student", "teacher"), kinds):
        model = batch.source(side, kind, dtype)
        if kind == "logits":
            wider = torch.nn.functional.pad(model.values.detach(), (2, 3), value=7.0).requires_grad_()
            model = kd.Logits(wider[..., 2:-3])
            watched.append(wider)
        else:
            watched += leaves(model)
        models.append(model)
    top, ids = batch.tensors["teacher logits"].log_softmax(-1).topk(6)
    tail = (1 - top.exp().sum(-1)).log().float()
    sparse = kd.SparseTarget(ids, top.float(), log_tail_mass=tail)
    watched += [ids, sparse.logprobs, tail]
    before = [(x._version, x.detach().clone()) for x in watched]
    for reduction in ("mean", "none"):
        found = CALLS[call](batch, *models, sparse, {"backend": backend, "reduction": reduction})
        if isinstance(found, torch.Tensor):
            found.sum().backward()
    for x, (version, value) in zip(watched, before):
        assert x._version == version and torch.equal(x.detach(), value)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset", "column-sliced"])
def test_strides(layout, reduction, monkeypatch):
    """Strided, expanded and transposed inputs and weights; a weight with one unit stride is not copied."""
    batch = Batch(lead=(4, 6), teacher_width=24)

    def shaped(x, is_weight=False):
        if layout == "transposed":
            return x.mT.contiguous().mT
        if layout == "strided":
            return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
        if layout == "expanded" and not is_weight:
            return x[:1].expand(x.shape)
        if layout == "offset":
            return torch.cat([x.new_full((1, *x.shape[1:]), torch.nan), x])[1:]
        if layout == "column-sliced":
            return torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2]
        return x

    from kd_kernels.drivers import sides

    seen = []
    matmul = sides.matmul
    monkeypatch.setattr(sides, "matmul", lambda a, b, *r, **k: (seen.append((a, b)), matmul(a, b, *r, **k)))
    for kinds in (("head", "head"), ("logits", "head"), ("logits", "logits")):
        sources = []
        for side, kind in zip(("student", "teacher"), kinds):
            leaf = batch.source(side, kind, torch.float64)
            values, weight, _ = leaf.tensors()
            strided = shaped(values)
            sources.append((kd.Logits(strided), values, None) if weight is None
                           else (kd.Head(strided, shaped(weight, True)), values, weight))  # fmt: skip
        (student, *s_leaves), (teacher, *t_leaves) = sources
        wanted = [x for x in (*s_leaves, *t_leaves) if x is not None]
        loss = kd.distill(student, teacher, JS, reduction=reduction, labels=batch.labels, teacher_grad=True)
        exact = dense_distill(student, teacher, JS, reduction=reduction, labels=batch.labels)
        upstream = batch.upstream if reduction == "none" else None
        for x, y in zip(
            torch.autograd.grad(loss, wanted, upstream), torch.autograd.grad(exact, wanted, upstream)
        ):
            assert error(x, y) < 1e-13, (kinds, layout)
        if layout != "strided" and kinds[1] == "head":
            pointers = {m.data_ptr() for products in seen for m in products}
            assert teacher.weight.data_ptr() in pointers, "the weight was copied"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_states_that_lie_in_columns(dtype, reduction):
    """Their gradient does not: float16 sums it up in float32, by a product that writes rows."""
    batch = Batch(lead=(24,))
    found = []
    for shaped in (lambda x: x, lambda x: x.t().contiguous().t()):
        heads = [batch.source(side, "head", dtype) for side in ("student", "teacher")]
        columns = [kd.Head(shaped(x.hidden), x.weight) for x in heads]
        assert columns[0].hidden.is_contiguous() == (not found)
        loss = kd.distill(*columns, JS, reduction=reduction, teacher_grad=True, workspace_bytes=24_000)
        wanted = [x.hidden for x in heads]
        found.append(
            [loss, *torch.autograd.grad(loss, wanted, batch.upstream.to(loss) if loss.dim() else None)]
        )
    for rows, columns in zip(*found):
        assert error(columns, rows) < 30 * torch.finfo(dtype).eps


def test_upstream_gradients_of_all_strides():
    batch, student, teacher = pair()
    for make in (
        lambda loss: torch.ones(()).double().expand_as(loss),
        lambda loss: torch.randn(5, 3).double().t(),
        lambda loss: torch.randn(3, 10).double()[:, ::2],
    ):
        loss = kd.distill(student, teacher, JS, reduction="none")
        exact = dense_distill(student, teacher, JS, reduction="none")
        up = make(loss)
        for x, y in zip(
            torch.autograd.grad(loss, leaves(student), up), torch.autograd.grad(exact, leaves(student), up)
        ):
            assert error(x, y) < 1e-13


def test_float16_gradients_do_not_flush_to_zero():
    """Denominators and token weights of 1e-6 must not pass through float16 logit gradients."""
    batch, student, teacher = pair(torch.float16)
    exact_s, exact_t = widened(student, torch.float64), widened(teacher, torch.float64)
    weight = torch.full(batch.lead, 1e-7)
    for reduction in ("sum", "none"):
        loss = kd.distill(student, teacher, kd.ForwardKL(), token_weight=weight, reduction=reduction)
        exact = dense_distill(exact_s, exact_t, kd.ForwardKL(), token_weight=weight, reduction=reduction)
        scale = 2.0**20  # what a GradScaler does
        ours = torch.autograd.grad(loss.sum() * scale, leaves(student))
        theirs = torch.autograd.grad(exact.sum() * scale, leaves(exact_s))
        for x, y in zip(ours, theirs):
            assert error(x, y) < 3e-3


@pytest.mark.parametrize("temperature", [10.0, 100.0, 1000.0])
def test_float16_gradients_at_high_temperature(temperature):
    """1/T must not flush float16 logit gradients either: no loss scale comes before the forward pass."""
    batch = Batch(lead=(64,), vocab=4001)
    student, teacher = (batch.source(side, "head", torch.float16) for side in ("student", "teacher"))
    exact_s, exact_t = widened(student, torch.float64), widened(teacher, torch.float64)
    options = {"temperature": temperature, "temperature_squared": True}
    ours = gradients(kd.distill(student, teacher, kd.ForwardKL(), **options), [student])
    for x, y in zip(ours, gradients(dense_distill(exact_s, exact_t, kd.ForwardKL(), **options), [exact_s])):
        assert error(x, y) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_expanded_and_overlapping_operands(dtype):
    """A BLAS cannot describe them: they are copied, not read as if they were matrices."""
    weight, teacher = torch.randn(40, 16).to(dtype), torch.randn(6, 40)
    buffer = torch.randn(64).to(dtype)
    for hidden, w in (
        (torch.randn(1, 16).to(dtype).expand(6, 16), weight),
        (torch.randn(6, 1).to(dtype).expand(6, 16), weight),
        (torch.randn(6, 16).to(dtype), weight[:1].expand(40, 16)),
        (torch.randn(6, 16).to(dtype), weight[:, :1].expand(40, 16)),
        (buffer.as_strided((6, 16), (1, 1)), buffer.as_strided((40, 16), (1, 1))),
    ):
        ours = kd.distill(kd.Head(hidden, w), teacher, kd.ForwardKL())
        exact = dense_distill(
            kd.Head(hidden.double(), w.double()), kd.Logits(teacher.double()), kd.ForwardKL()
        )
        assert error(ours, exact) < 1e-5


def test_threads_at_once():
    """Eight Python threads, each with its own batch, all right."""
    expected, results = [], [None] * 8
    batches = [Batch(seed=i) for i in range(8)]

    def step(i):
        student, teacher = (batches[i].source(side, "head", torch.float32) for side in ("student", "teacher"))
        loss = kd.distill(student, teacher, JS, workspace_bytes=1 << 15)
        loss.backward()
        return loss.detach(), student.hidden.grad, student.weight.grad

    for i in range(8):
        expected.append(step(i))

    def work(i):
        for _ in range(20):
            results[i] = step(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for got, want in zip(results, expected):
        assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
def test_deterministic_whatever_the_threads(objective):
    def step(threads):
        torch.set_num_threads(threads)
        batch = Batch(lead=(407,), vocab=1531)
        logits = [batch.source(side, "logits", torch.float32) for side in ("student", "teacher")]
        loss = kd.distill(*logits, objective, teacher_grad=True, reduction="none")
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves(*logits))]

    try:
        first = step(1)
        for threads in (2, 3, 2):
            assert all(torch.equal(x, y) for x, y in zip(first, step(threads)))
    finally:
        torch.set_num_threads(1)
