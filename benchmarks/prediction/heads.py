"""Which heads retrieve: measured by tokens drawn at random and said twice (RazorAttention,
2407.15891, section 3). Nothing but the first time can tell what comes next.

echo       attention to the place where the same token stood
induction  attention to the place after it, which holds the token that comes next
"""

from __future__ import annotations

import torch
from network import Network

NUM_TOKENS = 1024  # drawn; the sequence is twice as long


def retrieval(network: Network, seed: int = 0) -> torch.Tensor:
    """(2, num_layers, kv_heads, group): mean mass on echoes and on inductions, 0..1."""
    drawn = torch.Generator().manual_seed(seed)
    vocabulary = len(network.weights["embed_tokens.weight"])
    ids = torch.randint(16, vocabulary, (NUM_TOKENS,), generator=drawn).repeat(2)
    reading, positions = network.read(ids), torch.arange(NUM_TOKENS, 2 * NUM_TOKENS)
    later = torch.arange(2 * NUM_TOKENS) > positions[:, None]
    x, found = network.embed(ids[positions]), []
    rows = torch.arange(NUM_TOKENS)
    for layer in range(network.num_layers):
        q = network.query(layer, x, positions).permute(1, 2, 0, 3)  # (kv_heads, group, rows, d)
        scores = q @ reading.keys[layer][:, None].mT
        weights = scores.masked_fill_(later, -torch.inf).softmax(-1)
        echo, induction = (weights[:, :, rows, rows + step].mean(-1) for step in (0, 1))
        found.append(torch.stack([echo, induction]))
        out = weights @ reading.values[layer][:, None]
        x = network.after_mlp(layer, network.after_attention(layer, x, out.permute(2, 0, 1, 3)))
    return torch.stack(found, 1)
