"""The first half of a layer whose state is a matrix for each head, or a short convolution's alone:
norm, projections, and what the kernels make of them. See state_layer.py.
"""

from __future__ import annotations

import functools

import torch

from ...kernels.norm import normed
from ...kernels.recurrence import RecurrentShape, RecurrentWeights, recur, short_conv
from ...kernels.state_step import StateStep, recurrent_step
from ...kernels.step import native_for
from ..models.layer_config import ScanShape
from ..models.model_config import ModelConfig
from ..weights.weights import LayerTensors
from .state_layer import Replay, StateLayer, placed
from .states import LayerState

# In the order in which `_parts` takes them; a layer has one, two, four or six of them.
_PARTS = ("", "_qkvz", "_ba", "_qkv", "_q", "_k", "_v", "_z", "_b", "_a")
_PROJECTIONS = tuple(f"in_proj{part}.weight" for part in _PARTS)


class RecurrentLayer(StateLayer):
    """See StateLayer."""

    def __init__(self, config: ModelConfig, layer: int, w: LayerTensors):
        super().__init__(config, layer, w)
        shape = self._recurrence.shape
        assert not isinstance(shape, ScanShape)
        self._shape = shape
        self._conv = conv, bias = self._convolution("conv" if shape is None else "conv1d")
        self._weights: RecurrentWeights | None = None
        if shape is not None:
            step_bias, rate = self._numbers("dt_bias"), -self._numbers("A_log").flatten().exp()
            skip, norm = self._numbers_or_none("D"), self._numbers_or_none("norm.weight")
            self._weights = RecurrentWeights(conv, bias, step_bias, rate, skip, norm)
        self._orders: list[torch.Tensor] = []
        if shape is not None and self._recurrence.by_heads:
            each = shape.heads // shape.key_heads  # heads that share a key
            values = each * shape.value_dim
            self._orders = [
                _by_parts(shape.key_heads, sizes, conv.device)
                for sizes in ((shape.key_dim, shape.key_dim, values, values), (each, each))
            ]
        self._names = [n.removesuffix(".weight") for n in _PROJECTIONS if n in self._module]
        self.step = self._make_step()

    def _new_rows(
        self, x: torch.Tensor, rows: slice, before: LayerState, after: LayerState
    ) -> tuple[torch.Tensor, Replay]:
        shape, conv, weights, h = self._shape, self._conv, self._weights, normed(x, self._norm)
        projected = [self._projected(name, h, rows) for name in self._names]
        if shape is None:

            def advance(some: slice, before: LayerState, after: LayerState) -> torch.Tensor:
                return short_conv(projected[0][some], *conv, before[0], after[0])

        else:
            assert weights is not None
            mixed, steps, gains, gate = self._parts(projected, shape)

            def advance(some: slice, before: LayerState, after: LayerState) -> torch.Tensor:
                gain = None if gains is None else gains[some]
                tokens = mixed[some], steps[some], gain, gate[some]
                return recur(shape, weights, *tokens, before, after)

        def replay(row: int, before: LayerState, after: LayerState) -> None:
            advance(slice(row, row + 1), before, after)

        return advance(slice(None), before, after), replay

    def _own_numbers(self) -> None:
        super()._own_numbers()
        if self._weights is not None:
            self._weights = self._weights.copied()

    def _projected(self, name: str, h: torch.Tensor, rows: slice) -> torch.Tensor:
        """`rows` of h times a projection, or times two of which the first gives few numbers."""
        if self._is_of_few(name):
            h = placed(self._times(f"{name}_few", h, rows), rows, len(h))
        return self._times(name, h, rows)

    def _is_of_few(self, name: str) -> bool:
        return f"{name}_few.weight" in self._module

    def _parts(
        self, projected: list[torch.Tensor], shape: RecurrentShape
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What goes into the convolution, steps, gains and the gate."""
        if not shape.is_delta:
            if self._recurrence.multipliers:
                times = self._recurrence.multipliers
                projected[0] *= _by_columns(shape, times, projected[0].device)
            gate, mixed, steps = projected[0].split([shape.values, shape.channels, shape.heads], -1)
            return mixed, steps, None, gate
        if not self._recurrence.by_heads:
            *mixed, gate, gains, steps = projected
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed, -1), steps, gains, gate
        both, of_heads = (
            part.index_select(-1, order)
            for part, order in zip(projected, self._orders, strict=True)
        )
        mixed, gate = both.split([shape.channels, shape.values], -1)
        gains, steps = of_heads.split([shape.heads, shape.heads], -1)
        return mixed, steps, gains, gate

    def _make_step(self) -> StateStep | None:
        few = {name: self._product(name) for name in self._names if self._is_of_few(name)}
        products = [self._product(f"{n}_few" if n in few else n) for n in self._names]
        weights = [weight for weight, _ in products]
        native = native_for(*weights, *(weight for weight, _ in few.values()))
        if native is None:
            return None
        shape, order, factors = self._shape, None, None
        if shape is None:
            return recurrent_step(native, products, self._norm, self._conv)
        if self._orders:
            starts = [0, weights[0].shape[0]]
            order = torch.cat([n + at for n, at in zip(self._orders, starts, strict=True)])
        if self._recurrence.multipliers:
            factors = _by_columns(shape, self._recurrence.multipliers, self._norm.weight.device)
        assert self._weights is not None
        of_few = few.get("in_proj_z"), few.get("in_proj_a")
        described = shape, self._weights
        return recurrent_step(native, products, self._norm, described, order, factors, *of_few)


@functools.cache  # layers are alike
def _by_columns(shape: RecurrentShape, multipliers: tuple[float, ...], device) -> torch.Tensor:
    """The multiplier of each output of Mamba-2's projection, given those of its parts."""
    sizes = (shape.values, shape.values, shape.keys, shape.keys, shape.heads)
    repeats = torch.tensor(sizes, device=device)
    return torch.tensor(multipliers, device=device).repeat_interleave(repeats)


@functools.cache
def _by_parts(count: int, sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Of outputs in which parts of these sizes take turns, `count` times: their numbers, part after
    part."""
    numbers = torch.arange(count * sum(sizes), device=device).view(count, -1).split(sizes, -1)
    return torch.cat([part.flatten() for part in numbers])
