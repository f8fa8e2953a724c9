"""Log-probabilities of given tokens straight from hidden states, differentiable."""

from __future__ import annotations

import functools
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.arguments import (
    Scalar,
    autocast_dtype,
    check_resources,
    check_source,
    flat_ids,
    per_token,
    refuse_transforms,
    saveable,
    shaping,
)
from kd_kernels.ops.logprobs import linear_logprobs as _op
from kd_kernels.regather import gathers_of, regathering_logprobs
from kd_kernels.sources import Source, as_source


def linear_logprobs(
    source: Source | Tensor,
    ids: Tensor,
    *,
    ignore_index: int = -100,
    temperature: Scalar = 1.0,
    entropy: bool = False,
    compact: bool = True,
    backend: Optional[str] = None,
    logits_dtype: Optional[torch.dtype] = None,
    workspace_bytes: Optional[int] = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log softmax(z / temperature)`` at given ids, without ``[tokens, vocab]`` logits.

    What policy-gradient, preference and ranking losses are built on. One product forward; the upstream
    gradient being unknown until then, the backward pass projects again and takes two more (one with a frozen
    head). Where the weights of the tokens are known up front, as in ``-(advantage * log q).mean()``,
    ``kd.distill(head, kd.SparseTarget.from_samples(ids[..., None], ones), kd.ForwardKL(),
    token_weight=advantage)`` is the same loss in three products instead of four.

    Args:
        source: :class:`Head`, :class:`Logits` or a tensor of logits; leading dimensions are tokens.
        ids: integer, the leading shape (one id per token) or that and K more; -1 or ``ignore_index`` where
            unused. A token without any id costs nothing, and whatever it holds reaches neither result nor
            gradient.
        ignore_index: another mark for unused, as labels have it.
        temperature: > 0, number or leading shape.
        entropy: also return the entropy of ``softmax(z / temperature)``, differentiable too.
        compact, backend, logits_dtype, workspace_bytes: as for :func:`kd_kernels.distill`.

    Returns:
        The shape of ``ids``, float32 (float64 for float64 inputs), in nats, 0 where unused. With ``entropy``
        a pair of that and ``[...]``, the leading shape, 0 at tokens without any id.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.

    Double backward is not implemented and raises; ``torch.func`` transforms are refused.
    """
    source = as_source("source", source)
    refuse_transforms("kd_kernels.linear_logprobs", *source.tensors())
    lead, device = source.leading_shape, source.tensors()[0].device
    check_source("source", source, device)
    check_resources(ignore_index, backend, workspace_bytes, logits_dtype)
    flat = flat_ids("ids", ids, ignore_index, lead, device)
    t = per_token("temperature", temperature, lead, device)
    tensors = source.tensors()
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    if any(needs):
        tensors, flat, t = tuple(saveable(x) for x in tensors), saveable(flat), saveable(t)
    run, gathers = _op, gathers_of(source)
    if any(needs) and any(gathers):
        run = functools.partial(regathering_logprobs, gathers)
    logprobs, entropies = run(
        *tensors,
        flat,
        t,
        torch.stack(shaping(source)),
        entropy,
        autocast_dtype(source),
        logits_dtype,
        backend,
        workspace_bytes,
        compact,
        needs,
    )
    logprobs = logprobs.reshape(ids.shape)
    return (logprobs, entropies.reshape(lead)) if entropy else logprobs
