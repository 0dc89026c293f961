"""The Llama-type network that is trained, by itself and small enough to read.

Tensors are named as Hugging Face names them, less the leading "model.", so that export.py only
writes them down. Positions are given, never counted: training skips some. No cache, no sampling.
Runs on any device; under autocast its matrix products are bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from attention import attend
from torch import nn

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """How large the network is."""

    vocab: int = 4096
    hidden: int = 384
    layers: int = 4
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 64
    intermediate: int = 512
    # So large that three in four dimensions of a head hardly turn within max_positions: what a head
    # finds by content it finds at any distance, and the more dimensions, the less by mistake.
    rope_theta: float = 1e24
    max_positions: int = 32768


SHAPES = {
    "nano": Shape(),
    "reader": Shape(
        vocab=12288, hidden=640, layers=12, heads=10, kv_heads=2, head_dim=64, intermediate=1792
    ),
    # Learns nothing; shows in a minute that everything runs.
    "tiny": Shape(
        vocab=1024, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate=96
    ),
}


def turns(positions: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (batch, 1, tokens, head_dim / 2) of positions (batch, tokens)."""
    steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() / shape.rope_theta ** (steps / shape.head_dim)
    return angles.cos()[:, None], angles.sin()[:, None]


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (batch, heads, tokens, head_dim), its halves rotated; the type of x."""
    left, right = x.float().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * self.weight


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden, bias=False)

    def queries(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head_dim) of x (batch, tokens, hidden), turned."""
        return rope(self._by_head(self.q_proj(x)), cos, sin)

    def keys_values(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, kv_heads, tokens, head_dim) each; keys are turned."""
        return rope(self._by_head(self.k_proj(x)), cos, sin), self._by_head(self.v_proj(x))

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = attend(self.queries(x, cos, sin), *self.keys_values(x, cos, sin), wanted)
        out = out.transpose(1, 2).flatten(2)
        return self.o_proj(out if wanted is None else out[wanted])


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), FeedForward(shape)
        self.input_layernorm = Norm(shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, wanted)
        x = attended + (x if wanted is None else x[wanted])
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Embeddings are shared between input and output."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.layers)])
        self.norm = Norm(shape.hidden)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5
                if "embed" in name:
                    std = 0.02
                elif "o_proj" in name or "down" in name:  # what a layer adds starts small
                    std *= 0.01
                nn.init.normal_(parameter, 0, std)

    def hidden(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        wanted: torch.Tensor | None = None,
        entered: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(batch, tokens, hidden) of ids and positions (batch, tokens).

        With `wanted` (batch, tokens) of bool, (wanted tokens, hidden) of these alone: the last
        layer computes no others, of which nothing but keys and values is needed. What enters each
        layer (batch, tokens, hidden) is added to `entered`.
        """
        cos, sin = turns(positions, self.shape)
        x = self.embed_tokens(ids)
        for layer in self.layers[:-1]:
            if entered is not None:
                entered.append(x)
            x = layer(x, cos, sin)
        if entered is not None:
            entered.append(x)
        return self.norm(self.layers[-1](x, cos, sin, wanted))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., vocab) of hidden (..., hidden)."""
        return F.linear(hidden, self.embed_tokens.weight)
