"""Where mass is lost on the way from the best tokens to the records that are asked for in time.

Each step takes the same number of tokens and gives up one more thing: tokens for pages, a choice
per query head for one per KV head and one per layer, pages for records, true masses for the near
plane's, the true query for the rehearsed one. Queries are those of the exact run.
"""

from __future__ import annotations

import torch
from approximate import BATCH, Setting, attend
from estimate import Estimate
from network import Network, Reading
from sealed import Sealed
from view import View

STEPS = (
    "tokens, per query head",
    "pages, per query head",
    "pages, per KV head",
    "pages, per layer",
    "records, per layer",
    "records, near plane",
    "records, rehearsed near plane",
)


def recalls(
    network: Network,
    reading: Reading,
    pages: list[Sealed],
    positions: torch.Tensor,
    budget: float,
    pages_per_record: int = 2,
) -> torch.Tensor:
    """(len(STEPS), num_positions, num_layers): the mass that is found, raw keys counted in, mean
    over query heads, with `budget` of the sealed tokens.
    """
    found = []
    for part in positions.split(BATCH):
        x = late = network.embed(reading.ids[part])
        per_layer = []
        for layer in range(network.num_layers):
            at = (network, reading, pages[layer], layer)
            view, rehearsed = (View(*at, r, part, pages_per_record) for r in (x, late))
            per_layer.append(_found(view, rehearsed, budget))
            out, _ = attend(view, view.is_sealed, Setting())
            late = network.after_attention(layer, x, out.transpose(0, 1))
            x = network.after_mlp(layer, late)
        found.append(torch.stack(per_layer, -1))
    return torch.cat(found, 1)


def _found(view: View, rehearsed: View, budget: float) -> torch.Tensor:
    """(len(STEPS), num_rows)."""
    scores, each = view.scores(), view.pages_per_record
    whole = torch.cat([scores.flatten(3), view.raw_scores], -1).logsumexp(-1, keepdim=True)
    tokens = (scores.flatten(3) - whole).exp()
    masses = tokens.unflatten(-1, scores.shape[-2:]).sum(-1)
    records = _by_record(masses, each)
    near, ahead = (
        _by_record(v.estimates(Estimate())[0].softmax(-1).nan_to_num(0), each)
        for v in (view, rehearsed)
    )
    over = {"group": 2, "layer": (0, 2)}
    num_tokens = (budget * view.ends).round().long()
    kept = (
        _taken(tokens, tokens, num_tokens),
        _taken(masses, masses, num_tokens // scores.shape[-1]),
        _taken(masses, masses.mean(over["group"], True), num_tokens // scores.shape[-1]),
        _taken(masses, masses.mean(over["layer"], True), num_tokens // scores.shape[-1]),
        _taken(records, records.mean(over["layer"], True), num_tokens // scores.shape[-1] // each),
        _taken(records, near.mean(over["layer"], True), num_tokens // scores.shape[-1] // each),
        _taken(records, ahead.mean(over["layer"], True), num_tokens // scores.shape[-1] // each),
    )
    raw = (view.raw_scores - whole).exp().sum(-1)
    return torch.stack([(part + raw).mean((0, 2)) for part in kept])


def _by_record(pages: torch.Tensor, pages_per_record: int) -> torch.Tensor:
    return pages.unflatten(-1, (-1, pages_per_record)).sum(-1)


def _taken(masses: torch.Tensor, wanted: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(kv_heads, num_rows, group): the masses (..., n) of the `counts` (num_rows,) best wanted."""
    order = wanted.expand_as(masses).argsort(dim=-1, descending=True, stable=True)
    so_far = masses.gather(-1, order).cumsum(-1)
    so_far = torch.cat([torch.zeros_like(so_far[..., :1]), so_far], -1)
    index = counts.clamp_max(masses.shape[-1]).view(1, -1, 1, 1)
    return so_far.gather(-1, index.expand(*masses.shape[:3], 1)).squeeze(-1)
