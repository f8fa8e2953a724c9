"""Matrix products for the drivers: ``out (+)= a @ b`` by the fastest library that keeps float32.

Logits and weight gradients should leave the product in float32 even when the operands are 16-bit:
bf16-rounded logits make ``d hidden`` 20 times more wrong than rounding the logit gradient does. On
CUDA torch >= 2.8 offers that (``out_dtype``), and older ones cast up as below; on CPU none does, so in
order of speed:

* our AVX512_BF16 kernel, where the processor has that but no AMX (MKL falls back to float32
  arithmetic on such AMD processors, at half the speed);
* MKL's own mixed product, which torch's CPU library exports;
* casting slabs of the larger operand up, and a float32 product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kd_kernels import native

_SLAB_BYTES = 8 << 20  # upcast this much of an operand at a time: stays in cache, costs no memory


def matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Write ``a @ b`` into ``out``, or add it there.

    Args:
        a: ``[m, k]``; b: ``[k, n]`` of the same dtype.
        out: ``[m, n]``, rows contiguous; the operands' dtype, or a wider one.
        accumulate: add to what ``out`` holds.
    """
    if out.dtype == a.dtype:
        if accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif out.dtype != torch.float32:  # 16-bit operands of a loss that is float64 for another's sake
        _upcast(a, b, out, accumulate)
    elif a.device.type == "cpu":
        _widening_cpu(a, b, out, accumulate)
    elif _widens(a.dtype, a.device):
        _widening_cuda(a, b, out, accumulate)
    else:
        _upcast(a, b, out, accumulate)


def route(dtype: torch.dtype) -> str:
    """Which of the three ways a 16-bit product with a float32 result takes on this CPU."""
    if dtype == torch.bfloat16 and native.has_gemm_bf16() and "amx_bf16" not in native.processor_flags():
        return "native"
    if native.has_mkl_gemm(dtype):
        return "mkl"
    return "upcast"


def _widening_cpu(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    way = route(a.dtype)
    if way == "upcast" or min(a.shape + b.shape) == 0:
        _upcast(a, b, out, accumulate)
        return
    a, b = as_matrix(a), as_matrix(b)
    (native.gemm_bf16 if way == "native" else native.mkl_gemm)(a, b, out, accumulate)


def _widening_cuda(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    aten = torch.ops.aten
    if accumulate:
        aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        aten.mm.dtype_out(a, b, out.dtype, out=out)


def offers_widening() -> bool:
    """Whether this torch knows products with another dtype than their operands' (on CUDA, since 2.8)."""
    return hasattr(torch.ops.aten.addmm, "dtype_out")


@functools.cache
def _widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has a product with a float32 result here: tried once, on 16 x 16 numbers."""
    if not offers_widening():
        return False
    a, out = torch.ones(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        _widening_cuda(a, a, out, accumulate=False)
        _widening_cuda(a, a, out, accumulate=True)
    except (RuntimeError, TypeError):
        return False
    return True


def as_matrix(x: Tensor) -> Tensor:
    """``x`` itself where a BLAS can describe it: one unit stride, the other at least as long as a row
    or column (an expanded or overlapping matrix is not); else a copy."""
    rows, columns = x.stride()
    if (columns == 1 and rows >= x.shape[1]) or (rows == 1 and columns >= x.shape[0]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _upcast(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    if a.shape[0] < b.shape[1]:  # cut the larger operand
        _upcast(b.t(), a.t(), out.t(), accumulate)
        return
    wide = b.to(out.dtype)
    step = max(1, _SLAB_BYTES // max(1, a.shape[1] * out.element_size()))
    for start in range(0, a.shape[0], step):
        rows = slice(start, start + step)
        slab = a[rows].to(out.dtype)
        if accumulate:
            out[rows].addmm_(slab, wide)
        else:
            torch.mm(slab, wide, out=out[rows])  # `slab @ wide` autocast would make narrow again
