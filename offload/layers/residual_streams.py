"""Residual streams beside each other (AltUp, 2301.13310) before the first layer and behind the last
one: the others are made of the embedding, and in the end all become one. Each but the first has a
projection for either; they stay in memory. What a layer does with streams is altup.py's.
"""

from __future__ import annotations

import torch

from ..models.model_config import ModelConfig
from ..weights.packing import Kept
from .per_layer import PROJECTIONS
from .rowwise import row_means, tiled

_PROJECTIONS = "projections", "unembed_projections"
_LEAST = 1e-5  # mean square that a stream is divided by


def kept_names(config: ModelConfig) -> list[str]:
    """Tensors that belong to no layer and stay in memory, but for the final norm and the head."""
    inputs = PROJECTIONS if config.per_layer_inputs is not None else ()
    return [*inputs, *(name for which in _PROJECTIONS for name in _projections(config, which))]


def _projections(config: ModelConfig, which: str) -> list[str]:
    others = range(0 if config.altup is None else config.altup.streams - 1)
    return [f"model.altup_{which}.{number}.weight" for number in others]


class Streams:
    """Of one model that has some (ModelConfig.altup). kept: the tensors of `kept_names`."""

    def __init__(self, config: ModelConfig, kept: dict[str, Kept]):
        self._size = config.hidden_size
        self._inward, self._outward = (
            [kept[name] for name in _projections(config, which)] for which in _PROJECTIONS
        )

    def opened(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """(n, streams * hidden_size) of embeddings, which are `rows` of x (n, hidden_size)."""
        size = row_means(x.square(), rows).sqrt()
        others = (tiled(x, rows, weight) for weight in self._inward)
        return torch.cat([x, *(_scaled(other, size, rows) for other in others)], 1)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """(n, hidden_size) of residual rows (n, streams * hidden_size)."""
        first, *others = (part.contiguous() for part in x.split(self._size, 1))
        rows = slice(0, len(x))
        size, whole = row_means(first.square(), rows).sqrt(), first.clone()
        for other, weight in zip(others, self._outward, strict=True):
            whole += _scaled(tiled(other, rows, weight), size, rows)
        return whole / (1 + len(others))


def _scaled(x: torch.Tensor, size: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows x (n, hidden_size) that have the size (n, 1), which is the root of their mean square."""
    return x * size / row_means(x.square(), rows).clamp(min=_LEAST).sqrt()
