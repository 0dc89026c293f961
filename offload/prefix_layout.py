"""What of a sequence's pages and raw cells the prefix store's files hold, part by part, and how
many bytes each part has. Pages lie in them as exact mode has them with near planes in memory,
whatever reads them. Knows sizes and numbers, no files and no sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from .geometry import Geometry
from .model_config import ModelConfig


class Piece(NamedTuple):
    """Records of a layer that lie in one span of the engine's."""

    layer: int
    span: int
    first: int  # record
    count: int


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

    @property
    def bytes_per_token(self) -> float:
        """Of sealed pages."""
        return sum(of.near_bytes_per_token + of.far_bytes_per_token for of in self.kept)

    def pieces(self, span: int, num_cells: int) -> Iterator[Piece]:
        """The first cells of a file's span, layer by layer; a layer may have several spans in it.
        Near planes and records of each are two parts of a file."""
        for layer, per_cell in enumerate(self._cell_records):
            first = span * self.span_cells * per_cell
            stop = first + num_cells * per_cell
            for start in range(first, stop, self._span_records):
                count = min(self._span_records, stop - start)
                yield Piece(layer, start // self._span_records, start, count)

    def sealed_sizes(self, num_cells: int) -> list[int]:
        """Bytes of the parts that a span's first cells make."""
        sizes = []
        for layer, _, _, count in self.pieces(0, num_cells):
            kept = self.kept[layer]
            sizes += [count * kept.near_record_bytes, count * kept.record_bytes]
        return sizes

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
