"""For losses that no row kernel has: plain torch on the logits of a few tokens at a time, made again in the
backward pass where that is not all of them, so that ``[tokens, vocab]`` never exists as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kd_kernels.arguments import autocast_dtype
from kd_kernels.drivers.chunks import default_workspace
from kd_kernels.gemm import matmul
from kd_kernels.reference.dense import logits_of
from kd_kernels.sources import Head, Logits, Source

# Tensors of a chunk's size that live at a time: logits, softmax, sorted or shifted copies, gradients.
_COPIES = 8


def rows_that_fit(values: Tensor, vocab: int, dtype: torch.dtype, workspace_bytes: Optional[int]) -> int:
    """Tokens, one at least, the work on whose ``vocab`` logits fits the workspace."""
    budget = default_workspace(values.device) if workspace_bytes is None else workspace_bytes
    return max(1, budget // (_COPIES * vocab * dtype.itemsize))


def chunks_of(
    values: Tensor, vocab: int, dtype: torch.dtype, workspace_bytes: Optional[int]
) -> tuple[Tensor, ...]:
    """``values`` ``[N, ...]`` in chunks of tokens; an empty one where there are none: even then there is a
    gradient."""
    return values.split(rows_that_fit(values, vocab, dtype, workspace_bytes))


def chunk_logits(source: Source, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n, V]`` in ``dtype``: what the source makes of ``values``, a chunk of its own."""
    if isinstance(source, Head):
        compute = autocast_dtype(source) or values.dtype
        values = _Product.apply(values.to(compute), source.weight.to(compute), dtype)
        if source.bias is not None:
            values = values + source.bias
    values = values.to(dtype)
    shaped = source.scale != 1.0 or source.softcap is not None
    return logits_of(Logits(values, source.scale, source.softcap)) if shaped else values


def by_chunks(function: Callable[..., Tensor], *parts: Sequence[Tensor]) -> Tensor:
    """``function`` of one of each of ``parts``, joined. Where there is more than one chunk nothing
    is kept for the backward pass, which calls ``function`` again."""
    if len(parts[0]) == 1:
        return function(*(part[0] for part in parts))
    again = functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*each) for each in zip(*parts)])


class _Product(torch.autograd.Function):
    """``hidden @ weight.T``, float32 of 16-bit operands; back by products of their own dtype."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        out = hidden.new_empty(len(hidden), len(weight), dtype=dtype)
        matmul(hidden, weight.t(), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        hidden, weight = ctx.saved_tensors
        # 1 / tokens and the like would be nothing in float16.
        scale = gradient.abs().amax().clamp(min=1e-30) if gradient.numel() else 1.0
        narrow = (gradient / scale).to(hidden.dtype)
        back = (narrow @ weight if ctx.needs_input_grad[0] else None,
                narrow.t() @ hidden if ctx.needs_input_grad[1] else None)  # fmt: skip
        return *(None if x is None else (x * scale).to(hidden.dtype) for x in back), None
