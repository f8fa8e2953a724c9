"""tests/interpreter.py changes how long a kernel takes, and nothing that it finds but a maximum with NaN."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from conftest import left_out_by_pairs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@triton.jit
def twice(x):
    return x + x


@triton.jit
def mixture(x, out, n, counts, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + j[None, :]
    values = tl.load(x + at, mask=at < n, other=float("-inf"))
    top = tl.max(values, 1)
    half = tl.exp(values - top[:, None]).to(tl.bfloat16).to(tl.float32)
    total = tl.sum(twice(half.to(tl.float64)), 1)
    tl.store(out + i, tl.where(total > 3.0, total, top / 3))
    tl.store(counts + i, tl.sum((at < n).to(tl.int32), 1) * 7 - i)


def results():
    out, counts = torch.empty(4, dtype=torch.float64), torch.empty(4, dtype=torch.int32)
    mixture[(1,)](torch.randn(50), out, 50, counts, BLOCK=16, ROWS=4)
    return out, counts


def plain(monkeypatch):
    """As Triton has it."""
    assert len(interpreter.REPLACED) == len(interpreter.PATCHES), "of another Triton"
    for owner, name, original in interpreter.REPLACED:
        monkeypatch.setattr(owner, name, original)


def test_the_same_bits(monkeypatch):
    ours = results()
    torch.manual_seed(0)
    plain(monkeypatch)
    assert all(torch.equal(x, y) for x, y in zip(ours, results()))


def test_every_pair_is_left():
    cases = [{"a": i, "b": j, "c": k} for i in range(4) for j in range(2) for k in range(3)]
    out = left_out_by_pairs(cases, cases)
    left = [case for case in cases if case not in out]
    assert len(left) == 12  # no fewer can
    for x, y in ("ab", "ac", "bc"):
        assert {(c[x], c[y]) for c in left} == {(c[x], c[y]) for c in cases}
