"""The second half of a layer: an MLP for every row, or those of some experts that a router
chose for the row, and perhaps one more that all rows share.

Only chosen experts are multiplied, each once for all the rows of a cell that chose it; a row alone
takes one call of the compiled kernels for each, where they serve. By the reference a row keeps its
place in the tile that it is multiplied in (its own modulo ROW_TILE), because its bits may depend on
that; which rows stand beside it changes nothing. Knows no norms and no residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...kernels.gate import ACTIVATIONS, activate, xielu
from ...kernels.gate import gate as gate_with
from ...kernels.matmul import ROW_TILE
from ...kernels.norm import Norm
from ...kernels.routed_step import Product, RoutedStep, SharedExpert
from ...kernels.routing import route
from ...kernels.step import add_expert, expert_numbers, native_for
from ..models.layer_config import XIELU_PARAMETERS, Experts
from ..weights.weights import LayerTensors
from .rowwise import row_means, tiled

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FEW_ROWS = 16


def dense_mlp(
    w: LayerTensors,
    h: torch.Tensor,
    rows: slice,
    activation: str,
    names: Sequence[str] | None = None,
    gate_multiplier: float = 1.0,
    gate_cutoff: float | None = None,
):
    """down(activation(gate(h)) * up(h)) for h (n, hidden_size), or, where w has no such gate,
    down(activation(up(h))). names: of gate, up and down, or of up and down; those of the dense MLP
    if left out. gate_cutoff: see ModelConfig.gate_cutoffs.
    """

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        return tiled(x, rows, w[f"{name}.weight"], w.get(f"{name}.bias"))

    *inward, down = names or _dense(w, "mlp")
    inner = [product(h, name) for name in inward]
    if activation == "xielu":
        parameters = (w[f"mlp.act_fn.{name}"] for name in XIELU_PARAMETERS)
        return product(xielu(inner[0], *parameters), down)
    if len(inner) == 1:
        return product(activate(inner[0], activation), down)
    gate, up = inner
    if gate_multiplier != 1:
        gate *= gate_multiplier
    if gate_cutoff is not None:
        gate = _above(gate, rows, gate_cutoff)
    return product(gate_with(gate, up, activation), down)


def _above(gate: torch.Tensor, rows: slice, deviations: float) -> torch.Tensor:
    """What each number of `rows` of the gate is above its row's mean and so many of its standard
    deviations, 0 of one that is below; in its place."""
    gate -= row_means(gate, rows)
    # torch's root of a float32 may have another last bit than that of C++; of a float64 it has not.
    deviation = row_means(gate.square(), rows).double().sqrt().float()
    return gate.sub_(deviation * deviations).clamp_(min=0)


def _dense(w: LayerTensors, mlp: str) -> list[str]:
    """The projections of the MLP of that name, of which all rows are multiplied."""
    first = 0 if f"{mlp}.gate_proj.weight" in w else 1
    return [f"{mlp}.{name}" for name in _PROJECTIONS[first:]]


class Cell(NamedTuple):
    """Rows that experts are chosen for. h: (n, hidden_size), what those are given; rows: of it,
    those that are asked for; by: (n, hidden_size), what they are chosen by, None: h."""

    h: torch.Tensor
    rows: slice
    by: torch.Tensor | None = None


def routed_mlp(w: LayerTensors, h: torch.Tensor, rows: slice, activation: str, experts: Experts):
    """The chosen experts' outputs for `rows` of h (n, hidden_size), weighted and added in the order
    of their numbers, and behind them the shared one's; other rows of the result are zero.
    """
    return routed_mlps(w, [Cell(h, rows)], activation, experts)[0]


def routed_mlps(
    w: LayerTensors, cells: list[Cell], activation: str, experts: Experts
) -> list[torch.Tensor]:
    """`routed_mlp` of several cells, to the bit; each expert is brought once for all of them."""
    if experts.latent is not None:
        return _within_latent(w, cells, activation, experts)
    routed = [_Routed(w, cell, experts) for cell in cells]
    h = cells[0].h
    native = native_for(h) if len(cells) == 1 and h.shape[0] == 1 else None
    if native is not None:
        return [_one_row(native, w, h.contiguous(), activation, experts, routed[0])]
    # A few rows are verified: what they chose the next ones may choose again.
    is_few = sum(cell.h.shape[0] for cell in routed) <= _FEW_ROWS
    numbers = sorted(set().union(*(cell.numbers() for cell in routed)))
    for number, own in w.experts(numbers, keeps=is_few):
        for cell in routed:
            cell.add(own, activation, experts, number)
    for cell in routed:
        _add_shared(w, cell.h, cell.rows, activation, experts, cell.out)
    return [cell.out for cell in routed]


def _within_latent(
    w: LayerTensors, cells: list[Cell], activation: str, experts: Experts
) -> list[torch.Tensor]:
    """`routed_mlps` of experts that are given a latent, which stand between two projections; the
    shared one stands beside them."""
    into, out = _latent_products(w, experts)
    latents = [Cell(tiled(h, rows, *into), rows, h if by is None else by) for h, rows, by in cells]
    given = routed_mlps(w, latents, activation, experts.routed_alone)
    outs = []
    for (h, rows, _), latent in zip(cells, given, strict=True):
        whole = torch.zeros_like(h)
        whole[rows] = tiled(latent, rows, *out)[rows]
        _add_shared(w, h, rows, activation, experts, whole)
        outs.append(whole)
    return outs


def _latent_products(w: LayerTensors, experts: Experts) -> list[Product]:
    """What stands before and behind experts that are given a latent."""
    assert experts.latent is not None
    return [(w[f"{p}.weight"], w.vector_or_none(f"{p}.bias")) for p in experts.latent.projections]


class _Routed:
    """The rows of a cell, which experts each chose, and what comes of it: `out`."""

    def __init__(self, w: LayerTensors, cell: Cell, experts: Experts):
        self.h, self.rows, by = cell
        self.weights, self.chosen = _chosen(w, self.h if by is None else by, cell.rows, experts)
        self.out = torch.zeros_like(self.h)
        self._asked = torch.zeros(len(self.h), 1, dtype=torch.bool, device=self.h.device)
        self._asked[cell.rows] = True

    def numbers(self) -> list[int]:
        """The experts that some row chose."""
        return self.chosen[self.rows].unique().tolist()

    def add(self, own: LayerTensors, activation: str, experts: Experts, number: int) -> None:
        """What an expert with tensors `own` gives to the rows that chose it."""
        hit = (self.chosen == number) & self._asked
        picked = hit.any(-1)
        if not picked.any():
            return
        share = (self.weights * hit).sum(-1, keepdim=True)[picked]
        given = self.h[picked]
        if experts.weighs_input:
            given, share = given * share, 1.0
        if native_for(self.h) is not None:  # whose rows have the same bits in any place
            result = _expert(own, given, activation, experts, number)
            self.out[picked] += result * share
            return
        places, count = _places(picked)
        gathered = self.h.new_zeros(count, self.h.shape[1])
        gathered[places] = given
        result = _expert(own, gathered, activation, experts, number)
        self.out[picked] += result[places] * share


def _add_shared(
    w: LayerTensors, h: torch.Tensor, rows: slice, activation: str, experts: Experts, out
) -> None:
    """What the shared expert gives for `rows` of h, if there is one, to those of `out`."""
    if not experts.shared_size:
        return
    shared = dense_mlp(w, h, rows, activation, _dense(w, experts.shared))
    if experts.shared_gate is not None:
        shared *= _shared_share(w, h, rows, experts)
    if experts.shared_scaling != 1:
        shared *= experts.shared_scaling
    out[rows] += shared[rows]


def _one_row(native, w: LayerTensors, h, activation: str, experts: Experts, routed: _Routed):
    """The same for one row, an expert in one call."""

    def add(own: LayerTensors, paths: list[str], x: torch.Tensor, share: float, out) -> None:
        add_expert(native, _numbers(own, paths), x, share, activation, out)

    chosen, weights = routed.chosen[0].tolist(), routed.weights[0].tolist()
    shares, out = dict(sorted(zip(chosen, weights, strict=True))), routed.out
    # Where some are read they come in any order, and are added in that of their numbers: what is
    # added to zeros first has the same bits.
    apart = {number: torch.zeros_like(out) for number in shares} if w.apart is not None else {}
    for number, own in w.experts(list(shares), keeps=True, at_hand_first=True):
        given, share = (h * shares[number], 1.0) if experts.weighs_input else (h, shares[number])
        add(own, _paths(experts, number), given, share, apart.get(number, out))
    for given in apart.values():
        out += given
    if experts.shared_size:
        share = experts.shared_scaling
        if experts.shared_gate is not None:
            share *= _shared_share(w, h, slice(0, 1), experts).item()
        add(w, _dense(w, experts.shared), h, share, out)
    return out


def routed_step(
    w: LayerTensors, activation: str, experts: Experts, norm_eps: float
) -> RoutedStep | None:
    """`routed_mlp` of one row as a part of a token's step; None where the compiled kernels do not
    serve, or where not all of it lies in memory. Made once: for every expert it takes a while.
    """
    is_other = experts.sparse_mixer is not None or activation not in ACTIVATIONS
    if is_other or w.apart is not None:
        return None
    native = None if w.routed_step is not None else native_for(*w.values())
    if native is not None:
        w.routed_step = _make_routed_step(native, w, activation, experts, norm_eps)
    return w.routed_step


def _make_routed_step(
    native, w: LayerTensors, activation: str, experts: Experts, norm_eps: float
) -> RoutedStep:
    shared, router = None, experts.router
    if experts.shared_size:
        name = experts.shared_gate
        gate = None if name is None else w[f"{name}.weight"]
        numbers = _found_numbers(w, _dense(w, experts.shared))
        shared = SharedExpert(numbers, gate, experts.shared_scaling)
    bias, scale = _beside_scores(w, experts)
    return RoutedStep(
        native,
        (w[f"{router}.weight"], w.vector_or_none(f"{router}.bias")),
        None if experts.router_scale is None else Norm(router_norm(w, experts), 0.0, norm_eps),
        None if experts.latent is None else _latent_products(w, experts),
        experts.routing,
        bias,
        scale,
        [_found_numbers(w, _paths(experts, number)) for number in range(experts.count)],
        shared,
        activation,
        experts.weighs_input,
        list(w.values()),  # not `w`, which keeps the step
    )


def router_norm(w: LayerTensors, experts: Experts) -> torch.Tensor:
    """What experts are chosen by is the residual, normed by this weight, (hidden_size,)."""
    assert experts.router_scale is not None
    scale = w.vector(experts.router_scale)
    return scale * len(scale) ** -0.5


def _beside_scores(
    w: LayerTensors, experts: Experts
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What `route` takes beside scores: the bias and the scale of each expert."""

    def numbers(name: str | None) -> torch.Tensor | None:
        return None if name is None else w.vector(name).flatten().float()

    return numbers(experts.bias), numbers(experts.expert_scale)


def _paths(experts: Experts, number: int) -> list[str]:
    """The names of an expert's projections."""
    return [path.format(number) for path in (*experts.inward, experts.down)]


def _numbers(w: LayerTensors, paths: list[str]) -> list[int]:
    """As `_found_numbers`, found once."""
    numbers = w.expert_numbers.get(paths[-1])
    if numbers is None:
        numbers = w.expert_numbers[paths[-1]] = _found_numbers(w, paths)
    return numbers


def _found_numbers(w: LayerTensors, paths: list[str]) -> list[int]:
    """An MLP's tensors as kernels.step has them."""
    return expert_numbers(
        [(w[f"{path}.weight"], w.vector_or_none(f"{path}.bias")) for path in paths]
    )


def _shared_share(w: LayerTensors, h: torch.Tensor, rows: slice, experts: Experts) -> torch.Tensor:
    """How much of the shared expert counts for each row, (n, 1)."""
    return _sigmoid(tiled(h, rows, w[f"{experts.shared_gate}.weight"]))


def _expert(w: LayerTensors, h: torch.Tensor, activation: str, experts: Experts, number: int):
    """The output of one expert for all rows of h (n, hidden_size)."""
    rows = slice(0, len(h))
    if experts.gate_up is None:
        names = [name.format(number) for name in (*experts.inward, experts.down)]
        return dense_mlp(w, h, rows, activation, names)
    name, down = experts.gate_up.format(number), experts.down.format(number)
    both = tiled(h, rows, w[f"{name}.weight"], w.get(f"{name}.bias"))
    gate, up = (both[:, i::2].contiguous() for i in (0, 1))
    inner = gate_with(gate, up, activation)
    return tiled(inner, rows, w[f"{down}.weight"], w.get(f"{down}.bias"))


def chosen_experts(w: LayerTensors, h: torch.Tensor, experts: Experts) -> list[int]:
    """The experts that the router chooses for a row h (1, hidden_size), in no certain order."""
    return _chosen(w, h, slice(0, 1), experts)[1][0].tolist()


def _chosen(w: LayerTensors, h: torch.Tensor, rows: slice, experts: Experts):
    """As `route` has them, of `rows` of h (n, hidden_size)."""
    router = experts.router
    scores = tiled(h, rows, w[f"{router}.weight"], w.get(f"{router}.bias"))
    return route(scores, experts.routing, *_beside_scores(w, experts))


def _sigmoid(scores: torch.Tensor) -> torch.Tensor:
    """In their place. The kernel's: torch's of a few numbers has other bits than of many."""
    return gate_with(scores, torch.ones_like(scores), "sigmoid")


def _places(picked: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where picked rows (n,) bool go in a buffer of whole tiles, and how many rows that has: row i
    goes to the first tile whose place i % ROW_TILE is free. A row alone is one.
    """
    if len(picked) == 1:
        return torch.zeros(1, dtype=torch.long, device=picked.device), 1
    grid = picked.view(-1, ROW_TILE)
    tile = grid.long().cumsum(0) - 1
    places = tile * ROW_TILE + torch.arange(ROW_TILE, device=picked.device)
    return places[grid], int(tile.max() + 1) * ROW_TILE
