"""Real models: what each does between its last hidden state and its logits, and how to get at both.

Imports torch only. Models are known by what they have (``get_output_embeddings``, ``config``), other
libraries' wrappers by their classes. What is not known is refused by name: a head that ignored a scale,
a softcap or an adapter would train towards another distribution without any sign of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

from torch import Tensor, nn

from kd_kernels.arguments import outside_graphs
from kd_kernels.model_types import BY_HAND, factors_of
from kd_kernels.output_layer import (
    TENSOR_PARALLEL,
    fsdp_modules,
    linear_layer,
    lora_columns,
    lora_features,
    ordinary,
    peft_class,
    restore_sharded_parameters,
)
from kd_kernels.regather import gathered_head, kept_head
from kd_kernels.sources import Head, is_dtensor

# --- the two public functions ---------------------------------------------------------------------------


def head_from_model(model: nn.Module, hidden: Tensor) -> Head:
    """See :meth:`kd_kernels.Head.from_model`."""
    owner = "Head.from_model"
    causal, layer = _find(owner, model)
    _check_structure(owner, causal, layer)
    factors = factors_of(owner, causal)
    restore_sharded_parameters(model, layer)
    linear, adapters = linear_layer(owner, layer)
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{owner}: hidden must be a tensor, got {type(hidden).__name__}")
    if is_dtensor(hidden):
        raise TypeError(f"{owner}: hidden is a DTensor; pass hidden.to_local() or hidden.full_tensor()")

    like = hidden.new_empty(0)  # a gathering backward must not keep the hidden states

    def whole(name: str, tensor: Tensor) -> Tensor:
        return ordinary(f"{owner}: the output layer's {name}", tensor, model, layer, like)

    # The tensors of now: FSDP2 puts others into the layer between forward and backward.
    own_weight, own_bias = linear.weight, linear.bias
    constant = getattr(causal, factors.bias or "", None)

    def assemble() -> tuple[Tensor, Optional[Tensor]]:
        weight = whole("weight", own_weight)
        if weight.shape[0] < linear.out_features:
            raise ValueError(
                f"{owner}: the output layer's weight has {weight.shape[0]} of its {linear.out_features} "
                f"rows: it is sharded over the vocabulary. {TENSOR_PARALLEL}"
            )
        bias = None if own_bias is None else whole("bias", own_bias)
        if constant is not None:
            shift = constant.reshape(-1).to(weight.dtype)
            bias = shift if bias is None else bias + shift
        if adapters:
            weight, bias = lora_columns(weight, bias, adapters, whole)
        if factors.vocab is not None:
            weight, bias = weight[: factors.vocab], None if bias is None else bias[: factors.vocab]
        if bias is not None and factors.hidden != 1:
            bias = bias / factors.hidden  # Head scales hidden states and bias alike
        return weight, bias

    if adapters:
        hidden = lora_features(hidden, adapters, whole)
    shaping = {"scale": factors.hidden * factors.logits, "softcap": factors.softcap}
    parts = [own_weight, own_bias, *(x for lora in adapters for x in (lora.up, lora.up_bias))]
    parts = [part for part in parts if part is not None]
    if all(is_dtensor(part) for part in parts):
        return gathered_head(hidden, assemble, parts, **shaping)
    whole_head = Head(hidden, *assemble(), **shaping)
    # A whole tensor may be FSDP2's own, which it frees at will; what LoRA made of it is a copy.
    if not adapters and fsdp_modules(model, layer):
        return kept_head(whole_head)
    return whole_head


@outside_graphs
def last_hidden_state(model: nn.Module, *args: Any, **inputs: Any) -> Tensor:
    """The last hidden state of a language model, as :meth:`Head.from_model` takes it; no logits computed.

    Calls ``model(*args, **inputs)`` with its output layer replaced by one that does nothing and its result
    by what that layer received. So whatever wraps the model does its work (DDP's and FSDP's
    synchronisation, PEFT, autocast), every model is called as its authors call it, encoder-decoders
    included, and no hidden states but the last are kept.

    Args:
        model: a causal language model or encoder-decoder with ``get_output_embeddings`` (Hugging Face's),
            bare or in the wrappers named in :meth:`Head.from_model`.
        args, inputs: what the model takes, without ``labels``. ``use_cache`` is False unless given;
            ``logits_to_keep`` keeps those hidden states only. Encoder-decoders: with ``decoder_input_ids``.

    Returns:
        ``[batch, tokens, D]``, after the final norm: the backbone's ``last_hidden_state``. A factor that the
        model puts on hidden states before the output layer (MiniCPM, T5) is taken out; the head has it.

    Raises:
        ValueError: ``labels``; a model compiled as a whole (compile its backbone instead); PEFT's
            ``adapter_names`` with an adapted output layer, and X-LoRA; a model type of which
            :meth:`Head.from_model` does not know what it does to hidden states; a call within another on
            the same output layer, or beside one in another thread.
        TypeError: not such a model.

    The output layer's ``forward`` is replaced during the call: do not use one model in two threads, and
    expect no logits in the output layer's forward hooks. DDP
    with ``find_unused_parameters=True`` counts an untied trained head as unused and fails: leave it False.
    """
    owner = "last_hidden_state"
    _refuse_labels(owner, inputs)
    causal, layer = _find(owner, model)
    _refuse_compiled(owner, model, causal)
    _refuse_adapters(owner, model, layer, inputs.get("adapter_names"))
    factor = factors_of(owner, causal).hidden
    signature = inspect.signature(type(causal).forward)
    if inputs.get("use_cache") is None and "use_cache" in signature.parameters:
        inputs["use_cache"] = False
    received: list[Tensor] = []

    def no_logits(x: Tensor, *_: Any, **__: Any) -> Tensor:
        received.append(x)
        return x[..., :1].clone()  # a model may scale its logits in place

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        try:  # only here is it known what the wrappers made of positional arguments
            bound = signature.bind_partial(causal, *args, **kwargs).arguments
        except TypeError:
            bound = {}  # the model itself will say what is wrong
        _refuse_labels(owner, bound)
        received.clear()
        with _replaced_forward(layer, no_logits):
            run(*args, **kwargs)
        if len(received) != 1:
            raise ValueError(
                f"{owner}: {type(causal).__name__} called its output layer {len(received)} times, so no one "
                f"tensor is its last hidden state; take it from the backbone and {BY_HAND}"
            )
        hidden = received.pop()
        return hidden if factor == 1 else hidden / factor

    with _alone(owner, causal, layer):
        run = causal.forward
        with _replaced_forward(causal, forward):
            found = model(*args, **inputs)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{owner}: {type(model).__name__} gave a {type(found).__name__}: it calls "
            f"{type(causal).__name__} past its forward, as PEFT's prompt learning and adaption prompts do; "
            f"{BY_HAND}"
        )
    return found


def _refuse_adapters(owner: str, model: nn.Module, layer: nn.Module, names: Any) -> None:
    """What the head cannot know, and what cannot do without the model's own output."""
    if names is not None and peft_class(layer) is not None:
        raise ValueError(
            f"{owner}: adapter_names picks an adapter for each sample, which Head.from_model does not do, "
            f"and the output layer has adapters; make one call for each adapter, or leave the output layer "
            f"out of their targets"
        )
    if any(type(module).__name__ == "XLoraModel" for module in model.modules()):
        raise ValueError(
            f"{owner}: PEFT's X-LoRA reads its model's own output, which is not there; {BY_HAND}"
        )


def _refuse_labels(owner: str, inputs: Mapping[str, Any]) -> None:
    if inputs.get("labels") is not None:
        raise ValueError(f"{owner}: labels has no use here; pass it to kd.distill (see kd.next_token_labels)")


_replaced: dict[int, object] = {}  # by id of the output layer: the call that replaces its forward


@contextmanager
def _alone(owner: str, causal: nn.Module, layer: nn.Module) -> Iterator[None]:
    """Two calls that replace one layer's forward would take each other's hidden states."""
    mine = object()
    if _replaced.setdefault(id(layer), mine) is not mine:  # one step, whatever the threads
        raise ValueError(
            f"{owner}: another call is running on this {type(causal).__name__}'s output layer, around this "
            f"one or in another thread; make one call after the other, or give each thread its own copy"
        )
    try:
        yield
    finally:
        del _replaced[id(layer)]


# --- finding the output layer ---------------------------------------------------------------------------

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


def _find(owner: str, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(the language model inside its wrappers, its output layer inside none)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")
    causal = model
    while (inner := _inside(causal)) is not None:
        causal = inner
    name = type(causal).__name__
    if not hasattr(type(causal), "get_output_embeddings") or not hasattr(causal, "config"):
        raise TypeError(
            f"{owner}: {name} has no get_output_embeddings() and config to tell what its head does; {BY_HAND}"
        )
    layer = causal.get_output_embeddings()
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{owner}: {name}.get_output_embeddings() gives no output layer; {BY_HAND}")
    return causal, layer


def _inside(module: nn.Module) -> Optional[nn.Module]:
    """What a wrapper (torch.compile, DDP, FSDP1, DeepSpeed, checkpointing, PEFT) wraps; else None."""
    if peft_class(module) is not None:
        return module.get_base_model() if hasattr(module, "get_base_model") else module._modules.get("model")
    if hasattr(type(module), "get_output_embeddings"):
        return None
    return next((module._modules[name] for name in _WRAPPED if module._modules.get(name) is not None), None)


def _check_structure(owner: str, causal: nn.Module, layer: nn.Module) -> None:
    """Refuse heads with more in them than the output layer (BERT's transform, draft models' projections)."""
    name = type(causal).__name__
    path = next((path for path, module in causal.named_modules() if module is layer), None)
    if path is None:
        raise ValueError(f"{owner}: {name}'s output layer is not one of its modules; {BY_HAND}")
    top, *below = path.split(".")
    beside = [
        (child, module)
        for child, module in causal.named_children()
        if child != top and not (isinstance(module, nn.Embedding) or hasattr(module, "get_input_embeddings"))
    ]
    node, above = getattr(causal, top), top
    for part in below:
        if hasattr(type(node), "get_output_embeddings") and node.get_output_embeddings() is layer:
            raise ValueError(f"{owner}: {name} holds a language model; pass that one (model.{above})")
        beside += [(f"{above}.{child}", module) for child, module in node.named_children() if child != part]
        node, above = getattr(node, part), f"{above}.{part}"
    beside = [child for child, module in beside if next(module.parameters(), None) is not None]
    if beside:
        raise ValueError(
            f"{owner}: besides a backbone and the output layer {path}, {name} has {', '.join(beside)}, which "
            f"may lie between its last hidden state and its logits; kd.last_hidden_state(model, ...) gives "
            f"what the output layer receives: with that, {BY_HAND}"
        )


def _refuse_compiled(owner: str, model: nn.Module, causal: nn.Module) -> None:
    while model is not causal:
        if "_orig_mod" in model._modules:
            break
        model = _inside(model)
    if model is not causal or getattr(causal, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{owner}: the model is compiled as a whole, logits included; compile its backbone instead, for "
            f"example model.{getattr(causal, 'base_model_prefix', 'model') or 'model'}.compile()"
        )


@contextmanager
def _replaced_forward(module: nn.Module, function: Callable) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate puts its autocast there
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
