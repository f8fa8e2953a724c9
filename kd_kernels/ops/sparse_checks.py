"""What a sparse teacher's numbers must be, and which objectives they define."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kd_kernels.drivers.sparse import Target

# By how much the recorded probabilities may exceed 1: bfloat16 log-probabilities of 10 nats are off by 0.03.
_MASS_SLACK = 1.05
# A top-1 of a uniform teacher over a million tokens has ten times this.
_HARDLY_ANYTHING = 1e-7


def refuse_undefined(objective: str, missing: str) -> None:
    """Raise ValueError where the objective has no finite value for what the teacher leaves unsaid."""
    if missing == "unnormalised" and objective != "forward_kl":
        raise ValueError(
            f'missing="unnormalised" is a weighted sum of log q: forward KL only, not {objective}; '
            f'use missing="tail", or one of the renormalising modes'
        )
    if missing == "teacher_renorm" and objective in ("reverse_kl", "weighted_kl"):
        raise ValueError(
            f'{objective} is infinite with missing="teacher_renorm", which gives the other tokens '
            f'probability 0; use missing="tail" or "renorm_both"'
        )


def check_target(target: Target, counted: Callable[[Tensor], Tensor], vocab: int) -> None:
    """Raise ValueError for numbers that must not be; ``counted`` picks the tokens that count of ``[N]``."""
    ids = counted(target.ids)
    wrong = ids[(ids < -1) | (ids >= vocab)]
    if wrong.numel():
        raise ValueError(
            f"SparseTarget: ids must be in [0, {vocab}), the student's vocabulary, or -1 where unused; got "
            f"{wrong[0].item()}. A teacher with a longer one is cut when it is saved: kd.Head(hidden, "
            f"weight[:{vocab}])"
        )
    used = ids >= 0
    logprobs = torch.where(used, counted(target.logprobs).to(torch.float64), -torch.inf)
    if bool((logprobs.isnan() | (logprobs == torch.inf)).any()):
        raise ValueError(
            "SparseTarget: logprobs hold NaN or +infinity; a token whose teacher had no distribution is left "
            "out by mask= or labels="
        )
    mass = logprobs.exp().sum(1)
    tail = None if target.log_tail is None else counted(target.log_tail).to(torch.float64)
    if tail is not None:
        whole = mass + tail.exp()
        wrong = whole[~((whole - 1).abs() <= _MASS_SLACK - 1)]
        if wrong.numel():
            raise ValueError(
                f"SparseTarget: the probabilities of a token and exp(log_tail_mass) sum to "
                f"{wrong[0].item():.4g} instead of 1: are logprobs logits, or is the tail that of another "
                f"temperature (linear_topk's target(index=...) takes both)?"
            )
    if target.missing == "tail" and bool((mass > _MASS_SLACK).any()):
        raise ValueError(
            f"SparseTarget: the probabilities of a token sum to {mass.max().item():.4g}; logprobs must be "
            f'logarithms of probabilities (logits less their log-sum-exp) for missing="tail"'
        )
    if target.missing in ("teacher_renorm", "renorm_both") and bool((logprobs.amax(1) == -torch.inf).any()):
        raise ValueError(
            f"SparseTarget: a token that counts has no id with a probability, so "
            f'missing="{target.missing}" leaves it without a target; leave it out by mask= or labels='
        )
    if target.missing == "tail" and bool((used.any(1) & (mass < _HARDLY_ANYTHING)).any()):
        raise ValueError(
            f"SparseTarget: the probabilities of a token sum to {mass[used.any(1)].min().item():.4g}; what "
            f"is saved of a teacher is most of it: logprobs must be logarithms of probabilities (logits less "
            f"their log-sum-exp)"
        )
