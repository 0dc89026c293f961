"""Answers as bounded mode computes them, differentiable: what a selection of pages costs the model.

Beside the dense pass, a second residual stream runs for answers' rows of some cells. Its queries
attend as the runtime's do: to the first page and the cells around them raw, to the records that the
runtime would select in full, to all other pages as one token each, whose mass is estimated from
keys of few bits. So the model learns to put its attention where a selection finds it, and to answer
without the rest. Criterion and estimates are the runtime's (docs/design.md, "Bounded mode: what is
read"), less the rounding of what is attended in full. Scores of all pages are computed a few rows
at a time, and once more for the gradient: they would not fit in a cache, nor many in memory.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from model import Model, turns

PAGE, RECORD, CELL = 64, 128, 256  # tokens
KEY_BITS, NEAR_BITS, FINER_BITS, FINER_LAYERS = 8, 2, 3, 2
LEAST_ROWS = 16  # of a cell that is worth looking at all pages
FIRST_CELL = 3  # that has pages to select from, besides the first one
LEAST_AIM = 4  # records, however short the text
SCORES_AT_ONCE = 1 << 20


class Choice(NamedTuple):
    """epsilon: as bounded mode's; aim: the share of the records that should be enough to read."""

    epsilon: float
    aim: float


class Kept(NamedTuple):
    """What a selection leaves. wrong: (rows,) what the criterion says is wrong where only `aim` is
    read, differentiable; read: (rows,) the share of the records that epsilon selects."""

    wrong: torch.Tensor
    read: torch.Tensor


def draw_rows(counted: torch.Tensor, rng: random.Random, most_rows: int) -> torch.Tensor:
    """Counted rows of whole cells, drawn until there are most_rows, of counted (tokens,) of bool:
    tokens (n,), ascending."""
    per_cell = counted.unflatten(0, (-1, CELL)).sum(-1)
    cells = [c for c in range(FIRST_CELL, len(per_cell)) if per_cell[c] >= LEAST_ROWS]
    rng.shuffle(cells)
    drawn, num_rows = torch.zeros_like(per_cell, dtype=torch.bool), 0
    for cell in cells:
        if num_rows < most_rows:
            drawn[cell] = True
            num_rows += int(per_cell[cell])
    return (counted & drawn.repeat_interleave(CELL)).nonzero()[:, 0]


def near_keys(keys: torch.Tensor, bits: int) -> torch.Tensor:
    """What the first `bits` bits say of keys (kv_heads, tokens, head_dim): the middles of bins."""
    pages = keys.unflatten(1, (-1, PAGE))
    low, high = pages.amin(2, keepdim=True), pages.amax(2, keepdim=True)
    step = ((high - low) / (2**KEY_BITS - 1)).clamp_min(1e-12)
    width = 2 ** (KEY_BITS - bits)
    codes = ((pages - low) / step).round_().div_(width).floor_()
    codes.sub_((2**bits - 1) / 2).mul_(step * width).add_((low + high) / 2)
    return codes.flatten(1, 2)


class _PageScores(torch.autograd.Function):
    """q (kv_heads, rows, head_dim), keys (kv_heads, tokens, head_dim) and what their first bits say
    to the log mass and the unevenness (kv_heads, rows, pages) of pages. The gradient of what the
    bits say is the keys'; unevenness has none."""

    @staticmethod
    def _parts(q, coarse):
        step = max(1, SCORES_AT_ONCE // coarse[..., 0].numel())
        for begin in range(0, q.shape[1], step):
            rows = slice(begin, begin + step)
            scores = (q[:, rows] @ coarse.transpose(1, 2)).unflatten(-1, (-1, PAGE))
            yield rows, scores

    @staticmethod
    def forward(ctx, q, keys, coarse):
        ctx.save_for_backward(q, coarse)
        mass = q.new_empty(*q.shape[:2], coarse.shape[1] // PAGE)
        uneven = torch.empty_like(mass)
        for rows, scores in _PageScores._parts(q, coarse):
            greatest = scores.amax(-1, keepdim=True)
            scores.sub_(greatest).exp_()
            total = scores.sum(-1, keepdim=True)
            mass[:, rows] = (total.log() + greatest)[..., 0]
            uneven[:, rows] = scores.div_(total).sub_(1 / PAGE).abs_().sum(-1) / 2
        ctx.mark_non_differentiable(uneven)
        return mass, uneven

    @staticmethod
    def backward(ctx, upstream, _):
        q, coarse = ctx.saved_tensors
        q_grad, keys_grad = torch.empty_like(q), torch.zeros_like(coarse)
        for rows, scores in _PageScores._parts(q, coarse):
            weights = scores.softmax(-1).mul_(upstream[:, rows, :, None]).flatten(2)
            q_grad[:, rows] = weights @ coarse
            keys_grad += weights.transpose(1, 2) @ q[:, rows]
        return q_grad, keys_grad, None


class _Chosen(torch.autograd.Function):
    """Attention of q (rows, kv_heads, group, head_dim), each row to its own records of keys and
    values (kv_heads, records, RECORD, head_dim): the outputs, and the log mass of each. A row
    without records has no mass, and the first page, which is attended raw, has none either."""

    @staticmethod
    def _weights(q, keys, chosen):
        own = keys[:, chosen].flatten(1, 2)
        scores = q @ own.transpose(1, 2)
        if chosen[0] == 0:
            scores[..., :PAGE] = -torch.inf
        mass = scores.logsumexp(-1, keepdim=True)
        return own, scores.sub_(mass).exp_(), mass

    @staticmethod
    def forward(ctx, q, keys, values, chosen):
        ctx.save_for_backward(q, keys, values)
        ctx.chosen = [row.nonzero()[:, 0] for row in chosen]
        out, masses = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
        for row, records in enumerate(ctx.chosen):
            if len(records):
                _, weights, mass = _Chosen._weights(q[row], keys, records)
                out[row] = weights @ values[:, records].flatten(1, 2)
                masses[row] = mass[..., 0]
        ctx.out = out
        return out.clone(), masses

    @staticmethod
    def backward(ctx, out_grad, mass_grad):
        q, keys, values = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in (q, keys, values)]
        for row, records in enumerate(ctx.chosen):
            if not len(records):
                continue
            own, weights, _ = _Chosen._weights(q[row], keys, records)
            own_values = values[:, records].flatten(1, 2)
            upstream = out_grad[row]
            at_weights = upstream @ own_values.transpose(1, 2)
            inner = (upstream * ctx.out[row]).sum(-1, keepdim=True)
            scores = weights * (at_weights - inner + mass_grad[row, ..., None])
            grads[0][row] = scores @ own
            shape = (len(keys), len(records), RECORD, -1)
            grads[1].index_add_(1, records, (scores.transpose(1, 2) @ q[row]).view(shape))
            grads[2].index_add_(1, records, (weights.transpose(1, 2) @ upstream).view(shape))
        return *grads, None


def ranked(cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what each head gets wrong without each record, (heads, rows, records): each record's place
    in the order in which all heads together want them, and what is wrong where only those before a
    place are read; (rows, records) each."""
    order = cost.sum(0).sort(descending=True, stable=True).indices
    ordered = cost.gather(2, order.expand_as(cost))
    wrong = ordered.flip(-1).cumsum(-1).flip(-1).square().sum(0).sqrt()
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter_(1, order, places), wrong


class Heads(NamedTuple):
    """What the criterion knows of a layer besides its pages. norms: (heads,) of the output
    projection; residual: (rows,) the norm of what enters; bits: of near keys."""

    norms: torch.Tensor
    residual: torch.Tensor
    bits: int


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tokens: torch.Tensor,
    heads: Heads,
    choice: Choice,
) -> tuple[torch.Tensor, Kept]:
    """Scaled queries (heads, rows, head_dim) of tokens (rows,) of one cell, over keys and values
    (kv_heads, all tokens, head_dim): outputs of the shape of q, and what the selection leaves."""
    num_heads, num_rows, head_dim = q.shape
    kv_heads, cell = len(keys), int(tokens[0]) // CELL
    window, end = (cell - 1) * CELL, (cell + 1) * CELL
    by_kv = q.reshape(kv_heads, -1, head_dim)

    def weighted(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (weights.reshape(kv_heads, -1, weights.shape[-1]) @ values).view_as(q)

    raw_at = torch.cat([torch.arange(PAGE), torch.arange(window, end)]).to(q.device)
    raw_values = values[:, raw_at]
    raw = (by_kv @ keys[:, raw_at].transpose(1, 2)).view(num_heads, num_rows, -1)
    raw = raw.masked_fill(raw_at[None] > tokens[:, None], -torch.inf)
    raw_mass = raw.logsumexp(-1, keepdim=True)

    keys, values = keys[:, :window].contiguous(), values[:, :window].contiguous()
    coarse = near_keys(keys.detach(), heads.bits)
    mass, uneven = (
        part.view(num_heads, num_rows, -1) for part in _PageScores.apply(by_kv, keys, coarse)
    )
    first = torch.arange(mass.shape[-1], device=q.device) == 0  # is attended raw
    mass = mass.masked_fill(first, -torch.inf)
    with torch.no_grad():
        raw_out = weighted((raw - raw_mass).exp(), raw_values)
        off = raw_values - raw_values.mean(1, keepdim=True)
        spread = off.square().sum(-1).mean(-1).sqrt().repeat_interleave(num_heads // kv_heads)
        added = (heads.norms[:, None].square() * raw_out.square().sum(-1)).sum(0)
        effect = (heads.norms * spread)[:, None] / (added + heads.residual.square()).sqrt()
    total = torch.logaddexp(raw_mass, mass.logsumexp(-1, keepdim=True))
    cost = (mass - total).exp() * uneven * effect[..., None]
    cost = cost.unflatten(-1, (-1, RECORD // PAGE)).sum(-1)
    place, wrong = ranked(cost.detach())
    count = (wrong > choice.epsilon).sum(-1, keepdim=True)
    chosen, aimed = place < count, place < max(LEAST_AIM, round(choice.aim * cost.shape[-1]))
    left = cost.masked_fill(aimed, 0.0).sum(-1).square().sum(0)
    kept = Kept((left + 1e-8).sqrt(), count[:, 0] / cost.shape[-1])

    whole = chosen.repeat_interleave(RECORD // PAGE, -1)
    out, chosen_mass = _Chosen.apply(
        q.view(kv_heads, -1, num_rows, head_dim).permute(2, 0, 1, 3).contiguous(),
        keys.unflatten(1, (-1, RECORD)),
        values.unflatten(1, (-1, RECORD)),
        chosen,
    )
    out = out.permute(1, 2, 0, 3).reshape(q.shape)
    chosen_mass = chosen_mass.permute(1, 2, 0).reshape(num_heads, num_rows, 1)
    mass = mass.masked_fill(whole, -torch.inf)
    parts = torch.cat([raw_mass, chosen_mass, mass], -1)
    total = parts.logsumexp(-1, keepdim=True)
    means = values.unflatten(1, (-1, PAGE)).mean(2)
    out = out * (chosen_mass - total).exp() + weighted((raw - total).exp(), raw_values)
    return out + weighted((mass - total).exp(), means), kept


def hidden(
    model: Model,
    ids: torch.Tensor,
    positions: torch.Tensor,
    entered: list[torch.Tensor],
    tokens: torch.Tensor,
    choice: Choice,
) -> tuple[torch.Tensor, list[Kept]]:
    """(rows, hidden) of `tokens` (rows,) as bounded mode computes them, and what the selection of
    each layer leaves.

    ids and positions: (all tokens,) of one example; entered: what entered each layer of the dense
    pass, (all tokens, hidden). What is in rows of the stream is seen by the later ones.
    """
    shape = model.shape
    all_turns, own_turns = (turns(at[None], shape) for at in (positions, positions[tokens]))
    cells = [at.nonzero()[:, 0] for at in (tokens // CELL == (tokens // CELL).unique()[:, None])]
    x = model.embed_tokens(ids[tokens])
    kept = []
    for number, (layer, dense) in enumerate(zip(model.layers, entered, strict=True)):
        attention = layer.self_attn
        normed = layer.input_layernorm(x)[None]
        q = attention.queries(normed, *own_turns)[0].float() * shape.head_dim**-0.5
        own = attention.keys_values(normed, *own_turns)
        others = attention.keys_values(layer.input_layernorm(dense)[None], *all_turns)
        with torch.autocast(x.device.type, enabled=False):
            keys, values = (
                other[0].float().index_copy(1, tokens, mine[0].float())
                for other, mine in zip(others, own, strict=True)
            )
            weight = attention.o_proj.weight.detach().unflatten(1, (shape.heads, -1))
            norms = weight.square().sum((0, 2)).sqrt() / shape.head_dim**0.5
            residual = x.detach().float().norm(dim=-1)
            bits = FINER_BITS if number < FINER_LAYERS else NEAR_BITS
            parts = [
                attend(q[:, at], keys, values, tokens[at], Heads(norms, residual[at], bits), choice)
                for at in cells
            ]
        kept.append(Kept(*(torch.cat(part) for part in zip(*(p[1] for p in parts), strict=True))))
        out = torch.cat([part[0] for part in parts], 1)
        x = x + attention.o_proj(out.transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x), kept


def divergence(dense: torch.Tensor, bounded: torch.Tensor) -> torch.Tensor:
    """(rows,) KL of the distribution of bounded logits (rows, vocab) from that of dense ones."""
    wanted, found = dense.float().log_softmax(-1), bounded.float().log_softmax(-1)
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
