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


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Everything but attention sees the tokens of all rows as one: its shapes depend on how many
    there are in all, not on how long rows are, and are compiled once for all lengths."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), FeedForward(shape)
        self.input_layernorm = Norm(shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden)

    def before_attention(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values (heads or kv_heads, tokens, head_dim) of x (tokens, hidden)."""
        x = self.input_layernorm(x)[None]
        attention = self.self_attn
        return tuple(
            part[0]
            for part in (attention.queries(x, cos, sin), *attention.keys_values(x, cos, sin))
        )

    def after_attention(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) of out (tokens, heads * head_dim) and of what entered the layer."""
        x = x + self.self_attn.o_proj(out)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rows: int,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(tokens, hidden), or (wanted tokens, hidden), of x (tokens of all rows, hidden)."""
        q, k, v = (
            part.unflatten(1, (rows, -1)).transpose(0, 1)
            for part in self.before_attention(x, cos, sin)
        )
        out = attend(q, k, v, None if wanted is None else wanted.view(rows, -1))
        out = out.transpose(1, 2).flatten(0, 1).flatten(1)
        if wanted is not None:
            out, x = out[wanted], x[wanted]
        return self.after_attention(out, x)


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
        rows, flat = len(ids), None if wanted is None else wanted.flatten()
        cos, sin = turns(positions.flatten()[None], self.shape)
        x = self.embed_tokens(ids.flatten())
        for layer in self.layers[:-1]:
            if entered is not None:
                entered.append(x.unflatten(0, (rows, -1)))
            x = layer(x, cos, sin, rows)
        if entered is not None:
            entered.append(x.unflatten(0, (rows, -1)))
        x = self.norm(self.layers[-1](x, cos, sin, rows, flat))
        return x if flat is not None else x.unflatten(0, (rows, -1))

    def compile_parts(self) -> None:
        """Compile what lies between attentions, once for all layers and for each number of tokens
        that a step has. What comes after the last attention has another number in every step."""
        for layer in self.layers:
            layer.before_attention = torch.compile(layer.before_attention, dynamic=False)
        for layer in self.layers[:-1]:
            layer.after_attention = torch.compile(layer.after_attention, dynamic=False)

    def uncompile(self) -> None:
        for layer in self.layers:
            vars(layer).pop("before_attention", None)
            vars(layer).pop("after_attention", None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., vocab) of hidden (..., hidden)."""
        return F.linear(hidden, self.embed_tokens.weight)
