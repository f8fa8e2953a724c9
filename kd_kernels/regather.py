"""Heads gathered from shards, in a loss whose backward recomputes the logits: gathered there again.

The op would save the gathered weight for its backward, the largest tensor of the step. Here the op runs
inside an autograd function that saves all but that weight and its bias.

Why a function and not ``saved_tensors_hooks``: only the innermost hooks are called, and nothing that went
through a hook is watched for changes in place. This way all other tensors still meet the caller's own hooks
(``save_on_cpu``, checkpointing) and autograd's version check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from kd_kernels.ops.row_divergence import row_divergence, row_divergence_backward
from kd_kernels.sources import Head, Source

Weights = tuple[Tensor, Optional[Tensor]]  # weight, bias
Gather = Callable[[], Weights]


class GatheredHead(Head):
    """A head whose weight and bias ``gather`` makes again.

    Not a field: what is built from other tensors (``dataclasses.replace``) must not inherit it.
    """

    gather: Optional[Gather] = None


def gathered_head(hidden: Tensor, assemble: Gather, parts: Sequence[Tensor], **shaping: Any) -> Head:
    """The head that ``assemble`` gives from ``parts``, parameters and their shards."""
    versions = [_version(part) for part in parts]

    def again() -> Weights:
        if versions != [_version(part) for part in parts]:
            raise RuntimeError(
                "distill: the output layer was changed in place between forward and backward, and this "
                "backward gathers it again; call backward() before the optimizer's step"
            )
        with torch.no_grad():
            return assemble()

    head = GatheredHead(hidden, *assemble(), **shaping)
    object.__setattr__(head, "gather", again)
    return head


def _version(tensor: Tensor) -> Optional[int]:
    return None if tensor.is_inference() else tensor._version


def gathers_of(*sources: Source) -> list[Optional[Gather]]:
    return [getattr(source, "gather", None) for source in sources]


def regathering_row_divergence(gathers: list[Optional[Gather]], *arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and terms of a deferred ``row_divergence``; ``gathers`` of student and teacher."""
    return _Regathering.apply(gathers, *arguments)


class _Regathering(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gathers: list[Optional[Gather]], *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, terms, statistics, *_ = row_divergence(*arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(terms)
        # [values, weight, bias] of each model come first
        again = [x for i, gather in enumerate(gathers) if gather for x in (3 * i + 1, 3 * i + 2)]
        saved = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and i not in again]
        ctx.save_for_backward(statistics, *(arguments[i] for i in saved))
        ctx.gathers, ctx.saved, ctx.wanted = gathers, saved, ctx.needs_input_grad[1:]
        ctx.rest = [None if isinstance(x, Tensor) else x for x in arguments]
        return loss, terms

    @staticmethod
    def backward(ctx, upstream: Optional[Tensor], *_: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        if upstream is None:
            return (None,) * (1 + len(ctx.rest))
        statistics, *tensors = ctx.saved_tensors
        arguments = list(ctx.rest)
        for i, tensor in zip(ctx.saved, tensors):
            arguments[i] = tensor
        for i, gather in enumerate(ctx.gathers):
            if gather is not None:
                arguments[3 * i + 1 : 3 * i + 3] = gather()
        gradients = iter(row_divergence_backward(upstream, statistics, *arguments))
        return None, *(next(gradients) if wanted else None for wanted in ctx.wanted)
