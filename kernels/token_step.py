"""One decoded token through all layers, their attention included, in one call: compiled kernels
alone.

For layers all of whose tensors lie in memory, and all pages that are attended without being
selected. What is selected and does not is asked for in the middle of the call. The bits are those
of each layer's `LayerStep`, `attend_layer`, `StateStep` and `RoutedStep` one after the other,
or, where records are selected, of `effect`, `score`, `selection` and `means`, since the same
functions serve. What a token sees comes as numbers: knows no windows, cells or tables. Where layers
are numbered, those that attend are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from . import dispatch
from .altup_step import AltUpStep
from .layer_selection import Choice
from .layout import PageLayout
from .norm import vector_address
from .rope_scores import Turns
from .routed_step import RoutedStep
from .state_step import StateStep
from .step import LayerStep
from .threads import num_threads


@dataclass(frozen=True)
class TokenLayer:
    """A layer of a TokenStep.

    layout: of its pages, None where it does not attend; what follows is of layers that do. view,
    angles: which of those that `run` is given are its own. output_norms: (kv_heads, num_rows)
    float32 (see `effect`) where records are selected, None where all is attended. key_bias:
    (kv_heads, head_dim) float32 that its pages leave out, or None; with one, turns is of its
    rotation and amplitude what that scales what it turns by. null_scores: as layer_attention.Raw
    has them. state: of a layer that keeps one, which begins state_offset numbers behind the
    first layer's. experts: of one that has some, in place of its step's MLP or beside it. streams:
    of one whose residual is several streams, of which it works on the first.
    """

    step: LayerStep
    layout: PageLayout | None
    view: int = 0
    angles: int = 0
    output_norms: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    turns: Turns | None = None
    amplitude: float = 1.0
    null_scores: torch.Tensor | None = None
    state: StateStep | None = None
    state_offset: int = 0
    experts: RoutedStep | None = None
    streams: AltUpStep | None = None


class RawRows(NamedTuple):
    """Some raw tokens, in any layer. slot: of a ring of cells, or THE_SINK; first: row there."""

    slot: int
    first: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's is not called


THE_SINK = -1


class View(NamedTuple):
    """What the token sees in some of the layers, whose records have as many tokens.

    records: the first one and their number, a whole number of spans from a span's start on;
    visible: the tokens from .. to - 1 of these records that count; position: of their first token.
    """

    records: tuple[int, int]
    visible: tuple[int, int]
    position: int
    raw: list[RawRows]


class AtHand(NamedTuple):
    """Records that lie in frames for a while, known by numbers. Addresses of arrays: frame_of
    (int64), each number's frame or -1; states (int8), whether a frame may be read: reads.State;
    frames, each record_bytes long. They may change while records are asked for, and frames may
    become READY any time."""

    frame_of: int
    states: int
    frames: int
    record_bytes: int


# Gives a layer's chosen records (ascending, (n,) int64) in parts: positions among them (ascending)
# and where each starts, both (m,) int64, good until the next part is asked for.
Ask = Callable[[int, torch.Tensor], Iterator[tuple[torch.Tensor, torch.Tensor]]]


class Selections:
    """What a token selected, layer by layer: filled by TokenStep.run.

    chosen: (num_layers, 1 + num_records) int64, the number of records and then the records,
    ascending. figures: (num_layers, 4) float64, the mean and the greatest missed share of a query
    head, and the same of misplaced ones. Of the layer `looked_at` (None: of none) also q (kv_heads,
    num_rows, head_dim), shares (kv_heads, num_rows, num_pages), those of all mass that were left
    out, and log_total (kv_heads, num_rows), the log of all mass.
    """

    def __init__(
        self,
        num_layers: int,
        num_records: int,
        shape: tuple[int, int],  # kv_heads, num_rows
        layout: PageLayout,
        looked_at: int | None,
    ):
        self.chosen = torch.empty((num_layers, 1 + num_records), dtype=torch.int64)
        self.figures = torch.empty((num_layers, 4), dtype=torch.float64)
        self.looked_at = looked_at
        seen = shape if looked_at is not None else (0, 0)
        self.q = torch.empty((*seen, layout.head_dim))
        self.shares = torch.empty((*seen, num_records * layout.pages_per_record))
        self.log_total = torch.empty(seen)

    def records(self, layer: int) -> torch.Tensor:
        """The records that a layer selected, ascending."""
        return self.chosen[layer, 1 : 1 + int(self.chosen[layer, 0])]

    def numbers(self) -> list[int]:
        parts = (self.chosen, self.figures, self.q, self.shares, self.log_total)
        looked_at = -1 if self.looked_at is None else self.looked_at
        return [self.chosen.shape[1], looked_at, *(part.data_ptr() for part in parts)]


class TokenStep:
    """All layers of a model. Keeps their tensors alive.

    raw_dtype: of raw keys and values. native: of `step.native_for`.
    """

    def __init__(
        self,
        native,
        layers: list[TokenLayer],
        raw_dtype: torch.dtype,
        records_per_span: int,
        softcap: float,
        choice: Choice | None = None,
    ):
        self._layers = layers
        numbers = []
        for layer in layers:
            numbers += [layer.view, layer.angles, vector_address(layer.key_bias)]
            if layer.key_bias is None:
                numbers += [0, 0, 0]
            else:
                turns = layer.turns
                assert turns is not None
                numbers += [len(turns.frequencies), turns.num_fast, turns.table.data_ptr()]
            numbers += [vector_address(layer.output_norms), vector_address(layer.null_scores)]
            numbers.append(layer.state_offset)
        self._native = native.TokenStep(
            [layer.step.native for layer in layers],
            [layer.state and layer.state.native for layer in layers],
            [layer.experts and layer.experts.native for layer in layers],
            [layer.streams and layer.streams.native for layer in layers],
            numbers,
            [layer.amplitude for layer in layers],
            [dispatch.layout_numbers(layer.layout) if layer.layout else [] for layer in layers],
            dispatch.raw_kind(raw_dtype),
            records_per_span,
            softcap,
            *(choice or Choice(0.0, True, True)),
        )

    def key_bias(self, layer: int) -> torch.Tensor | None:
        attending = [one for one in self._layers if one.layout is not None]
        return attending[layer].key_bias

    def run(
        self,
        x: torch.Tensor,
        scales: list[float],
        angles: list[tuple[torch.Tensor, torch.Tensor]],
        places: list[RawRows],
        views: list[View],
        raw: torch.Tensor,
        tables: torch.Tensor,
        inputs: torch.Tensor | None = None,
        states: tuple[int, int] = (0, 0),
        selections: Selections | None = None,
        at_hand: AtHand | None = None,
        ask: Ask | None = None,
    ) -> torch.Tensor:
        """The residual (1, residual_size) float32 after the last layer, of x before the first.

        angles: cosines and sines of the token's position, (rope_width,) float32 each; scales: of
        the queries that are turned by each. places: the rows where its keys and values go. raw:
        (num_layers, 8) int64, where each layer's raw rows lie: the addresses of the first keys and
        values of its ring and of its sink, then bytes from cell to cell, from head to head in a
        cell and in the sink, and from row to row. tables: (num_layers, 3) int64, the addresses of
        three int64 arrays for each layer: where each near record and each record starts, 0 where a
        record lies elsewhere, and its number in at_hand. inputs: the layers' own, one layer's after
        another's, (num_layers, 1, size) float32, where they have some. states: addresses of all
        layers' states before the token and behind it. selections: to be filled, where layers
        select. ask: begins to bring what a layer chose, called where that is neither in memory nor
        at hand; what it raises ends the run.
        """

        def addresses(layer: int) -> Iterator[tuple[int, int, int]]:
            assert ask is not None and selections is not None
            parts = ask(layer, selections.records(layer))  # begins, before anything is asked for
            return ((at.data_ptr(), records.data_ptr(), len(at)) for at, records in parts)

        numbers = [len(angles)]
        for cosines, sines in angles:
            numbers += [cosines.data_ptr(), sines.data_ptr()]
        numbers += [len(places), *chain.from_iterable(places), len(views)]
        for view in views:
            numbers += [*view.records, *view.visible, view.position, len(view.raw)]
            numbers += chain.from_iterable(view.raw)
        numbers += [raw.data_ptr(), vector_address(inputs), *states]
        out = torch.empty_like(x)
        self._native.run(
            x.data_ptr(),
            scales,
            numbers,
            tables.data_ptr(),
            list(at_hand or ()),
            None if ask is None else addresses,
            out.data_ptr(),
            [] if selections is None else selections.numbers(),
            num_threads(),
        )
        return out
