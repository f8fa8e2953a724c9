"""A device that is not there: meta tensors in its place, kernels that do nothing, and a watch on what would
make the host wait for it. What a driver does around its kernels is the same on every device but the CPU,
apart from branches for CUDA alone (products, scaling): those are for a GPU to show."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from kd_kernels import backends

DEVICE = torch.device("meta")
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::to")


class Waits(TorchDispatchMode):
    """Collects copies between the host and the device; a number read from the device raises of itself, and
    what depends on one (``nonzero``, a mask as index) does too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kd_kernels":  # what the op does, and not its shape rules
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func._schema.name in _COPIES:
            source = args[1] if func._schema.name == "aten::copy_" else args[0]
            if source.device != out.device:
                self.found.append(f"{func}: {tuple(source.shape)} from {source.device} to {out.device}")
        return out


def there(monkeypatch) -> None:
    """Calls take meta tensors for such as hold numbers, and a backend like Triton's for them."""
    idle = (lambda *arguments: None, lambda device, **size: [])
    offer = {"triton": idle, "reference": idle}
    monkeypatch.setattr(backends, "TABLE", dict.fromkeys(backends.TABLE, offer))
    monkeypatch.setattr(torch.Tensor, "is_meta", property(lambda tensor: False))
    # On a real device that is a copy from the host.
    made = torch.tensor

    def tensor(data, **options):
        assert torch.device(options.get("device") or "cpu") != DEVICE, f"torch.tensor({data}) is copied"
        return made(data, **options)

    monkeypatch.setattr(torch, "tensor", tensor)
    # torch knows no autocast there.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: nullcontext())
