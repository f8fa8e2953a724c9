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

from kd_kernels.ops.backward import for_all_inputs, once, save, saved
from kd_kernels.ops.logprobs import linear_logprobs, linear_logprobs_backward
from kd_kernels.ops.pairwise_l1 import pairwise_l1, pairwise_l1_backward
from kd_kernels.ops.row_divergence import row_divergence, row_divergence_backward
from kd_kernels.sources import Head, Source, is_dtensor

Weights = tuple[Tensor, Optional[Tensor]]  # weight, bias
Gather = Callable[[], Weights]
Upstream = Sequence[Optional[Tensor]]
_OWN = 6  # inputs of _Regathering ahead of its op's arguments


class GatheredHead(Head):
    """A head whose weight and bias ``gather`` makes again.

    Not a field: what is built from other tensors (``dataclasses.replace``) must not inherit it.
    """

    gather: Optional[Gather] = None


def gathered_head(hidden: Tensor, assemble: Gather, parts: Sequence[Tensor], **shaping: Any) -> Head:
    """The head that ``assemble`` gives from ``parts``, parameters and their shards."""
    versions = [_version(part) for part in parts]

    def again() -> Weights:
        if any(_freed(part) for part in parts):
            raise RuntimeError(
                "FSDP2 freed the output layer at the end of an earlier backward, and this backward, which "
                "recomputes the logits, needs it again; call backward() before the next forward, or once on "
                "the sum of the losses, or shard the output layer as a group of its own, which is gathered "
                "again: fully_shard(model.get_output_embeddings()) before fully_shard(model)"
            )
        if versions != [_version(part) for part in parts]:
            raise RuntimeError(
                "the output layer was changed in place between forward and backward, and this backward, "
                "which recomputes the logits, needs it again; call backward() before the optimizer's step"
            )
        with torch.no_grad():
            return assemble()

    head = GatheredHead(hidden, *assemble(), **shaping)
    object.__setattr__(head, "gather", again)
    return head


def kept_head(head: Head) -> Head:
    """The same, of tensors that FSDP2 may have freed when a backward asks for them.

    It could be made to gather them again, but they would be those of after an optimizer's step without any
    sign of it: what changes in such a step are the shards.
    """
    weights = head.weight, head.bias
    parts = [x for x in weights if x is not None]
    return gathered_head(head.hidden, lambda: weights, parts, scale=head.scale, softcap=head.softcap)


def _freed(tensor: Tensor) -> bool:
    local = tensor.to_local() if is_dtensor(tensor) else tensor
    return local.numel() > 0 and local.untyped_storage().size() == 0


def _version(tensor: Tensor) -> Optional[int]:
    return None if tensor.is_inference() else tensor._version


def gathers_of(*sources: Source) -> list[Optional[Gather]]:
    return [getattr(source, "gather", None) for source in sources]


def regathering_row_divergence(gathers: list[Optional[Gather]], *arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and terms of a deferred ``row_divergence``; ``gathers`` of student and teacher."""
    return _regathering("distill", _divergence, _divergence_backward, gathers, arguments)


def regathering_logprobs(gathers: list[Optional[Gather]], *arguments: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of ``linear_logprobs``; ``gathers`` of its source."""
    return _regathering("linear_logprobs", _logprobs, _logprobs_backward, gathers, arguments)


def regathering_pairwise_l1(gathers: list[Optional[Gather]], *arguments: Any) -> tuple[Tensor, ...]:
    """Distances, signs and statistics of ``pairwise_l1``; ``gathers`` of student and teacher."""
    return _regathering("distill", _pairwise, _pairwise_backward, gathers, arguments)


# Forward: (results, those without gradients, what the backward needs besides the arguments).
# Backward: the gradients of the wanted arguments.


def _divergence(*arguments: Any) -> tuple[Sequence[Tensor], ...]:
    loss, terms, statistics, *_ = row_divergence(*arguments)
    return [loss], [terms, statistics], [statistics]


def _divergence_backward(upstream: Upstream, made: Sequence[Tensor], arguments: list[Any]) -> list[Tensor]:
    return row_divergence_backward(upstream[0], *made, *arguments)


def _logprobs(*arguments: Any) -> tuple[Sequence[Tensor], ...]:
    return linear_logprobs(*arguments), [], []


def _logprobs_backward(upstream: Upstream, made: Sequence[Tensor], arguments: list[Any]) -> list[Tensor]:
    logprobs, entropies = upstream
    if logprobs is None:
        logprobs = entropies.new_zeros(arguments[3].shape)  # the ids
    return linear_logprobs_backward(logprobs, entropies, *arguments)


def _pairwise(*arguments: Any) -> tuple[Sequence[Tensor], ...]:
    cost, *others = pairwise_l1(*arguments)
    return [cost], others, [cost, *others]


def _pairwise_backward(upstream: Upstream, made: Sequence[Tensor], arguments: list[Any]) -> list[Tensor]:
    return pairwise_l1_backward(upstream[0], *made, *arguments)


def _regathering(
    function: str,
    run: Callable,
    backward: Callable,
    gathers: list[Optional[Gather]],
    arguments: Sequence[Any],
) -> tuple[Tensor, ...]:
    # [values, weight, bias] of each model come first
    again = [x for i, gather in enumerate(gathers) if gather for x in (3 * i + 1, 3 * i + 2)]
    gathered = [arguments[i] for i in again if arguments[i] is not None]
    # Nothing of them, but with their way back to the shards.
    edge = torch.cat([x.reshape(-1)[:0] for x in gathered])
    return _Regathering.apply(function, run, backward, gathers, again, edge, *arguments)


class _Regathering(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, function: str, run: Callable, backward: Callable, gathers: list[Optional[Gather]],
        again: Sequence[int], edge: Tensor, *arguments: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        results, constants, made = run(*arguments)
        ctx.mark_non_differentiable(*constants)
        save(ctx, [None if i in again else x for i, x in enumerate(arguments)], edge, *made)
        ctx.function, ctx.run_backward, ctx.gathers = function, backward, gathers
        ctx.wanted = ctx.needs_input_grad[_OWN:]
        return (*results, *constants)

    @staticmethod
    def backward(ctx, *upstream: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        if all(x is None for x in upstream):
            return (None,) * (_OWN + len(ctx.wanted))
        (edge, *made), arguments = saved(ctx)
        for i, gather in enumerate(ctx.gathers):
            if gather is not None:
                arguments[3 * i + 1 : 3 * i + 3] = gather()
        gradients = ctx.run_backward(upstream, made, arguments)
        gradients = [once(ctx.function, x, edge) for x in gradients]
        return (None,) * _OWN + for_all_inputs(gradients, ctx.wanted, len(arguments))
