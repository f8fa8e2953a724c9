"""What the public calls have in common: checking arguments, and bringing them into the form that ops take."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, Optional, TypeVar, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kd_kernels.sources import FLOATING, Head, Logits, Source, SparseTarget, Teacher

Scalar = Union[float, Tensor]
Call = TypeVar("Call", bound=Callable[..., Any])


# --- checks -------------------------------------------------------------------------------------------


def is_number(value: object) -> bool:
    """Not True, which is an int to Python. int and float by name: a compiler follows no abstract class."""
    return not isinstance(value, bool) and isinstance(value, (int, float, numbers.Real))


def check_positive(name: str, value: float) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # A comparison would make the number a constant of a compiled graph.
    if not torch.compiler.is_compiling() and not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")


def check_vocab(vocab: str) -> None:
    if vocab not in ("error", "truncate"):
        raise ValueError(f'vocab must be "error" or "truncate", got {vocab!r}')


def check_backend(backend: Optional[str]) -> None:
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a name or None, got {backend!r}")


def refuse_transforms(function: str, *tensors: Optional[Tensor]) -> None:
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise TypeError(
            f"{function} does not work under torch.func transforms (grad, vmap, jvp, ...): kernels compute "
            f"it and its gradient; call it outside, and use loss.backward()"
        )
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise TypeError(f"{function} has no forward-mode derivative; use loss.backward()")


def check_source(name: str, source: Teacher, device: torch.device, where: str = "its values") -> None:
    """Its tensors are on ``device``, as ``where`` are, and, unless autocast makes them, of one dtype."""
    values, weight, bias = source.tensors()
    parts = [("values", values), ("weight", weight), ("bias", bias)]
    if isinstance(source, SparseTarget):
        parts = [("logprobs", values), ("ids", source.ids), ("log_tail_mass", source.log_tail_mass)]
    for part, tensor in parts:
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}'s {part} is on {tensor.device}, {where} on {device}")
        if tensor.is_meta:
            raise ValueError(f"{name}'s {part} is on the meta device and holds no numbers")
        if part != "ids" and tensor.dtype not in FLOATING:
            raise TypeError(f"{name}'s {part} has dtype {tensor.dtype}")
        if weight is not None and tensor.dtype != values.dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(
                f"{name}: hidden is {values.dtype} but its {part} is {tensor.dtype}; cast one, or "
                f"use torch.autocast"
            )


def _logits_hint(*sources: Source) -> str:
    if not any(isinstance(source, Logits) for source in sources):
        return ""
    return ". A bare tensor is taken as logits; hidden states go in as kd.Head(hidden, weight)"


def _batch_hint(student: Source, teacher: Teacher) -> str:
    lead = [[size for size in x.leading_shape if size != 1] for x in (student, teacher)]
    return "; take the dimension of 1 off, as in hidden[0]" if lead[0] == lead[1] else ""


def check_sources(student: Source, teacher: Teacher, vocab: str, teacher_name: str = "teacher") -> None:
    """A student and a teacher that fit together."""
    if student.leading_shape != teacher.leading_shape:
        raise ValueError(
            f"student and {teacher_name} must have the same tokens; their leading shapes are "
            f"{tuple(student.leading_shape)} and {tuple(teacher.leading_shape)}"
            + _batch_hint(student, teacher)
        )
    sparse = isinstance(teacher, SparseTarget)
    if not sparse and student.vocab_size != teacher.vocab_size and vocab == "error":
        raise ValueError(
            f"student has {student.vocab_size} vocabulary entries and {teacher_name} {teacher.vocab_size}; "
            f'of one tokenizer, padded to two sizes, vocab="truncate" restricts both to the first '
            f"{min(student.vocab_size, teacher.vocab_size)}; of two, see kd.SortedWasserstein"
            + _logits_hint(student, teacher)
        )
    for name, source in (("student", student), (teacher_name, teacher)):
        check_source(name, source, student.tensors()[0].device, "the student's values")


def check_resources(
    ignore_index: int,
    backend: Optional[str],
    workspace_bytes: Optional[int],
    logits_dtype: Optional[torch.dtype],
) -> None:
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    check_backend(backend)
    if workspace_bytes is not None:
        if not isinstance(workspace_bytes, int) or isinstance(workspace_bytes, bool):
            raise TypeError(f"workspace_bytes must be an int or None, got {workspace_bytes!r}")
        if workspace_bytes < 0:  # 0 does for logits that exist
            raise ValueError(f"workspace_bytes must be >= 0, got {workspace_bytes}")
    if logits_dtype is not None and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(
            f"logits_dtype must be a torch.dtype such as torch.bfloat16, or None, got {logits_dtype!r}"
        )


def _shift_hint(name: str, shape: torch.Size, lead: torch.Size) -> str:
    sliced = (
        name == "labels" and len(lead) > 0 and (*shape[:-1], shape[-1] + 1 if shape else 0) == tuple(lead)
    )
    return "; kd.next_token_labels(labels) shifts them and keeps the length" if sliced else ""


def check_per_token(name: str, value: Tensor, lead: torch.Size, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != lead:
        raise ValueError(
            f"{name} must have the leading shape of the tokens, {tuple(lead)}; got {tuple(value.shape)}"
            + _shift_hint(name, value.shape, lead)
        )
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the student on {device}")


def valid_tokens(
    labels: Optional[Tensor],
    ignore_index: int,
    mask: Optional[Tensor],
    lead: torch.Size,
    device: torch.device,
) -> Optional[Tensor]:
    """Bool ``[N]``, or None where every token counts."""
    valid = None
    if labels is not None:
        check_per_token("labels", labels, lead, device)
        if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        valid = labels.to(torch.int64) != ignore_index  # -100 as uint8 would be the label 156
    if mask is not None:
        check_per_token("mask", mask, lead, device)
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be bool (True = counts), got {mask.dtype}; use mask.bool(), or token_weight "
                f"for weights"
            )
        valid = mask if valid is None else valid & mask
    return None if valid is None else valid.reshape(-1)


def flat_ids(name: str, ids: Tensor, ignore_index: int, lead: torch.Size, device: torch.device) -> Tensor:
    """Ids of the leading shape, or that and K more, as ``[N, K]`` int64, -1 where they are unused."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32, torch.int16):
        raise TypeError(f"{name} must be integers (int64, int32 or int16), got {ids.dtype}")
    one = ids.shape == lead
    if not one and (ids.shape[:-1] != lead or ids.dim() == 0):
        raise ValueError(
            f"{name} must have the leading shape of the tokens, {tuple(lead)}, or that and K more; got "
            f"{tuple(ids.shape)}" + _shift_hint("labels", ids.shape, lead)
        )
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device}, the tokens on {device}")
    flat = ids.to(torch.int64).reshape(lead.numel(), 1 if one else ids.shape[-1])
    return torch.where(flat == ignore_index, -1, flat)


def outside_graphs(function: Call) -> Call:
    """For a function that asks its inputs' values how to go on: a compiler would make dozens of graphs of it,
    and others for every length. It runs as it stands instead; ``fullgraph=True`` refuses it by its name."""
    as_it_stands = torch._disable_dynamo(function)  # torch.compiler.disable would load the compiler now

    @functools.wraps(function)
    def run(*arguments, **options):
        return (as_it_stands if torch.compiler.is_compiling() else function)(*arguments, **options)

    return run


# --- small conversions --------------------------------------------------------------------------------


def number(value: float) -> Tensor:
    """A 0-d float64 tensor on CPU, whatever the default device. A graph being compiled takes a changing
    number through tensor arithmetic without recompiling, but makes a constant of ``torch.tensor(value)``."""
    if torch.compiler.is_compiling():
        return torch.zeros((), dtype=torch.float64, device="cpu") + value
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def shaping(*sources: Source) -> list[Tensor]:
    """Scale and softcap (0: none) of each, as the ops take them."""
    return [number(x) for source in sources for x in (source.scale, source.softcap or 0.0)]


def per_token(name: str, value: Scalar, lead: torch.Size, device: torch.device) -> Tensor:
    """A number as a 0-d tensor, a tensor checked and flattened to ``[N]``; float64."""
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        return number(value)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but is not differentiated; pass {name}.detach(), or use per-token "
            f'results (reduction="none") and weight them outside'
        )
    if not (value.dtype.is_floating_point or value.dtype in (torch.int32, torch.int64)):
        raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(value).tangent is not None:
        raise TypeError(f"{name} has a forward-mode derivative, but is not differentiated; pass its primal")
    if value.dim() == 0:
        return beside(name, value.detach(), device).to(torch.float64)
    check_per_token(name, value, lead, device)
    return value.detach().reshape(-1).to(torch.float64)


def beside(name: str, value: Tensor, device: torch.device) -> Tensor:
    """A 0-d tensor as work on ``device`` takes it: there, or on the CPU."""
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no number")
    return value if value.device.type == "cpu" else value.to(device)


def detached(source: Source) -> Source:
    return _of_each(source, lambda x: None if x is None else x.detach())


def saveable_source(source: Source) -> Source:
    """The source in tensors that autograd can save: see :func:`saveable`."""
    return _of_each(source, saveable)


def _of_each(source: Source, made: Callable[[Optional[Tensor]], Optional[Tensor]]) -> Source:
    values, weight, bias = (made(x) for x in source.tensors())
    if isinstance(source, Head):
        return Head(values, weight, bias, source.scale, source.softcap)
    return type(source)(values, source.scale, source.softcap)


def saveable(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """Inference-mode tensors cannot be saved for backward: give autograd a plain tensor over the same
    memory instead."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def autocast_dtype(*sources: Teacher) -> Optional[torch.dtype]:
    """The dtype heads compute in under autocast, as F.linear would; None outside, and for float64."""
    device = sources[0].tensors()[0].device.type
    heads = [source for source in sources if isinstance(source, Head)]
    if not torch.is_autocast_enabled(device) or not heads:
        return None
    if any(x is not None and x.dtype == torch.float64 for head in heads for x in head.tensors()):
        return None
    return torch.get_autocast_dtype(device)


def count(valid: Optional[Tensor], lead: torch.Size, device: torch.device) -> Tensor:
    # Filled in on the device: copying it there would wait for the device.
    return torch.full((), lead.numel(), device=device) if valid is None else valid.sum()
