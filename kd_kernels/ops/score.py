"""Scores of any number of models as a torch op: without autograd, whole under ``torch.compile``."""

# Schemas are read from the annotations: no postponed ones, and typing's own generics, for torch 2.6.
import os
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from kd_kernels.drivers.scoring import DIVERGENCES, MEASURES, Scoring, walk
from kd_kernels.drivers.sides import Model


def _check_values(call: Scoring) -> None:
    """Value checks: on CPU, and elsewhere under KD_KERNELS_DEBUG=1, since they wait for the device."""
    if not (call.temperature > 0 and call.temperature < float("inf")):
        raise ValueError(f"temperature must be finite and > 0, got {call.temperature}")
    debug = os.environ.get("KD_KERNELS_DEBUG", "0") not in ("", "0")
    if call.labels is None or not (call.device.type == "cpu" or debug):
        return
    labels = call.labels if call.rows is None else call.labels[call.rows]
    wrong = labels[(labels < 0) | (labels >= call.vocab)]
    if wrong.numel():
        raise ValueError(
            f"labels must be in [0, {call.vocab}) or ignore_index (-100 unless given), got {wrong[0].item()} "
            f"({wrong.numel()} such labels)"
        )


def _result_dtype(values: List[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in values) else torch.float32


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
        :class:`kd_kernels.drivers.scoring.Measured`.
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
    rows = None if valid is None else valid.nonzero().squeeze(1)
    if rows is not None and rows.numel() == valid.numel():
        rows = None
    call = Scoring(
        models,
        labels=None if labels is None else labels.to(torch.int64).contiguous(),
        rows=rows,
        temperature=temperature,
        compute_dtype=compute_dtype,
        logits_dtype=logits_dtype,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    _check_values(call)
    result, dtype = walk(call), _result_dtype(values)
    return result.measures.to(dtype), result.top1, result.divergences.to(dtype)


@score.register_fake
def _(values, weights, biases, valid, labels, scalars, *rest):
    count, tokens, dtype = len(values), values[0].shape[:-1].numel(), _result_dtype(values)
    return (
        values[0].new_empty((count, MEASURES, tokens), dtype=dtype),
        values[0].new_empty((count, tokens), dtype=torch.int64),
        values[0].new_empty((count - 1, len(DIVERGENCES), tokens), dtype=dtype),
    )
