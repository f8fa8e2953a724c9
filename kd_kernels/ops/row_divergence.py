"""The divergence of two models' next-token distributions, as torch ops.

Three ops. ``row_divergence`` computes per-token terms and, where the weighting of the tokens is known
(a scalar result), the unscaled gradients with them. Its backward calls ``scale_gradient`` then, or
``row_divergence_backward`` where the weighting only arrives with the upstream gradient. These two are
ops of their own whose autograd formula raises (``backward.py`` says why).

Scalars that a schedule may change are 0-d tensors: a Python float argument would be a constant of the
compiled graph, and every new value a recompilation.
"""

# The schema of scale_gradient is read from its annotations: no postponed ones.
import math
from typing import Optional

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.drivers.chunked_head import Problem, walk
from kd_kernels.drivers.scale import scaled
from kd_kernels.drivers.sides import Model, Number, accumulate_dtype, hidden_gradient_dtype
from kd_kernels.drivers.sparse import Target
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.drivers.vocabulary_parallel import Shards
from kd_kernels.objectives import CATALOGUE, SortedWasserstein
from kd_kernels.ops.backward import DENSE, for_all_inputs, refuse_double_backward, save, saved, shapes_of
from kd_kernels.ops.checks import (
    IGNORED,
    check_finite,
    check_log_mass,
    check_range,
    check_temperatures,
    checks_values,
)
from kd_kernels.ops.direct import direct
from kd_kernels.ops.schema import names
from kd_kernels.ops.sparse_checks import check_target, refuse_undefined
from kd_kernels.sources import result_dtype

# What both ops take, in the order in which autograd sees it.
_CALL = """
    Tensor student, Tensor? student_weight, Tensor? student_bias, Tensor teacher, Tensor? teacher_weight,
    Tensor? teacher_bias, Tensor? target_ids, Tensor? target_log_tail, str missing, Tensor? valid,
    Tensor? labels, Tensor student_temperature, Tensor teacher_temperature, Tensor? token_weight,
    Tensor parameter0, Tensor parameter1, Tensor scalars, str objective, bool temperature_squared,
    ScalarType? compute_dtype, ScalarType? logits_dtype, str? backend, int? workspace_bytes, bool compact,
    bool[] needs, bool parts, bool per_token, bool deferred, int? top_k, str? vocab_group"""
ARGUMENTS = names(_CALL)
_DIFFERENTIABLE = 6  # the first six
_SOFT, _HARD = 4, 5  # in ``scalars``


def _check_values(problem: Problem, call: dict) -> None:
    """Value checks: on CPU, and elsewhere under KD_KERNELS_DEBUG=1, since each waits for the device."""

    def of_counted(value: Number) -> Number:  # [N, K], [N] or one number -> the tokens that count
        if isinstance(value, float):
            return value
        value = value if value.dim() > 1 else value.reshape(-1).expand(problem.tokens.count)
        return problem.tokens.counted(value)

    if problem.tokens.count == 0:
        return
    looks = checks_values(problem.student.values.device)
    for name, model in (("temperature", problem.student), ("teacher_temperature", problem.teacher)):
        if looks or isinstance(model.temperature, float):
            check_temperatures(name, of_counted(model.temperature))
    if not looks:
        return
    scalars = call["scalars"].tolist()
    objective = CATALOGUE.get(call["objective"], SortedWasserstein)
    called = [f"{objective.__name__}'s {name}" for name in objective.parameter_names]
    for name, value in (
        ("token_weight", call["token_weight"]),
        ("soft_weight", scalars[_SOFT]),
        ("hard_weight", scalars[_HARD]),
        *zip(called, (problem.parameter0, problem.parameter1)),
    ):
        if value is not None:
            check_finite(name, of_counted(value))
    if problem.is_sorted:
        for name, value in zip(called, (problem.parameter0, problem.parameter1)):
            check_log_mass(name, of_counted(value))
    else:
        CATALOGUE[call["objective"]].check(call["parameter0"].tolist())
    if problem.target is not None:
        # The ids of a sorted teacher are of its own vocabulary, whose size nobody knows.
        check_target(problem.target, of_counted, 2**31 - 1 if problem.is_sorted else problem.vocab)
    if problem.labels is not None:
        size = problem.student.vocab_size if problem.hard_weight is None else problem.vocab
        if problem.shards is not None:
            size = problem.shards.total
        check_range("labels", of_counted(problem.labels), size, otherwise=IGNORED)


def _resolve(objective: str, parameter0: Tensor) -> str:
    """The ends of the mixture families are the plain divergences."""
    if objective == "jensen_shannon":
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(parameter0.item(), objective)
    if objective in ("skew_kl", "skew_reverse_kl") and parameter0.item() == 0:
        return {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}[objective]
    return objective


def _on_host(value: Tensor) -> Number:
    return value.item() if value.dim() == 0 and value.device.type == "cpu" else value


def _unpack(call: dict) -> Problem:
    needs = tuple(call["needs"])
    scalars = call["scalars"].tolist()
    models = [
        Model(
            call[side],
            call[f"{side}_weight"],
            call[f"{side}_bias"],
            scale=scalars[2 * i],
            softcap=scalars[2 * i + 1],
            temperature=_on_host(call[f"{side}_temperature"]),
            needs=needs[3 * i : 3 * i + 3],
            later=any(needs[3 * i : 3 * i + 3]),
            split=call["vocab_group"] is not None,
        )
        for i, side in enumerate(("student", "teacher"))
    ]
    labels = call["labels"]
    weight = 1.0 if call["token_weight"] is None else call["token_weight"]
    soft = scalars[_SOFT] * weight
    if call["temperature_squared"]:
        soft = soft * (models[0].temperature * models[0].temperature)
    hard = None
    if labels is not None and (scalars[_HARD] != 0 or call["parts"]):
        hard = scalars[_HARD] * weight
    tokens = Tokens.that_count(call["valid"], models[0].token_count, call["compact"])
    return Problem(
        *models,
        objective=_resolve(call["objective"], call["parameter0"]),
        parameter0=_on_host(call["parameter0"]),
        parameter1=_on_host(call["parameter1"]),
        soft_weight=soft,
        hard_weight=hard,
        # the kernels take an address: int64, one after the other, whatever the caller had
        labels=None if labels is None else labels.to(torch.int64).contiguous(),
        tokens=tokens,
        entropies=call["parts"],
        compute_dtype=call["compute_dtype"],
        logits_dtype=call["logits_dtype"],
        backend=call["backend"],
        workspace_bytes=call["workspace_bytes"],
        target=_target(call),
        top_k=call["top_k"],
        shards=_shards(call, models[0], tokens),
    )


def _target(call: dict) -> Optional[Target]:
    if call["target_ids"] is None:
        return None
    k, tail = call["target_ids"].shape[-1], call["target_log_tail"]
    return Target(
        call["target_ids"].reshape(-1, k),
        call["teacher"].reshape(-1, k),
        None if tail is None else tail.reshape(-1),
        call["missing"],
    )


def _shards(call: dict, student: Model, tokens: Tokens) -> Optional[Shards]:
    if call["vocab_group"] is None:
        return None
    alike = {
        "the number of tokens that count": tokens.walked,
        "the gradients wanted of each model's values, weight and bias": sum(
            want << i for i, want in enumerate(call["needs"])
        ),
    }
    return Shards.exchanged(call["vocab_group"], student.vocab_size, student.values.device, alike)


def _without_gradients(problem: Problem) -> Problem:
    problem.student.needs = problem.teacher.needs = (False, False, False)
    return problem


def _forward(*arguments):
    """Weighted divergence (+ cross-entropy) over tokens.

    Args:
        student, teacher: hidden ``[..., D]`` with weight ``[V, D]`` and bias ``[V]``, or logits
            ``[..., V]`` without; N tokens in all. A sparse teacher: log-probabilities ``[..., K]``.
        target_ids, target_log_tail, missing: a sparse teacher's ids ``[..., K]``, the log of what they leave
            ``[...]``, and what to make of it; None, None, "" for others.
        valid: ``[N]`` bool or None, the tokens that count. labels: ``[N]`` int64 or None.
        *_temperature, token_weight, parameter0, parameter1: 0-d or ``[N]``.
        scalars: ``[6]`` float64 on CPU: student scale and softcap (0: none), teacher scale and softcap,
            soft weight, hard weight.
        needs: gradients wanted of the first six arguments.
        parts: fill the cross-entropy and entropy columns of the terms.
        per_token: return ``[N]`` losses instead of their sum.
        deferred: leave gradients to the backward pass.
        top_k: of the sorted L1, whose vocabularies may differ; None: exact.
        vocab_group: the process group over which the vocabulary is split; None: it is not.

    Returns:
        loss (0-d or ``[N]``), terms ``[N, 4]``, statistics ``[N, 10]``, factor (0-d), and the six
        gradients, unscaled (empty where not wanted or deferred).
    """
    call = dict(zip(ARGUMENTS, arguments))
    problem = _unpack(call)
    _check_values(problem, call)
    if problem.target is not None:
        refuse_undefined(problem.objective, call["missing"])
    now = any(call["needs"]) and not call["deferred"]
    phases = R.STATISTICS | R.TERMS | (R.GRADIENT if now else 0)
    outcome = walk(problem if now else _without_gradients(problem), phases)
    student = call["student"]
    dtype = result_dtype(student, call["teacher"])
    gradients = [student.new_empty(0) if g is None else g for g in outcome.gradients]
    return (
        (outcome.loss if call["per_token"] else outcome.loss.sum()).to(dtype),
        outcome.terms.to(dtype),
        outcome.statistics,
        outcome.factor,
        *gradients,
    )


row_divergence_op = torch.library.custom_op(
    "kd_kernels::row_divergence",
    _forward,
    mutates_args=(),
    schema=f"({_CALL}) -> ({', '.join(['Tensor'] * 10)})",
)


@row_divergence_op.register_fake
def _(*args):
    call = dict(zip(ARGUMENTS, args))
    student, teacher = call["student"], call["teacher"]
    tokens = math.prod(student.shape[:-1])  # Size.numel() would make constants of sizes that vary
    dtype = result_dtype(student, teacher)

    def of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return student.new_empty(shape, dtype=dtype)

    gradients = [student.new_empty(0) for _ in range(_DIFFERENTIABLE)]
    if not call["deferred"]:
        for i, wanted in enumerate(call["needs"]):
            if not wanted:
                continue
            tensor, is_head = args[i], args[i - i % 3 + 1] is not None
            dtype_i = (call["compute_dtype"] or args[i - i % 3].dtype) if is_head else tensor.dtype
            if is_head:
                split = call["vocab_group"] is not None
                dtype_i = hidden_gradient_dtype(dtype_i, split) if i % 3 == 0 else accumulate_dtype(dtype_i)
            gradients[i] = of(*tensor.shape, dtype=dtype_i)
    loss = of(tokens, dtype=dtype) if call["per_token"] else of(dtype=dtype)
    return (loss, of(tokens, R.TERM_COLUMNS, dtype=dtype), of(tokens, R.STATISTIC_COLUMNS), of(), *gradients)


@torch.library.custom_op("kd_kernels::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, upstream: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * upstream * factor`` in ``dtype``, into a fresh tensor: what was saved stays as it
    was, so that a second backward is right."""
    return scaled(gradient, upstream.to(torch.float64) * factor, dtype)


@scale_gradient.register_fake
def _(gradient, upstream, factor, dtype):
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)


@torch.library.custom_op(
    "kd_kernels::row_divergence_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor statistics, {_CALL}) -> Tensor[]",
)
def row_divergence_backward(upstream, statistics, *arguments):
    """Gradients of the wanted inputs (in order, the others left out) for an upstream gradient that is
    0-d or ``[N]``, recomputing the logits and reusing ``statistics``."""
    problem = _unpack(dict(zip(ARGUMENTS, arguments)))
    problem.soft_weight = _times(problem.soft_weight, upstream)
    if problem.hard_weight is not None:
        problem.hard_weight = _times(problem.hard_weight, upstream)
    problem.entropies = False
    outcome = walk(problem, R.GRADIENT, statistics)
    found = [(g, x) for g, x in zip(outcome.gradients, arguments) if g is not None and x is not None]
    if not problem.shares_factor:
        return [g for g, _ in found]
    return [scaled(g, outcome.factor, x.dtype) for g, x in found]


def _times(weight: Number, upstream: Tensor) -> Number:
    return weight * _on_host(upstream.to(torch.float64))


@row_divergence_backward.register_fake
def _(upstream, statistics, *args):
    return shapes_of(args, dict(zip(ARGUMENTS, args))["needs"])


def _setup_context(ctx, inputs, output) -> None:
    call = dict(zip(ARGUMENTS, inputs))
    ctx.needs, ctx.deferred = call["needs"], call["deferred"]
    _, _, statistics, factor, *gradients = output
    if ctx.deferred:
        save(ctx, inputs, statistics)
    else:
        ctx.set_materialize_grads(False)
        wanted = [i for i, want in enumerate(ctx.needs) if want]
        ctx.dtypes = [inputs[i].dtype for i in wanted]
        ctx.save_for_backward(factor, *(gradients[i] for i in wanted))


def _backward(ctx, upstream, *others):
    if upstream is None:  # the other outputs carry no gradient; distill hands them out detached
        return (None,) * len(ARGUMENTS)
    if any(asked and not found for asked, found in zip(ctx.needs_input_grad, ctx.needs)):
        raise RuntimeError(
            "distill: an input requires a gradient that did not when this graph was made; export or trace it "
            "with example inputs that require one"
        )
    if ctx.deferred:
        (statistics,), inputs = saved(ctx)
        gradients = torch.ops.kd_kernels.row_divergence_backward(upstream, statistics, *inputs)
    else:
        factor, *unscaled = ctx.saved_tensors
        scale = torch.ops.kd_kernels.scale_gradient
        gradients = [scale(g, upstream, factor, dtype) for g, dtype in zip(unscaled, ctx.dtypes)]
    return for_all_inputs(gradients, ctx.needs, len(ARGUMENTS))


row_divergence_op.register_autograd(_backward, setup_context=_setup_context)
for backward in (scale_gradient, row_divergence_backward):
    refuse_double_backward(backward, "distill", DENSE)

row_divergence = direct(row_divergence_op, _forward, _backward, _setup_context)
