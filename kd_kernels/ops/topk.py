"""The k largest logits, their tail, ranks and draws, as a torch op; forward only."""

# Schemas are read from the annotations: no postponed ones, and typing's own generics, for torch 2.6.
from typing import Optional, Tuple

import torch
from torch import Tensor

from kd_kernels.drivers.sides import Model
from kd_kernels.drivers.topk import TopkProblem, walk_topk
from kd_kernels.ops.checks import IGNORED, check_range, check_temperatures, checks_values


@torch.library.custom_op("kd_kernels::linear_topk", mutates_args=())
def linear_topk(
    values: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    targets: Tensor,
    temperatures: Tensor,
    scalars: Tensor,
    seed: Tensor,
    k: int,
    samples: int,
    compute_dtype: Optional[torch.dtype],
    logits_dtype: Optional[torch.dtype],
    backend: Optional[str],
    workspace_bytes: Optional[int],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of :class:`kd_kernels.rows.TopkJob`.

    Args:
        values, weight, bias: hidden ``[..., D]`` with weight ``[V, D]`` and bias ``[V]``, or logits
            ``[..., V]`` without; N tokens in all.
        targets: ``[N, R]`` int64, -1 where there is none.
        temperatures: ``[M]`` float64 on CPU.
        scalars: ``[2]`` float64 on CPU: scale, softcap (0: none).
        seed: 0-d int64.

    Returns:
        ids ``[N, k]`` int32, z ``[N, k]``, statistics ``[N, 1 + 3 M]``, z of the targets ``[N, R]``, their
        ranks ``[N, R]`` int32, draws ``[N, samples]`` int32 ascending; floats in float64.
    """
    scale, softcap = scalars.tolist()
    vocab = values.shape[-1] if weight is None else weight.shape[0]
    if checks_values(values.device):
        check_range("targets and ids", targets, vocab, -1, otherwise=IGNORED)
    check_temperatures("temperature", temperatures)  # on the host: looking at them waits for nobody
    model = Model(values, weight, bias, scale, softcap, temperatures[:1], needs=(False, False, False))
    found = walk_topk(
        TopkProblem(
            model,
            k,
            temperatures,
            targets.contiguous(),
            samples,
            seed,
            compute_dtype,
            logits_dtype,
            backend,
            workspace_bytes,
        )
    )
    return (
        found.ids,
        found.values,
        found.statistics,
        found.target_values,
        found.target_ranks,
        found.samples,
    )


@linear_topk.register_fake
def _(values, weight, bias, targets, temperatures, scalars, seed, k, samples, *rest):
    n, r = targets.shape

    def of(columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return values.new_empty((n, columns), dtype=dtype)

    statistics = of(1 + 3 * temperatures.shape[0])
    return of(k, torch.int32), of(k), statistics, of(r), of(r, torch.int32), of(samples, torch.int32)
