"""L1 distances between the next-token distributions of all rows of two models, as torch ops: forward, and a
backward that recomputes the logits, slab by slab."""

import torch
from torch import Tensor

from kd_kernels.drivers.pairwise_l1 import Distances, PairwiseProblem, carry_back, measure
from kd_kernels.drivers.sides import Model
from kd_kernels.drivers.tokens import Tokens
from kd_kernels.ops.backward import for_all_inputs, refuse_double_backward, save, saved, shapes_of
from kd_kernels.ops.checks import check_temperatures_of, checks_values
from kd_kernels.ops.direct import direct
from kd_kernels.ops.schema import names

# What both ops take, in the order in which autograd sees it.
_CALL = """
    Tensor student, Tensor? student_weight, Tensor? student_bias, Tensor teacher, Tensor? teacher_weight,
    Tensor? teacher_bias, Tensor members, Tensor student_temperature, Tensor teacher_temperature,
    Tensor scalars, ScalarType? compute_dtype, ScalarType? logits_dtype, str? backend, int? workspace_bytes,
    bool compact, bool[] needs"""
_ARGUMENTS = names(_CALL)
_STATISTICS = 4  # columns


def _model(call: dict, side: str, which: int) -> Model:
    scale, softcap = call["scalars"].tolist()[2 * which : 2 * which + 2]
    needs = tuple(call["needs"][3 * which : 3 * which + 3])
    weight, bias, temperature = (call[f"{side}_{part}"] for part in ("weight", "bias", "temperature"))
    return Model(call[side], weight, bias, scale, softcap, temperature, needs)


def _unpack(call: dict) -> PairwiseProblem:
    members, tokens = call["members"], call["student"].shape[:-1].numel()
    rows = kept = None
    if members.shape[0] == 1 and not call["compact"]:
        kept = members[0] >= 0
    else:
        rows = members[members >= 0]
        if members.shape[0] == 1 and rows.numel() == tokens:  # one group holds its tokens in their order
            rows = None
    return PairwiseProblem(
        _model(call, "student", 0),
        _model(call, "teacher", 1),
        members,
        Tokens(tokens, rows, kept),
        *(call[name] for name in ("compute_dtype", "logits_dtype", "backend", "workspace_bytes")),
    )


def _check_values(problem: PairwiseProblem) -> None:
    looks = checks_values(problem.members.device)
    check_temperatures_of("temperature", problem.student.temperature, problem.tokens, looks)
    check_temperatures_of("teacher_temperature", problem.teacher.temperature, problem.tokens, looks)


def _forward(*arguments):
    """``sum_v |p_iv - q_jv|`` of all pairs of a student's and a teacher's row in each group.

    Args:
        student, student_weight, student_bias: hidden ``[..., D]`` with weight ``[V, D]`` and bias ``[V]``, or
            logits ``[..., V]`` without; N tokens in all. teacher likewise, the same tokens; both vocabularies
            are cut to the smaller one.
        members: ``[G, L]`` int64: each group's tokens in ascending order, -1 behind them. With
            ``compact=False`` one group of all tokens, -1 in the place of those that do not count.
        student_temperature, teacher_temperature: 0-d or ``[N]`` float64.
        scalars: ``[4]`` float64 on CPU: scale and softcap (0: none) of the student, of the teacher.
        needs: gradients wanted of the first six arguments.

    Returns:
        ``[G, L, L]``, unspecified where a member is -1; and for the backward, sums of signs ``[G, L, L]`` (or
        empty) and statistics ``[G, L, 4]``. All in float64: beside the rows they are small.
    """
    call = dict(zip(_ARGUMENTS, arguments))
    problem = _unpack(call)
    _check_values(problem)
    found = measure(problem)
    signs = found.cost.new_empty(0) if found.signs is None else found.signs
    return found.cost, signs, found.statistics


pairwise_l1_op = torch.library.custom_op(
    "kd_kernels::pairwise_l1", _forward, mutates_args=(), schema=f"({_CALL}) -> (Tensor, Tensor, Tensor)"
)


@pairwise_l1_op.register_fake
def _(*arguments):
    call = dict(zip(_ARGUMENTS, arguments))
    groups, longest = call["members"].shape

    def of(*shape: int) -> Tensor:
        return call["student"].new_empty(shape, dtype=torch.float64)

    signs = of(groups, longest, longest) if any(call["needs"]) else of(0)
    return of(groups, longest, longest), signs, of(groups, longest, _STATISTICS)


@torch.library.custom_op(
    "kd_kernels::pairwise_l1_backward",
    mutates_args=(),
    schema=f"(Tensor d_cost, Tensor cost, Tensor signs, Tensor statistics, {_CALL}) -> Tensor[]",
)
def pairwise_l1_backward(d_cost, cost, signs, statistics, *arguments):
    """Gradients of the wanted inputs, in order, the others left out."""
    problem = _unpack(dict(zip(_ARGUMENTS, arguments)))
    present = problem.members >= 0
    pairs = present[:, :, None] & present[:, None, :]
    gradients = carry_back(problem, Distances(cost, signs, statistics), torch.where(pairs, d_cost, 0.0))
    return [gradient for gradient in gradients if gradient is not None]


@pairwise_l1_backward.register_fake
def _(d_cost, cost, signs, statistics, *args):
    return shapes_of(args, needs=args[-1])


def _setup_context(ctx, inputs, output) -> None:
    save(ctx, inputs, *output)


def _backward(ctx, d_cost, d_signs, d_statistics):
    if d_cost is None:
        return (None,) * len(_ARGUMENTS)
    made, inputs = saved(ctx)
    gradients = torch.ops.kd_kernels.pairwise_l1_backward(d_cost, *made, *inputs)
    return for_all_inputs(gradients, inputs[-1], len(inputs))


pairwise_l1_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(pairwise_l1_backward, "distill")

pairwise_l1 = direct(pairwise_l1_op, _forward, _backward, _setup_context)
