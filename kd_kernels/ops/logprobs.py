"""Log-probabilities of given ids and entropies, as torch ops: forward, and a backward that recomputes."""

import torch

from kd_kernels.drivers.logprobs import LogprobProblem, walk_logprobs
from kd_kernels.drivers.scale import scaled
from kd_kernels.drivers.sides import Model
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.ops.backward import for_all_inputs, refuse_double_backward, save, saved, shapes_of
from kd_kernels.ops.checks import check_range, check_temperatures_of, checks_values
from kd_kernels.ops.direct import direct
from kd_kernels.ops.schema import names
from kd_kernels.sources import result_dtype

# What both ops take, in the order in which autograd sees it.
_CALL = """
    Tensor values, Tensor? weight, Tensor? bias, Tensor ids, Tensor temperature, Tensor scalars, bool entropy,
    ScalarType? compute_dtype, ScalarType? logits_dtype, str? backend, int? workspace_bytes, bool compact,
    bool[] needs"""
_ARGUMENTS = names(_CALL)


def _unpack(call: dict, gradients: bool) -> LogprobProblem:
    scale, softcap = call["scalars"].tolist()
    ids = call["ids"]
    return LogprobProblem(
        Model(
            call["values"],
            call["weight"],
            call["bias"],
            scale=scale,
            softcap=softcap,
            temperature=call["temperature"],
            needs=tuple(call["needs"]) if gradients else (False, False, False),
            later=any(call["needs"]),
        ),
        ids,
        call["entropy"],
        Tokens.that_count((ids != -1).any(1), ids.shape[0], call["compact"]),
        call["compute_dtype"],
        call["logits_dtype"],
        call["backend"],
        call["workspace_bytes"],
    )


def _check_values(problem: LogprobProblem) -> None:
    looks = checks_values(problem.ids.device)
    if looks:
        unused = ", or -1 or ignore_index (-100 unless given)"
        check_range("ids", problem.ids, problem.model.vocab_size, -1, otherwise=unused)
    check_temperatures_of("temperature", problem.model.temperature, problem.tokens, looks)


def _forward(*arguments):
    """Log-probabilities ``[N, K]`` of ids ``[N, K]`` (-1: unused, 0), entropies ``[N]`` (or 0).

    Args:
        values, weight, bias: hidden ``[..., D]`` with weight ``[V, D]`` and bias ``[V]``, or logits
            ``[..., V]`` without; N tokens in all.
        temperature: 0-d or ``[N]`` float64.
        scalars: ``[2]`` float64 on CPU: scale, softcap (0: none).
        needs: gradients wanted of the first three arguments.
    """
    problem = _unpack(dict(zip(_ARGUMENTS, arguments)), gradients=False)
    _check_values(problem)
    logprobs, entropies, _, _ = walk_logprobs(problem)
    dtype = result_dtype(problem.model.values)
    return logprobs.to(dtype), entropies.to(dtype)


linear_logprobs_op = torch.library.custom_op(
    "kd_kernels::linear_logprobs", _forward, mutates_args=(), schema=f"({_CALL}) -> (Tensor, Tensor)"
)


@linear_logprobs_op.register_fake
def _(values, weight, bias, ids, *rest):
    dtype = result_dtype(values)
    return values.new_empty(ids.shape, dtype=dtype), values.new_empty(ids.shape[:1], dtype=dtype)


@torch.library.custom_op(
    "kd_kernels::linear_logprobs_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor? upstream_entropy, {_CALL}) -> Tensor[]",
)
def linear_logprobs_backward(upstream, upstream_entropy, *arguments):
    """Gradients of the wanted inputs, in order, the others left out."""
    problem = _unpack(dict(zip(_ARGUMENTS, arguments)), gradients=True)
    wide = None if upstream_entropy is None else upstream_entropy.to(torch.float64)
    _, _, gradients, factor = walk_logprobs(problem, upstream.to(torch.float64), wide)
    return [
        scaled(g, factor, x.dtype) for g, x in zip(gradients, arguments) if g is not None and x is not None
    ]


@linear_logprobs_backward.register_fake
def _(upstream, upstream_entropy, *args):
    return shapes_of(args, needs=args[-1])


def _setup_context(ctx, inputs, output) -> None:
    save(ctx, inputs)


def _backward(ctx, upstream, upstream_entropy):
    if upstream is None and upstream_entropy is None:
        return (None,) * len(_ARGUMENTS)
    _, inputs = saved(ctx)
    call = dict(zip(_ARGUMENTS, inputs))
    if upstream is None:
        upstream = upstream_entropy.new_zeros(call["ids"].shape)
    if not call["entropy"]:
        upstream_entropy = None
    gradients = torch.ops.kd_kernels.linear_logprobs_backward(upstream, upstream_entropy, *inputs)
    return for_all_inputs(gradients, call["needs"], len(inputs))


linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(linear_logprobs_backward, "linear_logprobs")

linear_logprobs = direct(linear_logprobs_op, _forward, _backward, _setup_context)
