"""The Llama-type network that is trained, by itself and small enough to read.

Tensors are named as Hugging Face names them, less the leading "model.", so that export.py only
writes them down. Positions are given, never counted: training skips some. No cache, no sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """How large the network is."""

    vocab: int = 2048
    hidden: int = 160
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 448
    rope_theta: float = 500000.0
    max_positions: int = 32768


SHAPES = {
    "nano": Shape(),
    # Learns nothing; shows in a minute that everything runs.
    "tiny": Shape(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate=64),
}


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """x (batch, heads, tokens, head_dim), its halves rotated by positions (batch, tokens)."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = positions[..., None].float() * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, NORM_EPS)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            projection(x).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rope(q, positions, self.shape.rope_theta)
        k = rope(k, positions, self.shape.rope_theta)
        groups = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


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

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions)
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
                    std *= 0.5
                nn.init.normal_(parameter, 0, std)

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) of ids and positions (batch, tokens)."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, positions)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., vocab) of hidden (..., hidden)."""
        return hidden @ self.embed_tokens.weight.T


@torch.no_grad()
def look_back_from_birth(model: Model) -> None:
    """Make the query heads of KV head 0 in layer 0 attend to the token before them.

    Copying needs a head that looks back by one and a later one that finds what it saw. The second
    is learnt quickly where the first is there already: an hour of training on two cores was not
    enough to find both.
    """
    shape, attention = model.shape, model.layers[0].self_attn
    model.embed_tokens.weight[:, 0] = 0.1  # an input that is the same for every token
    half = shape.head_dim // 2
    theta = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    groups = shape.heads // shape.kv_heads
    strength = 1.65
    attention.k_proj.weight[: shape.head_dim] *= 0.02
    attention.q_proj.weight[: groups * shape.head_dim] *= 0.02
    for i in range(6):
        attention.k_proj.weight[i, 0] = strength
        attention.k_proj.weight[i + half, 0] = 0
        for head in range(groups):
            # The query is the key turned back by one position: the score peaks at distance 1.
            row = head * shape.head_dim + i
            attention.q_proj.weight[row, 0] = strength * math.cos(-theta[i])
            attention.q_proj.weight[row + half, 0] = strength * math.sin(-theta[i])
    attention.v_proj.weight[: shape.head_dim, 0] = 0
