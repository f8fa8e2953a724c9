"""The losses as a textbook writes them: dense, differentiable by autograd, meant for float64.

Nothing here is shared with the kernels, so that a mistake cannot hide in both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.objectives import Objective, SortedWasserstein, Weight
from kd_kernels.sources import Head, Source, SparseTarget, Teacher, as_source, as_teacher


def _xlogy(x: Tensor, log_y: Tensor) -> Tensor:
    """``x * log_y`` with ``0 * (-inf) = 0``, in value and gradient (hence the double where)."""
    dead = x == 0
    return torch.where(dead, 0.0, x * torch.where(dead, 0.0, log_y))


def divergence(objective: Objective, student: Tensor, teacher: Tensor) -> Tensor:
    """Per-row divergence of ``softmax(teacher)`` and ``softmax(student)``.

    Args:
        objective: any entry of the catalogue; tensor parameters must broadcast against the rows.
        student: ``[..., V]`` logits, temperature already applied.
        teacher: ``[..., V]`` logits, temperature already applied.

    Returns:
        ``[...]``, in the dtype of the logits.
    """
    lq, lp = student.log_softmax(-1), teacher.log_softmax(-1)
    q, p = lq.exp(), lp.exp()
    first, second = objective.parameters()

    def kl(a: Tensor, la: Tensor, lb: Tensor) -> Tensor:
        return (_xlogy(a, la) - _xlogy(a, lb)).sum(-1)

    def mixture(share: float) -> Tensor:  # log(share p + (1 - share) q)
        share_p = torch.tensor(share, dtype=lp.dtype, device=lp.device)
        absent = (lp == -torch.inf) & (lq == -torch.inf)  # whose gradient would be NaN
        a, b = (torch.where(absent, 0.0, x) for x in (lp, lq))
        return torch.where(absent, -torch.inf, torch.logaddexp(share_p.log() + a, torch.log1p(-share_p) + b))

    name = objective.name
    if isinstance(objective, SortedWasserstein):
        return _sorted_l1(objective, q, p)
    if name == "jensen_shannon" and first in (0, 1):
        name = "forward_kl" if first == 0 else "reverse_kl"
    if name == "forward_kl":
        return kl(p, lp, lq)
    if name == "reverse_kl":
        return kl(q, lq, lp)
    if name == "jensen_shannon":
        lm = mixture(first)
        return first * kl(p, lp, lm) + (1 - first) * kl(q, lq, lm)
    if name == "skew_kl":
        return kl(p, lp, mixture(first))
    if name == "skew_reverse_kl":
        return kl(q, lq, mixture(1 - first))
    if name == "total_variation":
        return 0.5 * (p - q).abs().sum(-1)
    if name == "weighted_kl":
        return _times(first, kl(p, lp, lq)) + _times(second, kl(q, lq, lp))
    raise ValueError(f"no reference for objective {objective.name!r}")


def _sorted_l1(
    objective: SortedWasserstein, q: Tensor, p: Tensor, p_beyond: Optional[Tensor] = None
) -> Tensor:
    """Of probabilities ``[..., V]``, the vocabularies being of any two sizes; ``p_beyond`` [...] is the
    teacher's mass outside a ``p`` of a few entries."""
    width = max(q.shape[-1], p.shape[-1])

    def ranked(x: Tensor, log_mass: Weight) -> Tensor:
        x = x.sort(dim=-1, descending=True, stable=True).values
        return torch.nn.functional.pad(x, (0, width - x.shape[-1])) * _exp(log_mass, x)[..., None]

    q, p = (ranked(x, log_mass) for x, log_mass in zip((q, p), objective.masses()))
    k = width if objective.top_k is None else objective.top_k
    tail_q, tail_p = q[..., k:].sum(-1), p[..., k:].sum(-1)
    if p_beyond is not None:
        tail_p = tail_p + p_beyond * _exp(objective.teacher_log_mass, p_beyond)
    return (q - p)[..., :k].abs().sum(-1) + (tail_q - tail_p).abs()


def _exp(log_mass: Weight, like: Tensor) -> Tensor:
    return torch.as_tensor(log_mass, dtype=like.dtype, device=like.device).exp()


def sparse_divergence(
    objective: Objective, student: Tensor, target: SparseTarget, temperature: Tensor
) -> Tensor:
    """Per-row divergence from a sparse teacher; see :class:`kd_kernels.SparseTarget` for what it means.

    Args:
        objective: any entry of the catalogue that the target's ``missing`` defines.
        student: ``[n, V]`` logits, temperature already applied.
        target: of ``[n, K]`` ids.
        temperature: ``[n]``, what the target is brought to.

    Returns:
        ``[n]``, in the dtype of the logits.
    """
    used = target.ids >= 0
    given = torch.where(used, target.logprobs.to(student.dtype), -torch.inf)
    index = torch.where(used, target.ids.long(), 0)
    # Repeated ids add up, each token's relative to its largest: some may be too small for anything else.
    top = torch.full_like(student, -torch.inf).scatter_reduce(1, index, given.detach(), "amax")
    top = torch.where(top == -torch.inf, 0.0, top)
    relative = torch.zeros_like(student).scatter_add(1, index, (given - top.gather(1, index)).exp())
    lp = (relative.log() + top) * (target.temperature / temperature[:, None])
    named = torch.zeros_like(student).scatter_add(1, index, used.to(student.dtype)) > 0
    lq, p = student.log_softmax(-1), lp.exp()
    if target.missing == "unnormalised":
        return (_xlogy(p, lp) - _xlogy(p, lq)).sum(-1)
    if target.missing == "teacher_renorm":
        return divergence(objective, student, lp)
    if target.missing == "renorm_both":
        return divergence(objective, student.masked_fill(~named, -torch.inf), lp)
    if isinstance(objective, SortedWasserstein):
        tail = 1 - p.sum(-1) if target.log_tail_mass is None else target.log_tail_mass.to(p.dtype).exp()
        return _sorted_l1(objective, lq.exp(), p, tail)
    # The outcomes one after the other, and last the sum over the tokens that are not named.
    rest = lq.masked_fill(named, -torch.inf).logsumexp(-1)
    tail = target.log_tail_mass
    if tail is None:  # where the student has nothing else either, whatever the sum rounds to
        tail = torch.where(rest == -torch.inf, 0.0, 1 - p.sum(-1)).clamp(min=0).log()
    lq = torch.cat([lq.masked_fill(~named, -torch.inf), rest[:, None]], -1)
    lp = torch.cat([lp, tail.to(p.dtype)[:, None]], -1)
    return divergence(objective, lq, lp)


def _times(weight: Weight, value: Tensor) -> Tensor:
    """A weight of 0 silences a divergence even where that is infinite."""
    return torch.where(torch.as_tensor(weight, device=value.device) == 0, 0.0, weight * value)


def logits_of(source: Source) -> Tensor:
    """The logits of a source, materialised: ``[..., V]``."""
    if isinstance(source, Head):
        z = source.hidden @ source.weight.T
        if source.bias is not None:
            z = z + source.bias
    else:
        z = source.values
    z = z * source.scale
    return z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)


def dense_distill(
    student: Source | Tensor,
    teacher: Teacher | Tensor,
    objective: Objective,
    *,
    labels: Optional[Tensor] = None,
    ignore_index: int = -100,
    mask: Optional[Tensor] = None,
    token_weight: Optional[Tensor] = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    temperature_squared: bool = False,
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    vocab: str = "error",
) -> Tensor:
    """:func:`kd_kernels.distill`, with all logits materialised and gradients from autograd.

    These arguments, shapes and result as of the public call (see there), but that a teacher which requires
    a gradient gets one: detach it. Used to check that call, and where a gradient is to be differentiated
    again. Not for :class:`kd_kernels.SinkhornBatch`.
    """
    student, teacher = as_source("student", student), as_teacher(teacher)
    sparse = isinstance(teacher, SparseTarget)
    z_s, z_t = logits_of(student), teacher.logprobs if sparse else logits_of(teacher)
    if vocab == "truncate" and not sparse:
        common = min(z_s.shape[-1], z_t.shape[-1])
        z_s, z_t = z_s[..., :common], z_t[..., :common]
    lead = z_s.shape[:-1]
    valid = torch.ones(lead, dtype=torch.bool, device=z_s.device)
    if reduction not in ("mean", "sum", "batchmean", "none"):
        raise ValueError(f"reduction must be mean, sum, batchmean or none, got {reduction!r}")
    if hard_weight and labels is None:
        raise ValueError(f"hard_weight={hard_weight} needs labels")
    if labels is not None:
        valid = valid & (labels != ignore_index)
    if mask is not None:
        valid = valid & mask
    z_s, z_t = z_s[valid], z_t[valid]  # rows that do not count reach nothing, NaN included

    def per_token(value: float | Tensor) -> Tensor:
        value = torch.as_tensor(value, dtype=z_s.dtype, device=z_s.device)
        return value.expand(lead)[valid]

    t_s = per_token(temperature)
    t_t = t_s if teacher_temperature is None else per_token(teacher_temperature)
    if objective.name == "weighted_kl":
        objective = type(objective)(*(per_token(x) for x in objective.parameters()))
    if isinstance(objective, SortedWasserstein):
        own, other = (per_token(x) for x in objective.masses())
        objective = replace(objective, student_log_mass=own, teacher_log_mass=other)
    if sparse:
        tail = None if teacher.log_tail_mass is None else teacher.log_tail_mass[valid]
        target = SparseTarget(teacher.ids[valid], z_t, teacher.missing, teacher.temperature, tail)
        loss = soft_weight * sparse_divergence(objective, z_s / t_s[:, None], target, t_t)
    else:
        loss = soft_weight * divergence(objective, z_s / t_s[:, None], z_t / t_t[:, None])
    if temperature_squared:
        loss = loss * t_s**2
    if hard_weight:
        nll = -z_s.log_softmax(-1).gather(-1, labels[valid][:, None])[:, 0]
        loss = loss + hard_weight * nll
    if token_weight is not None:
        loss = loss * per_token(token_weight)
    if reduction == "none":
        return torch.zeros(lead, dtype=loss.dtype, device=loss.device).masked_scatter(valid, loss)
    if reduction == "sum":
        return loss.sum()
    if reduction == "batchmean":
        return loss.sum() / max(lead[0] if len(lead) else 1, 1)
    if num_items is None or not valid.any():
        num_items = valid.sum().clamp(min=1)
    return loss.sum() / num_items
