"""The second half of a layer: a gated MLP for every row, or those of some experts that a router
chose for the row, and perhaps one more that all rows share.

Only chosen experts are multiplied, each once for all the rows of a cell that chose it. A row keeps
its place in the tile that it is multiplied in (its own modulo ROW_TILE), because its bits may
depend on that; which rows stand beside it changes nothing. Knows no norms and no residual.
"""

from __future__ import annotations

import torch

from ..kernels.gate import gate as gate_with
from ..kernels.matmul import ROW_TILE
from .model_config import Experts
from .rowwise import tiled
from .weights import LayerTensors

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_LEAST_SUM = 1e-6  # added to that of sigmoids, which may all be small
_DENSE = tuple(f"mlp.{name}" for name in _PROJECTIONS)


def dense_mlp(w: LayerTensors, h: torch.Tensor, rows: slice, activation: str, names=_DENSE):
    """down(activation(gate(h)) * up(h)) for h (n, hidden_size)."""
    gate, up, down = (
        lambda x, n=name: tiled(x, rows, w[f"{n}.weight"], w.get(f"{n}.bias")) for name in names
    )
    return down(gate_with(gate(h), up(h), activation))


def routed_mlp(w: LayerTensors, h: torch.Tensor, rows: slice, activation: str, experts: Experts):
    """The chosen experts' outputs for `rows` of h (n, hidden_size), weighted and added in the order
    of their numbers, and behind them the shared one's; other rows of the result are zero.
    """
    scores = tiled(h, rows, w[f"{experts.router}.weight"])
    bias = None if experts.bias is None else w[experts.bias]
    weights, chosen = _route(scores, experts, bias)
    asked = torch.zeros(h.shape[0], 1, dtype=torch.bool, device=h.device)
    asked[rows] = True
    out = torch.zeros_like(h)
    for number in chosen[rows].unique().tolist():
        hit = (chosen == number) & asked
        picked = hit.any(-1)
        names = [n.format(number) for n in (experts.gate, experts.up, experts.down)]
        places, count = _places(picked)
        gathered = h.new_zeros(count, h.shape[1])
        gathered[places] = h[picked]
        result = dense_mlp(w, gathered, slice(0, count), activation, names)
        share = (weights * hit).sum(-1, keepdim=True)[picked]
        out[picked] += result[places] * share
    if experts.shared_size:
        shared = dense_mlp(w, h, rows, activation, [f"{experts.shared}.{n}" for n in _PROJECTIONS])
        if experts.shared_gate is not None:
            shared *= tiled(h, rows, w[f"{experts.shared_gate}.weight"]).sigmoid()
        out[rows] += shared[rows]
    return out


def _route(
    scores: torch.Tensor, experts: Experts, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers of the chosen experts, each (n, chosen). Ties go to the lowest number."""
    shares = scores.sigmoid() if experts.by_sigmoid else scores.softmax(-1)
    worth = shares if bias is None else shares + bias
    numbers = worth.sort(stable=True, dim=-1, descending=True).indices[:, : experts.chosen]
    shares = shares.gather(-1, numbers)
    if experts.normalised:
        least = _LEAST_SUM if experts.by_sigmoid else 0.0
        shares = shares / (shares.sum(-1, keepdim=True) + least)
    return (shares if experts.scaling == 1 else shares * experts.scaling), numbers


def _places(picked: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where picked rows (n,) bool go in a buffer of whole tiles, and how many rows that has: row i
    goes to the first tile whose place i % ROW_TILE is free. Where there are no whole tiles, rows
    are multiplied whose bits depend on no place: one, or a few by the compiled kernels.
    """
    if len(picked) % ROW_TILE:
        count = int(picked.sum())
        return torch.arange(count, device=picked.device), count
    grid = picked.view(-1, ROW_TILE)
    tile = grid.long().cumsum(0) - 1
    places = tile * ROW_TILE + torch.arange(ROW_TILE, device=picked.device)
    return places[grid], int(tile.max() + 1) * ROW_TILE
