"""Heads of real models: for every causal LM that transformers has, what kd.last_hidden_state and
kd.Head.from_model give are the model's own logits. Toy sizes, random weights, nothing downloaded."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from cases import TORCH, error
from heads import check
from torch import nn

import kd_kernels as kd
from kd_kernels.model_types import REFUSED, SHAPING, SIGNALS, Shaping
from kd_kernels.reference.dense import logits_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: no models to read")
from transformers.models.auto import modeling_auto  # noqa: E402

if TORCH < (2, 7):
    pytest.skip("transformers' newest models do not run on torch 2.6", allow_module_level=True)

CAUSAL = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEQ2SEQ = dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
DOCS = Path(__file__).resolve().parent.parent / "docs" / "models.md"
VOCAB = 64

# Sizes by the name of a config's field, where the config has that field.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "emb_dim": 32,
    "dim": 32, "hidden_dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32, "n_ctx": 64,
    "intermediate_size": 32, "ffn_dim": 32, "n_inner": 32, "d_ff": 32, "feed_forward_size": 32,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_inner": 32, "dff": 32, "dim_ff": 32,
    "ffn_hidden_size": 32,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "num_decoder_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "head_dim": 8, "d_head": 8, "d_kv": 8,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "max_source_positions": 64,
    "max_target_positions": 64, "max_sequence_length": 64, "context_length": 64, "type_vocab_size": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "top_k": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "state_size": 8, "time_step_rank": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_chunk_size": 8,
    "chunk_size": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "mamba_n_heads": 8, "mamba_d_ssm": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
    "n_groups": 1, "n_mamba_heads": 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
    "swa_head_dim": 8, "rel_extent": 16, "d_rel": 4, "laurel_rank": 8, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB, "backbone_hidden_size": 32, "num_centroids": 8,
    "shared_intermediate_size": 16, "dense_intermediate_size": 32, "intermediate_size_mlp": 32,
    "moe_shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16, "index_topk": 4,
    "index_head_dim": 16, "index_n_heads": 2, "o_lora_rank": 16, "o_groups": 2, "hc_lowrank": 8,
    "router_hidden_size": 16, "kv_channels": 8, "linear_head_dim": 8, "linear_num_heads": 4,
    "zero_expert_num": 2, "moe_topk": 2, "rotary_dim": 4, "adapter_rank": 4, "dim_head": 8,
    "position_bias_num_buckets": 16, "position_bias_max_distance": 32, "attention_window_size": 16,
    "gated_norm_rank": 8, "attention_head_size": 8, "encoder_hash_byte_group_vocab": 64,
    "hidden_size_global": 32, "input_embedding_size": 16, "output_embedding_size": 32, "lru_width": 32,
    "num_kv_shared_layers": 0, "pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB,
    "codebook_size": 16, "prompt_length": 4, "depth": 1, "image_size": 16, "patch_size": 8,
    "decoder_start_token_id": 2, "is_decoder": True,
}  # fmt: skip

# Values with which what a config says about logits cannot be overlooked.
TELLING = {
    "logit_scale": 0.6,
    "logits_scaling": 1.7,
    "lm_head_multiplier": 1.4,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
    "logits_mup_width_multiplier": 1.7,
    "unpadded_vocab_size": 51,
    "dim_model_base": 16,
}

# What a family needs beyond that. A dict for a sub-config changes that one.
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
            "indexer_compress_ratio": 2}  # fmt: skip
EXTRA: dict[str, dict] = {
    "bailing_hybrid": _LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_moe": {"text_config": _LINEAR},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp": {"text_config": {**_LINEAR, **_INDEXER}},
    "qwen4_exp_text": {**_LINEAR, **_INDEXER},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "local_attn_chunk_length": 4,
                 "lsh_attn_chunk_length": 4, "num_buckets": 2},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# What a family has to be called with.
INPUTS = {"blt": {"use_cache": False}}  # its config lacks what its cache reads

# Where the config of the causal LM has another name than its family.
CONFIG_OF = {"musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder"}

# Families that head_from_model refuses, and words of the refusal.
_TRANSFORM = r"besides a backbone and the output layer \S+, \w+ has (cls|lm_head)\."
_HEADS = "ModuleList, not a"
REFUSES: dict[str, str] = {
    **dict.fromkeys(
        ("bert", "big_bird", "camembert", "data2vec-text", "ernie", "megatron-bert", "rembert", "roberta",
         "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        _TRANSFORM,
    ),
    "dory": "DoryLMHead, not a",  # a logit scale per token of the vocabulary
    "electra": "has generator_predictions",
    "modernbert-decoder": "has lm_head",
    "musicgen": _HEADS,
    "musicgen_melody": _HEADS,
    "prophetnet": "n-gram predicting stream",
}  # fmt: skip

# Families that could not be built here at toy size, and why. Their heads are covered by the rules for
# unknown model types only.
_RAISES = "its own default config raises"
NOT_BUILT: dict[str, str] = {
    "dots3_note": "its config keeps its 42 layers (the same class is tested as dots3_note_text)",
    "gemma3n": "needs timm and Pillow (gemma3n_text is tested)",
    "gemma4_assistant": _RAISES,
    "gemma4_unified_assistant": _RAISES,
}


def toy_config(cls: type, **changes):
    """A config of toy size: SIZES and TELLING where it has such a field, its sub-configs likewise."""
    fields = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in {**SIZES, **TELLING}.items() if name in fields}
    for name, spec in getattr(cls, "sub_configs_defaults", {}).items():
        kind = getattr(spec, "model_type", None)
        sub = transformers.CONFIG_MAPPING[kind] if kind else getattr(spec, "config_class", spec)
        changes[name] = toy_config(sub, **changes.get(name, {}))
    return cls(**{**values, **changes})


def toy_model(kind: str, names: dict[str, str] = CAUSAL, **changes) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.CONFIG_MAPPING[CONFIG_OF.get(kind, kind)]
        config = toy_config(config, **{**EXTRA.get(kind, {}), **changes})
        if names is CAUSAL and kind not in CONFIG_OF:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = getattr(transformers, names[kind])(config)
    model = model.float().eval()
    layer = model.get_output_embeddings()
    if isinstance(layer, nn.Linear):
        layer.weight.data.normal_(0, 0.4)
        if layer.bias is not None:
            layer.bias.data.normal_()
    if getattr(model, "final_logits_bias", None) is not None:
        model.final_logits_bias.normal_()
    return model


def tokens(length: int = 8) -> torch.Tensor:
    return torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", sorted(set(CAUSAL) - set(NOT_BUILT)))
def test_every_causal_lm(kind):
    model = toy_model(kind)
    if kind in REFUSES:
        with pytest.raises((ValueError, TypeError), match=REFUSES[kind]):
            kd.Head.from_model(model, torch.randn(2, 32))
        return
    check(model, input_ids=tokens(), **INPUTS.get(kind, {}))
    shaping = SHAPING.get(model.config.model_type, Shaping())
    head = kd.Head.from_model(model, torch.randn(2, model.get_output_embeddings().in_features))
    acts = (shaping.times, shaping.over, shaping.hidden_over, shaping.hidden_over_root)
    assert (head.scale != 1) == any(acts), "the table names an attribute that has no effect here"
    assert (head.softcap is not None) == (shaping.softcap is not None)
    assert (head.vocab_size < VOCAB) == (shaping.vocab is not None)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "modernbert-decoder"])
def test_by_hand_where_refused(kind):
    """The way round that the refusal names: what the output layer receives, and its weight."""
    model, layer = toy_model(kind), toy_model(kind).get_output_embeddings()
    with torch.no_grad():
        head = kd.Head(kd.last_hidden_state(model, input_ids=tokens()), layer.weight, layer.bias)
        assert error(logits_of(head), model(input_ids=tokens()).logits) < 2e-6


ENCODER_DECODERS = [kind for kind in SHAPING if kind in SEQ2SEQ]


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_every_encoder_decoder_of_the_table(kind):
    model = toy_model(kind, SEQ2SEQ, is_decoder=False, is_encoder_decoder=True)
    check(model, input_ids=tokens(), decoder_input_ids=tokens(6))
    head = kd.Head.from_model(model, torch.randn(2, 32))
    assert (head.scale != 1) == (SHAPING[kind].hidden_over_root is not None)
    assert (head.bias is not None) == (SHAPING[kind].bias is not None)


def test_the_table_has_no_stale_entries():
    known = set(CAUSAL) | set(SEQ2SEQ)
    assert set(SHAPING) <= known and set(REFUSED) <= set(transformers.CONFIG_MAPPING)
    assert set(NOT_BUILT) <= set(CAUSAL) and set(REFUSES) <= set(CAUSAL)
    assert not set(NOT_BUILT) & (set(SHAPING) | set(REFUSED)), "an entry nobody tests"
    named = {x for s in SHAPING.values() for x in (s.times, s.over, s.hidden_over, s.softcap, s.vocab) if x}
    assert named <= set(SIGNALS), "an attribute of the table that an unknown model type may have unnoticed"


@pytest.mark.parametrize("kind", ["cohere", "gemma2", "granite", "inkling_text", "minicpm3"])
def test_a_bias_is_shaped_as_the_model_does(kind):
    """Before or after the factor: none of these families ships with a bias, people add them."""
    model = toy_model(kind)
    layer = nn.Linear(model.lm_head.in_features, VOCAB)
    layer.weight.data.normal_(0, 0.4)
    layer.bias.data.normal_()
    model.lm_head = layer
    check(model, input_ids=tokens())


@pytest.mark.parametrize("kind, name", [("cohere", "logit_scale"), ("falcon_h1", "lm_head_multiplier")])
def test_a_factor_that_was_changed_in_one_place(kind, name):
    """The model reads the copy that it made, others the config."""
    model = toy_model(kind)
    setattr(model.config, name, 0.9)
    with pytest.raises(ValueError, match=f"{name} is 0.9 in the config and .* in the model"):
        kd.last_hidden_state(model, tokens())


def test_two_biases():
    model = toy_model("bart", SEQ2SEQ, is_decoder=False, is_encoder_decoder=True)
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    check(model, input_ids=tokens(), decoder_input_ids=tokens(6))


def test_hidden_is_the_backbones():
    """What people pass who call the backbone themselves."""
    for kind in ("llama", "minicpm3", "gpt2", "gemma2"):
        model = toy_model(kind)
        backbone = getattr(model, model.base_model_prefix)
        with torch.no_grad():
            theirs = backbone(input_ids=tokens()).last_hidden_state
            ours = kd.last_hidden_state(model, input_ids=tokens())
        assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "cohere", "granite", "gemma2", "phi", "minicpm3"])
def test_distillation_is_the_models_own(kind):
    """Loss and every gradient of the model as by its own logits; the teacher in no_grad."""
    student, teacher = toy_model(kind), toy_model("llama", vocab_size=VOCAB, hidden_size=16, head_dim=4)
    ids, mask = tokens(), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        t_hidden = kd.last_hidden_state(teacher, **inputs)
        t_logits = teacher(**inputs).logits
    options = {"labels": kd.next_token_labels(ids), "mask": mask.bool(), "hard_weight": 0.4}
    objective = kd.JensenShannon(0.3)

    hidden = kd.last_hidden_state(student, **inputs)
    assert hidden.requires_grad
    sources = kd.Head.from_model(student, hidden), kd.Head.from_model(teacher, t_hidden)
    loss = kd.distill(*sources, objective, **options)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    theirs = kd.distill(kd.Logits(student(**inputs).logits), t_logits, objective, **options)
    theirs.backward()
    assert error(loss, theirs) < 1e-5
    for name, p in student.named_parameters():
        assert error(ours[name], p.grad) < 1e-4, name


def test_no_logits_and_no_cache(monkeypatch):
    model = toy_model("llama")
    called = []
    monkeypatch.setattr(nn.Linear, "forward", counting(nn.Linear.forward, called))
    kd.last_hidden_state(model, input_ids=tokens())
    assert called and VOCAB not in called
    model(input_ids=tokens())
    assert VOCAB in called, "the test can see the output layer"
    monkeypatch.undo()
    given = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    kd.last_hidden_state(model, input_ids=tokens())
    kd.last_hidden_state(model, input_ids=tokens(), use_cache=True)
    assert [k["use_cache"] for k in given] == [False, True]


def counting(forward, called):
    def counted(self, x):
        called.append(self.out_features)
        return forward(self, x)

    return counted


def test_the_model_is_left_as_it_was():
    model = toy_model("llama")
    plain = kd.last_hidden_state(model, input_ids=tokens())
    own = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate does
    model.forward = own
    assert 1e-4 < error(kd.last_hidden_state(model, input_ids=tokens()), plain) < 2e-2, (
        "not under its autocast"
    )
    assert model.__dict__["forward"] is own and "forward" not in model.lm_head.__dict__
    with pytest.raises(Exception):  # noqa: B017
        kd.last_hidden_state(model, input_ids=torch.tensor([[10**6]]))
    assert model.__dict__["forward"] is own and "forward" not in model.lm_head.__dict__


def test_logits_to_keep():
    model = toy_model("llama")
    whole = kd.last_hidden_state(model, input_ids=tokens())
    assert torch.equal(kd.last_hidden_state(model, input_ids=tokens(), logits_to_keep=3), whole[:, -3:])


def test_resized_and_tied():
    model = toy_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(model, input_ids=tokens())
    for size in (VOCAB + 8, VOCAB - 8):
        model.resize_token_embeddings(size)
        check(model, input_ids=tokens())
        assert kd.Head.from_model(model, torch.randn(1, 32)).vocab_size == size


def test_compiled_models():
    """A compiled backbone serves; a model compiled with its logits is refused where it would compute them."""
    model = toy_model("llama")
    hidden = kd.last_hidden_state(model, input_ids=tokens())
    compiled = torch.compile(model, backend="eager")
    assert kd.Head.from_model(compiled, hidden).weight is model.lm_head.weight
    with pytest.raises(ValueError, match=r"compiled as a whole.*model\.model\.compile\(\)"):
        kd.last_hidden_state(compiled, input_ids=tokens())
    model.model.compile(backend="eager")
    for _ in range(2):
        assert error(kd.last_hidden_state(model, input_ids=tokens()), hidden) < 1e-6
        assert error(model(input_ids=tokens()).logits, logits_of(kd.Head.from_model(model, hidden))) < 1e-6
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled as a whole"):
        kd.last_hidden_state(model, input_ids=tokens())


# --- the page in the docs -------------------------------------------------------------------------------


def phrase(shaping: Shaping) -> str:
    parts = [
        f"hidden states / `{shaping.hidden_over}`" if shaping.hidden_over else "",
        f"hidden states / sqrt(`{shaping.hidden_over_root}`) where `{shaping.when}`"
        if shaping.hidden_over_root
        else "",
        f"logits x `{shaping.times}`" if shaping.times else "",
        f"logits / `{shaping.over}`" if shaping.over else "",
        f"softcap `{shaping.softcap}`" if shaping.softcap else "",
        f"the first `{shaping.vocab}` entries" if shaping.vocab else "",
        f"logits + `{shaping.bias}` (encoder-decoder)" if shaping.bias else "",
    ]
    return ", ".join(part for part in parts if part) or "nothing"


def generated() -> str:
    """The part of docs/models.md between its markers."""
    plain = sorted(set(CAUSAL) - set(SHAPING) - set(REFUSES) - set(NOT_BUILT))
    rows = [f"| `{kind}` | {phrase(shaping)} |" for kind, shaping in sorted(SHAPING.items())]
    text = [
        f"Model types (`config.model_type`) of transformers {transformers.__version__}.",
        "",
        "| model type | besides the output layer |",
        "|---|---|",
        *rows,
        "",
        "Nothing but the output layer: " + ", ".join(f"`{kind}`" for kind in plain) + ".",
        "",
        "Refused by name: " + ", ".join(f"`{kind}`" for kind in sorted(REFUSES)) + ".",
    ]
    if NOT_BUILT:
        text += ["", "Not tested, because no toy model of it could be built:", ""]
        text += [f"* `{kind}`: {reason}" for kind, reason in sorted(NOT_BUILT.items())]
    return "\n".join(text)


MARKERS = "<!-- models:begin -->\n", "\n<!-- models:end -->"


def test_docs_are_generated():
    """`python tests/test_models.py` writes the page anew."""
    page = DOCS.read_text()
    version = re.search(r"of transformers (\S+)\.\n", page).group(1)
    if version != transformers.__version__:
        pytest.skip(f"the page was made from transformers {version}, {transformers.__version__} is installed")
    assert page.split(MARKERS[0])[1].split(MARKERS[1])[0] == generated()


if __name__ == "__main__":
    before, rest = DOCS.read_text().split(MARKERS[0])
    DOCS.write_text(before + MARKERS[0] + generated() + MARKERS[1] + rest.split(MARKERS[1])[1])
