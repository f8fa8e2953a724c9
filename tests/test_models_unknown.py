"""Models of no known library: plain heads, unless something says otherwise; then an error that names it."""

from __future__ import annotations

import functools
import warnings
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from heads import check
from torch import nn

import kd_kernels as kd
from kd_kernels.model_types import REFUSED, SIGNALS


class Unknown(nn.Module):
    """A model of a library nobody knows."""

    def __init__(self, **config) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="unknown", hidden_size=8, vocab_size=12, **config)
        self.body = nn.Embedding(12, 8)
        self.lm_head = nn.Linear(8, 12, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.lm_head(self.body(input_ids)))


def test_unknown_models_are_plain_heads():
    check(Unknown(logit_scale=1.0, logits_scaling=1, final_logit_softcapping=None, dim_model_base=8),
          input_ids=torch.arange(12)[None])  # fmt: skip


def test_logits_that_are_changed_in_place():
    """What the model does to what it takes for logits must not reach the hidden states."""

    class InPlace(Unknown):
        def forward(self, input_ids):
            logits = self.lm_head(self.body(input_ids))
            logits *= 2.5
            return SimpleNamespace(logits=logits)

    model, ids = InPlace(), torch.arange(12)[None]
    assert torch.equal(kd.last_hidden_state(model, ids), model.body(ids))


def test_last_hidden_state_between_compiled_graphs():
    """A compiler leaves the call as it stands."""
    model, teacher, ids = Unknown(), torch.randn(1, 12, 12), torch.arange(12)[None]

    def step(ids):
        head = kd.Head.from_model(model, kd.last_hidden_state(model, ids))
        return kd.distill(head, teacher, kd.ForwardKL())

    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(ids), step(ids))


@pytest.mark.parametrize("name", SIGNALS)
def test_unknown_models_that_announce_something(name):
    model = Unknown(**{name: True if name == "scale_decoder_outputs" else 3})
    for call in (kd.Head.from_model, lambda m, h: kd.last_hidden_state(m, input_ids=torch.arange(3))):
        with pytest.raises(ValueError, match=f"'unknown' is not in the table.*{name}=.*kd.Head"):
            call(model, torch.randn(3, 8))


def test_either_part_of_a_composite_config_may_announce_it():
    for whole, text in (({"logit_scale": 3}, {}), ({}, {"logit_scale": 3})):
        model = Unknown(**whole)
        part = SimpleNamespace(**text)
        model.config.get_text_config = lambda decoder, part=part: part
        with pytest.raises(ValueError, match="logit_scale=3"):
            kd.Head.from_model(model, torch.randn(3, 8))


@pytest.mark.parametrize("kind", REFUSED)
def test_model_types_that_are_refused(kind):
    model = Unknown()
    model.config.model_type = kind
    with pytest.raises(ValueError, match=f"{kind!r} is not covered: {REFUSED[kind]}"):
        kd.Head.from_model(model, torch.randn(3, 8))


def with_layer(layer) -> Unknown:
    model = Unknown()
    model.lm_head = layer
    return model


class Packed(torch.Tensor):
    """A tensor that says it is float32 and is not, as quantisation libraries have them."""


class Int4(nn.Module):
    """A layer of a quantisation library."""

    def __init__(self):
        super().__init__()
        self.qweight = nn.Buffer(torch.zeros(1, 12, dtype=torch.int32))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Transform(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.decoder = nn.Linear(8, 8), nn.Linear(8, 12)


def nested() -> Unknown:
    model = Unknown()
    model.lm_head = None
    model.cls = Transform()
    model.get_output_embeddings = lambda: model.cls.decoder
    return model


def beside() -> Unknown:
    model = Unknown()
    model.projection = nn.Linear(8, 8)
    return model


def holding() -> Unknown:
    model = Unknown()
    model.lm_head = None
    model.language_model = Unknown()
    model.get_output_embeddings = model.language_model.get_output_embeddings
    return model


def partitioned() -> Unknown:
    model = Unknown()
    model.lm_head.weight.data = torch.empty(0)
    model.lm_head.weight.ds_id, model.lm_head.weight.ds_shape = 7, (12, 8)
    return model


def flattened() -> Unknown:
    model = Unknown()
    model.lm_head.weight.untyped_storage().resize_(0)
    return model


def shard_of_rows() -> Unknown:
    model = Unknown()
    model.lm_head.weight = nn.Parameter(torch.randn(6, 8))
    return model


def packed() -> Unknown:
    model = Unknown()
    model.lm_head.weight = nn.Parameter(torch.randn(12, 8).as_subclass(Packed), requires_grad=False)
    return model


BAD = {
    "no module": (lambda: "gpt2", TypeError, "model must be a torch.nn.Module, got str"),
    "no language model": (lambda: nn.Linear(8, 12), TypeError, "Linear has no get_output_embeddings"),
    "no output layer": (lambda: with_layer(None), TypeError, "gives no output layer"),
    "transform": (nested, ValueError, r"cls\.decoder, Unknown has cls\.dense"),
    "module beside": (beside, ValueError, "lm_head, Unknown has projection"),
    "language model inside": (holding, ValueError, r"pass that one \(model\.language_model\)"),
    "encoder-decoder": (lambda: Unknown(is_encoder_decoder=True), ValueError, "encoder-decoder"),
    "several heads": (lambda: with_layer(nn.ModuleList([nn.Linear(8, 12)])), TypeError, "ModuleList, not a"),
    "embedding": (lambda: with_layer(nn.Embedding(12, 8)), TypeError, "Embedding, not a torch.nn.Linear"),
    "own forward": (lambda: with_layer(Scaled(8, 12)), TypeError, "Scaled, not a torch.nn.Linear"),
    "packed layer": (lambda: with_layer(Int4()), TypeError, r"Int4, not a torch\.nn\.Linear.*dequantise"),
    "int8": (
        lambda: with_layer(int8()), TypeError, "weight is a Parameter of torch.int8.*dequantise"),
    "packed": (packed, TypeError, "weight is a Packed of torch.float32"),
    "ZeRO-3": (partitioned, ValueError, r"ZeRO-3.*\(12, 8\).*GatheredParameters"),
    "FSDP1": (flattened, ValueError, "freed storage.*FSDP1.*fully_shard"),
    "shard of rows": (shard_of_rows, ValueError, "6 of its 12 rows.*vocab_group"),
    "meta": (lambda: with_layer(nn.Linear(8, 12, device="meta")), ValueError, "meta device"),
}  # fmt: skip


def int8() -> nn.Linear:
    layer = nn.Linear(8, 12, bias=False)
    layer.weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize("case", BAD)
def test_refused_by_name(case):
    make, exception, words = BAD[case]
    with pytest.raises(exception, match=words):
        kd.Head.from_model(make(), torch.randn(3, 8))


def patched() -> nn.Linear:
    layer = nn.Linear(8, 12, bias=False)
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 3
    return layer


def test_a_patched_forward_is_refused():
    with pytest.raises(ValueError, match="would be ignored"):
        kd.Head.from_model(with_layer(patched()), torch.randn(3, 8))


@pytest.mark.parametrize("partial", [False, True])
def test_a_hook_that_may_change_the_logits_is_named(partial):
    def twice(module, inputs, output):
        return 2 * output

    model = Unknown()
    handle = model.lm_head.register_forward_hook(functools.partial(twice) if partial else twice)
    with pytest.warns(UserWarning, match="the output layer has a forward hook .*twice.* not called here"):
        kd.Head.from_model(model, torch.randn(3, 8))
    handle.remove()
    handle = model.lm_head.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.warns(UserWarning, match="forward pre-hook .* If it changes the hidden states"):
        kd.Head.from_model(model, torch.randn(3, 8))
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.Head.from_model(model, torch.randn(3, 8))


def test_bad_inputs():
    model = Unknown()
    with pytest.raises(TypeError, match="hidden must be a tensor"):
        kd.Head.from_model(model, [1.0])
    with pytest.raises(ValueError, match="hidden has 5 features"):
        kd.Head.from_model(model, torch.randn(3, 5))
    with pytest.raises(ValueError, match="labels has no use here"):
        kd.last_hidden_state(model, input_ids=torch.arange(3), labels=torch.arange(3))
    model.forward = lambda input_ids: model.lm_head(model.lm_head(torch.randn(3, 8)).expand(3, 8))
    with pytest.raises(ValueError, match="called its output layer 2 times"):
        kd.last_hidden_state(model, input_ids=torch.arange(3))


def test_labels_by_position_are_refused():
    class Labelled(Unknown):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids)

    model, ids = Labelled(), torch.arange(3)
    for wrapped in (model, Wrapped(model)):
        assert torch.equal(kd.last_hidden_state(wrapped, ids, None), model.body(ids))
        with pytest.raises(ValueError, match="labels has no use here"):
            kd.last_hidden_state(wrapped, ids, ids)
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4 were given"):
        kd.last_hidden_state(model, ids, None, None)


class Wrapped(nn.Module):
    """As DDP is one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("threads", [False, True], ids=["nested", "two threads"])
def test_one_call_at_a_time(threads):
    model, ids = Unknown(), torch.arange(3)
    errors = []

    def second():
        with pytest.raises(
            ValueError, match="another call is running on this Unknown's output layer"
        ) as info:
            kd.last_hidden_state(model, input_ids=ids)
        errors.append(info)

    def meanwhile(*_):
        if threads:
            thread = Thread(target=second)
            thread.start()
            thread.join()
        else:
            second()

    handle = model.body.register_forward_hook(meanwhile)
    assert torch.equal(kd.last_hidden_state(model, input_ids=ids), model.body.weight[:3])
    assert len(errors) == 1
    handle.remove()
    assert torch.equal(kd.last_hidden_state(model, input_ids=ids), model.body.weight[:3])
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
