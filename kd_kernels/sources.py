"""Where logits come from: plain data, read by the public call and by the drivers."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def result_dtype(*values: torch.Tensor) -> torch.dtype:
    """What results of models with these hidden states or logits are in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in values) else torch.float32


def is_dtensor(tensor: object) -> bool:
    """By name: importing torch.distributed takes a while, and not every torch has it."""
    return type(tensor).__name__ == "DTensor"


def _check_floating(owner: str, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor, got {type(tensor).__name__}")
    if is_dtensor(tensor):
        raise TypeError(
            f"{owner}: {name} is a DTensor; use kd.Head.from_model(model, hidden), which gathers FSDP2's, or "
            f"pass {name}.full_tensor()"
        )
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{owner}: {name} has dtype {tensor.dtype}; float32, bfloat16, float16 and float64 are "
            f"supported (dequantise a quantised head first)"
        )


def shown(value: object) -> str:
    """A tensor by its form: its numbers would fill the screen, and have to come from the device first. One
    number of the host's as it is."""
    if not isinstance(value, Tensor):
        return repr(value)
    if value.dim() == 0 and value.device.type == "cpu":
        return f"{value.item():.6g}"
    return f"[{', '.join(map(str, value.shape))}] {str(value.dtype).removeprefix('torch.')} {value.device}"


class Shown:
    """A dataclass that shows its tensors by their form."""

    def __repr__(self) -> str:
        parts = (f"{field.name}={shown(getattr(self, field.name))}" for field in fields(self))
        return f"{type(self).__name__}({', '.join(parts)})"


def _check_shaping(owner: str, scale: float, softcap: Optional[float]) -> None:
    for name, value in (("scale", scale), ("softcap", softcap)):
        if isinstance(value, Tensor):
            raise TypeError(f"{owner}: {name} must be a number, got a tensor; use {name}.item()")
        absent = name == "softcap" and value is None
        if isinstance(value, bool) or not absent and not isinstance(value, (int, float, numbers.Real)):
            raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not abs(scale) < float("inf"):
        raise ValueError(f"{owner}: scale must be finite, got {scale}")
    if softcap is not None and not 1e-30 < softcap < float("inf"):
        raise ValueError(f"{owner}: softcap must be > 0 and finite, or None for no softcap, got {softcap}")


@dataclass(frozen=True, eq=False, repr=False)
class Head(Shown):
    """Logits as an LM head would give them, never materialised.

    ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``; no tanh when ``softcap is None``.

    Args:
        hidden: ``[..., D]``; all leading dimensions are tokens.
        weight: ``[V, D]``, any strides; a weight with one unit stride (tied, transposed) is not copied.
        bias: ``[V]`` or None.
        scale: factor on the logits before the softcap.
        softcap: positive number or None.

    Raises:
        TypeError: not a tensor, or a dtype without a floating weight (quantised heads).
        ValueError: shapes that do not fit together, or ``softcap <= 0``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Optional[Tensor] = None
    scale: float = 1.0
    softcap: Optional[float] = None

    def __post_init__(self) -> None:
        _check_floating("Head", "hidden", self.hidden)
        _check_floating("Head", "weight", self.weight)
        if self.hidden.dim() < 1:
            raise ValueError("Head: hidden must be [..., D], got a 0-d tensor")
        if self.hidden.shape[-1] == 0:
            raise ValueError("Head: hidden has no features; it must be [..., D] with D > 0")
        if self.weight.dim() != 2:
            raise ValueError(f"Head: weight must be [V, D], got shape {tuple(self.weight.shape)}")
        if self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"Head: hidden has {self.hidden.shape[-1]} features but weight {tuple(self.weight.shape)} "
                f"takes {self.weight.shape[1]}; weight must be [V, D]"
            )
        if self.weight.shape[0] == 0:
            raise ValueError(
                "Head: weight has no rows (under ZeRO-3 the parameter is partitioned: gather it first)"
            )
        if self.bias is not None:
            _check_floating("Head", "bias", self.bias)
            if self.bias.shape != self.weight.shape[:1]:
                raise ValueError(f"Head: bias must be [{self.weight.shape[0]}], got {tuple(self.bias.shape)}")
        _check_shaping("Head", self.scale, self.softcap)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def leading_shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    def tensors(self) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """(values, weight, bias) as the ops take them."""
        return self.hidden, self.weight, self.bias

    @classmethod
    def from_model(cls, model: torch.nn.Module, hidden: Tensor) -> Head:
        """The head of a Hugging Face language model: its output layer and all else it does to logits.

        Finds bias, tied weights, multipliers on logits or on hidden states, softcap, padded vocabulary
        (docs/models.md lists the model types), looking inside DDP, FSDP, DeepSpeed, ``torch.compile`` and
        PEFT wrappers. PEFT: LoRA below the head needs nothing; LoRA on the head enters as extra features
        and columns, dropout and several adapters included, with gradients to A and B, at the price of one
        copy of the weight; ``modules_to_save`` is taken where it is active.

        FSDP2's sharded tensors are gathered here, once, so every rank must call this. Their gradients are
        averaged over the ranks as FSDP2 does. A backward that recomputes the logits (``reduction="none"``,
        :func:`~kd_kernels.linear_logprobs`) does not keep them but gathers again, so every rank must call
        that too, before the optimizer's step; between the two only a head that you hold keeps the weight
        whole.

        Args:
            model: has ``get_output_embeddings()`` and ``config``; the whole model as it is trained.
            hidden: ``[..., D]``, the backbone's last hidden state (:func:`kd_kernels.last_hidden_state`).

        Raises:
            TypeError: not such a model; a quantised head or one that is no linear layer.
            ValueError: something that would be ignored otherwise, by name: an adapter other than those
                above, modules between backbone and output layer, config attributes that shape the logits
                of a model type that is not known, a weight sharded by tensor parallelism, by ZeRO-3 or by
                FSDP1.
        """
        from kd_kernels.models import head_from_model

        return head_from_model(model, hidden)


@dataclass(frozen=True, eq=False, repr=False)
class Logits(Shown):
    """Logits that exist already: ``softcap * tanh(scale * values / softcap)``.

    Args:
        values: ``[..., V]``; all leading dimensions are tokens, any strides.
        scale: factor on the logits before the softcap.
        softcap: positive number or None.

    Raises:
        TypeError, ValueError: as :class:`Head`.
    """

    values: Tensor
    scale: float = 1.0
    softcap: Optional[float] = None

    def __post_init__(self) -> None:
        _check_floating("Logits", "values", self.values)
        if self.values.dim() < 1:
            raise ValueError("Logits: values must be [..., V], got a 0-d tensor")
        if self.values.shape[-1] == 0:
            raise ValueError("Logits: values has an empty vocabulary")
        _check_shaping("Logits", self.scale, self.softcap)

    @property
    def vocab_size(self) -> int:
        return self.values.shape[-1]

    @property
    def leading_shape(self) -> torch.Size:
        return self.values.shape[:-1]

    def tensors(self) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """(values, weight, bias) as the ops take them."""
        return self.values, None, None


_IGNORED = -100
_INTEGERS = (torch.int64, torch.int32, torch.int16)
MISSING = ("tail", "teacher_renorm", "renorm_both", "unnormalised")


@dataclass(frozen=True, eq=False, repr=False)
class SparseTarget(Shown):
    """A teacher known at a few tokens only: its top-K, or draws from it, saved earlier.

    With ``t`` the recorded probabilities of a token's ids S, ``a = sum t``, and ``Q`` the student's mass on
    S, ``missing`` says what to make of the other tokens:

    * ``"tail"``: they are one more outcome, with ``1 - a`` against ``1 - Q``. Every objective; a lower bound
      of the dense divergence, exact where K is the whole vocabulary.
    * ``"teacher_renorm"``: ``t / a``, and 0 elsewhere. Not for reverse and weighted KL, which are infinite.
    * ``"renorm_both"``: ``t / a`` against ``q / Q``, on S alone: says nothing about the student's other
      tokens.
    * ``"unnormalised"``: ``sum t log(t / q)``, forward KL only. What draws need (:meth:`from_samples`); of a
      top-K it inflates the head.

    Source: Anshumann et al. 2025, "Sparse Logit Sampling" (draws; why the renormalised forms are biased; the
    tail as a "ghost token").

    Args:
        ids: ``[..., K]`` integer; -1 (or -100, as labels have it) where unused, in any place. Repeated ids
            add up.
        logprobs: ``[..., K]`` floating: logarithms of t; -inf is a probability of 0. What stands at unused
            ids does not matter.
        missing: see above.
        temperature: at which the probabilities were recorded. The renormalising modes can be brought to any
            other; the others have to be trained at it (``teacher_temperature``).
        log_tail_mass: ``[...]``, the logarithm of ``1 - a`` for ``missing="tail"``, as
            :func:`kd_kernels.linear_topk` gives it. Without it, it is computed from ``logprobs``, and a
            teacher surer than 1 - 1.2e-7 counts as that sure.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit together, an unknown ``missing``.
    """

    ids: Tensor
    logprobs: Tensor
    missing: str = "tail"
    temperature: float = 1.0
    log_tail_mass: Optional[Tensor] = None
    scale: ClassVar[float] = 1.0
    softcap: ClassVar[Optional[float]] = None

    def __post_init__(self) -> None:
        _check_ids("SparseTarget", self.ids)
        _check_floating("SparseTarget", "logprobs", self.logprobs)
        if self.logprobs.shape != self.ids.shape:
            raise ValueError(
                f"SparseTarget: ids and logprobs must have the same shape [..., K], got "
                f"{tuple(self.ids.shape)} and {tuple(self.logprobs.shape)}"
            )
        if self.missing not in MISSING:
            raise ValueError(
                f"SparseTarget: missing must be one of {', '.join(MISSING)}, got {self.missing!r}"
            )
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not number or not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"SparseTarget: temperature must be one number > 0, got {self.temperature!r}; of a top-K "
                f"saved at several, target(index=...) is one"
            )
        if self.log_tail_mass is not None:
            _check_floating("SparseTarget", "log_tail_mass", self.log_tail_mass)
            if self.missing != "tail":
                raise ValueError(
                    f'SparseTarget: log_tail_mass goes with missing="tail", not {self.missing!r}'
                )
            if self.log_tail_mass.shape != self.ids.shape[:-1]:
                raise ValueError(
                    f"SparseTarget: log_tail_mass must have the leading shape "
                    f"{tuple(self.ids.shape[:-1])}, got {tuple(self.log_tail_mass.shape)}"
                )

    @classmethod
    def from_samples(cls, ids: Tensor, counts: Tensor, temperature: float = 1.0) -> SparseTarget:
        """Draws with replacement from the teacher: an unbiased estimate of forward KL and its gradient (up to
        the teacher's entropy, a constant).

        Args:
            ids: ``[..., N]`` integer, -1 where unused.
            counts: ``[..., N]`` integer: how often each was drawn.
            temperature: at which they were drawn.

        Raises:
            TypeError, ValueError: shapes or dtypes that do not fit, or negative counts (on CPU).
        """
        _check_ids("SparseTarget.from_samples", ids)
        if not isinstance(counts, Tensor) or counts.dtype not in _INTEGERS or counts.shape != ids.shape:
            shape = f"{counts.dtype} {tuple(counts.shape)}" if isinstance(counts, Tensor) else type(counts)
            raise ValueError(
                f"SparseTarget.from_samples: counts must be integers of the shape of ids, "
                f"{tuple(ids.shape)}; got {shape}"
            )
        counts = torch.where(ids < 0, 0, counts.to(torch.int64))
        on_host = counts.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and bool((counts < 0).any()):
            raise ValueError("SparseTarget.from_samples: counts must be >= 0")
        # Without any draw a token teaches nothing.
        share = counts.to(torch.float64) / counts.sum(-1, keepdim=True).clamp(min=1)
        return cls(ids, share.log(), "unnormalised", temperature)

    def check_temperature(self, temperature: Union[float, Tensor]) -> None:
        """Raise ValueError where this target cannot be brought to a number or ``[...]`` of temperatures."""
        if self.missing in ("tail", "unnormalised") and (
            isinstance(temperature, Tensor) or temperature != self.temperature
        ):
            given = "a tensor" if isinstance(temperature, Tensor) else temperature
            raise ValueError(
                f"the teacher's temperature is {given}, but this SparseTarget was recorded at "
                f'{self.temperature} and missing="{self.missing}" cannot be brought to another; pass '
                f"teacher_temperature={self.temperature}, record it at the temperature wanted, or renormalise"
            )

    def constant(self, dtype: torch.dtype) -> SparseTarget:
        """The target detached, its log-probabilities in ``dtype``."""
        ids = self.ids.detach().to(torch.int64)
        return SparseTarget(
            torch.where(ids == _IGNORED, -1, ids),
            self.logprobs.detach().to(dtype),
            self.missing,
            self.temperature,
            None if self.log_tail_mass is None else self.log_tail_mass.detach(),
        )

    @property
    def leading_shape(self) -> torch.Size:
        return self.ids.shape[:-1]

    def tensors(self) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """(values, weight, bias) as the ops take them."""
        return self.logprobs, None, None


def _check_ids(owner: str, ids: object) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{owner}: ids must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{owner}: ids must be integers (int64, int32 or int16), got {ids.dtype}")
    if ids.dim() < 1 or ids.shape[-1] == 0:
        raise ValueError(f"{owner}: ids must be [..., K] with K > 0, got shape {tuple(ids.shape)}")


def target_of(saved: Any, missing: str, index: int) -> SparseTarget:
    """The top-K of a ``TopK`` or a ``TeacherRecord``, at its ``index``-th temperature."""
    temperatures, many = _saved_at(saved.temperature), isinstance(saved.temperature, tuple)
    whole = hasattr(index, "__index__") and not isinstance(index, bool)  # NumPy's, and a tensor of one
    if not whole or not 0 <= index < len(temperatures):
        raise ValueError(
            f"index must be an integer, one of the {len(temperatures)} temperatures that were saved, counted "
            f"from 0; got {index!r}"
        )
    lse, tail = (x[..., index] if many else x for x in (saved.lse, saved.log_tail_mass))
    logprobs = saved.logits.to(lse.dtype) / temperatures[index] - lse[..., None]
    return SparseTarget(
        saved.ids, logprobs, missing, temperatures[index], tail if missing == "tail" else None
    )


def sampled_of(ids: Tensor, counts: Tensor, temperature: Union[float, tuple[float, ...]]) -> SparseTarget:
    """Saved draws, which were made at the first temperature."""
    return SparseTarget.from_samples(ids, counts, _saved_at(temperature)[0])


def _saved_at(temperature: Union[float, tuple[float, ...]]) -> tuple[float, ...]:
    found = temperature if isinstance(temperature, tuple) else (temperature,)
    if not all(isinstance(x, (int, float)) for x in found):
        raise TypeError(
            f"temperature must be a number or a tuple of them, got {temperature!r}. Where a collate "
            f"function made it of several results, let it collate their tensors and put a temperature back"
        )
    return found


Source = Union[Head, Logits]
Teacher = Union[Head, Logits, SparseTarget]


def as_source(name: str, value: object) -> Source:
    """``value`` as a source; a bare tensor means logits."""
    if isinstance(value, (Head, Logits)):
        return value
    if isinstance(value, Tensor):
        return Logits(value)
    if isinstance(value, SparseTarget):
        raise TypeError(
            f"{name} is a SparseTarget, which only the teacher of kd.distill can be: all else needs whole "
            f"distributions, kd.Head or logits"
        )
    if isinstance(value, tuple) and hasattr(value, "target") and hasattr(value, "sampled"):
        raise TypeError(f"{name} is what kd.linear_topk found; use its .target() or .sampled()")
    if isinstance(value, torch.nn.Module):
        raise TypeError(
            f"{name} is a model; use kd.Head.from_model(model, kd.last_hidden_state(model, **inputs))"
        )
    if hasattr(value, "logits"):
        raise TypeError(f"{name} is a {type(value).__name__}; pass its .logits")
    raise TypeError(
        f"{name} must be kd.Head(hidden, weight), kd.Logits(values) or a tensor of logits, one model each, "
        f"got {type(value).__name__}"
    )


def as_teacher(value: object, name: str = "teacher") -> Teacher:
    """As :func:`as_source`, or a sparse teacher."""
    return value if isinstance(value, SparseTarget) else as_source(name, value)
