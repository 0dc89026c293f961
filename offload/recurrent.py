"""The first half of a layer that keeps a state: its input's projections, and what the kernels make
of them. The output projection is the decoder's. Knows no sequences: states come as arguments.
"""

from __future__ import annotations

import torch

from ..kernels.recurrence import RecurrentShape, RecurrentWeights, recur, short_conv
from .model_config import ModelConfig, Recurrence
from .rowwise import tiled
from .states import LayerState
from .weights import LayerTensors


class RecurrentLayer:
    """One layer with its tensors w."""

    def __init__(self, recurrence: Recurrence, w: LayerTensors):
        self._recurrence, self._w = recurrence, w
        shape, name = recurrence.shape, "conv" if recurrence.shape is None else "conv1d"
        conv = self._tensor(f"{name}.weight").view(recurrence.channels, recurrence.conv_width)
        self._conv, self._conv_bias = conv.T.contiguous(), self._tensor(f"{name}.bias")
        if shape is not None:
            self._weights = RecurrentWeights(
                self._conv,
                self._conv_bias,
                self._tensor("dt_bias"),
                -self._tensor("A_log").exp(),
                self._tensor("D"),
                self._tensor("norm.weight"),
            )

    def run(
        self, h: torch.Tensor, rows: slice, before: LayerState, after: LayerState
    ) -> torch.Tensor:
        """See Decoder.recur; h: the residual, normed."""
        shape = self._recurrence.shape
        if shape is None:
            mixed = self._project(h, rows, "in_proj")
            new = short_conv(mixed, self._conv, self._conv_bias, before[0], after[0])
        else:
            parts = self._parts(h, rows, shape)
            new = recur(shape, self._weights, *parts, before, after)
        if len(h) == len(new):
            return new
        out = h.new_zeros(len(h), new.shape[1])
        out[rows] = new
        return out

    def _parts(self, h: torch.Tensor, rows: slice, shape: RecurrentShape):
        """What goes into the convolution, steps, gains and the gate, of `rows`."""
        if not shape.is_delta:
            sizes = [shape.values, shape.channels, shape.heads]
            gate, mixed, steps = self._project(h, rows, "in_proj").split(sizes, -1)
            return mixed, steps, None, gate
        if not self._recurrence.by_heads:
            names = ("in_proj_qkv", "in_proj_a", "in_proj_b", "in_proj_z")
            return [self._project(h, rows, name) for name in names]
        each = shape.heads // shape.key_heads  # heads that share a key
        sizes = [shape.key_dim, shape.key_dim, each * shape.value_dim, each * shape.value_dim]
        *mixed, gate = self._by_heads(h, rows, "in_proj_qkvz", sizes)
        gains, steps = self._by_heads(h, rows, "in_proj_ba", [each, each])
        return torch.cat(mixed, -1), steps, gains, gate

    def _by_heads(self, h, rows: slice, name: str, sizes: list[int]) -> list[torch.Tensor]:
        """A projection in which the parts of these sizes take turns, key by key: each part."""
        out = self._project(h, rows, name)
        parts = out.view(len(out), -1, sum(sizes)).split(sizes, -1)
        return [part.flatten(1).contiguous() for part in parts]

    def _project(self, h: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        return tiled(h, rows, self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"))[rows]

    def _tensor(self, name: str):
        return self._w.get(f"{self._recurrence.module}.{name}")


class RecurrentLayers:
    """Of one model: a resident layer is prepared once, a streamed one whenever it is read again."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._made: dict[int, tuple[LayerTensors, RecurrentLayer]] = {}

    def of(self, layer: int, w: LayerTensors) -> RecurrentLayer:
        made = self._made.get(layer)
        if made is None or made[0] is not w:
            layer_of = RecurrentLayer(self._config.recurrence_of(layer), w)
            made = self._made[layer] = w, layer_of
        return made[1]
