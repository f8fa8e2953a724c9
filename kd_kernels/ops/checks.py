"""When values are looked at: on CPU always; elsewhere each look waits for the device."""

import os

import torch


def improper_temperatures(values: torch.Tensor) -> torch.Tensor:
    """Those that are not > 0, or so far from 1 that float32 cannot divide by them."""
    return values[~((values >= 1e-30) & (values <= 1e30))]


def checks_values(device: torch.device) -> bool:
    return device.type == "cpu" or os.environ.get("KD_KERNELS_DEBUG", "0") not in ("", "0")
