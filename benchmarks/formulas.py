"""The objectives written plainly, twice: as a user would (timed) and in float64 (the judge).

The two are written differently on purpose: an oracle that shares an expression with what it judges
shares its mistakes. Neither imports the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import Inputs, Objective


def _kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL(p || q), mean over tokens, by the call every tutorial shows."""
    return F.kl_div(q_log, p_log, reduction="batchmean", log_target=True)


def _mixture(a_log: Tensor, b_log: Tensor, a_share: float) -> Tensor:
    """log(a_share a + (1 - a_share) b), as TRL's and Liger's losses write it."""
    return torch.logsumexp(torch.stack([a_log + math.log(a_share), b_log + math.log1p(-a_share)]), dim=0)


def user_loss(objective: Objective, student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of two [N, V] logit tensors, mean over tokens, in float32.

    JS is the expression of TRL's ``generalized_jsd_loss``; skew KL is that with one term.
    """
    q = F.log_softmax(student, dim=-1, dtype=torch.float32)
    p = F.log_softmax(teacher, dim=-1, dtype=torch.float32)
    if objective.name == "forward_kl":
        return _kl(p, q)
    if objective.name == "reverse_kl":
        return _kl(q, p)
    if objective.name == "jensen_shannon":
        beta = objective["beta"]
        m = _mixture(p, q, beta)
        both = beta * F.kl_div(m, p, reduction="none", log_target=True)
        both = both + (1 - beta) * F.kl_div(m, q, reduction="none", log_target=True)
        return both.sum() / q.shape[0]
    if objective.name == "skew_kl":
        return _kl(p, _mixture(p, q, objective["alpha"]))
    if objective.name == "skew_reverse_kl":
        return _kl(q, _mixture(q, p, objective["alpha"]))
    if objective.name == "total_variation":
        return 0.5 * (p.exp() - q.exp()).abs().sum() / q.shape[0]
    if objective.name == "weighted_kl":
        return objective["forward"] * _kl(p, q) + objective["reverse"] * _kl(q, p)
    raise KeyError(f"benchmarks/formulas.py: user_loss has no {objective.name}")


def exact_sum(objective: Objective, student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of the divergence of two float64 logit tensors, from probabilities."""
    lq, lp = student.log_softmax(-1), teacher.log_softmax(-1)
    q, p = lq.exp(), lp.exp()
    if objective.name == "forward_kl":
        return (p * (lp - lq)).sum()
    if objective.name == "reverse_kl":
        return (q * (lq - lp)).sum()
    if objective.name == "jensen_shannon":
        beta = objective["beta"]
        lm = (beta * p + (1 - beta) * q).log()
        return (beta * p * (lp - lm) + (1 - beta) * q * (lq - lm)).sum()
    if objective.name == "skew_kl":
        alpha = objective["alpha"]
        return (p * (lp - (alpha * p + (1 - alpha) * q).log())).sum()
    if objective.name == "skew_reverse_kl":
        alpha = objective["alpha"]
        return (q * (lq - ((1 - alpha) * p + alpha * q).log())).sum()
    if objective.name == "total_variation":
        return (p - q).abs().sum() / 2
    if objective.name == "weighted_kl":
        forward, reverse = objective["forward"], objective["reverse"]
        return ((forward * p - reverse * q) * (lp - lq)).sum()
    raise KeyError(f"benchmarks/formulas.py: exact_sum has no {objective.name}")


@dataclass(frozen=True)
class Exact:
    """Float64 loss over all tokens, ``d hidden`` of some rows, ``d weight`` of some vocabulary entries."""

    loss: float
    rows: Tensor
    d_hidden: Tensor
    ids: Tensor
    d_weight: Tensor

    def errors(self, loss: Tensor, inputs: Inputs) -> dict[str, float]:
        """Relative errors (norm of the difference over norm) of a step that has just run on ``inputs``."""

        def relative(got: Tensor, want: Tensor) -> float:
            return float((got.double() - want).norm() / want.norm())

        if inputs.h_s.grad is None or inputs.w_s.grad is None:
            raise RuntimeError("the step left no gradient on the student")
        return {
            "loss": abs(float(loss.detach()) - self.loss) / abs(self.loss),
            "d_hidden": relative(inputs.h_s.grad[self.rows], self.d_hidden),
            "d_weight": relative(inputs.w_s.grad[self.ids], self.d_weight),
        }


def exact(objective: Objective, inputs: Inputs, *, sample: int = 256, block: int = 128) -> Exact:
    """Float64 answer on the same rounded inputs, by autograd through row blocks.

    The loss and the softmax need every token and every vocabulary entry; of the gradients a sample is
    enough to tell a right answer from a wrong one, and it saves most of the float64 work.
    """
    h_s, w_s, h_t, w_t = (t.detach().double() for t in (inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t))
    tokens, vocab = h_s.shape[0], w_s.shape[0]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(tokens, generator=generator)[:sample].sort().values.to(h_s.device)
    ids = torch.randperm(vocab, generator=generator)[: 8 * sample].sort().values.to(h_s.device)
    total = torch.zeros((), dtype=torch.float64, device=h_s.device)
    d_hidden = []
    d_weight = torch.zeros(len(ids), w_s.shape[1], dtype=torch.float64, device=h_s.device)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        student = (h_s[start:stop] @ w_s.t()).requires_grad_()
        value = exact_sum(objective, student, h_t[start:stop] @ w_t.t())
        (grad,) = torch.autograd.grad(value, student)
        total += value.detach()
        inside = rows[(rows >= start) & (rows < stop)] - start
        d_hidden.append(grad[inside] @ w_s)
        d_weight += grad[:, ids].t() @ h_s[start:stop]
    return Exact(float(total) / tokens, rows, torch.cat(d_hidden) / tokens, ids, d_weight / tokens)
