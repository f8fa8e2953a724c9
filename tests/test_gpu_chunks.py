"""What is added up over many chunks, and gradients beyond 2^31 logits, on a GPU. ``pytest -m gpu``."""

import pytest
import torch
from cases import DTYPES, Batch, error, leaves
from gpu import wants_cuda_kernels, wants_gpu
from plain import gradients, widened

import kd_kernels as kd
from kd_kernels.drivers.sides import HeadSide, accumulate_dtype
from kd_kernels.drivers.workspace import Workspace, footprint
from kd_kernels.gemm import matmul
from kd_kernels.reference.dense import dense_distill

pytestmark = wants_gpu
DEVICE = "cuda"
IDS = {"ids": lambda x: str(x).replace("torch.", "")}
SIDES = ("student", "teacher")
# |x - x64| / |x64| of gradients whose logit gradient and result are rounded to the dtype, and nothing else:
# some twice of what a CPU's have. Sums that are rounded to 16 bits once a chunk are beyond.
ROUNDED = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("step", [25, 200])
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_products_add_up(dtype, step):
    """Over forty chunks and over five, the last one ragged, as a head carries its gradient on."""
    wide, tokens, vocab, width = accumulate_dtype(dtype), 987, 523, 72
    g = torch.Generator().manual_seed(0)
    grad, hidden, weight = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((tokens, vocab), (tokens, width), (vocab, width))
    )
    d_weight = torch.full((vocab, width), torch.nan, dtype=wide, device=DEVICE)
    d_hidden = torch.full((tokens, width), torch.nan, dtype=wide, device=DEVICE)
    x, w = hidden.to(DEVICE), weight.to(DEVICE)
    buffer = torch.empty(footprint(step, vocab, dtype.itemsize), dtype=torch.uint8, device=DEVICE)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        chunk = Workspace(buffer).take(rows.stop - start, vocab, dtype).copy_(grad[rows])
        matmul(chunk.t(), x[rows], d_weight, accumulate=start > 0)
        matmul(chunk, w, d_hidden[rows])
    grad, hidden, weight = (x.double() for x in (grad, hidden, weight))
    bar = 1e-13 if wide == torch.float64 else 2e-6
    assert error(d_weight.cpu(), grad.t() @ hidden) < bar
    assert error(d_hidden.cpu(), grad @ weight) < bar


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_gradients_over_forty_chunks(dtype, monkeypatch):
    """Of states, weights and biases of both models, against float64."""
    batch = Batch(lead=(987,), vocab=1003, student_width=64, teacher_width=48)
    models = [batch.source(side, "head", dtype, bias=True) for side in SIDES]
    carry, carried = HeadSide.carry, []

    def counted(side, start, stop, rows):
        carried.append(stop - start)
        carry(side, start, stop, rows)

    monkeypatch.setattr(HeadSide, "carry", counted)
    sizes = {torch.float64: (8,), torch.float32: (4,)}.get(dtype, (4, 2))  # logits, and their gradient
    budget = 2 * sum(footprint(25, batch.vocab, size) for size in sizes)
    ours = [widened(x, dtype, DEVICE) for x in models]
    exact = [widened(x, torch.float64) for x in models]
    options = {"labels": batch.labels, "hard_weight": 0.5, "reduction": "sum"}
    want = dense_distill(*exact, kd.JensenShannon(0.3), **options)
    options["labels"] = batch.labels.to(DEVICE)
    loss = kd.distill(*ours, kd.JensenShannon(0.3), teacher_grad=True, workspace_bytes=budget, **options)
    chunks = carried[::2]
    assert len(chunks) >= 30 and chunks[-1] < chunks[0], chunks
    assert error(loss.cpu(), want) < (1e-13 if dtype == torch.float64 else 5e-6)
    for x, got, true in zip(leaves(*ours), gradients(loss, ours), gradients(want, exact)):
        assert got.dtype == dtype
        off = error(got.cpu(), true)
        assert off < ROUNDED[dtype], f"{tuple(x.shape)}: {off:.2e} after {len(chunks)} chunks"


@pytest.fixture
def room():
    """For logits beyond 2^31, given back to the processes that test beside this one."""
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB of device memory")
    yield
    torch.cuda.empty_cache()


def logits_beyond(tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of two models, and rows to look at: those that begin at 2^31 - V and at 2^31, and the last ones."""
    student = torch.randn(tokens, vocab, device=DEVICE, dtype=torch.bfloat16)
    border = 2**31 // vocab
    rows = torch.tensor([0, border - 1, border, border + 1, tokens - 2, tokens - 1]) % tokens
    return student.requires_grad_(), student.detach().roll(1, 0).requires_grad_(), rows.to(DEVICE)


def picked(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.detach()[rows].double().cpu()


NAMED = [None, pytest.param("cuda", marks=wants_cuda_kernels)]


@pytest.mark.parametrize("named", NAMED)
def test_gradients_beyond_2_to_the_31_logits(room, named):
    student, teacher, rows = logits_beyond(17000, 131072)
    options = {"reduction": "none", "teacher_grad": True, "backend": named}
    upstream = torch.linspace(-1, 2, len(student), device=DEVICE)
    loss = kd.distill(student, teacher, kd.JensenShannon(0.3), **options)
    found = torch.autograd.grad(loss, (student, teacher), upstream)
    models = [kd.Logits(picked(x, rows).requires_grad_()) for x in (student, teacher)]
    want = dense_distill(*models, kd.JensenShannon(0.3), reduction="none")
    exact = gradients(want, models, upstream[rows].cpu())
    assert error(loss[rows].cpu(), want) < 1e-5
    for got, true in zip(found, exact):
        for row, mine, theirs in zip(rows.tolist(), picked(got, rows), true):
            assert error(mine, theirs) < 4e-3, row  # of bfloat16


def test_other_walks_beyond_2_to_the_31_logits(room):
    """Log-probabilities with their gradient, and the top K, of the same rows."""
    logits, _, rows = logits_beyond(17000, 131072)
    ids = torch.randint(0, logits.shape[1], (len(logits), 3), device=DEVICE)
    logprobs, entropy = kd.linear_logprobs(logits, ids, entropy=True)
    (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    z = picked(logits, rows).requires_grad_()
    log_q = z.log_softmax(-1)
    want, want_entropy = log_q.gather(-1, ids[rows].cpu()), -(log_q.exp() * log_q).sum(-1)
    (exact,) = torch.autograd.grad(want.sum() + want_entropy.sum(), z)
    assert error(logprobs[rows].cpu(), want) < 1e-5 and error(entropy[rows].cpu(), want_entropy) < 1e-5
    for row, mine, theirs in zip(rows.tolist(), picked(grad, rows), exact):
        assert error(mine, theirs) < 4e-3, row
    del grad
    top = kd.linear_topk(logits.detach(), 16)
    order = z.detach().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top.ids[rows].long().cpu(), order.indices[:, :16])
    assert error(top.logits[rows].cpu(), order.values[:, :16]) == 0
    assert error(top.lse[rows].cpu(), z.logsumexp(-1)) < 1e-6
