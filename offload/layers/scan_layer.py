"""The first half of a layer with Mamba's selective scan: norm, projections, the convolution, what
steps, keys and queries are made of its outputs, and the scan. See state_layer.py.
"""

from __future__ import annotations

import torch

from ...kernels.norm import Norm, normed
from ...kernels.scan import ScanTokens, scan, silu_conv
from ...kernels.state_step import StateStep, scan_step
from ...kernels.step import native_for
from ..models.layer_config import ScanShape
from ..models.model_config import ModelConfig
from ..weights.weights import LayerTensors
from .state_layer import Replay, StateLayer, placed
from .states import LayerState


class ScanLayer(StateLayer):
    """See StateLayer."""

    def __init__(self, config: ModelConfig, layer: int, w: LayerTensors):
        super().__init__(config, layer, w)
        assert isinstance(self._recurrence.shape, ScanShape)
        self._shape = self._recurrence.shape
        self._conv = self._convolution("conv1d")
        self._rate = -self._numbers("A_log").float().exp().T.contiguous()
        self._skip = self._numbers("D")
        # Of steps, keys and queries, in this order; Mamba itself has none.
        self._norms = [
            Norm(self._numbers(f"{name}.weight"), 0.0, config.norm_eps)
            for name in self._shape.norms
        ]
        self.step = self._make_step()

    def _make_step(self) -> StateStep | None:
        products = self._product("in_proj"), self._product("x_proj"), self._product("dt_proj")
        native = native_for(*(weight for weight, _ in products))
        if native is None:
            return None
        numbers = self._conv, self._rate, self._skip, self._norms
        return scan_step(native, products, self._norm, *numbers)

    def _new_rows(
        self, x: torch.Tensor, rows: slice, before: LayerState, after: LayerState
    ) -> tuple[torch.Tensor, Replay]:
        shape, conv, rate, skip, count = self._shape, self._conv, self._rate, self._skip, len(x)
        given, gate = self._times("in_proj", normed(x, self._norm), rows).chunk(2, -1)
        mixed = silu_conv(given, *conv, before[0], after[0])
        few = self._times("x_proj", placed(mixed, rows, count), rows)
        parts = few.split([shape.rank, shape.dim, shape.dim], -1)
        if self._norms:
            parts = [normed(part, norm) for part, norm in zip(parts, self._norms, strict=True)]
        steps = self._times("dt_proj", placed(parts[0], rows, count), rows)
        tokens = ScanTokens(mixed, steps, parts[1], parts[2], gate)

        def replay(row: int, before: LayerState, after: LayerState) -> None:
            some = slice(row, row + 1)
            one = ScanTokens(*(part[some] for part in vars(tokens).values()))
            silu_conv(given[some], *conv, before[0], after[0])
            scan(rate, skip, one, before[1], after[1])

        return scan(rate, skip, tokens, before[1], after[1]), replay

    def _own_numbers(self) -> None:
        super()._own_numbers()
        self._skip = self._skip.clone()
