"""When values are looked at: on CPU always; elsewhere each look waits for the device."""

import os

import torch


def checks_values(device: torch.device) -> bool:
    return device.type == "cpu" or os.environ.get("KD_KERNELS_DEBUG", "0") not in ("", "0")
