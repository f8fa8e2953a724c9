"""Products of 16-bit operands with a float32 result, by every way that a processor may have to take."""

import pytest
import torch
from cases import Batch, error, leaves

import kd_kernels as kd
from kd_kernels import gemm, native

WAYS = ["native", "mkl", "upcast"]
WAY = pytest.mark.parametrize("way", WAYS)
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def take(monkeypatch):
    def only(way: str, dtype: torch.dtype) -> None:
        if way == "native" and not (dtype == torch.bfloat16 and native.has_gemm_bf16()):
            pytest.skip(f"{dtype}: our kernel is for bfloat16, on processors with AVX512_BF16")
        if way == "mkl" and not native.has_mkl_gemm(dtype):
            pytest.skip(f"{dtype}: this torch exports no such product")
        monkeypatch.setattr(gemm, "route", lambda dtype: way)

    return only


@WAY
@DTYPE
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(5, 300, 7), (70, 65, 4100), (1, 1, 1)], ids=str)
def test_the_result_is_float32(take, way, dtype, autocast, accumulate, shape):
    """No factor and no sum is rounded to 16 bits, also where the caller is under autocast."""
    take(way, dtype)
    m, k, n = shape
    for a in (torch.randn(m, k), torch.randn(k, m).t(), torch.randn(m, 2 * k)[:, ::2]):
        for b in (torch.randn(k, n), torch.randn(n, k).t()):
            a, b, out = a.to(dtype), b.to(dtype), torch.randn(m, n)
            exact = a.double() @ b.double() + (out if accumulate else 0)
            with torch.autocast("cpu", dtype=dtype, enabled=autocast):
                gemm.matmul(a, b, out, accumulate)
            assert error(out, exact) < 2e-6


@WAY
@DTYPE
def test_a_float64_result(take, way, dtype):
    """No way but casting up has one."""
    take(way, dtype)
    a, b = torch.randn(5, 300).to(dtype), torch.randn(300, 7).to(dtype)
    out = torch.randn(5, 7, dtype=torch.float64)
    exact = out + a.double() @ b.double()
    gemm.matmul(a, b, out, accumulate=True)
    assert error(out, exact) < 1e-14
    gemm.matmul(a, b, out)
    assert error(out, a.double() @ b.double()) < 1e-14


@WAY
@DTYPE
def test_float32_masters_under_autocast(take, way, dtype):
    """As exact as the operands' rounding leaves it, whichever way the processor takes."""
    take(way, dtype)
    batch = Batch(lead=(40,), vocab=301)
    student, teacher = (batch.source(side, "head", torch.float32) for side in ("student", "teacher"))
    rounded = [
        kd.Head(*(x.detach().to(dtype).double().requires_grad_() for x in leaves(source)))
        for source in (student, teacher)
    ]
    with torch.autocast("cpu", dtype=dtype):
        loss = kd.distill(student, teacher, kd.ReverseKL(), reduction="sum")
    exact = kd.distill(*rounded, kd.ReverseKL(), reduction="sum")
    found = torch.autograd.grad(loss, leaves(student))
    bound = 3e-3 if dtype == torch.bfloat16 else 4e-4
    for x, y in zip(found, torch.autograd.grad(exact, leaves(rounded[0]))):
        assert error(x, y) < bound
