"""The output layer of a model as it is found: adapters on it, weights that are sharded, packed or away."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from kd_kernels.model_types import BY_HAND
from kd_kernels.sources import FLOATING, is_dtensor


def peft_class(module: nn.Module) -> Optional[type]:
    """The module's class in PEFT; FSDP2 derives its own classes from those."""
    return next((c for c in type(module).__mro__ if c.__module__.split(".")[0] == "peft"), None)


# --- adapters -------------------------------------------------------------------------------------------


Whole = Callable[[str, Tensor], Tensor]  # (name, tensor as the layer has it) -> the whole tensor


class Lora(NamedTuple):
    """Tensors, not layers: FSDP2 puts other tensors into a layer between forward and backward."""

    down: Tensor
    up: Tensor
    up_bias: Optional[Tensor]
    dropout: nn.Module
    scaling: float


def linear_layer(owner: str, layer: nn.Module) -> tuple[nn.Linear, list[Lora]]:
    """(the linear layer that gives the logits, the LoRA adapters active on it)."""
    adapters: list[Lora] = []
    wrapper, peft = layer, peft_class(layer)
    if peft is not None and peft.__name__ == "ModulesToSaveWrapper":
        copies, active = layer.modules_to_save, list(layer.active_adapters)
        own = bool(active) and not layer.disable_adapters and all(name in copies for name in active)
        layer = copies[active[0]] if own else layer.original_module
    elif peft is not None and (peft.__module__, peft.__name__) == ("peft.tuners.lora.layer", "Linear"):
        adapters = _active_lora(owner, layer)
        layer = layer.base_layer
    elif peft is not None:
        raise ValueError(
            f"{owner}: PEFT's {peft.__name__} on the output layer is not covered (LoRA on a linear layer and "
            f"modules_to_save are); merge it, or leave the output layer out of its targets"
        )
    if type(layer).forward is not nn.Linear.forward:
        raise TypeError(_not_linear(owner, layer))
    _refuse_patched(owner, {wrapper, layer})
    return layer, adapters


def _refuse_patched(owner: str, layers: set[nn.Module]) -> None:
    """A forward put on the instance may do anything to the logits. Accelerate's moves weights only."""
    for layer in layers:
        if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):
            raise ValueError(
                f"{owner}: the output layer has a forward of its own instance, whose work on the logits "
                f"would be ignored; take it off for the call, or {BY_HAND}"
            )
        for kind, hooks in (("hook", layer._forward_hooks), ("pre-hook", layer._forward_pre_hooks)):
            what = "logits" if kind == "hook" else "hidden states"
            for hook in hooks.values():
                if not _moves_weights_only(hook):
                    warnings.warn(
                        f"{owner}: the output layer has a forward {kind} ({hook!r}), which is not called "
                        f"here. If it changes the {what}, {BY_HAND}; if it only looks at them, all is well",
                        stacklevel=2,
                    )


def _moves_weights_only(hook: Callable) -> bool:
    """What shards or offloads: torch's FSDP2 and DTensor, DeepSpeed, accelerate."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    return (getattr(function, "__module__", None) or "").split(".")[0] in ("torch", "deepspeed", "accelerate")


def _not_linear(owner: str, layer: nn.Module) -> str:
    return (
        f"{owner}: the output layer is a {type(layer).__module__}.{type(layer).__name__}, not a "
        f"torch.nn.Linear with a floating weight; dequantise a quantised head first, or {BY_HAND}"
    )


def _active_lora(owner: str, layer: nn.Module) -> list[Lora]:
    if layer.merged:
        if layer.disable_adapters:
            raise ValueError(f"{owner}: LoRA on the output layer is merged and disabled; unmerge it first")
        return []
    if layer.disable_adapters:
        return []
    adapters = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None or getattr(layer, "use_dora", {}).get(name):
            kind = "DoRA" if variant is None else type(variant).__name__
            raise ValueError(
                f"{owner}: adapter {name!r} on the output layer is {kind}, not plain LoRA, and is not "
                f"covered; merge it, or leave the output layer out of its targets"
            )
        down, up = layer.lora_A[name], layer.lora_B[name]
        lora = Lora(down.weight, up.weight, up.bias, layer.lora_dropout[name], layer.scaling[name])
        adapters.append(lora)
    return adapters


def lora_features(hidden: Tensor, adapters: list[Lora], whole: Whole) -> Tensor:
    """The left side of ``h W' + s (dropout(h) A') B'`` as one product: ``[h, s dropout(h) A'] [W, B]'``.

    Adding ``s B A`` to ``W`` instead would round small updates away in bf16, and knows no dropout.
    """
    features = [hidden]
    for lora in adapters:
        down = whole("lora_A", lora.down)
        low = nn.functional.linear(lora.dropout(hidden.to(down.dtype)), down) * lora.scaling
        features.append(low.to(hidden.dtype))
    return _beside(features)


def lora_columns(
    weight: Tensor, bias: Optional[Tensor], adapters: list[Lora], whole: Whole
) -> tuple[Tensor, Optional[Tensor]]:
    """The right side of that product, and the bias."""
    columns = [weight]
    for lora in adapters:
        columns.append(whole("lora_B", lora.up).to(weight.dtype))
        if lora.up_bias is not None:
            shift = (whole("lora_B bias", lora.up_bias) * lora.scaling).to(weight.dtype)
            bias = shift if bias is None else bias + shift
    return _beside(columns), bias


def _beside(columns: list[Tensor]) -> Tensor:
    """Of one dtype; autocast would look for a common one, and know none for the other 16-bit type."""
    with torch.autocast(columns[0].device.type, enabled=False):
        return torch.cat(columns, -1)


# --- weights that are not whole, or not weights ---------------------------------------------------------

TENSOR_PARALLEL = (
    "Where its rows are split over ranks, pass this rank's and the group to kd.distill: kd.Head(hidden, "
    "weight.to_local(), ...), vocab_group=... (docs/vocabulary_parallel.md); or gather it: kd.Head(hidden, "
    "weight.full_tensor(), ...)"
)


def ordinary(what: str, tensor: Tensor, model: nn.Module, layer: nn.Module, hidden: Tensor) -> Tensor:
    """The tensor if it is an ordinary one; gathered if FSDP2 sharded it; an error that says why otherwise."""
    if is_dtensor(tensor):
        return _gathered(what, tensor, model, layer).to(hidden.dtype)  # as FSDP's mixed precision casts
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in FLOATING or tensor.is_quantized:
        raise TypeError(
            f"{what} is a {type(tensor).__name__} of {tensor.dtype}; a quantised or otherwise packed head is "
            f"not covered: dequantise it, or keep the output layer out of quantisation"
        )
    if tensor.numel() == 0 and hasattr(tensor, "ds_id"):
        raise ValueError(
            f"{what} is empty: DeepSpeed ZeRO-3 has partitioned it (full shape "
            f"{tuple(getattr(tensor, 'ds_shape', ()))}). Gather it around the loss and its backward: with "
            f"deepspeed.zero.GatheredParameters(list(model.get_output_embeddings().parameters())): ..."
        )
    if tensor.is_meta and not hidden.is_meta:
        raise ValueError(f"{what} is on the meta device (offloaded?); bring it to {hidden.device} first")
    freed = not tensor.is_meta and tensor.numel() > 0 and tensor.untyped_storage().size() == 0
    if freed or (what.endswith("weight") and tensor.dim() != 2):
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)}{' and freed storage' if freed else ''}: FSDP1 has "
            f"flattened it. Use FSDP2 (fully_shard), or FullyShardedDataParallel.summon_full_params around "
            f"the call for a head that is not trained"
        )
    return tensor


def fsdp_modules(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """FSDP2's modules that hold the output layer, the innermost last."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)  # slow to import
    if fsdp is None:
        return []
    return [m for m in model.modules() if isinstance(m, fsdp) and any(x is layer for x in m.modules())]


def restore_sharded_parameters(model: nn.Module, layer: nn.Module) -> None:
    """Have FSDP2 put its own parameters into a layer that ``reshard_after_forward=n`` left others in.

    Those are made after each forward, sharded over n ranks (the second dimension of their mesh); a gradient
    that reaches them is lost. ``reshard`` exchanges them, and does nothing where nothing is to be exchanged:
    hybrid sharding looks the same from outside. What is not trained keeps its shards on few ranks.
    """
    trained = [p for p in layer.parameters() if p.requires_grad and is_dtensor(p)]
    if not any(p.device_mesh.ndim == 2 for p in trained):
        return
    parts = [m for x in layer.modules() for m in fsdp_modules(x, x)]  # an adapter may be a group
    for module in (*fsdp_modules(model, layer)[-1:], *parts):
        module.reshard()


def _gathered(what: str, tensor: Tensor, model: nn.Module, layer: nn.Module) -> Tensor:
    """The full tensor of a DTensor that FSDP2 manages, differentiable.

    FSDP2's tensors are told from tensor-parallel ones by the modules: an ``FSDPModule`` of the model holds
    the output layer, and one dimension of the mesh at most is sharded (FSDP on top of tensor
    parallelism shards two). Every rank has gone through other data, so the gradients are summed over ranks
    into the shards and divided by their number, or by what FSDP2 was told to divide by.
    """
    from torch.distributed.tensor import Partial, Replicate

    placements, mesh = tensor.placements, tensor.device_mesh
    if all(isinstance(placement, Replicate) for placement in placements):
        return tensor.full_tensor()
    sharded = sum(not isinstance(placement, Replicate) for placement in placements)
    managed = bool(fsdp_modules(model, layer))
    if not managed or sharded > 1 or any(isinstance(placement, Partial) for placement in placements):
        raise ValueError(
            f"{what} is a DTensor with placements {placements} over {mesh}, sharded by tensor parallelism "
            f"rather than by FSDP2. {TENSOR_PARALLEL}"
        )
    full = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        divisor = _divide_factor(fsdp_modules(model, layer)[-1]) or mesh.size()
        full.register_hook(lambda grad: grad / divisor)
    return full


def _divide_factor(module: nn.Module) -> Optional[float]:
    """What ``set_gradient_divide_factor`` left; None by default, and in a torch that keeps it elsewhere."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return getattr(groups[0], "gradient_divide_factor", None)
