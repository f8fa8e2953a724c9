"""TRL's distillation losses and trainers (signatures of trl 1.16).

:func:`generalized_jsd_loss` and :class:`ChunkedDivergenceFunction` need no TRL. :func:`use_in_gkd` and
:func:`use_in_distillation` change a trainer of the installed one, and refuse releases they do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Optional

import torch
from torch import Tensor

from kd_kernels.compat._shared import reduced
from kd_kernels.distill import Scalar, distill, next_token_labels
from kd_kernels.models import last_hidden_state
from kd_kernels.objectives import JensenShannon
from kd_kernels.sources import Head, Source, as_source

__all__ = [
    "KNOWN_TRL",
    "ChunkedDivergenceFunction",
    "Undo",
    "chunked_divergence_loss",
    "generalized_jsd_loss",
    "use_in_distillation",
    "use_in_gkd",
]

KNOWN_TRL = ("1.16",)
"""Release series whose trainers ``use_in_*`` was checked against."""


# --- losses -------------------------------------------------------------------------------------------


def generalized_jsd_loss(
    student_logits: Tensor | Source,
    teacher_logits: Tensor | Source,
    labels: Optional[Tensor] = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Optional[Scalar] = None,
) -> Tensor:
    """``trl.experimental.gkd.GKDTrainer.generalized_jsd_loss``; a :class:`kd_kernels.Head` is taken too.

    Differs: ``reduction="none"`` (``[tokens, V]`` terms) is refused; ``"mean"`` over no tokens is 0 and
    not NaN; softmax and loss are float32, not the logits' dtype.

    Args:
        student_logits, teacher_logits: ``[..., V]``.
        labels: ``[...]``, already shifted; tokens at -100 do not count.
        beta: share of the teacher in the mixture, 0 forward KL, 1 reverse KL.
        temperature: > 0, of both; no temperature squared.
        reduction: ``"batchmean"``: sum / tokens that count (without labels: / size of the first
            dimension); ``"mean"``: sum / (tokens that count V); ``"sum"``.
        num_items_in_batch: where given, the denominator, whatever the reduction.

    Returns:
        0-d.
    """
    student, objective = as_source("student_logits", student_logits), JensenShannon(beta)
    options = {"labels": labels, "temperature": temperature}
    if num_items_in_batch is not None:
        return distill(student, teacher_logits, objective, num_items=num_items_in_batch, **options)
    if reduction == "batchmean" and labels is None:
        return distill(student, teacher_logits, objective, reduction="batchmean", **options)
    return reduced("generalized_jsd_loss", reduction, student, teacher_logits, objective, **options)


class ChunkedDivergenceFunction:
    """``trl.kernels.chunked_divergence.ChunkedDivergenceFunction``: ``apply`` and its results.

    Differs: a teacher with a larger vocabulary is refused (TRL compares with its first part only, in
    silence); weights partitioned by ZeRO-3 must be gathered by the caller.
    """

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Optional[Tensor],
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Optional[Tensor],
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: Optional[float] = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: Optional[float] = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden ``[N, H]``, weights ``[V, H]``, biases ``[V]`` or None, per model; returns each token's
        divergence ``[N]`` and, without gradient, the student's entropy ``[N]`` at the temperature."""
        loss, parts = distill(
            _head(
                student_hidden,
                student_weight,
                student_bias,
                student_logit_scale,
                student_final_logit_softcapping,
            ),
            _head(
                teacher_hidden,
                teacher_weight,
                teacher_bias,
                teacher_logit_scale,
                teacher_final_logit_softcapping,
            ),
            JensenShannon(beta),
            temperature=temperature,
            reduction="none",
            return_parts=True,
        )
        return loss, parts.student_entropy


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Optional[Scalar] = None,
    student_lm_head_bias: Optional[Tensor] = None,
    teacher_lm_head_bias: Optional[Tensor] = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: Optional[float] = None,
    teacher_final_logit_softcapping: Optional[float] = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of ``trl.DistillationTrainer`` (``_chunked_divergence_loss``), with gradients in the forward
    pass: 4 matrix products where TRL's takes 6 (KL) or 8 (JSD).

    Differs: as :class:`ChunkedDivergenceFunction`; DTensor weights (FSDP2) are refused.

    Args:
        *_hidden_states: ``[B, K, H]``. *_lm_head_weight: ``[V, H]``.
        completion_mask: ``[B, K]``; nonzero = counts.
        num_items_in_batch: denominator; None: the tokens that count.

    Returns:
        Loss (0-d), sum of the student's entropies (0-d, detached), number of tokens that count (0-d).
    """
    loss, parts = distill(
        _head(
            student_hidden_states,
            student_lm_head_weight,
            student_lm_head_bias,
            student_logit_scale,
            student_final_logit_softcapping,
        ),
        _head(
            teacher_hidden_states,
            teacher_lm_head_weight,
            teacher_lm_head_bias,
            teacher_logit_scale,
            teacher_final_logit_softcapping,
        ),
        JensenShannon(beta),
        mask=completion_mask != 0,
        temperature=temperature,
        num_items=num_items_in_batch,
        return_parts=True,
    )
    return loss, parts.student_entropy.sum(), parts.valid_tokens


def _head(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], scale: float, softcap: Optional[float]
) -> Head:
    """A head whose weight has the hidden states' dtype; under autocast the core sees to it."""
    if not torch.is_autocast_enabled(hidden.device.type):
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    return Head(hidden, weight, bias, scale=scale, softcap=softcap)


# --- trainers -----------------------------------------------------------------------------------------


class Undo:
    """Puts back what ``use_in_*`` replaced: call :meth:`undo`, or leave the ``with`` block."""

    def __init__(self, target: Any, name: str, function: Callable) -> None:
        if hasattr(getattr(target, name), "kd_kernels_original"):
            raise ValueError(f"{name} already takes the head path here; undo that first")
        self._target, self._name = target, name
        self._was_own, self._previous = name in vars(target), vars(target).get(name)
        function.kd_kernels_original = getattr(target, name)
        setattr(target, name, function if isinstance(target, type) else MethodType(function, target))
        self._done, self._installed = False, vars(target)[name]

    def undo(self) -> None:
        """Put the original back; a second call does nothing.

        Raises:
            RuntimeError: something else has been put over it since; take that off first.
        """
        if self._done:
            return
        if vars(self._target).get(self._name) is not self._installed:
            raise RuntimeError(
                f"{self._name} has been replaced again since; take that off before undoing this"
            )
        self._done = True
        if self._was_own:
            setattr(self._target, self._name, self._previous)
        else:
            delattr(self._target, self._name)

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def use_in_gkd(trainer_or_class: Any) -> Undo:
    """Make a GKD trainer compute its loss from hidden states and LM heads, without logits.

    Same loss and gradients as its own ``compute_loss``, with the logits kept in float32. Evaluation with
    ``compute_metrics`` asks for logits: such calls (``return_outputs=True``) go the trainer's own way.

    Args:
        trainer_or_class: a ``trl.experimental.gkd.GKDTrainer``, or the class (or a subclass), for all its
            instances.

    Returns:
        A handle that undoes it; also a context manager.

    Raises:
        ValueError: a TRL release outside ``KNOWN_TRL``, or a trainer that does so already.
        TypeError: not a GKD trainer, or one with a loss of its own.

    In training, models and wrappers that :meth:`kd_kernels.Head.from_model` or
    :func:`kd_kernels.last_hidden_state` do not cover are refused by them.
    """
    _check_release("use_in_gkd")
    from trl.experimental.gkd import GKDTrainer

    _check_trainer("use_in_gkd", trainer_or_class, GKDTrainer, ("compute_loss", "generalized_jsd_loss"))
    dense = _original(GKDTrainer, "compute_loss")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:  # the caller wants the logits themselves
            return dense(self, model, inputs, True, num_items_in_batch)
        seen = {name: inputs[name] for name in ("input_ids", "attention_mask")}

        def loss(student: torch.nn.Module) -> Tensor:
            hidden = last_hidden_state(student, **seen)
            # accelerate's mixed precision lives in the models' forward, outside which the heads are
            with self.accelerator.autocast():
                student_head = Head.from_model(student, hidden)
            self.teacher_model.eval()  # not before, as in the original: it may be the student
            with torch.no_grad():
                target = last_hidden_state(self.teacher_model, **seen)
            with self.accelerator.autocast():
                return generalized_jsd_loss(
                    student_head,
                    Head.from_model(self.teacher_model, target),
                    labels=next_token_labels(inputs["labels"]),
                    beta=self.beta,
                    num_items_in_batch=num_items_in_batch,
                )

        return _through_ddp(model, loss)

    return Undo(trainer_or_class, "compute_loss", compute_loss)


def use_in_distillation(trainer_or_class: Any) -> Undo:
    """Make a ``trl.DistillationTrainer``, which takes the head path already, take this package's.

    Same loss, gradients and entropy metric as its own; see :func:`chunked_divergence_loss`.

    Args:
        trainer_or_class: a ``trl.DistillationTrainer``, or the class (or a subclass), for all its instances.

    Returns:
        A handle that undoes it; also a context manager.

    Raises:
        ValueError, TypeError: as :func:`use_in_gkd`.
    """
    _check_release("use_in_distillation")
    from trl import DistillationTrainer

    _check_trainer(
        "use_in_distillation", trainer_or_class, DistillationTrainer, ("compute_loss", "_compute_loss")
    )
    body = _original(DistillationTrainer, "_compute_loss")
    # The trainer's own method with one of its module's names bound anew: nothing else in TRL changes.
    names = {**body.__globals__, "_chunked_divergence_loss": chunked_divergence_loss}
    function = FunctionType(body.__code__, names, body.__name__, body.__defaults__, body.__closure__)
    return Undo(trainer_or_class, "_compute_loss", function)


def _check_release(owner: str) -> None:
    import trl

    if ".".join(trl.__version__.split(".")[:2]) not in KNOWN_TRL:
        raise ValueError(
            f"{owner} knows trl {', '.join(KNOWN_TRL)}; installed is {trl.__version__}, whose trainer may "
            f"compute another loss: install a known one, or call generalized_jsd_loss with kd.Head(...) in "
            f"a compute_loss of your own"
        )


def _check_trainer(owner: str, target: Any, base: type, methods: tuple[str, ...]) -> None:
    cls = target if isinstance(target, type) else type(target)
    if not issubclass(cls, base):
        raise TypeError(f"{owner}: trainer_or_class must be a trl {base.__name__}, got {cls.__name__}")
    for name in methods:
        if _original(target, name) is not _original(base, name):
            raise TypeError(
                f"{owner}: {cls.__name__}.{name} is not that of {base.__name__}, and would be passed over; "
                f"call generalized_jsd_loss with kd.Head(...) in it instead"
            )


def _original(owner: Any, name: str) -> Callable:
    method = getattr(owner, name)
    method = getattr(method, "kd_kernels_original", method)
    return getattr(method, "__func__", method)


def _through_ddp(model: torch.nn.Module, function: Callable[[torch.nn.Module], Tensor]) -> Tensor:
    """``function(model)``; inside DDP's forward where there is one, so that it sees the head used too."""
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return function(model)
    from trl.models.utils import _ForwardRedirection

    return _ForwardRedirection()(model, model.module, function, model.module)
