"""What the network is born with: it finds the place that reads like the present one, and copies.

Layer 0 writes into every token which tokens stood one, two, three and four before it, and, less
exactly, which stood about six and about ten before; slowly turning pairs keep it from looking at
far places, where the quick ones come round again. Layer 1 looks for the place whose past is the
present token with its past, and says what stands there. "The Leeds mill belongs to" is thus
continued as the document does, and not as "the York mill belongs to". Training starts from this
circuit instead of having to find it. Knows no text.
"""

from __future__ import annotations

import math

import torch
from model import Model, Shape

# An input that is the same for every token; the others are about 0.02 before the first norm.
CONSTANT = 0.1
# How far back the heads of layer 0 look, how sharply, and how much each counts in layer 1. The
# last two see a few tokens about that place.
BACK = (1.0, 2.0, 3.0, 4.0, 6.0, 10.0)
PEAKS = (60.0, 60.0, 60.0, 60.0, 20.0, 20.0)
COUNTS = (1.0, 0.9, 0.6, 0.5, 0.7, 0.5)
# What each slow pair of layer 0 adds to the score of a token near by: far ones get less, down to
# the negative of it. Pairs that tell neighbours from each other come round within 1,118 tokens. A
# network that was trained without keeps more of its answers with less.
NEARNESS, TRAINED_NEARNESS = 16.0, 4.0
SHARPNESS, COPY = 10.0, 0.3  # of layer 1: how sharply it looks, what it adds of what it found
# The last norm's weights: how surely the network says what it found. With 1 the first steps of
# training have nothing to do but to raise it, and break the circuit meanwhile.
SURENESS = 4.0


class _Room:
    """Which dimensions of the hidden state hold what: one input that is constant, the token
    itself, and a code of a few dimensions for each token looked back at."""

    def __init__(self, shape: Shape):
        self.num_codes = min(shape.heads, len(BACK))
        self.code = min(shape.head_dim, 9 * shape.hidden // (16 * self.num_codes))
        self.begin = shape.hidden - self.num_codes * self.code
        self.token = slice(1, self.begin)

    def of(self, code: int) -> slice:
        return slice(self.begin + code * self.code, self.begin + (code + 1) * self.code)


@torch.no_grad()
def copy_from_birth(model: Model) -> None:
    """Put the circuit into a new `model`; what it does not need stays random."""
    shape, room = model.shape, _Room(model.shape)
    draw = torch.Generator().manual_seed(1)
    embedding = model.embed_tokens.weight
    embedding[:, 0] = CONSTANT
    embedding[:, room.begin :] = 0
    model.norm.weight.fill_(SURENESS)
    # (code, hidden): a token's code, from its embedding.
    coder = torch.zeros(room.code, shape.hidden)
    coder[:, room.token] = _directions(room.begin - 1, room.code, draw).T
    _look_back(model, room, coder)
    _look_for(model, room, coder, draw)
    look_near(model)


@torch.no_grad()
def look_near(model: Model, nearness: float = NEARNESS) -> None:
    """Turn the heads of layer 0 away from far tokens, also in a model that was born without.

    Heads that look back by pairs that turn quickly look at every place where these come round: with
    nine tenths of their attention, in 28,000 tokens. Two slower pairs, which see all near places
    alike, cost such places half of `nearness` and mostly more, between them.
    """
    shape, layer = model.shape, model.layers[0]
    dim, turning = shape.head_dim, _turning(shape)
    slow = (turning <= 0.004) & (turning * shape.max_positions > 4)
    # The direction in which all tokens are most nearly 1.
    tokens = layer.input_layernorm(model.embed_tokens.weight).double()
    squares = tokens.T @ tokens / len(tokens) + 1e-3 * torch.eye(shape.hidden).to(tokens)
    constant = torch.linalg.solve(squares, tokens.mean(0))
    constant = (constant / (tokens @ constant).mean()).float()
    for projection, size in (
        (layer.self_attn.q_proj, nearness * math.sqrt(dim)),
        (layer.self_attn.k_proj, 1.0),
    ):
        heads = projection.weight.unflatten(0, (-1, 2, dim // 2))
        heads[:, 0, slow], heads[:, 1, slow] = size * constant, 0.0


def _directions(dims: int, count: int, draw: torch.Generator) -> torch.Tensor:
    """(dims, count): unit vectors, at right angles where there is room for it."""
    drawn = torch.randn(dims, count, generator=draw)
    return torch.linalg.qr(drawn)[0] if count <= dims else drawn * dims**-0.5


def _turning(shape: Shape) -> torch.Tensor:
    """By what angle each pair of a head's dimensions turns from one position to the next."""
    return shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)


def _embedding_size(model: Model, room: _Room) -> float:
    return model.embed_tokens.weight[:, room.token].norm(dim=-1).mean().item()


def _look_back(model: Model, room: _Room, coder: torch.Tensor) -> None:
    """Layer 0: head i writes the code of the token BACK[i] before, as large as an embedding."""
    shape, attention = model.shape, model.layers[0].self_attn
    dim, half, turning = shape.head_dim, shape.head_dim // 2, _turning(shape)
    embedding = model.embed_tokens.weight
    normed = embedding * torch.rsqrt(embedding.square().mean(-1, keepdim=True))
    constant = normed[:, 0].mean().item()
    size = _embedding_size(model, room) / (normed @ coder.T).norm(dim=-1).mean().item()
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection.weight.zero_()
    near = turning > 0.004  # slower pairs do not tell neighbours from each other
    for kv_head in range(shape.kv_heads):
        attention.v_proj.weight[kv_head * dim : kv_head * dim + room.code] = coder
        attention.k_proj.weight[kv_head * dim : kv_head * dim + half, 0] = near / constant
    for head in range(room.num_codes):
        back, peak = BACK[head], PEAKS[head]
        exact = peak == max(PEAKS)
        pairs = range(min(4, half)) if exact else (near & (turning < 0.4)).nonzero()[:, 0].tolist()
        # Each pair adds strength cos(angle) / sqrt(dim) to the score: the most, `back` before.
        strength = peak / len(pairs) * math.sqrt(dim) / constant
        for pair in pairs:
            row, angle = head * dim + pair, -back * turning[pair].item()
            attention.q_proj.weight[row, 0] = strength * math.cos(angle)
            attention.q_proj.weight[row + half, 0] = strength * math.sin(angle)
        rows = torch.arange(room.code)
        attention.o_proj.weight[room.begin + head * room.code + rows, head * dim + rows] = size


def _look_for(model: Model, room: _Room, coder: torch.Tensor, draw: torch.Generator) -> None:
    """Layer 1: attend where the earlier tokens are the present one and those before it."""
    shape, attention = model.shape, model.layers[1].self_attn
    dim, groups, hidden = shape.head_dim, shape.heads // shape.kv_heads, shape.hidden
    still = (_turning(shape).repeat(2) * shape.max_positions < 0.5).nonzero()[:, 0]
    token = _embedding_size(model, room)
    squares = CONSTANT**2 + (1 + room.num_codes) * token**2
    code_size = token / math.sqrt(squares / hidden)  # behind the norm
    own = math.sqrt((room.begin - 1) / room.code)  # `coder` shortens an embedding by this
    gain = math.sqrt(SHARPNESS * math.sqrt(dim)) / code_size
    attention.q_proj.weight *= 0.02
    attention.k_proj.weight *= 0.02
    for kv_head in range(shape.kv_heads):
        key, query = torch.zeros(len(still), hidden), torch.zeros(len(still), hidden)
        for code in range(room.num_codes):
            mix = torch.randn(len(still), room.code, generator=draw) * len(still) ** -0.5
            mix *= math.sqrt(COUNTS[code])
            key[:, room.of(code)] = mix
            if code == 0:
                query += own * mix @ coder
            else:  # one token nearer to the query, but for those that are not exact
                exact = PEAKS[code] == max(PEAKS)
                query[:, room.of(code - 1 if exact else code)] += mix
        value = torch.zeros(dim, hidden)
        value[:, room.token] = _directions(room.begin - 1, dim, draw).T
        attention.k_proj.weight[still + kv_head * dim] = gain * key
        attention.v_proj.weight[kv_head * dim : (kv_head + 1) * dim] = value
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            rows = slice(head * dim, (head + 1) * dim)
            attention.q_proj.weight[still + head * dim] = gain * query
            attention.o_proj.weight[:, rows] = COPY * value.T / shape.heads
