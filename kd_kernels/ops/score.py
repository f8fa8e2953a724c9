"""Scores of any number of models as a torch op: without autograd, whole under ``torch.compile``."""

# Schemas are read from the annotations: no postponed ones, and typing's own generics, for torch 2.6.
import math
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from kd_kernels.drivers.score import DIVERGENCES, MEASURES, Scoring, walk
from kd_kernels.drivers.sides import Model
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.ops.checks import IGNORED, check_range, check_temperatures, checks_values
from kd_kernels.sources import result_dtype


def _check_values(call: Scoring) -> None:
    check_temperatures("temperature", call.temperature)
    if call.labels is not None and checks_values(call.device):
        check_range("labels", call.tokens.take(call.labels), call.vocab, otherwise=IGNORED)


@torch.library.custom_op("kd_kernels::score", mutates_args=())
def score(
    values: List[Tensor],
    weights: List[Optional[Tensor]],
    biases: List[Optional[Tensor]],
    valid: Optional[Tensor],
    labels: Optional[Tensor],
    scalars: Tensor,
    compute_dtype: Optional[torch.dtype],
    logits_dtype: Optional[torch.dtype],
    backend: Optional[str],
    workspace_bytes: Optional[int],
) -> Tuple[Tensor, Tensor, Tensor]:
    """Measures of each model, and divergences of the first from each other one.

    Args:
        values: M models, the student first: hidden ``[..., D]`` with weight ``[V, D]`` and bias ``[V]``, or
            logits ``[..., V]`` without; N tokens in all.
        valid: ``[N]`` bool or None, the tokens that count. labels: ``[N]`` integers or None.
        scalars: ``[2 M + 1]`` float64 on CPU: each model's scale and softcap (0: none), the temperature.

    Returns:
        measures ``[M, 3, N]``, top-1 ids ``[M, N]``, divergences ``[M - 1, 3, N]``: see
        :class:`kd_kernels.drivers.score.Measured`.
    """
    *shaping, temperature = scalars.tolist()
    models = [
        Model(
            x,
            weight,
            bias,
            scale=shaping[2 * i],
            softcap=shaping[2 * i + 1],
            temperature=scalars[-1],
            needs=(False, False, False),
        )
        for i, (x, weight, bias) in enumerate(zip(values, weights, biases))
    ]
    call = Scoring(
        models,
        labels=None if labels is None else labels.to(torch.int64).contiguous(),
        tokens=Tokens.that_count(valid, models[0].token_count, compact=True),
        temperature=temperature,
        compute_dtype=compute_dtype,
        logits_dtype=logits_dtype,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    _check_values(call)
    result, dtype = walk(call), result_dtype(*values)
    return result.measures.to(dtype), result.top1, result.divergences.to(dtype)


@score.register_fake
def _(values, weights, biases, valid, labels, scalars, *rest):
    tokens = math.prod(values[0].shape[:-1])  # Size.numel() would make constants of sizes that vary
    count, dtype = len(values), result_dtype(*values)
    return (
        values[0].new_empty((count, MEASURES, tokens), dtype=dtype),
        values[0].new_empty((count, tokens), dtype=torch.int64),
        values[0].new_empty((count - 1, len(DIVERGENCES), tokens), dtype=dtype),
    )
