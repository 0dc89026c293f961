"""What of a sequence's pages and raw cells the prefix store's files hold, part by part, and how
many bytes each part has. Pages lie in them as exact mode has them with near planes in memory,
whatever reads them. Knows sizes and numbers, no files and no sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from ...kernels.layout import PageLayout
from ..models.model_config import ModelConfig
from ..pages.geometry import Geometry
from ..pages.windows import Windows


class Piece(NamedTuple):
    """Records of a layer that lie in one span of the engine's."""

    layer: int
    span: int
    first: int  # record
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's is not called


class PrefixLayout:
    """Of one model and geometry. used: the layouts of layers that keep pages, in the engine's
    tiers; kept: in files. span_cells: of a span file, the longest span of any layer."""

    def __init__(self, config: ModelConfig, geometry: Geometry):
        layers = range(config.num_page_layers)
        in_files = replace(geometry, finer_layers=())
        in_files = in_files.with_pages(value_means=False, near_resident=True)
        self.used = geometry.layouts(layers)
        self.kept = in_files.layouts(layers)
        self.span_cells = geometry.most_span_tokens // geometry.cell_tokens
        self._cell_tokens, self._span_records = geometry.cell_tokens, geometry.records_per_span
        self._cell_records = list(map(geometry.cell_records_of, self.used))
        windows = Windows(config, geometry)
        # Layers that keep all pages, and those that keep what windows show.
        self.whole = [n for n in layers if not windows.bounds(n)]
        self.windowed = [n for n in layers if windows.bounds(n) and windows.keeps_pages(n)]
        self.unkept = [n for n in layers if not windows.keeps_pages(n)]
        self._windows = windows

    @property
    def bytes_per_token(self) -> float:
        """Of sealed pages of all layers."""
        return self._bytes_of(self.kept)

    @property
    def window_bytes(self) -> int:
        """The most that one needs, to go on, of the pages that windows show."""
        of_windows = self._bytes_of([self.kept[layer] for layer in self.windowed])
        return int(self._windows.most_tokens * of_windows)

    def window_spans(self, boundary: int) -> range:
        """The whole spans that windows show from the end of cell boundary - 1 on."""
        first = self._windows.first_span(boundary) if self.windowed else boundary
        return range(first, (boundary - 1) // self.span_cells)

    def num_unseen(self, boundary: int) -> Iterator[tuple[int, int]]:
        """Of each layer with a window: its number, and how many of its records before the end of
        cell boundary - 1 are not kept, since nobody sees them from there."""
        first_cell = self._windows.first_span(boundary) * self.span_cells
        for layer in self.windowed:  # whole spans: what is seen begins before the end
            yield layer, first_cell * self._cell_records[layer]
        for layer in self.unkept:
            yield layer, (boundary - 1) * self._cell_records[layer]

    def pieces(self, span: int, num_cells: int, layers: Iterable[int]) -> Iterator[Piece]:
        """The first cells of a file's span, layer by layer; a layer may have several spans in it.
        Near planes and records of each are two parts of a file."""
        for layer in layers:
            per_cell = self._cell_records[layer]
            first = span * self.span_cells * per_cell
            stop = first + num_cells * per_cell
            for start in range(first, stop, self._span_records):
                count = min(self._span_records, stop - start)
                yield Piece(layer, start // self._span_records, start, count)

    def sealed_sizes(self, num_cells: int, layers: Iterable[int]) -> list[int]:
        """Bytes of the parts that a span's first cells make."""
        sizes = []
        for layer, _, _, count in self.pieces(0, num_cells, layers):
            kept = self.kept[layer]
            sizes += [count * kept.near_record_bytes, count * kept.record_bytes]
        return sizes

    @staticmethod
    def _bytes_of(layouts: list[PageLayout]) -> float:
        return sum(of.near_bytes_per_token + of.far_bytes_per_token for of in layouts)

    def raw_sizes(self, *, has_sink: bool) -> list[int]:
        """Bytes of a raw cell's keys and values, layer by layer, and of the sink's; values that are
        the keys are kept once."""
        sizes = []
        for kept in self.kept:
            token = kept.kv_heads * kept.head_dim * kept.raw_dtype.itemsize
            kinds = 2 - kept.shares_values
            sizes += [self._cell_tokens * token] * kinds
            sizes += [kept.page_tokens * token] * kinds * has_sink
        return sizes
