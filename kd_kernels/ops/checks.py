"""Value checks that the ops share, and when: on CPU always; elsewhere each look waits for the device."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from kd_kernels.drivers.sides import Number
from kd_kernels.drivers.tokens import Tokens

IGNORED = " or ignore_index (-100 unless given)"
_ROUNDED_MASS = 0.05  # what logarithms in bfloat16 may add up to


def checks_values(device: torch.device) -> bool:
    return device.type == "cpu" or os.environ.get("KD_KERNELS_DEBUG", "0") not in ("", "0")


def check_temperatures(name: str, values: Number) -> None:
    """All > 0, and not so far from 1 that float32 cannot divide by them."""
    if isinstance(values, float):
        wrong = [] if 1e-30 <= values <= 1e30 else [values]
    else:
        wrong = values[~((values >= 1e-30) & (values <= 1e30))].tolist()
    if wrong:
        raise ValueError(f"{name} must be finite and > 0, got {wrong[0]}")


def check_temperatures_of(name: str, values: Tensor, tokens: Tokens, looks: bool) -> None:
    """The same of a number, or of one per token that counts. What is on the host is always looked at; what is
    not, where ``looks`` allows it."""
    number = values.dim() == 0
    if looks or (number and values.device.type == "cpu"):
        check_temperatures(name, values if number else tokens.counted(values))


def check_positive(name: str, values: Tensor) -> None:
    """Numbers on the host, which nobody could look at while a graph was compiled."""
    for value in values.aminmax() if values.numel() else ():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value.item()!r}")


def check_finite(name: str, values: Number) -> None:
    if not (math.isfinite(values) if isinstance(values, float) else bool(torch.isfinite(values).all())):
        raise ValueError(f"{name} holds NaN or infinity")


def check_log_mass(name: str, values: Number) -> None:
    """At most 0, or a little more from rounding. A mass of 0 and NaN are for others to judge."""
    if isinstance(values, Tensor):
        values = float(values.max()) if values.numel() else 0.0
    if values > _ROUNDED_MASS:
        raise ValueError(f"{name} must be <= 0, the logarithm of a mass of at most 1, got {values}")


def check_range(name: str, values: Tensor, vocab: int, lowest: int = 0, otherwise: str = "") -> None:
    """All in ``[lowest, vocab)``; ``otherwise`` says what stands for nothing."""
    wrong = values[(values < lowest) | (values >= vocab)]
    if wrong.numel():
        raise ValueError(
            f"{name} must be in [0, {vocab}){otherwise}, got {wrong[0].item()} ({wrong.numel()} such)"
        )
