"""kd.linear_logprobs against log_softmax of materialised logits."""

import pytest
import torch
from cases import DTYPES, FLOOR, SHAPING, Batch, batch_for, error, leaves

import kd_kernels as kd
from kd_kernels.reference.dense import logits_of

IDS = {"ids": lambda x: str(x).replace("torch.", "")}
SMALL = {"workspace_bytes": 3 << 10}  # three tokens at a time, two of 16-bit heads, one in float64


def ids_of(batch: Batch, k: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch.seed)
    ids = torch.randint(0, batch.vocab, (*batch.lead, k), generator=generator)
    flat = ids.view(-1, k)
    flat[0, 2] = flat[0, 5]  # twice
    flat[1, 3], flat[2, 1] = -1, -100
    flat[3] = -100
    return ids


def plain(source, ids, temperature=1.0, entropy=False):
    """As one would write it: log-softmax of all logits, wide, and a gather."""
    values, weight, bias = source.tensors()
    if weight is not None:
        values = torch.nn.functional.linear(values, weight, bias)
    wide = torch.promote_types(values.dtype, torch.float32)
    z = logits_of(kd.Logits(values.to(wide), scale=source.scale, softcap=source.softcap))
    t = torch.as_tensor(temperature, dtype=z.dtype)
    log_q = (z / (t[..., None] if t.dim() else t)).log_softmax(-1)
    columns = ids if ids.dim() == z.dim() else ids[..., None]
    picked = torch.where(columns >= 0, log_q.gather(-1, columns.clamp(min=0)), 0.0).reshape(ids.shape)
    if not entropy:
        return picked
    return picked, torch.where((columns >= 0).any(-1), -(log_q.exp() * log_q).sum(-1), 0.0)


def compare(batch, source, ids, backend, **options):
    """At most twice plain torch's error, in values and every gradient."""
    dtype = source.tensors()[0].dtype
    own = {k: options.pop(k) for k in ("compact",) if k in options}

    def copy(to):
        tensors = [None if x is None else x.detach().to(to).requires_grad_() for x in source.tensors()]
        if isinstance(source, kd.Head):
            return kd.Head(*tensors, scale=source.scale, softcap=source.softcap)
        return kd.Logits(tensors[0], scale=source.scale, softcap=source.softcap)

    results = []
    for to, call in (
        (dtype, lambda s: kd.linear_logprobs(s, ids, backend=backend, **SMALL, **own, **options)),
        (dtype, lambda s: plain(s, ids, **options)),
        (torch.float64, lambda s: plain(s, ids, **options)),
    ):
        mine = copy(to)
        out = call(mine)
        out = out if isinstance(out, tuple) else (out,)
        weights = torch.Generator().manual_seed(9)
        total = sum(
            (x * torch.randn(x.shape, generator=weights, dtype=torch.float64).to(x.dtype)).sum() for x in out
        )
        results.append([*out, *torch.autograd.grad(total, leaves(mine))])
    for i, (x, y, z) in enumerate(zip(*results)):
        assert error(x, z) <= 2 * error(y, z) + FLOOR[dtype], (i, error(x, z), error(y, z))
        assert z.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("shaping", SHAPING)
@pytest.mark.parametrize("entropy", [False, True])
def test_heads(dtype, shaping, entropy, backend):
    batch = batch_for(backend)
    source = batch.source("student", "head", dtype, **SHAPING[shaping])
    compare(batch, source, ids_of(batch), backend, temperature=batch.temperature, entropy=entropy)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_logits_and_one_id(dtype, entropy, compact, backend):
    batch = batch_for(backend, seed=1)
    source = batch.source("student", "logits", dtype, scale=0.7, softcap=5.0)
    compare(batch, source, batch.labels, backend, temperature=1.6, entropy=entropy, compact=compact)
    source = batch.source("student", "head", dtype)
    compare(batch, source, batch.labels, backend, entropy=entropy, compact=compact)


def test_unused_ids_are_zero_and_their_tokens_reach_nothing(backend):
    batch = batch_for(backend)
    ids = ids_of(batch)
    source = batch.source("student", "head", torch.float32)
    with torch.no_grad():
        source.hidden.view(-1, source.hidden.shape[-1])[3] = torch.nan
    for compact in (True, False):
        logprobs, entropy = kd.linear_logprobs(source, ids, entropy=True, compact=compact, backend=backend)
        assert (logprobs == 0).equal(ids < 0)
        assert ((entropy == 0) == (ids < 0).all(-1)).all()
        grads = torch.autograd.grad(logprobs.sum() + entropy.sum(), leaves(source))
        assert all(g.isfinite().all() for g in grads)


def test_entropy_alone(backend):
    batch = batch_for(backend)
    source = batch.source("student", "head", torch.float64)
    _, entropy = kd.linear_logprobs(source, batch.labels.clamp(min=0), entropy=True, backend=backend)
    grads = torch.autograd.grad(entropy.sum(), leaves(source))
    log_q = (source.hidden @ source.weight.T).log_softmax(-1)
    want = torch.autograd.grad(-(log_q.exp() * log_q).sum(), leaves(source))
    assert all(error(x, y) < 1e-11 for x, y in zip(grads, want))


def test_known_weights_take_the_way_through_distill(backend):
    """The docstring's promise: a policy gradient as a weighted distillation, signs included."""
    batch = batch_for(backend)
    source = batch.source("student", "head", torch.float64)
    actions, advantage = batch.labels.clamp(min=0), batch.upstream
    a = -(advantage * kd.linear_logprobs(source, actions, backend=backend)).mean()
    target = kd.SparseTarget.from_samples(actions[..., None], torch.ones_like(actions[..., None]))
    b = kd.distill(source, target, kd.ForwardKL(), token_weight=advantage, backend=backend)
    assert error(b, a) < 1e-12
    pairs = zip(*(torch.autograd.grad(x, leaves(source)) for x in (b, a)))
    assert all(error(x, y) < 1e-11 for x, y in pairs)


def test_gradcheck_op_and_second_backward():
    batch = Batch(lead=(3,), vocab=17, student_width=4)
    source = batch.source("student", "head", torch.float64, bias=True)
    ids = torch.tensor([[3, 3, 16], [0, -1, 5], [-1, -1, -1]])

    def call(hidden, weight, bias):
        return kd.linear_logprobs(
            kd.Head(hidden, weight, bias, softcap=3.0), ids, temperature=1.3, entropy=True
        )

    assert torch.autograd.gradcheck(call, source.tensors())
    logprobs, _ = call(*source.tensors())
    first = torch.autograd.grad(logprobs.sum(), source.hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logprobs.sum(), source.hidden, create_graph=True)[0])
    again = torch.autograd.grad(logprobs.sum(), source.hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        again.sum().backward()


def test_opcheck_and_compile():
    batch = Batch()
    source = batch.source("student", "head", torch.float32)
    given = ids_of(batch)
    ids = given.reshape(-1, 6)
    ids = torch.where(ids < 0, -1, ids)
    zero = torch.zeros((), dtype=torch.float64)
    call = (
        source.hidden, source.weight, None, ids, zero + 1, torch.stack([zero + 1, zero]), True, None, None,
        None, None, True, [True, True, False],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kd_kernels.linear_logprobs.default, call)

    def loss(hidden, weight):
        logprobs, entropy = kd.linear_logprobs(kd.Head(hidden, weight), given, entropy=True)
        return logprobs.sum() - 0.3 * entropy.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = [f(source.hidden, source.weight) for f in (loss, compiled)]
    grads = [torch.autograd.grad(v, (source.hidden, source.weight)) for v in values]
    assert torch.equal(*values) and all(torch.equal(x, y) for x, y in zip(*grads))


def test_only_what_is_asked_for_is_computed():
    batch = Batch()
    source = batch.source("student", "head", torch.float32)
    source.weight.requires_grad_(False)
    kd.linear_logprobs(source, batch.labels).sum().backward()
    assert source.weight.grad is None and source.hidden.grad is not None
    with torch.no_grad():
        assert not kd.linear_logprobs(source, batch.labels).requires_grad


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()], ids=str)
def test_shapes(lead):
    hidden, weight = torch.randn(*lead, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    for ids in (torch.zeros(lead, dtype=torch.int64), torch.zeros(*lead, 3, dtype=torch.int32)):
        logprobs = kd.linear_logprobs(kd.Head(hidden, weight), ids)
        assert logprobs.shape == ids.shape
        logprobs.sum().backward()
        assert weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "ids, options, message",
    [
        (torch.full((3, 5), 203), {}, r"ids must be in \[0, 203\)"),
        (torch.full((3, 5), -7), {}, "got -7"),
        (torch.zeros(3, 5), {}, "must be integers"),
        (torch.zeros(3, 5, dtype=torch.uint8), {}, "must be integers"),
        (torch.zeros(5, 3).long(), {}, "leading shape"),
        ([1, 2], {}, "must be a tensor"),
        (torch.zeros(3, 5).long(), {"temperature": 0.0}, "temperature must be"),
        (torch.zeros(3, 5).long(), {"temperature": torch.ones(3)}, "leading shape"),
        (torch.zeros(3, 5).long(), {"backend": "gpu"}, "backend must be one of"),
        (torch.zeros(3, 5).long(), {"workspace_bytes": 10}, "less than one row"),
    ],
    ids=range(10),
)
def test_refusals(ids, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kd.linear_logprobs(Batch().source("student", "head", torch.float32), ids, **options)


@pytest.mark.parametrize("compact", [True, False])
def test_no_ids_at_all(compact):
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    ids = torch.zeros(4, 0, dtype=torch.int64)
    found = kd.linear_logprobs(kd.Head(hidden, weight), ids, compact=compact)
    found.sum().backward()
    assert found.shape == (4, 0) and (hidden.grad == 0).all() and (weight.grad == 0).all()
