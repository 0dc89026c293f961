"""The Llama-type network that is trained, by itself and small enough to read.

Tensors are named as Hugging Face names them, less the leading "model.", so that export.py only
writes them down. Positions are given, never counted: training skips some. No cache, no sampling.
Runs on any device; under autocast its matrix products are bfloat16.
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

    vocab: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 640
    # So large that half the dimensions of a head hardly turn within max_positions: what a head
    # finds by content it finds at any distance.
    rope_theta: float = 1e9
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

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            projection(x).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        groups = self.shape.heads // self.shape.kv_heads
        q, k = rope(q, cos, sin), rope(k, cos, sin)
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

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
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

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) of ids and positions (batch, tokens)."""
        cos, sin = turns(positions, self.shape)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., vocab) of hidden (..., hidden)."""
        return F.linear(hidden, self.embed_tokens.weight)


@torch.no_grad()
def copy_from_birth(model: Model) -> None:
    """Make the network copy before it has learnt anything: an induction head by hand.

    Query heads of KV head 0 in layer 0 attend to the tokens one, two, ... before theirs and write
    down which they are. Layer 1 asks, in the dimensions that hardly turn with distance, for the
    place whose earlier tokens are the present ones, and says what stands there. Training starts
    from this circuit instead of having to find it.
    """
    shape = model.shape
    draw = torch.Generator().manual_seed(1)
    model.embed_tokens.weight[:, 0] = CONSTANT
    seen = _projection(shape, draw)
    written = [_projection(shape, draw) for _ in range(shape.heads // shape.kv_heads)]
    _look_back(model.layers[0].self_attn, seen, written)
    _look_for(model.layers[1].self_attn, seen, written, draw)


# An input that is the same for every token; the others are about 0.02 before the first norm.
CONSTANT = 0.1
# The score of the token looked back at; what layer 0 adds of it to the others' 0.02; how sharply
# layer 1 looks; what it adds of the token that it found.
PEAK, WRITE, SHARPNESS, COPY = 60.0, 0.04, 3.0, 0.15


def _projection(shape: Shape, draw: torch.Generator) -> torch.Tensor:
    """(head_dim, hidden), random, blind to the constant input."""
    matrix = torch.randn(shape.head_dim, shape.hidden, generator=draw) * shape.hidden**-0.5
    matrix[:, 0] = 0
    return matrix


def _frequencies(shape: Shape) -> torch.Tensor:
    return 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)


def _look_back(attention: Attention, seen: torch.Tensor, written: list[torch.Tensor]) -> None:
    """Write `seen` of the token `distance` back where written[distance - 1] reads it."""
    shape = attention.shape
    dim, half, theta = shape.head_dim, shape.head_dim // 2, _frequencies(shape)
    constant = CONSTANT / math.sqrt((CONSTANT**2 + shape.hidden * 0.0004) / shape.hidden)
    turning = min(4, half)
    # Each turning pair adds strength^2 cos(angle) / sqrt(dim) to the score.
    strength = math.sqrt(PEAK / turning * math.sqrt(dim)) / constant
    attention.k_proj.weight[:dim] = 0
    attention.q_proj.weight[: len(written) * dim] = 0
    attention.v_proj.weight[:dim] = seen
    attention.k_proj.weight[:turning, 0] = strength
    for head, target in enumerate(written):
        for pair in range(turning):
            # The query is the key turned back by the distance: the score peaks there.
            row, angle = head * dim + pair, -(head + 1) * theta[pair]
            attention.q_proj.weight[row, 0] = strength * math.cos(angle)
            attention.q_proj.weight[row + half, 0] = strength * math.sin(angle)
        attention.o_proj.weight[:, head * dim : (head + 1) * dim] = WRITE * target.T


def _look_for(
    attention: Attention, seen: torch.Tensor, written: list[torch.Tensor], draw: torch.Generator
) -> None:
    """Attend where the tokens one and two back are the present one and the one before it."""
    shape = attention.shape
    dim, groups = shape.head_dim, shape.heads // shape.kv_heads
    still = (_frequencies(shape).repeat(2) * shape.max_positions < 0.5).nonzero()[:, 0]
    for kv_head in range(shape.kv_heads):
        mixes = [torch.randn(len(still), dim, generator=draw) * dim**-0.5 for _ in range(2)]
        key = mixes[0] @ written[0]
        query = mixes[0] @ seen
        if groups > 1:
            key += mixes[1] @ written[1]
            query += mixes[1] @ written[0]
        value = _projection(shape, draw)
        keys = slice(kv_head * dim, (kv_head + 1) * dim)
        attention.k_proj.weight[keys] *= 0.1
        attention.k_proj.weight[still + kv_head * dim] = key
        attention.v_proj.weight[keys] = value
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            rows = slice(head * dim, (head + 1) * dim)
            attention.q_proj.weight[rows] *= 0.1
            attention.q_proj.weight[still + head * dim] = SHARPNESS * query
            attention.o_proj.weight[:, rows] = COPY * value.T / groups
