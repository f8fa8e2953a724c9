"""The comparison that tests of real models share: a head against its model's own logits."""

from __future__ import annotations

import dataclasses

import torch
from cases import error
from torch import nn

import kd_kernels as kd
from kd_kernels.model_types import SHAPING, Shaping
from kd_kernels.reference.dense import logits_of


def check(model: nn.Module, **inputs) -> None:
    """The head's logits are the model's; with anything left out that the table says, they are not."""
    with torch.no_grad():
        logits = model(**inputs).logits
        hidden = kd.last_hidden_state(model, **inputs)
        head = kd.Head.from_model(model, hidden)
    assert torch.isfinite(logits).all() and logits.std() > 0.3, "the test is vacuous"
    assert hidden.shape[:-1] == logits.shape[:-1]
    assert error(logits_of(head), logits) < 2e-6
    shaping = SHAPING.get(model.config.model_type, Shaping())
    if shaping.hidden_over or shaping.hidden_over_root:  # cancels in the logits
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
        states = getattr(output, "decoder_hidden_states", None) or output.hidden_states
        assert error(hidden, states[-1]) < 2e-6
    for change in shaping_left_out(head):
        other = dataclasses.replace(head, **change)
        assert error(logits_of(other)[..., : logits.shape[-1]], logits) > 1e-2, change


def shaping_left_out(head: kd.Head) -> list[dict]:
    left_out = []
    if head.scale != 1:
        left_out.append({"scale": 1.0})
    if head.softcap is not None:
        left_out.append({"softcap": None})
    if head.bias is not None:
        left_out.append({"bias": None})
    return left_out
