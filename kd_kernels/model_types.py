"""What model types do between their last hidden state and their logits, besides the output layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from torch import nn


@dataclass(frozen=True)
class Shaping:
    """What a model type does besides its output layer. Each entry names an attribute of its text config."""

    times: Optional[str] = None
    """Multiplies the logits."""
    over: Optional[str] = None
    """Divides the logits."""
    hidden_over: Optional[str] = None
    """Divides the hidden states before the output layer."""
    hidden_over_root: Optional[str] = None
    """Its square root divides the hidden states before the output layer..."""
    when: Optional[str] = None
    """...where this is true."""
    softcap: Optional[str] = None
    """``softcap * tanh(logits / softcap)``; None in the config: no softcap."""
    vocab: Optional[str] = None
    """Only that many entries of the vocabulary are logits; the rest of the weight is padding."""
    bias: Optional[str] = None
    """A buffer of the model (not of its config) that is added to the logits."""


_GEMMA = Shaping(softcap="final_logit_softcapping")
_BART = Shaping(bias="final_logits_bias")  # the encoder-decoders; their decoders alone have none
_COHERE = Shaping(times="logit_scale")
_GRANITE = Shaping(over="logits_scaling")

# By ``config.model_type``. A causal LM that is not listed is a plain output layer, an encoder-decoder is not
# covered. tests/test_models.py holds each entry, and every other causal LM of transformers, against the
# model's own logits.
SHAPING: dict[str, Shaping] = {
    "bart": _BART,
    "beam": _GEMMA,
    "bigbird_pegasus": _BART,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "cohere2_moe": _COHERE,
    "cohere_compass_text": _COHERE,
    "falcon_h1": Shaping(times="lm_head_multiplier"),
    "gemma2": _GEMMA,
    "gemma3": Shaping(),  # Gemma3ForConditionalGeneration has the softcap in its config and does not apply it
    "gemma3_text": _GEMMA,
    "gemma3n_text": _GEMMA,
    "gemma4": _GEMMA,
    "gemma4_text": _GEMMA,
    "gemma4_unified": _GEMMA,
    "gemma4_unified_text": _GEMMA,
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hyperclovax": Shaping(times="logits_scaling"),  # the attribute by which Granite divides
    "inkling2_loop_text": Shaping(softcap="final_logit_softcapping", vocab="unpadded_vocab_size"),
    "inkling2_text": Shaping(softcap="final_logit_softcapping", vocab="unpadded_vocab_size"),
    "inkling_text": Shaping(hidden_over="logits_mup_width_multiplier", vocab="unpadded_vocab_size"),
    "led": _BART,
    "longt5": Shaping(hidden_over_root="d_model", when="scale_decoder_outputs"),
    "m2m_100": Shaping(),
    "marian": _BART,
    "mbart": _BART,
    "minicpm3": Shaping(hidden_over="logits_scaling"),  # = hidden_size / dim_model_base
    "mpt": Shaping(),  # has logit_scale in its config and does not apply it
    "mt5": Shaping(),  # T5 without its factor
    "mvp": _BART,
    "nanochat": _GEMMA,
    "nllb-moe": Shaping(),
    "pegasus": _BART,
    "plbart": _BART,
    "recurrent_gemma": Shaping(softcap="logits_soft_cap"),
    "switch_transformers": Shaping(hidden_over_root="d_model", when="tie_word_embeddings"),
    "t5": Shaping(hidden_over_root="d_model", when="scale_decoder_outputs"),
    "t5gemma": _GEMMA,
    "umt5": Shaping(hidden_over_root="d_model", when="tie_word_embeddings"),
    "vaultgemma": _GEMMA,
    "xlstm": Shaping(softcap="output_logit_soft_cap"),
}

# Model types whose logits are no function of one hidden state per token through one output layer, though
# nothing in their structure shows it.
REFUSED: dict[str, str] = {
    "chameleon": "it bans the tokens of images from its logits",
    "prophetnet": "its logits come from an n-gram predicting stream, not from the last hidden state",
}

# Attributes by which a config announces that logits are not just the output layer's, and the value (or the
# attribute with the value) that does nothing; None never does. On a model type that is not in SHAPING, any
# other value is a reason to refuse.
SIGNALS: dict[str, object] = {
    "dim_model_base": "hidden_size",
    "final_logit_softcap": None,
    "final_logit_softcapping": None,
    "lm_head_multiplier": 1,
    "logit_scale": 1,
    "logit_softcap": None,
    "logits_mup_width_multiplier": 1,
    "logits_scale": 1,
    "logits_scaling": 1,
    "logits_soft_cap": None,
    "output_logit_soft_cap": None,
    "output_multiplier": 1,
    "scale_decoder_outputs": False,
    "unpadded_vocab_size": "vocab_size",
}

BY_HAND = "build the head yourself: kd.Head(hidden, weight, bias, scale=..., softcap=...)"


class Factors(NamedTuple):
    hidden: float
    logits: float
    softcap: Optional[float]
    vocab: Optional[int]
    bias: Optional[str]


def factors_of(owner: str, causal: nn.Module) -> Factors:
    kind = getattr(causal.config, "model_type", "")
    config = causal.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    if kind in REFUSED:
        raise ValueError(f"{owner}: model type {kind!r} is not covered: {REFUSED[kind]}")
    shaping = SHAPING.get(kind)
    if shaping is None:
        _check_plain(owner, kind, causal.config, config)
        shaping = Shaping()

    def value(name: Optional[str], default: Any) -> Any:
        if name is None:
            return default
        if not hasattr(config, name):
            raise ValueError(f"{owner}: the config of model type {kind!r} lacks {name}, which shapes logits")
        found = getattr(config, name)
        for module in (causal, getattr(causal, "model", None)):  # some read a copy made with the model
            own = getattr(module, name, found)
            if isinstance(own, (int, float)) and own != found:
                raise ValueError(
                    f"{owner}: {name} is {found} in the config and {own} in the model, and which of them its "
                    f"forward reads is its own affair; set both alike"
                )
        return default if found is None else found

    hidden = 1.0 / float(value(shaping.hidden_over, 1.0))
    if shaping.hidden_over_root is not None and value(shaping.when, True):
        hidden /= math.sqrt(value(shaping.hidden_over_root, 1.0))
    logits = float(value(shaping.times, 1.0)) / float(value(shaping.over, 1.0))
    softcap = value(shaping.softcap, None)
    softcap = None if softcap is None else float(softcap)
    return Factors(hidden, logits, softcap, value(shaping.vocab, None), shaping.bias)


def _check_plain(owner: str, kind: str, config: Any, text_config: Any) -> None:
    """Refuse a model type that is not in the table and may do something to its logits."""
    unknown = f"{owner}: model type {kind!r} is not in the table of kd_kernels.model_types and"
    for part in (config, text_config):
        for name, neutral in SIGNALS.items():
            found = getattr(part, name, None)
            nothing = getattr(part, neutral, None) if isinstance(neutral, str) else neutral
            if found is not None and found != nothing:
                raise ValueError(f"{unknown} has {name}={found!r}, which may shape its logits; {BY_HAND}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{unknown} is an encoder-decoder, some of which scale what enters the output layer; {BY_HAND}"
        )
