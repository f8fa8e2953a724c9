"""Log-probabilities of given ids and entropies, as torch ops: forward, and a backward that recomputes."""

# Schemas are read from the annotations: no postponed ones, and typing's own generics, for torch 2.6.
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from kd_kernels.drivers.logprobs import LogprobProblem, walk_logprobs
from kd_kernels.drivers.sides import Model
from kd_kernels.ops.checks import checks_values, improper_temperatures
from kd_kernels.ops.row_divergence import scaled

_ARGUMENTS = (
    "values", "weight", "bias", "ids", "temperature", "scalars", "entropy", "compute_dtype", "logits_dtype",
    "backend", "workspace_bytes", "compact", "needs",
)  # fmt: skip
_DIFFERENTIABLE = 3  # the first three


def _unpack(call: dict, gradients: bool) -> LogprobProblem:
    scale, softcap = call["scalars"].tolist()
    ids = call["ids"]
    rows, kept = None, (ids != -1).any(1)
    if call["compact"]:
        rows = kept.nonzero().squeeze(1)
        rows, kept = (None if rows.numel() == kept.numel() else rows), None
    return LogprobProblem(
        Model(
            call["values"],
            call["weight"],
            call["bias"],
            scale=scale,
            softcap=softcap,
            temperature=call["temperature"],
            needs=tuple(call["needs"]) if gradients else (False, False, False),
        ),
        ids,
        call["entropy"],
        rows,
        kept,
        call["compute_dtype"],
        call["logits_dtype"],
        call["backend"],
        call["workspace_bytes"],
    )


def _check_values(problem: LogprobProblem) -> None:
    if not checks_values(problem.ids.device) or problem.ids.numel() == 0:
        return
    ids, vocab = problem.ids, problem.model.vocab_size
    wrong = ids[(ids < -1) | (ids >= vocab)]
    if wrong.numel():
        raise ValueError(
            f"ids must be in [0, {vocab}), -1 or ignore_index where unused, got {wrong[0].item()}"
        )
    counted = problem.rows if problem.kept is None else problem.kept
    temperature = problem.model.temperature
    if counted is not None and temperature.dim():
        temperature = temperature[counted]
    wrong = improper_temperatures(temperature)
    if wrong.numel():
        raise ValueError(f"temperature must be finite and > 0, got {wrong.reshape(-1)[0].item()}")


def _dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


@torch.library.custom_op("kd_kernels::linear_logprobs", mutates_args=())
def linear_logprobs(
    values: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    ids: Tensor,
    temperature: Tensor,
    scalars: Tensor,
    entropy: bool,
    compute_dtype: Optional[torch.dtype],
    logits_dtype: Optional[torch.dtype],
    backend: Optional[str],
    workspace_bytes: Optional[int],
    compact: bool,
    needs: List[bool],
) -> Tuple[Tensor, Tensor]:
    """Log-probabilities ``[N, K]`` of ids ``[N, K]`` (-1: unused, 0), entropies ``[N]`` (or 0).

    Args:
        values, weight, bias: hidden ``[..., D]`` with weight ``[V, D]`` and bias ``[V]``, or logits
            ``[..., V]`` without; N tokens in all.
        temperature: 0-d or ``[N]`` float64.
        scalars: ``[2]`` float64 on CPU: scale, softcap (0: none).
        needs: gradients wanted of the first three arguments.
    """
    arguments = locals()
    problem = _unpack({name: arguments[name] for name in _ARGUMENTS}, gradients=False)
    _check_values(problem)
    logprobs, entropies, _, _ = walk_logprobs(problem)
    return logprobs.to(_dtype(values)), entropies.to(_dtype(values))


@linear_logprobs.register_fake
def _(values, weight, bias, ids, *rest):
    dtype = _dtype(values)
    return values.new_empty(ids.shape, dtype=dtype), values.new_empty(ids.shape[:1], dtype=dtype)


@torch.library.custom_op("kd_kernels::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    upstream: Tensor,
    upstream_entropy: Optional[Tensor],
    values: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    ids: Tensor,
    temperature: Tensor,
    scalars: Tensor,
    entropy: bool,
    compute_dtype: Optional[torch.dtype],
    logits_dtype: Optional[torch.dtype],
    backend: Optional[str],
    workspace_bytes: Optional[int],
    compact: bool,
    needs: List[bool],
) -> List[Tensor]:
    """Gradients of the wanted inputs, in order, the others left out."""
    arguments = locals()
    problem = _unpack({name: arguments[name] for name in _ARGUMENTS}, gradients=True)
    wide = None if upstream_entropy is None else upstream_entropy.to(torch.float64)
    _, _, gradients, factor = walk_logprobs(problem, upstream.to(torch.float64), wide)
    inputs = (values, weight, bias)
    return [scaled(g, factor, x.dtype) for g, x in zip(gradients, inputs) if g is not None and x is not None]


@linear_logprobs_backward.register_fake
def _(upstream, upstream_entropy, *args):
    needs = args[-1]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, wanted in zip(args, needs) if wanted]


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.shape = output[0].shape
    ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in inputs]
    ctx.save_for_backward(*[x for x in inputs if isinstance(x, Tensor)])


def _backward(ctx, upstream, upstream_entropy):
    if upstream is None and upstream_entropy is None:
        return (None,) * len(_ARGUMENTS)
    remaining = iter(ctx.saved_tensors)
    inputs = [next(remaining) if x is None else x[0] for x in ctx.rest]
    call = dict(zip(_ARGUMENTS, inputs))
    if upstream is None:
        upstream = upstream_entropy.new_zeros(ctx.shape)
    if not call["entropy"]:
        upstream_entropy = None
    gradients = iter(torch.ops.kd_kernels.linear_logprobs_backward(upstream, upstream_entropy, *inputs))
    first = [next(gradients) if wanted else None for wanted in call["needs"]]
    return (*first, *(None,) * (len(_ARGUMENTS) - _DIFFERENTIABLE))


def _double_backward(ctx, *gradients):
    raise RuntimeError("kd_kernels.linear_logprobs: double backward is not implemented")


linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
linear_logprobs_backward.register_autograd(_double_backward)
