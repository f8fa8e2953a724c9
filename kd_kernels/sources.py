"""Where logits come from: plain data, read by the public call and by the drivers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def _check_shaping(owner: str, scale: float, softcap: Optional[float]) -> None:
    for name, value in (("scale", scale), ("softcap", softcap)):
        if isinstance(value, Tensor):
            raise TypeError(f"{owner}: {name} must be a number, got a tensor; use {name}.item()")
    if softcap is not None and not 1e-30 < softcap < float("inf"):
        raise ValueError(f"{owner}: softcap must be > 0 and finite, or None for no softcap, got {softcap}")


@dataclass(frozen=True, eq=False)
class Head:
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
        averaged over the ranks as FSDP2 does. A backward that recomputes the logits (``reduction="none"``)
        does not keep them but gathers again, so every rank must call that too, before the optimizer's step;
        between the two only a head that you hold keeps the weight whole.

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


@dataclass(frozen=True, eq=False)
class Logits:
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


Source = Union[Head, Logits]


def as_source(name: str, value: object) -> Source:
    """``value`` as a source; a bare tensor means logits."""
    if isinstance(value, (Head, Logits)):
        return value
    if isinstance(value, Tensor):
        return Logits(value)
    raise TypeError(
        f"{name} must be kd.Head(hidden, weight), kd.Logits(values) or a tensor of logits, "
        f"got {type(value).__name__}"
    )
