"""One decoded token through all layers, their attention included, in one call: compiled kernels
alone.

For layers all of whose tensors and pages lie in memory. The bits are those of each layer's
`LayerStep` and `attend_layer` one after the other, since the same functions serve. What a token
sees comes as numbers: knows no windows, cells or tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import dispatch
from .layout import PageLayout
from .step import LayerStep


@dataclass(frozen=True)
class TokenLayer:
    """A layer of a TokenStep.

    view, angles: which of those that `run` is given are its own. key_bias: (kv_heads, head_dim)
    float32 that its pages leave out, or None; with one, its rotation turns whole heads:
    frequencies (head_dim / 2,) float32, and what turned elements are scaled by.
    """

    step: LayerStep
    view: int
    angles: int
    key_bias: torch.Tensor | None = None
    frequencies: torch.Tensor | None = None
    amplitude: float = 1.0


class View(NamedTuple):
    """What the token sees in some of the layers.

    records: the first one and their number, a whole number of spans from a span's start on;
    visible: the tokens from .. to - 1 of these records that count; position: of their first token.
    runs: of raw tokens in the first layer, as layer_attention.Raw has them.
    """

    records: tuple[int, int]
    visible: tuple[int, int]
    position: int
    runs: list[int]


class TokenStep:
    """All layers of a model over pages of one layout. Keeps their tensors alive.

    raw_dtype: of raw keys and values. native: of `step.native_for`.
    """

    def __init__(
        self,
        native,
        layers: list[TokenLayer],
        layout: PageLayout,
        raw_dtype: torch.dtype,
        records_per_span: int,
        softcap: float,
    ):
        self._layers = layers
        numbers = []
        for layer in layers:
            numbers += [layer.view, layer.angles]
            if layer.key_bias is None:
                numbers += [0, 0, 0]
                continue
            assert layer.key_bias.dtype == torch.float32 and layer.key_bias.is_contiguous()
            numbers += [layer.key_bias.data_ptr(), layer.frequencies.data_ptr()]
            numbers.append(len(layer.frequencies))
        self._native = native.TokenStep(
            [layer.step.native for layer in layers],
            numbers,
            [layer.amplitude for layer in layers],
            dispatch.layout_numbers(layout),
            dispatch.raw_kind(raw_dtype),
            records_per_span,
            softcap,
        )

    def run(
        self,
        x: torch.Tensor,
        scale: float,
        angles: list[tuple[torch.Tensor, torch.Tensor]],
        places: list[int],
        views: list[View],
        tables: torch.Tensor,
    ) -> torch.Tensor:
        """The residual (1, hidden_size) float32 after the last layer, of x before the first.

        scale: of queries. angles: cosines and sines of the token's position, (rope_width,) float32
        each. places: where the first layer's keys and values go, as LayerStep.project_into takes
        them. tables: (num_layers, 2) int64, the addresses of two int64 arrays for each layer: where
        each near record and each record starts.
        """
        numbers = [len(angles)]
        for cosines, sines in angles:
            numbers += [cosines.data_ptr(), sines.data_ptr()]
        numbers += [len(places) // 4, *places, len(views)]
        for view in views:
            numbers += [*view.records, *view.visible, view.position, len(view.runs) // 5]
            numbers += view.runs
        out = torch.empty_like(x)
        threads = torch.get_num_threads()
        self._native.run(x.data_ptr(), scale, numbers, tables.data_ptr(), out.data_ptr(), threads)
        return out
