"""One distillation step to be planned, timed or weighed, and the ways to run it."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_kernels.backends import TABLE, BackendUnavailable, pick
from kd_kernels.cli.common import DTYPES, UsageError
from kd_kernels.distill import distill
from kd_kernels.objectives import CATALOGUE, Objective
from kd_kernels.sources import Head


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    student: int  # hidden sizes
    teacher: int
    dtype: str  # a key of DTYPES
    objective: str  # a key of CATALOGUE
    device: str
    frozen_head: bool = False
    workspace_bytes: Optional[int] = None
    backend: Optional[str] = None

    @staticmethod
    def of(args: argparse.Namespace) -> Case:
        """The case of a command line; :class:`UsageError` where its backend cannot serve it."""
        if args.backend is not None and args.backend not in TABLE["row_divergence"]:
            names = ", ".join(TABLE["row_divergence"])
            raise UsageError(f"--backend must be one of {names}, got {args.backend!r}")
        try:
            pick("row_divergence", args.device, args.backend)
        except BackendUnavailable as error:
            raise UsageError(f"--backend {args.backend}: {error}") from None
        return Case(
            tokens=args.tokens,
            vocab=args.vocab,
            student=args.student,
            teacher=args.teacher,
            dtype=args.dtype or ("bf16" if args.device.type == "cuda" else "fp32"),
            objective=args.objective,
            device=str(args.device),
            frozen_head=args.frozen_head,
            workspace_bytes=args.workspace_bytes,
            backend=args.backend,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def label(self) -> str:
        head = ", head frozen" if self.frozen_head else ""
        return (
            f"{self.tokens} tokens, vocabulary {self.vocab}, hidden {self.student} (student) and "
            f"{self.teacher} (teacher), {self.dtype}, {self.objective}, {self.device}{head}"
        )

    @property
    def gemm_flops(self) -> int:
        """Both logits, d hidden, and d weight unless the head is frozen."""
        student = 2 if self.frozen_head else 3
        return 2 * self.tokens * self.vocab * (student * self.student + self.teacher)


@dataclass
class Inputs:
    """Leaves of one step; ``[tokens, D]`` and ``[vocab, D]`` each."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @staticmethod
    def of(case: Case, device: Optional[str] = None) -> Inputs:
        """Random models whose logits have a standard deviation of 3; the teacher shares the student's
        features, or the divergence would be unlike any in training."""
        g = torch.Generator().manual_seed(0)
        where = device or case.device

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, device="meta") if where == "meta" else torch.randn(shape, generator=g)

        h_s, w_s = normal(case.tokens, case.student), normal(case.vocab, case.student)
        h_t, w_t = normal(case.tokens, case.teacher), normal(case.vocab, case.teacher)
        shared = min(case.student, -(-case.teacher // 2))
        h_t[:, :shared], w_t[:, :shared] = h_s[:, :shared], w_s[:, :shared]
        w_s *= 3 / case.student**0.5
        w_t *= 3 / case.teacher**0.5
        made = [x.to(where, case.torch_dtype) for x in (h_s, w_s, h_t, w_t)]
        made[0].requires_grad_()
        made[1].requires_grad_(not case.frozen_head)
        return Inputs(*made)

    def tensors(self) -> list[Tensor]:
        return [self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight]

    def first(self, tokens: int) -> Inputs:
        """The same heads with fewer tokens."""
        hidden = self.student_hidden.detach()[:tokens].clone().requires_grad_()
        return Inputs(hidden, self.student_weight, self.teacher_hidden[:tokens], self.teacher_weight)

    def clear(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None


def objective_of(case: Case) -> Objective:
    return CATALOGUE[case.objective]()


# --- the ways: each runs forward and backward, leaves the gradients in ``.grad``, returns the loss ----


def kd_step(case: Case, inputs: Inputs) -> Tensor:
    loss = distill(
        Head(inputs.student_hidden, inputs.student_weight),
        Head(inputs.teacher_hidden, inputs.teacher_weight),
        objective_of(case),
        workspace_bytes=case.workspace_bytes,
        backend=case.backend,
    )
    loss.backward()
    return loss


def plain_step(case: Case, inputs: Inputs) -> Tensor:
    """What people write: the logits of both models, log-softmax in float32, ``F.kl_div``."""
    loss = _plain_loss(objective_of(case), *inputs.tensors())
    loss.backward()
    return loss


def compiled_step(case: Case) -> Callable[[Case, Inputs], Tensor]:
    """``torch.compile`` of the plain loss, for one shape."""
    function = torch.compile(functools.partial(_plain_loss, objective_of(case)), dynamic=False)

    def step(case: Case, inputs: Inputs) -> Tensor:
        loss = function(*inputs.tensors())
        loss.backward()
        return loss

    return step


def _plain_loss(
    objective: Objective,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(teacher_hidden, teacher_weight)
    return plain_divergence(objective, F.linear(student_hidden, student_weight), teacher)


def plain_divergence(objective: Objective, student: Tensor, teacher: Tensor) -> Tensor:
    """The objectives as training scripts have them: mean over ``[tokens, vocab]`` logits.

    These are what is timed against; what is checked against is :mod:`kd_kernels.reference`.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    q = F.log_softmax(student, dim=-1, dtype=wide)
    p = F.log_softmax(teacher, dim=-1, dtype=wide)

    def kl(a: Tensor, b: Tensor) -> Tensor:  # KL(a || b) of log-probabilities
        return F.kl_div(b, a, reduction="batchmean", log_target=True)

    def mix(a: Tensor, b: Tensor, share: float) -> Tensor:  # log(share a + (1 - share) b)
        return torch.logsumexp(torch.stack([a + math.log(share), b + math.log1p(-share)]), dim=0)

    first, second = objective.parameters()
    if objective.name == "forward_kl":
        return kl(p, q)
    if objective.name == "reverse_kl":
        return kl(q, p)
    if objective.name == "jensen_shannon":
        m = mix(p, q, first)
        return first * kl(p, m) + (1 - first) * kl(q, m)
    if objective.name == "skew_kl":
        return kl(p, mix(p, q, first))
    if objective.name == "skew_reverse_kl":
        return kl(q, mix(q, p, first))
    if objective.name == "total_variation":
        return 0.5 * (p.exp() - q.exp()).abs().sum() / q.shape[0]
    if objective.name == "weighted_kl":
        return first * kl(p, q) + second * kl(q, p)
    raise UsageError(f"--objective {objective.name}: the plain form to compare with is not known")


class Floor:
    """The matrix products that a step cannot do without, into outputs made beforehand.

    The student's logits stand in for their gradient: a product's time does not depend on the values.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.h_s, self.w_s, self.h_t, self.w_t = (x.detach() for x in inputs.tensors())
        self.student, self.teacher = (self.h_s.new_empty(case.tokens, case.vocab) for _ in range(2))
        self.d_hidden = torch.empty_like(self.h_s)
        self.d_weight = None if case.frozen_head else torch.empty_like(self.w_s)

    def __call__(self) -> None:
        torch.mm(self.h_s, self.w_s.t(), out=self.student)
        torch.mm(self.h_t, self.w_t.t(), out=self.teacher)
        torch.mm(self.student, self.w_s, out=self.d_hidden)
        if self.d_weight is not None:
            torch.mm(self.student.t(), self.h_s, out=self.d_weight)
