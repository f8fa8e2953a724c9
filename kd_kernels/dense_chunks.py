"""For losses that no row kernel has: plain torch on the logits of a few tokens at a time, made again in the
backward pass where that is not all of them, so that ``[tokens, vocab]`` never exists as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_kernels.arguments import autocast_dtype
from kd_kernels.drivers.chunks import default_workspace
from kd_kernels.gemm import matmul
from kd_kernels.ops.backward import once
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
    size = rows_that_fit(values, vocab, dtype, workspace_bytes)
    return tuple(values[start : start + size] for start in range(0, max(len(values), 1), size))


def chunk_logits(
    source: Source, values: Tensor, dtype: torch.dtype, sums: Sequence[Optional[Tensor]] = (None, None)
) -> Tensor:
    """``[n, V]`` in ``dtype``: what the source makes of ``values``, a chunk of its own. ``sums``: see
    :func:`wide_sums`."""
    if isinstance(source, Head):
        compute = autocast_dtype(source) or values.dtype
        weight, bias = source.weight, source.bias
        if sums[0] is not None:
            weight, bias = weight.detach(), None if bias is None else bias.detach() + sums[1]
        values = _Product.apply(values.to(compute), weight.to(compute), sums[0], dtype)
        if bias is not None:
            values = values + bias
    values = values.to(dtype)
    shaped = source.scale != 1.0 or source.softcap is not None
    return logits_of(Logits(values, source.scale, source.softcap)) if shaped else values


def wide_sums(source: Source) -> list[Optional[Tensor]]:
    """Stand in for a head's weight and bias in the graph of many chunks: zeros that take no memory, in
    float32, so that the chunks' gradients add up in it and not in 16 bits."""
    return [None if x is None else _WideSum.apply(x) for x in source.tensors()[1:]]


def by_chunks(function: Callable[..., Tensor], kept: Sequence[Tensor], *parts: Sequence[Tensor]) -> Tensor:
    """``function`` of one of each of ``parts``, joined. Where there is more than one chunk nothing
    is kept for the backward pass, which calls ``function`` again, and refuses to where one of ``kept``, what
    it reads, is not what it was: autograd looks only at what a graph keeps."""
    if len(parts[0]) == 1:
        return function(*(part[0] for part in parts))
    versions = [(x, x._version) for x in kept if not x.is_inference()]

    def unchanged(*each: Tensor) -> Tensor:
        for x, version in versions:
            if x._version != version:
                raise RuntimeError(
                    f"one of the variables needed for gradient computation, {list(x.shape)}, has been "
                    f"modified by an inplace operation: it is at version {x._version}, not {version}"
                )
        return function(*each)

    again = functools.partial(checkpoint, unchanged, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*each) for each in zip(*parts)])


class _Product(torch.autograd.Function):
    """``hidden @ weight.T``, float32 of 16-bit operands; back by products of their own dtype. The weight's
    gradient goes to ``wide_sum``, where there is one, in its dtype."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, wide_sum: Optional[Tensor], dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, wide_sum)
        out = hidden.new_empty(len(hidden), len(weight), dtype=dtype)
        matmul(hidden, weight.t(), out)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        tensors = ctx.saved_tensors  # once: activation checkpointing makes them once
        with torch.no_grad():
            made = _Product.back(gradient, *tensors[:2], ctx.needs_input_grad)
        return *(x if x is None else once("hybrid_uld", x, gradient, *tensors) for x in made), None

    @staticmethod
    def back(
        gradient: Tensor, hidden: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Optional[Tensor], ...]:
        # 1 / tokens would be nothing in float16. One scale for all rows, and not of one that is NaN.
        scale = gradient.abs().nan_to_num(0.0, 0.0).amax().clamp(min=1e-30) if gradient.numel() else 1.0
        narrow = (gradient / scale).to(hidden.dtype)
        d_hidden = d_weight = d_sum = None
        if needs[0]:
            d_hidden = ((narrow @ weight) * scale).to(hidden.dtype)
        if needs[1]:
            d_weight = ((narrow.t() @ hidden) * scale).to(weight.dtype)
        if needs[2]:
            d_sum = weight.new_empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
            matmul(narrow.t(), hidden, d_sum)
            d_sum *= scale
        return d_hidden, d_weight, d_sum


class _WideSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.new_zeros((), dtype=wide).expand(parameter.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.to(ctx.dtype)
