"""How a shim is compared: with the library it stands in for, and both with the formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from cases import FLOOR, error
from torch import Tensor

# How far a peer may be from its own formula: beyond that it computes something else.
PEER = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.3}
UPSTREAM = 2.5  # a loss is rarely the last factor


def leaves(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.detach().to(dtype).clone().requires_grad_() for x in tensors]


def evaluate(function: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``[loss, gradient of every input that is not None]``; a gradient is None where none arrives."""
    loss = function(*inputs)
    wanted = [x for x in inputs if x is not None]
    upstream = torch.full_like(loss, UPSTREAM)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream, allow_unused=True)]


def assert_same(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    exact: Callable[..., Tensor] | None = None,
) -> None:
    """Loss and gradients of ``ours(*tensors)`` are at most twice as far from ``exact`` in float64 as those
    of ``theirs``, and the same inputs receive a gradient. ``exact=None``: ``theirs`` in float64."""
    x = evaluate(ours, leaves(tensors, dtype))
    y = evaluate(theirs, leaves(tensors, dtype))
    rounded = [None if t is None else t.to(dtype).double() for t in tensors]
    z = evaluate(exact or theirs, leaves(rounded, torch.float64))
    for i, (a, b, c) in enumerate(zip(x, y, z)):
        name = f"gradient {i - 1}" if i else "loss"
        assert (a is None) == (b is None), f"{name}: ours {a is None}, theirs {b is None}"
        if a is None:
            continue
        assert i == 0 or a.dtype == dtype
        assert c.abs().sum() > 0, f"{name}: the test is vacuous"
        assert error(b, c) <= PEER[dtype], f"{name}: the peer is off by {error(b, c):.2e}"
        bar = 2 * error(b, c) + FLOOR[dtype]
        assert error(a, c) <= bar, f"{name}: error {error(a, c):.2e}, bar {bar:.2e}"
