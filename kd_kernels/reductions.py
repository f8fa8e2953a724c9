"""From the tokens' losses to what :func:`kd_kernels.distill` returns."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kd_kernels.arguments import Scalar, beside, count, is_number, saveable

REDUCTIONS = ("mean", "sum", "batchmean", "none")


def check_reduction(reduction: str, num_items: Optional[Scalar]) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items goes with reduction="mean" only, got reduction={reduction!r}')
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items must be a number or a 0-d tensor, got {tuple(num_items.shape)}")
        if num_items.requires_grad and torch.is_grad_enabled():
            raise ValueError("num_items requires grad, but is not differentiated; pass num_items.detach()")
    elif num_items is not None and not is_number(num_items):
        raise TypeError(f"num_items must be a number or a 0-d tensor, got {type(num_items).__name__}")


def check_num_items(num_items: Optional[Scalar], valid: Optional[Tensor], lead: torch.Size) -> None:
    """Its value, where the host can see it. 0 is what a trainer counts where no token does."""
    if num_items is None or not _on_host(num_items) or num_items > 0:
        return
    nothing = lead.numel() == 0 or torch.compiler.is_compiling() or (valid is not None and not valid.any())
    if not (num_items == 0 and nothing):
        raise ValueError(f"num_items must be > 0, got {float(num_items)}; 0 is taken where no token counts")


def reduced(
    loss: Tensor, reduction: str, num_items: Optional[Scalar], valid: Optional[Tensor], lead: torch.Size
) -> Tensor:
    """From the op's loss: ``[N]`` for ``"none"``, a sum otherwise."""
    if reduction == "none":
        return loss.reshape(lead)
    if reduction == "mean":
        return loss / _denominator(num_items, valid, lead, loss)
    if reduction == "batchmean":
        return loss / max(lead[0] if len(lead) else 1, 1)
    return loss


def _denominator(
    num_items: Optional[Scalar], valid: Optional[Tensor], lead: torch.Size, loss: Tensor
) -> Scalar:
    """Of a mean. Without any token that counts, a trainer may well have counted 0 items: then 1."""
    if num_items is None:
        return count(valid, lead, loss.device).clamp(min=1)
    if isinstance(num_items, Tensor):
        num_items = saveable(beside("num_items", num_items, loss.device)).to(loss.dtype)
    if _on_host(num_items) and num_items > 0:
        return num_items
    if valid is None:
        return num_items if lead.numel() else 1.0
    if isinstance(num_items, Tensor):
        num_items = num_items.to(loss.device)
    return torch.where(valid.any(), num_items, 1.0)


def _on_host(number: Scalar) -> bool:
    """Whether it can be looked at: without waiting for a device, and within a graph being compiled."""
    if not isinstance(number, Tensor):
        return True
    return number.device.type == "cpu" and not torch.compiler.is_compiling()
