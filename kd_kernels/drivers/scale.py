"""Scale a gradient that the forward pass found: times what arrives upstream, into the parameter's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import triton_runtime
from kd_kernels.drivers.workspace import fresh

SLAB = 4 << 20  # elements: few enough pieces, each wakes the threads twice


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * scale`` (0-d) as one fresh tensor in ``dtype``: scaling and casting never hold a third
    copy of a weight's gradient."""
    out = fresh(gradient.shape, dtype, gradient.device)
    scale = scale.to(gradient.device)
    if gradient.is_cuda and gradient.is_contiguous() and not triton_runtime.why_not(gradient.device):
        triton_runtime.scale(gradient, scale, out)
        return out
    if gradient.dtype == dtype or gradient.is_cuda:  # where one kernel multiplies and casts
        return torch.mul(gradient, scale, out=out)
    # In slabs through one small buffer: the wide product of all of it would be that third copy.
    source, target = gradient.reshape(-1), out.view(-1)
    wide = torch.promote_types(gradient.dtype, dtype)
    buffer = torch.empty(min(SLAB, source.numel()), dtype=wide, device=gradient.device)
    scale = scale.to(wide)
    for start in range(0, source.numel(), SLAB):
        part = slice(start, start + SLAB)
        product = buffer[: source[part].numel()]
        torch.mul(source[part], scale, out=product)
        target[part] = product
    return out
