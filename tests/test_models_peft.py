"""PEFT: what the adapted model's own logits are, loss and gradients alike; or an error that names why not."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from cases import error

import kd_kernels as kd
from kd_kernels.reference.dense import dense_distill, logits_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: no models to adapt")
peft = pytest.importorskip("peft", reason="peft is not installed: no adapters to read")

VOCAB = 48
IDS = torch.arange(3, 19).reshape(2, 8)


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, **changes,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.normal_(0, 0.5)
    return model


def adapted(config, model=None, name="default"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama() if model is None else model, config, adapter_name=name)
    stir(model)
    return model.eval()


def stir(model):
    """Adapters start as the identity: give every trainable parameter something to do."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)


def lora(*targets, **options):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)


def head_of(model, **inputs):
    return kd.Head.from_model(model, kd.last_hidden_state(model, input_ids=IDS, **inputs))


def check(model, base=None):
    """Logits, loss and gradients are the model's own; and those of the unadapted model are not."""
    logits = model(input_ids=IDS).logits
    assert error(logits_of(head_of(model)), logits) < 2e-6
    if base is not None:
        with torch.no_grad():
            assert error(base(input_ids=IDS).logits, logits) > 1e-2, "the adapter does nothing"
    teacher = torch.randn(2, 8, VOCAB)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    ours = kd.distill(head_of(model), teacher, kd.ReverseKL())
    ours.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    theirs = dense_distill(kd.Logits(model(input_ids=IDS).logits), kd.Logits(teacher), kd.ReverseKL())
    theirs.backward()
    assert error(ours, theirs) < 1e-5
    for name, p in trained.items():
        assert (gradients[name] is None) == (p.grad is None), name
        if p.grad is not None:
            assert p.grad.abs().sum() > 0 and error(gradients[name], p.grad) < 1e-4, name
    for name, p in model.named_parameters():
        assert name in trained or p.grad is None, name
    return trained


CONFIGS = {
    "LoRA below": lambda: lora("q_proj", "down_proj"),
    "LoRA on the head": lambda: lora("lm_head"),
    "LoRA on both": lambda: lora("q_proj", "lm_head", use_rslora=True),
    "LoRA on tied embeddings": lambda: lora("embed_tokens"),
    "LoRA with a bias": lambda: lora("lm_head", lora_bias=True),
    "modules_to_save": lambda: lora("q_proj", modules_to_save=["lm_head"]),
    "IA3 below": lambda: peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("case", [c for c in CONFIGS if c != "prompt tuning"])
def test_adapters(case):
    tied = {"tie_word_embeddings": "tied" in case}
    trained = check(adapted(CONFIGS[case](), llama(**tied)), base=llama(**tied))
    on_the_head = case not in ("LoRA below", "IA3 below", "LoRA on tied embeddings")
    assert trained and any("lm_head" in name for name in trained) == on_the_head


def test_prompt_tuning():
    """Virtual tokens come first, in the model's logits and here."""
    model = adapted(CONFIGS["prompt tuning"]())
    logits = model(input_ids=IDS).logits
    head = head_of(model)
    assert head.leading_shape == logits.shape[:-1] == (2, 11)
    assert error(logits_of(head), logits) < 2e-6


@pytest.mark.parametrize("unwrapped", [lambda m: m, lambda m: m.base_model, lambda m: m.base_model.model],
                         ids=["PeftModel", "LoraModel", "injected"])  # fmt: skip
def test_however_it_is_passed(unwrapped):
    model = adapted(lora("lm_head"))
    logits = model(input_ids=IDS).logits
    assert error(logits_of(head_of(unwrapped(model))), logits) < 2e-6


def test_granite_scales_the_adapter_too():
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=1.7,
    )  # fmt: skip
    check(adapted(lora("lm_head"), transformers.GraniteForCausalLM(config)))


def test_two_adapters_and_switching():
    model = adapted(lora("lm_head"), name="one")
    model.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"]))
    seen = []
    for active in ("one", "two", ["one", "two"]):
        model.base_model.set_adapter(active)
        stir(model)
        head = head_of(model)
        assert head.hidden.shape[-1] == 24 + {"one": 4, "two": 2}.get(str(active), 6)
        check(model)
        seen.append(logits_of(head).detach())
    assert error(seen[0], seen[1]) > 1e-2 and error(seen[1], seen[2]) > 1e-2


def test_disabled_and_merged():
    plain = logits_of(head_of(llama()))
    model = adapted(lora("lm_head"))
    with model.disable_adapter():
        assert error(logits_of(head_of(model)), plain) < 1e-6
    own = model(input_ids=IDS).logits
    model.merge_adapter()
    head = head_of(model)
    assert head.hidden.shape[-1] == 24 and error(logits_of(head), own) < 1e-5
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="merged and disabled"):
        head_of(model)
    model.base_model.enable_adapter_layers()
    model.unmerge_adapter()
    assert error(logits_of(head_of(model.merge_and_unload())), own) < 1e-5


def test_modules_to_save_disabled():
    model = adapted(lora("q_proj", modules_to_save=["lm_head"]))
    with model.disable_adapter():
        assert error(logits_of(head_of(model)), logits_of(head_of(llama()))) < 1e-6


def test_dropout():
    """The same random numbers give the same logits: dropout is on the adapter's input, as PEFT has it."""
    model = adapted(lora("lm_head", lora_dropout=0.5)).train()
    hidden = kd.last_hidden_state(model, input_ids=IDS)
    torch.manual_seed(7)
    theirs = model(input_ids=IDS).logits
    torch.manual_seed(7)
    assert error(logits_of(kd.Head.from_model(model, hidden)), theirs) < 2e-6
    assert error(logits_of(kd.Head.from_model(model, hidden)), theirs) > 1e-2, "dropout does nothing"
    model.eval()
    assert error(logits_of(kd.Head.from_model(model, hidden)), model(input_ids=IDS).logits) < 2e-6


def test_bfloat16_keeps_small_updates():
    """An update below the rounding of a bf16 weight: merged it would vanish."""
    base = llama().bfloat16()
    model = adapted(lora("lm_head"), base)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            assert p.dtype == torch.float32
            p.data.mul_(1e-3)
    with torch.no_grad():
        hidden = kd.last_hidden_state(model, input_ids=IDS)
        head = kd.Head.from_model(model, hidden)
        layer = model.get_base_model().lm_head
        exact = hidden.double() @ layer.get_delta_weight("default").double().T
        carried = head.hidden[..., 24:].double() @ head.weight[:, 24:].double().T
        merged = layer.base_layer.weight + layer.get_delta_weight("default").bfloat16()
        lost = hidden.double() @ (merged.double() - layer.base_layer.weight.double()).T
    assert head.hidden.dtype == head.weight.dtype == torch.bfloat16
    assert error(carried, exact) < 1e-2 < 0.2 < error(lost, exact)


REFUSED = {
    "DoRA": (lambda: lora("lm_head", use_dora=True), "adapter 'default' on the output layer is Dora"),
    "aLoRA": (
        lambda: lora("lm_head", task_type="CAUSAL_LM", alora_invocation_tokens=[3]),
        "adapter 'default' .* is ALora"),
    "IA3": (lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "PEFT's Linear on"),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=["lm_head"]), "PEFT's Linear on|PEFT's LoHa"),
    "a parameter": (
        lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=["lm_head.weight"]),
        "PEFT's ParamWrapper"),
    "trainable tokens": (
        lambda: lora("q_proj", trainable_token_indices={"lm_head": [1, 2]}), "PEFT's TrainableTokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    make, words = REFUSED[case]
    model = adapted(make())
    hidden = kd.last_hidden_state(model, input_ids=IDS)  # is right whatever is on the head
    assert hidden.shape == (2, 8, 24)
    with pytest.raises(ValueError, match=words):
        kd.Head.from_model(model, hidden)


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str
)
def test_autocast_to_the_other_16_bit_type(dtypes):
    base, other = dtypes
    model = adapted(lora("lm_head"), llama().to(base))
    with torch.autocast("cpu", other):
        found = kd.distill(head_of(model), torch.zeros(2, 8, VOCAB), kd.ForwardKL())
        logits = model(input_ids=IDS).logits.float()
    assert found.item() == pytest.approx(
        kd.distill(logits, torch.zeros_like(logits), kd.ForwardKL()).item(), rel=0.05
    )


def two_adapters(*targets):
    model = adapted(lora(*targets), name="one")
    model.add_adapter("two", lora(*targets))
    stir(model)
    return model


def test_an_adapter_for_each_sample():
    names = ["two", "__base__"]
    for model in (two_adapters("lm_head"), two_adapters("lm_head", "q_proj")):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="adapter_names picks an adapter for each sample"),
        ):
            kd.last_hidden_state(model, input_ids=IDS, adapter_names=names)
    below = two_adapters("q_proj")
    with torch.no_grad():
        found = logits_of(head_of(below, adapter_names=names))
        assert error(found, below(input_ids=IDS, adapter_names=names).logits) < 2e-6
        assert error(found, below(input_ids=IDS).logits) > 1e-3


@pytest.mark.parametrize("prompts", [True, False])
def test_what_goes_past_the_model_is_named(prompts):
    if prompts:
        model = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    else:
        model = adapted(peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1))
    with pytest.raises(
        TypeError, match="gave a CausalLMOutputWithPast: it calls LlamaForCausalLM past its forward"
    ):
        if prompts:
            with model.disable_adapter():
                kd.last_hidden_state(model, input_ids=IDS)
        else:
            kd.last_hidden_state(model, input_ids=IDS)


def test_xlora_is_named(tmp_path):
    peft.get_peft_model(llama(), lora("q_proj", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    base = llama(use_cache=False)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=24, adapters={"0": str(tmp_path)})
    model = peft.get_peft_model(base, config).eval()
    with pytest.raises(ValueError, match="X-LoRA reads its model's own output"):
        kd.last_hidden_state(model, input_ids=IDS)
