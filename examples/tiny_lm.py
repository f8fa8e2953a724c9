"""A small decoder-only language model: RMSNorm, rotary positions, causal attention, gated MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``[length, head_dim]``, of each position's rotation angles."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(length), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels of ``x [batch, heads, length, head_dim]`` by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    length = x.shape[-2]
    return x * cos[:length] + torch.cat((-second, first), dim=-1) * sin[:length]


class Block(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim)
        self.gate_up = nn.Linear(dim, 6 * dim, bias=False)
        self.down = nn.Linear(3 * dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, dim))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class TinyLM(nn.Module):
    """``forward`` returns hidden states; logits are ``hidden @ head.weight.T + head.bias``.

    The head is kept apart from the body, as a distillation loss wants it: whoever computes the loss
    decides whether ``[tokens, vocab]`` logits are ever written down.
    """

    def __init__(self, vocab: int, dim: int, layers: int, heads: int, max_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocab)
        self.head.weight = self.embedding.weight  # tied: one matrix reads tokens and predicts them
        cos, sin = rotary_table(max_length, dim // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            # Layers that write into the residual stream start small, so that depth does not inflate it.
            for layer in (block.attention_out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        # The tied matrix is initialised for the output side; the input side wants unit variance.
        x = self.embedding(tokens) * 50.0
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.norm(x)

    def start_from_frequencies(self, counts: Tensor) -> None:
        """Set the head's bias to the log frequency of each token, so training starts at that level."""
        frequency = (counts + 1.0) / (counts + 1.0).sum()
        with torch.no_grad():
            self.head.bias.copy_(frequency.log())
