"""Which experts a token goes through and what each of them counts, from a router's scores.

In the compiled kernel a row's bits depend on neither the other rows nor their number, and are those
of `RoutedStep`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import dispatch
from .gate import gate
from .step import vector_address
from .threads import num_threads


@dataclass(frozen=True)
class Groups:
    """Equal groups of neighbouring experts, of which `chosen` are in question for a token: those
    whose `best` highest scores have the largest sum."""

    count: int
    chosen: int
    best: int


@dataclass(frozen=True)
class Routing:
    """How experts are chosen.

    chosen: how many a token goes through; normalised: whether the shares of the chosen ones are
    made to sum to 1. by_sigmoid: scores are sigmoids, each on its own, not shares of one whole;
    bias_of_scores: whether the choice is by what sigmoids are of, and a bias added to that; groups:
    which limit the choice, None: nothing does; scaling: of the chosen ones' shares; least_sum:
    added to the sum that normalised sigmoids are divided by. sparse_mixer: see `_sparse_mixer`;
    with it two are chosen, and nothing else counts.
    """

    chosen: int
    normalised: bool = True
    by_sigmoid: bool = False
    bias_of_scores: bool = False
    groups: Groups | None = None
    scaling: float = 1.0
    least_sum: float = 1e-6
    sparse_mixer: float | None = None


def route(
    scores: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares and numbers of the chosen experts, each (n, chosen), the best first; ties go to the
    lowest number. scores: (n, count) float32, contiguous, used up. bias: (count,) float32, added to
    what is chosen by, alone; scale: (count,) float32, of each expert's share."""
    native = dispatch.compiled_for_floats(scores)
    if native is not None and routing.sparse_mixer is None:
        shares = torch.empty((len(scores), routing.chosen))
        numbers = torch.empty(shares.shape, dtype=torch.int64)
        described = routing_numbers(routing, scores.shape[1], bias, scale)
        assert scores.is_contiguous()
        native.route(
            *described,
            scores.data_ptr(),
            len(scores),
            numbers.data_ptr(),
            shares.data_ptr(),
            num_threads(),
        )
        return shares, numbers
    shares, numbers = _route(scores, routing, bias)
    return (shares if scale is None else shares * scale[numbers]), numbers


def routing_numbers(
    routing: Routing, count: int, bias: torch.Tensor | None, scale: torch.Tensor | None
) -> tuple[list[int], list[float]]:
    """Of `count` experts, as cpu/routing.h reads it. bias and scale must be kept alive."""
    r, groups = routing, routing.groups
    of_groups = (0, 0, 0) if groups is None else (groups.count, groups.chosen, groups.best)
    flags = r.by_sigmoid, r.normalised, r.bias_of_scores
    at = map(vector_address, (bias, scale))
    return [count, r.chosen, *of_groups, *map(int, flags), *at], [r.scaling, r.least_sum]


def _route(
    scores: torch.Tensor, routing: Routing, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if routing.sparse_mixer is not None:
        return _sparse_mixer(scores, routing.sparse_mixer)
    if routing.bias_of_scores:
        # Before sigmoids take the scores' place.
        worth = scores.clone() if bias is None else scores + bias
        shares = _sigmoid(scores)
    else:
        shares = _sigmoid(scores) if routing.by_sigmoid else scores.softmax(-1)
        worth = shares if bias is None else shares + bias
    if routing.groups is not None:
        worth = _within_groups(worth, routing.groups)
    numbers = worth.sort(stable=True, dim=-1, descending=True).indices[:, : routing.chosen]
    shares = shares.gather(-1, numbers)
    if routing.normalised:
        least = routing.least_sum if routing.by_sigmoid else 0.0
        shares = shares / (shares.sum(-1, keepdim=True) + least)
    return (shares if routing.scaling == 1 else shares * routing.scaling), numbers


def _sparse_mixer(scores: torch.Tensor, distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The two best experts. The weight of each is its share among those, itself included and the
    first one left out for the second, that are no further below it than `distance` times the
    larger of its score and their own magnitude (SparseMixer-v2, 2409.12136)."""
    left, shares, numbers = scores, [], []
    for _ in range(2):
        number = left.sort(stable=True, dim=-1, descending=True).indices[:, :1]
        best = left.gather(-1, number)
        far = (best - scores) > distance * torch.maximum(scores.abs(), best)
        shares.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, number))
        numbers.append(number)
        left = left.scatter(-1, number, -torch.inf)
    return torch.cat(shares, -1), torch.cat(numbers, -1)


def _sigmoid(scores: torch.Tensor) -> torch.Tensor:
    """In their place."""
    return gate(scores, torch.ones_like(scores), "sigmoid")


def _within_groups(worth: torch.Tensor, groups: Groups) -> torch.Tensor:
    """What experts (n, count) are worth, with the least of all where a group is not chosen."""
    grouped = worth.unflatten(-1, (groups.count, -1))
    best = grouped.topk(groups.best, -1).values.sum(-1)
    numbers = best.sort(stable=True, dim=-1, descending=True).indices[:, groups.chosen :]
    return grouped.scatter(
        1, numbers.unsqueeze(-1).expand(-1, -1, grouped.shape[-1]), -torch.inf
    ).flatten(1)
