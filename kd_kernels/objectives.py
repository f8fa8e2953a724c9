"""The catalogue: what is minimised, as plain data.

``p`` is the teacher's distribution, ``q`` the student's, both over the vocabulary at one token. Each
class carries its parameters, its formula and where the formula comes from; the arithmetic of a divergence
lives in ``reference/row_divergence.py`` (torch), ``csrc/objectives.h`` (C++ and CUDA) and
``triton_kernels/objectives.py`` (Triton), under the same ``name``; SortedWasserstein and SinkhornBatch, which
are none, have kernels of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional, Union

import torch

from kd_kernels.arguments import is_number
from kd_kernels.sources import Shown

Weight = Union[float, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """Base of all objectives. ``name`` keys every table in the package."""

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    top_k: ClassVar[Optional[int]] = None
    parameter_names: ClassVar[tuple[str, ...]] = ()  # what the caller knows ``parameters`` as

    def parameters(self) -> tuple[Weight, Weight]:
        """The two numbers (or ``[tokens]`` tensors) that the row kernels receive."""
        return 0.0, 0.0

    @staticmethod
    def check(first: float) -> None:
        """Raise ValueError when the first parameter is out of range."""

    def __post_init__(self) -> None:
        # A comparison would make the number a constant of a compiled graph; the op checks again.
        if not torch.compiler.is_compiling():
            first = self.parameters()[0]
            if self.name != "weighted_kl" and not is_number(first):
                name = self.parameter_names[0]
                raise TypeError(f"{type(self).__name__}: {name} must be a number, got {type(first).__name__}")
            self.check(first)


@dataclass(frozen=True)
class ForwardKL(Objective):
    """``KL(p || q) = sum_v p log(p / q)``, the classical distillation loss.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".
    """

    name: ClassVar[str] = "forward_kl"
    formula: ClassVar[str] = "KL(p || q)"
    source: ClassVar[str] = "Hinton et al. 2015"


@dataclass(frozen=True)
class ReverseKL(Objective):
    """``KL(q || p) = sum_v q log(q / p)``, mode seeking.

    Source: Gu et al. 2024, "MiniLLM" (the single-step term).
    """

    name: ClassVar[str] = "reverse_kl"
    formula: ClassVar[str] = "KL(q || p)"
    source: ClassVar[str] = "Gu et al. 2024 (MiniLLM)"


@dataclass(frozen=True)
class JensenShannon(Objective):
    """Generalised JS: ``beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``.

    ``beta`` in [0, 1] weights the teacher. The ends are the plain divergences, unscaled, as trainers
    define them: ``beta=0`` is forward KL, ``beta=1`` is reverse KL.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD).
    """

    name: ClassVar[str] = "jensen_shannon"
    formula: ClassVar[str] = "beta KL(p || m) + (1-beta) KL(q || m), m = beta p + (1-beta) q"
    source: ClassVar[str] = "Agarwal et al. 2024 (GKD)"
    parameter_names: ClassVar[tuple[str, ...]] = ("beta",)
    beta: float = 0.5

    @staticmethod
    def check(first: float) -> None:
        if not 0 <= first <= 1:
            raise ValueError(f"JensenShannon: beta must be in [0, 1], got {first}")

    def parameters(self) -> tuple[Weight, Weight]:
        return self.beta, 0.0


@dataclass(frozen=True)
class SkewKL(Objective):
    """``KL(p || alpha p + (1 - alpha) q)``, ``0 <= alpha < 1``; ``alpha=0`` is forward KL.

    Source: Ko et al. 2024, "DistiLLM".
    """

    name: ClassVar[str] = "skew_kl"
    formula: ClassVar[str] = "KL(p || alpha p + (1-alpha) q)"
    source: ClassVar[str] = "Ko et al. 2024 (DistiLLM)"
    parameter_names: ClassVar[tuple[str, ...]] = ("alpha",)
    alpha: float = 0.1

    @staticmethod
    def check(first: float) -> None:
        if not 0 <= first < 1:
            raise ValueError(f"SkewKL: alpha must be in [0, 1), got {first}")

    def parameters(self) -> tuple[Weight, Weight]:
        return self.alpha, 0.0


@dataclass(frozen=True)
class SkewReverseKL(Objective):
    """``KL(q || (1 - alpha) p + alpha q)``, ``0 <= alpha < 1``; ``alpha=0`` is reverse KL.

    The gradient flows through the student's share of the mixture (DistiLLM v1).

    Source: Ko et al. 2024, "DistiLLM".
    """

    name: ClassVar[str] = "skew_reverse_kl"
    formula: ClassVar[str] = "KL(q || (1-alpha) p + alpha q)"
    source: ClassVar[str] = "Ko et al. 2024 (DistiLLM)"
    parameter_names: ClassVar[tuple[str, ...]] = ("alpha",)
    alpha: float = 0.1

    @staticmethod
    def check(first: float) -> None:
        if not 0 <= first < 1:
            raise ValueError(f"SkewReverseKL: alpha must be in [0, 1), got {first}")

    def parameters(self) -> tuple[Weight, Weight]:
        return self.alpha, 0.0


@dataclass(frozen=True)
class TotalVariation(Objective):
    """``1/2 sum_v |p - q|``.

    Source: Wen et al. 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation".
    """

    name: ClassVar[str] = "total_variation"
    formula: ClassVar[str] = "1/2 sum |p - q|"
    source: ClassVar[str] = "Wen et al. 2023 (f-distill)"


@dataclass(frozen=True, eq=False, repr=False)
class WeightedKL(Shown, Objective):
    """``forward * KL(p || q) + reverse * KL(q || p)``; both 1 is Jeffreys' divergence.

    Either weight may be a tensor with the leading shape of the tokens (balanced and gated variants).

    Source: Jeffreys 1946; per-token weights as in Amara et al. 2022, "BD-KD".
    """

    name: ClassVar[str] = "weighted_kl"
    formula: ClassVar[str] = "forward KL(p || q) + reverse KL(q || p)"
    source: ClassVar[str] = "Jeffreys 1946; Amara et al. 2022 (BD-KD)"
    parameter_names: ClassVar[tuple[str, ...]] = ("forward", "reverse")
    forward: Weight = 1.0
    reverse: Weight = 1.0

    def parameters(self) -> tuple[Weight, Weight]:
        return self.forward, self.reverse


@dataclass(frozen=True, eq=False, repr=False)
class SortedWasserstein(Shown, Objective):
    """``sum_k |p_(k) - q_(k)|``, both in descending order, the smaller vocabulary filled up with zeros: for a
    teacher with another vocabulary (Universal Logit Distillation, ULD). ``vocab=`` has no effect on it.

    It says how peaked the student should be, not at which tokens. Equal probabilities stand in the order of
    their ids, and the gradient of ``|0|`` is 0. Without a factor: published code multiplies by 1.5.

    With ``top_k`` only the K largest of both are compared one by one, and all others as one: with the masses
    outside, ``sum_{k <= K} |p_(k) - q_(k)| + |tail_p - tail_q|``, never more than the exact value, and
    less by ``2 min(tail_p, tail_q)`` at most, which ``return_parts`` gives per token. Nothing is sorted then,
    and the teacher may be a :class:`SparseTarget` with ``missing="tail"`` and K ids or more.

    Where several tokens are merged into one (:func:`kd_kernels.align_tokens`), a row's distribution is
    multiplied by the probability of the tokens beside it: its logarithm is the log mass, differentiable.

    Args:
        top_k: K >= 1, or None for the exact value, which sorts every row.
        student_log_mass: <= 0, number or leading shape: logarithm of what the student's row is multiplied by.
        teacher_log_mass: likewise. Its gradient is there whether or not ``teacher_grad``: detach a constant.

    Source: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
    Loss"; merged tokens: TRL's GOLD. Top-K with tail: ours.
    """

    name: ClassVar[str] = "sorted_wasserstein"
    formula: ClassVar[str] = "sum_k |p_(k) - q_(k)|"
    source: ClassVar[str] = "Boizard et al. 2024 (ULD)"
    top_k: Optional[int] = None
    parameter_names: ClassVar[tuple[str, ...]] = ("student_log_mass", "teacher_log_mass")
    student_log_mass: Weight = 0.0
    teacher_log_mass: Weight = 0.0

    def __post_init__(self) -> None:
        if self.top_k is not None and (not isinstance(self.top_k, int) or isinstance(self.top_k, bool)):
            raise TypeError(f"SortedWasserstein: top_k must be an int or None, got {self.top_k!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"SortedWasserstein: top_k must be >= 1, or None for the exact value, got {self.top_k}"
            )

    def masses(self) -> tuple[Weight, Weight]:
        return self.student_log_mass, self.teacher_log_mass

    def parameters(self) -> tuple[Weight, Weight]:
        first, second = (x.detach() if isinstance(x, torch.Tensor) else x for x in self.masses())
        return first, second


@dataclass(frozen=True)
class SinkhornBatch(Objective):
    """Entropic optimal transport between the student's and the teacher's rows (SinKD): with
    ``C_ij = sum_v |q_iv - p_jv|`` between token i of the student and token j of the teacher, the cost
    ``<P, C>`` of the plan P that the Sinkhorn iterations reach from ``exp(-C / epsilon)``, rows first, each
    row and each column of mass 1.

    The tokens are coupled: all that count form one problem, or those of each of ``distill``'s ``groups``, and
    the work grows with the square of a problem's tokens. A problem's value is a sum over its rows, and
    ``reduction="mean"`` divides the sum over all problems by the number of tokens that count. Published code
    takes the sum, multiplies it by 8e-4 (``soft_weight``), at ``temperature=2.0``.

    Args:
        epsilon: > 0, in units of C, which is between 0 and 2.
        iterations: row and column steps. None: 20, as published; with ``tolerance`` at most so many,
            None: 1000.
        tolerance: None: all iterations, and the gradient of the number they return, back through them. A
            number: until the marginals' L1 error is at most this share of the mass, and the gradient of the
            solution.

    Source: Cui et al. 2024, "Sinkhorn Distance Minimization for Knowledge Distillation".
    """

    name: ClassVar[str] = "sinkhorn_batch"
    formula: ClassVar[str] = "<P, C>, C_ij = sum_v |q_iv - p_jv|, P = Sinkhorn(C)"
    source: ClassVar[str] = "Cui et al. 2024 (SinKD)"
    published_iterations: ClassVar[int] = 20
    epsilon: float = 0.1
    iterations: Optional[int] = None
    tolerance: Optional[float] = None

    def __post_init__(self) -> None:
        for name in ("epsilon", "tolerance"):
            value = getattr(self, name)
            if name == "tolerance" and value is None:
                continue
            if not is_number(value):
                raise TypeError(f"SinkhornBatch: {name} must be a number, got {type(value).__name__}")
            if not torch.compiler.is_compiling() and not 0 < value < float("inf"):
                raise ValueError(f"SinkhornBatch: {name} must be finite and > 0, got {value}")
        steps = self.iterations
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
            raise TypeError(f"SinkhornBatch: iterations must be an int or None, got {steps!r}")
        if steps is not None and steps < 1:
            raise ValueError(f"SinkhornBatch: iterations must be >= 1, got {steps}")


# The order is that of kd::Objective in csrc/row_divergence.h.
CATALOGUE: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (ForwardKL, ReverseKL, JensenShannon, SkewKL, SkewReverseKL, TotalVariation, WeightedKL)
}
