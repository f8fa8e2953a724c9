"""The sorted-L1 kernel in torch; see :class:`kd_kernels.rows.SortedL1Job` for the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.reference.gather import times
from kd_kernels.reference.row_divergence import shifted

# What this takes beside the logits, in bytes per token and entry of the larger vocabulary: the values, their
# order (int64) and what the sort itself needs, of both sides.
WORKING_BYTES = 96


def sorted_l1(job: R.SortedL1Job) -> None:
    """Fill the results of ``job``, and the gradients that its sides ask for."""
    sides = (job.student, job.teacher)
    dtype = torch.float32
    if any(side.rows.logits.dtype == torch.float64 for side in sides):
        dtype = torch.float64
    defined = torch.ones_like(job.loss, dtype=torch.bool)
    for side in sides:
        defined &= side.max.isfinite() & side.logz.isfinite()
    student, teacher = (_Ranked(side, job.n, dtype) for side in sides)

    width = max(student.masses.shape[1], teacher.masses.shape[1])
    difference = student.padded(width) - teacher.padded(width)
    job.loss.copy_(torch.where(defined, difference.abs().sum(1, dtype=torch.float64), torch.nan))
    sign = difference.sign()
    for side, ranked, signs in ((job.student, student, sign), (job.teacher, teacher, -sign)):
        signs = signs[:, : side.vocab]
        side.sum.copy_((signs * ranked.masses).sum(1, dtype=torch.float64))
        side.sum.copy_(torch.where(defined, side.sum, torch.nan))
        if side.rows.grad is not None:
            _write_gradient(job, side, ranked, signs, defined)


def centred(signs: Tensor, masses: Tensor) -> Tensor:
    """``sign - sum_j q_j sign_j``, q the masses over their sum; without the cancellation that it has where
    nearly all have the same sign."""
    above, below = (torch.where(s > 0, masses, 0.0).sum(1, keepdim=True) for s in (signs, -signs))
    equal = torch.where(signs == 0, masses, 0.0).sum(1, keepdim=True)
    pull = torch.where(
        signs > 0, 2 * below + equal, torch.where(signs < 0, -2 * above - equal, below - above)
    )
    return pull / (above + below + equal)


class _Ranked:
    """A side's probabilities times its mass, in descending order, stable."""

    def __init__(self, side: R.SortedSide, n: int, dtype: torch.dtype) -> None:
        self.z = shifted(side.rows, n, side.vocab, dtype)
        temperature = side.rows.temperature.to(dtype)[:, None]
        self.below = self.z - side.max.to(dtype)[:, None]
        p = (self.below / temperature - side.logz.to(dtype)[:, None]).exp()
        values, self.order = p.sort(dim=1, descending=True, stable=True)
        self.masses = values * side.mass.to(dtype)[:, None]

    def padded(self, width: int) -> Tensor:
        return torch.nn.functional.pad(self.masses, (0, width - self.masses.shape[1]))


def _write_gradient(
    job: R.SortedL1Job, side: R.SortedSide, ranked: _Ranked, signs: Tensor, defined: Tensor
) -> None:
    """Of the mass ``a q_v`` at rank r: ``a q_v (sign_r - sum_k q_(k) sign_k)``, over the temperature."""
    masses = ranked.masses
    dtype = masses.dtype
    # Into the order of the ids, over the temperature.
    soft = torch.zeros_like(masses).scatter_(1, ranked.order, masses * centred(signs, masses))
    soft = soft / side.rows.temperature.to(dtype)[:, None]
    soft = torch.where(defined[:, None], soft, torch.nan)
    gradient = times(job.soft_weight, soft)
    if side is job.student and job.hard_weight is not None:
        assert job.hard_logz is not None and job.labels is not None
        hard = (ranked.below - job.hard_logz.to(dtype)[:, None]).exp()
        hard = hard - (torch.arange(side.vocab, device=hard.device) == job.labels[:, None]).to(dtype)
        gradient = gradient + times(job.hard_weight, hard)
    if side.rows.softcap:
        slope = 1 - (ranked.z / side.rows.softcap) ** 2
        gradient = torch.where(gradient == 0, 0.0, gradient * slope)
    side.rows.write_grad(gradient * side.rows.scale)
