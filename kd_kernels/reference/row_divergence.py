"""The row kernel in torch: statistics, terms and closed-form gradients over rows of logits.

Every divergence here is an f-divergence, so one scheme serves all. From ``p``, ``q`` and
``d = log q - log p`` an objective gives three numbers per vocabulary entry:

* ``term``     a non-negative summand of the loss,
* ``student``  ``q dL/dq`` up to a multiple of ``q``,
* ``teacher``  ``p dL/dp`` up to a multiple of ``p``,

and the softmax Jacobian makes the gradients ``student - q sum(student)`` and
``teacher - p sum(teacher)``. Terms are written through ``phi(x) = e^x - 1 - x`` so that they never
cancel when teacher and student agree (sum p (q/p - 1) = 0 lets KL(p || q) = sum p phi(d)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import rows as R


@dataclass
class _Point:
    """All vocabulary entries of all rows, ``[n, V]`` each, with the helpers the formulas share."""

    p: Tensor
    q: Tensor
    d: Tensor  # log q - log p; 0 where both are 0

    def difference(self) -> Tensor:
        """``q - p``, exact to the last digits when they are close."""
        return torch.where(self.d.abs() < 1, self.p * torch.expm1(self.d.clamp(-1, 1)), self.q - self.p)

    def mixture(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """``log(m / p)`` and ``log(m / q)`` for ``m = share p + (1 - share) q``; no underflow."""
        below = self.d <= 0  # then p is the larger of the two
        x = -self.d.abs()
        near, far = torch.where(below, 1 - share, share), torch.where(below, share, 1 - share)
        # far + near e^x, as log1p while it is close to 1 and directly when it is small
        ratio = near * torch.expm1(x)
        larger = torch.where(ratio > -0.5, torch.log1p(ratio), torch.log(far + near * torch.exp(x)))
        other = torch.where(below, larger - self.d, larger + self.d)
        return torch.where(below, larger, other), torch.where(below, other, larger)


def _phi(x: Tensor) -> Tensor:
    """``e^x - 1 - x``, without the cancellation near 0."""
    small = x.clamp(-1, 1)
    series = torch.zeros_like(x)
    for k in range(18, 1, -1):  # x^2/2! + ... + x^18/18!: float64 accuracy on [-1, 1]
        series = (series + 1) * small / k
    # the loop leaves small/2 (1 + small/3 (1 + ...)); one more factor of x gives phi
    return torch.where(x.abs() < 1, series * small, torch.expm1(x) - x)


def _weighted_phi(weight: Tensor, x: Tensor, gap: Tensor) -> Tensor:
    """``weight * phi(x)`` where ``gap = weight (e^x - 1)``, finite when e^x overflows or weight is 0."""
    direct = gap - torch.where(weight > 0, weight * x, 0.0)
    return torch.where(x.abs() < 1, weight * _phi(x.clamp(-1, 1)), direct)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return torch.where(weight > 0, weight * x, torch.where(torch.isnan(weight), weight, 0.0))


def _forward_kl(v: _Point, a: Tensor, b: Tensor):
    gap = v.difference()
    return _weighted_phi(v.p, v.d, gap), gap, -_times(v.p, v.d)


def _reverse_kl(v: _Point, a: Tensor, b: Tensor):
    gap = -v.difference()
    return _weighted_phi(v.q, -v.d, gap), _times(v.q, v.d), gap


def _jensen_shannon(v: _Point, beta: Tensor, b: Tensor):
    log_mp, log_mq = v.mixture(beta)
    gap = v.difference()
    term = beta * _weighted_phi(v.p, log_mp, (1 - beta) * gap)
    term = term + (1 - beta) * _weighted_phi(v.q, log_mq, -beta * gap)
    return term, -(1 - beta) * _times(v.q, log_mq), -beta * _times(v.p, log_mp)


def _skew_kl(v: _Point, alpha: Tensor, b: Tensor):
    log_mp, _ = v.mixture(alpha)
    shrink = torch.expm1(-log_mp)  # p / m - 1
    term = _weighted_phi(v.p, log_mp, (1 - alpha) * v.difference())
    return term, -(1 - alpha) * _times(v.q, shrink), -_times(v.p, log_mp + alpha * shrink)


def _skew_reverse_kl(v: _Point, alpha: Tensor, b: Tensor):
    _, log_mq = v.mixture(1 - alpha)
    shrink = torch.expm1(-log_mq)  # q / m - 1
    term = _weighted_phi(v.q, log_mq, -(1 - alpha) * v.difference())
    return term, -_times(v.q, log_mq + alpha * shrink), -(1 - alpha) * _times(v.p, shrink)


def _total_variation(v: _Point, a: Tensor, b: Tensor):
    sign = torch.where(torch.isnan(v.d), v.d, 0.5 * torch.sign(v.d))  # torch.sign(NaN) is 0
    return 0.5 * v.difference().abs(), v.q * sign, -v.p * sign


def _weighted_kl(v: _Point, forward: Tensor, reverse: Tensor):
    f, r = _forward_kl(v, forward, reverse), _reverse_kl(v, forward, reverse)
    # a weight of 0 silences its divergence even where that one is infinite
    return tuple(
        torch.where(forward == 0, 0.0, forward * x) + torch.where(reverse == 0, 0.0, reverse * y)
        for x, y in zip(f, r)
    )


ELEMENTS = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "weighted_kl": _weighted_kl,
}


def shifted(side: R.Rows, n: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """z, the logits after scale and softcap, ``[n, V]``."""
    z = side.read(n, vocab).to(dtype) * side.scale
    return side.softcap * torch.tanh(z / side.softcap) if side.softcap else z


def _log_sum_exp(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """max z and log sum exp((z - max z) / T); a row of nothing but -inf, or with +inf or NaN, gives NaN."""
    top = z.amax(-1)
    return top, ((z - top[:, None]) / temperature[:, None]).exp().sum(-1).log()


def row_divergence(job: R.RowJob, phases: int) -> None:
    """Run ``phases`` over the rows of ``job``; see :mod:`kd_kernels.rows` for the contract."""
    double = torch.float64 in (job.student.logits.dtype, job.teacher.logits.dtype)
    dtype = torch.float64 if double else torch.float32
    n, vocab, stats = job.n, job.vocab, job.statistics
    z_s, z_t = (shifted(side, n, vocab, dtype) for side in (job.student, job.teacher))
    t_s, t_t = job.student.temperature.to(dtype), job.teacher.temperature.to(dtype)
    one = torch.ones_like(t_s)
    if phases & R.STATISTICS:
        stats[:, R.MAX_STUDENT], stats[:, R.LOGZ_STUDENT] = _log_sum_exp(z_s, t_s)
        stats[:, R.MAX_TEACHER], stats[:, R.LOGZ_TEACHER] = _log_sum_exp(z_t, t_t)
        if job.labels is not None:
            stats[:, R.LOGZ_HARD] = _log_sum_exp(z_s, one)[1]
            inside = (job.labels >= 0) & (job.labels < vocab)
            at_label = z_s.gather(1, torch.where(inside, job.labels, 0)[:, None])[:, 0]
            stats[:, R.LABEL_LOGIT] = torch.where(inside, at_label, torch.nan)
    if not phases & (R.TERMS | R.GRADIENT):
        return

    x_s = (z_s - stats[:, R.MAX_STUDENT, None].to(dtype)) / t_s[:, None]
    x_t = (z_t - stats[:, R.MAX_TEACHER, None].to(dtype)) / t_t[:, None]
    log_z_s, log_z_t = stats[:, R.LOGZ_STUDENT, None], stats[:, R.LOGZ_TEACHER, None]
    lq, lp = x_s - log_z_s.to(dtype), x_t - log_z_t.to(dtype)
    # the maxima stay apart, so a shift of a whole row costs no digits
    d = (x_s - x_t) - (log_z_s - log_z_t).to(dtype)
    both_banned = (x_s == -torch.inf) & (x_t == -torch.inf)
    point = _Point(p=lp.exp(), q=lq.exp(), d=torch.where(both_banned, 0.0, d))
    a, b = job.parameter0.to(dtype)[:, None], job.parameter1.to(dtype)[:, None]
    term, student, teacher = ELEMENTS[job.objective](point, a, b)
    if phases & R.TERMS:
        stats[:, R.SUM_STUDENT] = student.sum(-1)
        stats[:, R.SUM_TEACHER] = teacher.sum(-1)
        stats[:, R.MASS_STUDENT] = point.q.sum(-1)
        stats[:, R.MASS_TEACHER] = point.p.sum(-1)
        job.terms[:, R.SOFT] = term.sum(-1)
        if job.labels is not None:
            job.terms[:, R.HARD] = stats[:, R.LOGZ_HARD] - (stats[:, R.LABEL_LOGIT] - stats[:, R.MAX_STUDENT])
        if job.entropies:
            job.terms[:, R.STUDENT_ENTROPY] = -_times(point.q, lq).sum(-1)
            job.terms[:, R.TEACHER_ENTROPY] = -_times(point.p, lp).sum(-1)
    if not phases & R.GRADIENT:
        return

    soft, hard = job.soft_weight.to(dtype)[:, None], job.hard_weight.to(dtype)[:, None]
    dead = (soft == 0) & (hard == 0)
    if job.student.grad is not None:
        g = student - point.q * _mean(stats, R.SUM_STUDENT, R.MASS_STUDENT, dtype)
        g = torch.where(soft == 0, 0.0, soft / t_s[:, None] * g)  # even where the divergence is infinite
        if job.labels is not None:
            hit = torch.arange(vocab, device=z_s.device) == job.labels[:, None]
            below_max = z_s - stats[:, R.MAX_STUDENT, None].to(dtype)
            q_hard = (below_max - stats[:, R.LOGZ_HARD, None].to(dtype)).exp()
            bad_label = torch.isnan(stats[:, R.LABEL_LOGIT, None])
            of_label = torch.where(hard == 0, 0.0, hard * (q_hard - hit.to(dtype)))
            g = g + torch.where(bad_label, torch.nan, of_label)
        _store(job.student, g, z_s, dead)
    if job.teacher.grad is not None:
        g = teacher - point.p * _mean(stats, R.SUM_TEACHER, R.MASS_TEACHER, dtype)
        g = torch.where(soft == 0, 0.0, soft / t_t[:, None] * g)
        _store(job.teacher, g, z_t, dead)


def _mean(stats: Tensor, total: int, mass: int, dtype: torch.dtype) -> Tensor:
    return (stats[:, total, None] / stats[:, mass, None]).to(dtype)


def _store(side: R.Rows, g: Tensor, z: Tensor, dead: Tensor) -> None:
    """Chain through softcap and scale, silence rows without weight, write."""
    if side.softcap:
        g = g * (1 - (z / side.softcap) ** 2)
    side.write_grad(torch.where(dead, 0.0, g * side.scale))
