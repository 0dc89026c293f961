"""What layers that keep a state have in common: their tensors, their norm, and products with rows
of a cell. Each kind is a subclass: recurrent.py, scan_layer.py. The output projection is the
decoder's. Knows no sequences: states come as arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...kernels.norm import Norm
from ...kernels.state_step import Product, StateStep
from ..models.model_config import ModelConfig
from ..weights.packing import Kept, unquantised
from ..weights.weights import LayerTensors
from .rowwise import tiled
from .states import LayerState

# replay(row, before, after): `after` becomes the state behind one of several rows, given the state
# before it. To the bit what the layer made of all of them on its way.
Replay = Callable[[int, LayerState, LayerState], None]


class StateLayer:
    """One layer with its tensors w. step: what serves a single row in one call of the compiled
    kernels, or None where they do not serve."""

    step: StateStep | None = None
    _conv: tuple[torch.Tensor, torch.Tensor | None]  # see `_convolution`

    def __init__(self, config: ModelConfig, layer: int, w: LayerTensors):
        recurrence, norm_name = config.recurrence_of(layer), config.norms_of(layer).before_attention
        assert recurrence is not None
        self._recurrence = recurrence
        self._module: dict[str, Kept] = {}
        prefix = f"{recurrence.module}."
        for name, tensor in w.items():
            if name.startswith(prefix):
                self._module[name.removeprefix(prefix)] = tensor
        norm, offset = w.vector(f"{norm_name}.weight"), config.norm_offset
        if recurrence.input_multiplier != 1:
            norm, offset = (norm + offset) * recurrence.input_multiplier, 0.0
        self._norm = Norm(norm, offset, config.norm_eps)

    def run(
        self, x: torch.Tensor, rows: slice, before: LayerState, after: LayerState
    ) -> torch.Tensor:
        """See Decoder.recur."""
        if len(x) == 1 and self.step is not None:
            return self.step.run(x, before, after)
        return placed(self._new_rows(x, rows, before, after)[0], rows, len(x))

    def run_several(
        self, x: torch.Tensor, before: LayerState, after: LayerState, *, keeps: bool
    ) -> tuple[torch.Tensor, Replay]:
        """The same of all rows, and what makes the state behind some of them again. keeps: whether
        the layer's tensors stay where they are until then."""
        if not keeps:
            self._own_numbers()
        return self._new_rows(x, slice(0, len(x)), before, after)

    def _new_rows(
        self, x: torch.Tensor, rows: slice, before: LayerState, after: LayerState
    ) -> tuple[torch.Tensor, Replay]:
        """Of `rows` alone, see `run_several`."""
        raise NotImplementedError

    def _own_numbers(self) -> None:
        """Copy what a Replay needs of the layer's tensors, whose place others will take."""
        weights, bias = self._conv
        self._conv = weights.clone(), None if bias is None else bias.clone()

    def _numbers(self, name: str) -> torch.Tensor:
        return unquantised(self._module[name])

    def _numbers_or_none(self, name: str) -> torch.Tensor | None:
        return self._numbers(name) if name in self._module else None

    def _product(self, name: str) -> Product:
        return self._module[f"{name}.weight"], self._numbers_or_none(f"{name}.bias")

    def _times(self, name: str, h: torch.Tensor, rows: slice) -> torch.Tensor:
        """`rows` of h (n, in), multiplied with a projection."""
        return tiled(h, rows, *self._product(name))[rows]

    def _convolution(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights (conv_width, channels) and biases (channels,)."""
        r = self._recurrence
        conv = self._numbers(f"{name}.weight").view(r.channels, r.conv_width)
        return conv.T.contiguous(), self._numbers_or_none(f"{name}.bias")


def placed(new: torch.Tensor, rows: slice, count: int) -> torch.Tensor:
    """(count, width) with `new` at `rows` and zeros elsewhere."""
    if count == len(new):
        return new
    out = new.new_zeros(count, new.shape[1])
    out[rows] = new
    return out
