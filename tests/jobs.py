"""Random jobs for the gather and topk kernels, and their comparison with the reference run in float64."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.backends import OVERWRITES, TABLE, VOCABULARY_MAJOR

SPREAD = 3.0  # standard deviation of the logits


def backends_of(op: str) -> list[str]:
    """The backends whose kernel for ``op`` can run on this machine's CPU."""
    cpu = torch.device("cpu")
    return [name for name, (kernel, why_not) in TABLE[op].items() if kernel is not None and not why_not(cpu)]


def close(got: Tensor, want: Tensor, bar: float, spare: float | Tensor = 0.0) -> None:
    """Elementwise, relative to the largest number of its row; NaN and infinities alike."""
    finite = want.isfinite()
    torch.testing.assert_close(
        got.double().masked_fill(finite, 0), want.masked_fill(finite, 0), equal_nan=True, rtol=0, atol=0
    )
    size = want.masked_fill(~finite, 0).abs().amax(-1, keepdim=True) if want.numel() else want
    right = (got - want).abs().masked_fill(~finite, 0) <= bar * size + spare
    assert right.all(), (got[~right], want[~right])  # NaN is not


def kernel_of(op: str, backend: str):
    kernel = TABLE[op][backend][0]
    assert kernel is not None
    return kernel


def layouts_of(backend: str) -> list[str]:
    return ["rows", "scattered rows"] + ["vocabulary-major"] * (backend in VOCABULARY_MAJOR)


def side(
    z: Tensor,
    dtype: torch.dtype,
    layout: str = "rows",
    *,
    temperature: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    grad: str | None = None,
    grad_dtype: torch.dtype | None = None,
) -> R.Rows:
    """The raw logits ``z`` [n, V] as a kernel gets them; ``grad`` "in place", "elsewhere" or None.

    "scattered rows" come in another order, with gaps, at odd offsets.
    """
    n, vocab = z.shape
    if temperature is None:
        temperature = torch.ones(n, dtype=torch.float64)
    logits, offsets, multiple = _laid_out(z.to(dtype), layout)
    rows = R.Rows(logits, offsets, temperature, scale, softcap, multiple=multiple)
    if grad == "in place":
        rows.grad, rows.grad_offsets, rows.grad_multiple = logits, offsets, multiple
    elif grad == "elsewhere":
        empty = torch.full_like(z, torch.nan, dtype=grad_dtype or dtype)
        rows.grad, rows.grad_offsets, rows.grad_multiple = _laid_out(empty, layout)
    return rows


def _laid_out(z: Tensor, layout: str) -> tuple[Tensor, Tensor | None, int]:
    n, vocab = z.shape
    if layout == "vocabulary-major":
        memory = z.new_full((vocab, n + 3), torch.nan)[:, :n]
        return memory.copy_(z.t()), None, 1
    if layout == "rows":
        stride = -(-vocab // 8) * 8
        memory = z.new_full((n, stride), torch.nan)
        memory[:, :vocab] = z
        return memory, torch.arange(n) * stride, stride
    stride = vocab + 5
    memory = z.new_full((n * stride + 3,), torch.nan)
    offsets = torch.randperm(n) * stride + 3
    for row, offset in zip(z, offsets.tolist()):
        memory[offset : offset + vocab] = row
    return memory, offsets, 1


def ids_for(n: int, vocab: int, k: int, unused: bool) -> Tensor:
    """``[n, k]`` int32: ascending, none twice, -1 in front where ``unused`` leaves some; then the first row
    is full and the last empty."""
    k = min(k, vocab)
    ids = torch.stack([torch.randperm(vocab)[:k] for _ in range(n)]) if k else torch.zeros(n, 0)
    if unused and k:
        left = torch.randint(0, k + 1, (n, 1))
        left[0], left[-1] = 0, k
        ids = torch.where(torch.arange(k) < left, -1, ids)
    return ids.sort(-1).values.to(torch.int32)


def gather_job(
    rows: R.Rows, ids: Tensor, vocab: int, *, hard: bool = True, means: bool = True, slope: bool = True
) -> R.GatherJob:
    """A job with coefficients of either sign, some 0."""
    n, k = ids.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    soft, hard_weight = normal(n), normal(n)
    if n > 2:
        soft[1] = hard_weight[2] = 0
    return R.GatherJob(
        n=n,
        vocab=vocab,
        side=rows,
        ids=ids,
        gathered=torch.full((n, k), torch.nan, dtype=torch.float64),
        statistics=torch.full((n, R.GATHER_COLUMNS), torch.nan, dtype=torch.float64),
        hard=hard,
        means=means,
        soft=soft,
        slope=normal(n) if slope else None,
        hard_weight=hard_weight if hard else None,
        at_ids=normal(n, k),
    )


def topk_job(
    rows: R.Rows,
    vocab: int,
    k: int,
    temperatures: tuple[float, ...] = (1.0,),
    targets: int = 0,
    draws: int = 0,
) -> R.TopkJob:
    """A job whose targets are random but for one that is out of range and one that comes twice."""
    n = rows.temperature.numel()
    ids = torch.randint(0, vocab, (n, targets))
    if targets > 2:
        ids[:, 1] = ids[:, 0]
        ids[0, 2], ids[-1, 2] = -1, vocab
    nan = torch.nan
    return R.TopkJob(
        n=n,
        vocab=vocab,
        side=rows,
        temperatures=torch.tensor(temperatures, dtype=torch.float64),
        ids=torch.full((n, k), -7, dtype=torch.int32),
        values=torch.full((n, k), nan, dtype=torch.float64),
        statistics=torch.full((n, 1 + 3 * len(temperatures)), nan, dtype=torch.float64),
        targets=ids,
        target_values=torch.full((n, targets), nan, dtype=torch.float64),
        target_ranks=torch.full((n, targets), -7, dtype=torch.int32),
        uniforms=torch.rand(n, draws, dtype=torch.float64),
        samples=torch.full((n, draws), -7, dtype=torch.int32),
    )


def widened(job):
    """The same job in memory of its own, its logits and gradient in float64."""
    rows = job.side
    vocab = job.vocab
    logits, offsets, _ = _laid_out(rows.read(job.n, vocab).to(torch.float64), "rows")
    grad = torch.zeros_like(logits)
    wide = R.Rows(logits, offsets, rows.temperature, rows.scale, rows.softcap, grad, offsets)
    return replace(copy.deepcopy(replace(job, side=None)), side=wide)


def moved(job, device: str):
    """The job with its tensors on ``device``; a gradient in place stays so, what is there is not copied."""
    there: dict[int, Tensor] = {}

    def move(x):
        return there.setdefault(id(x), x.to(device)) if isinstance(x, Tensor) else x

    def moved_fields(data):
        return replace(data, **{f.name: move(getattr(data, f.name)) for f in fields(data)})

    return replace(moved_fields(job), side=moved_fields(job.side))


def gradient(job: R.GatherJob) -> Tensor:
    """The gradient as ``[n, V]`` float64."""
    rows = job.side
    written = R.Rows(rows.grad, rows.grad_offsets, rows.temperature)
    return written.read(job.n, job.vocab).to(torch.float64)


def keeps_logits(backend: str, job: R.GatherJob, before: Tensor) -> bool:
    """Whether STATISTICS left the logits ``before`` alone, but for those at ids that it may overwrite."""
    after = job.side.read(job.n, job.vocab)
    allowed = torch.zeros(before.shape, dtype=torch.bool)
    if backend in OVERWRITES:
        index = torch.where(job.ids < 0, job.vocab, job.ids.long())
        allowed = torch.zeros(job.n, job.vocab + 1, dtype=torch.bool).scatter_(1, index, True)[:, : job.vocab]
    same = (after == before) | (after.isnan() & before.isnan())
    return bool((same | allowed).all())
