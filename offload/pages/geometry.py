"""The sizes that fix every result: cells, spans, pages and bits, which differ by layer, as the
shapes of keys and values may. Chosen from model and options, never from a budget: in exact mode a
plan may choose what near planes hold beside them, of which no result depends.

Records of all layers have one size in bytes, and all spans as many records, so that frames, files
and hot records fit any layer. Layers whose tokens take less have more of them in a record.

The numbers behind the choices stand in docs/design.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch

from ...kernels.layout import PageLayout
from ...kernels.matmul import ROW_TILE
from ..errors import InputError
from ..models.model_config import ModelConfig

PAGE_TOKENS = 64
CELL_TOKENS = 256
MOST_CELL_TOKENS = 1024
SPAN_TOKENS = 1024
NEAR_BITS = 2
FINER_NEAR_BITS = 3  # of the first layers that select: they alone need them
NUM_FINER_LAYERS = 2
LEAST_RECORD_BYTES = 32 << 10  # random direct reads of 4 KiB reach a fifth of the speed of 32 KiB
MOST_PADDING = 0.05
# --kv-bits to bits per code of keys and of values
KV_BITS = {"8": (8, 8), "6": (6, 6), "4": (5, 4)}
AUTO_KV_BITS = "8"


@dataclass(frozen=True)
class Geometry:
    """cell_tokens: the grid of prefill and of sealing; span_tokens: of attention partials, homes
    and reads. layout: of every layer but the finer ones, and what all layers have in common: pages,
    bits, bytes of a record. finer_layers: those whose near planes have FINER_NEAR_BITS bits of each
    key. own_layouts: of each layer that keeps pages, where their shapes differ; span_tokens and
    layout are the first one's then.
    """

    cell_tokens: int
    span_tokens: int
    layout: PageLayout
    finer_layers: tuple[int, ...] = ()
    own_layouts: tuple[PageLayout, ...] = ()

    def __post_init__(self):
        assert self.layout.value_means or not self.finer_layers, "who selects nothing needs no more"
        assert self.cell_tokens % ROW_TILE == 0, "a cell is multiplied in whole tiles"
        assert self.layout == (self.own_layouts or (self.layout,))[0]
        for layout in self.shapes:
            assert layout.record_bytes == self.layout.record_bytes
            span_tokens = self.span_tokens_of(layout)
            if self.cell_tokens % layout.record_tokens or span_tokens % self.cell_tokens:
                raise InputError(
                    f"a span ({span_tokens} tokens) must hold whole cells "
                    f"({self.cell_tokens}), and a cell whole "
                    f"records ({layout.record_tokens})"
                )

    @cached_property
    def shapes(self) -> tuple[PageLayout, ...]:
        """Layers' layouts, each once; a finer one is like that of others but for its bits."""
        return tuple(dict.fromkeys(self.own_layouts or (self.layout,)))

    def layout_of(self, layer: int) -> PageLayout:
        """How the pages of a layer, by its number among those that keep some, lie in bytes."""
        layout = self.own_layouts[layer] if self.own_layouts else self.layout
        return _finer(layout) if layer in self.finer_layers else layout

    def layouts(self, layers: Iterable[int]) -> list[PageLayout]:
        """Of each of some layers, by their numbers among those that keep pages."""
        return [self.layout_of(layer) for layer in layers]

    def span_tokens_of(self, layout: PageLayout) -> int:
        """How many tokens of a layer with such pages a span has."""
        return self.records_per_span * layout.record_tokens

    def cell_records_of(self, layout: PageLayout) -> int:
        """How many records a cell of a layer with such pages has."""
        return self.cell_tokens // layout.record_tokens

    @cached_property
    def most_span_tokens(self) -> int:
        """Of any layer's spans."""
        return max(map(self.span_tokens_of, self.shapes))

    def spans_at_once(self, layer: int) -> int:
        """How many spans of a layer make the longest of any."""
        return self.most_span_tokens // self.span_tokens_of(self.layout_of(layer))

    def spare_spans(self, layer: int, sequences: int) -> int:
        """Of a layer that keeps pages, what several sequences take besides: a fork copies the last
        span before it writes to it. Layers have as many as they have of others, since by that near
        planes are shared out among them."""
        return 2 * self.spans_at_once(layer) * (sequences > 1)

    def with_pages(self, **changes) -> Geometry:
        """The same with other fields of every layer's layout."""
        own = _even([replace(of, least_record_bytes=0, **changes) for of in self.own_layouts])
        layout = own[0] if own else replace(self.layout, **changes)
        return replace(self, layout=layout, own_layouts=own)

    def may_select(self, config: ModelConfig) -> bool:
        """Whether there is a `selecting`, and a layer without a sliding window to select in."""
        quantised = not (self.layout.is_full or self.layout.rotate)
        return quantised and bool(choose_finer_layers(config))

    def selecting(self, config: ModelConfig) -> Geometry:
        """The same with near planes to select pages by: no bit of what is attended in full changes.
        Not for full pages."""
        with_means = self.with_pages(value_means=True)
        return replace(with_means, finer_layers=choose_finer_layers(config))

    @property
    def records_per_span(self) -> int:
        """The same number for all layers."""
        return self.span_tokens // self.layout.record_tokens

    def sealed_tokens(self, length: int) -> int:
        """How many of `length` tokens lie in sealed pages once all are processed."""
        return max(0, -(-length // self.cell_tokens) - 2) * self.cell_tokens

    def num_spans(self, length: int) -> int:
        """Spans of sealed pages of one layer after `length` tokens; of one with the longest, of
        which others have `spans_at_once` for each."""
        return -(-self.sealed_tokens(length) // self.most_span_tokens)

    @property
    def span_bytes(self) -> int:
        """Bytes of one layer's far planes for a span."""
        return self.records_per_span * self.layout.record_bytes


def choose_geometry(
    config: ModelConfig, kv_bits: str | int = "auto", *, selects: bool = False
) -> Geometry:
    """The geometry for a model. kv_bits: auto, full, 8, 6 or 4; anything else raises InputError.

    selects: near planes are made to choose pages by, which full pages do not allow: InputError.
    """
    kv_bits = str(kv_bits)
    if kv_bits not in ("auto", "full", *KV_BITS):
        raise InputError(f"kv_bits is {kv_bits!r}; allowed are auto, full, {', '.join(KV_BITS)}.")
    raw_dtype = getattr(torch, config.dtype)
    if kv_bits == "full" and selects:
        raise InputError(
            "kv_bits is 'full', and pages are to be selected: modes other than 'exact' need the "
            f"codes of quantised pages. Use --mode exact, or --kv-bits {', '.join(KV_BITS)}."
        )
    codec: dict[str, Any] = {"codec": "full"}
    if kv_bits != "full":
        key_bits, value_bits = KV_BITS[AUTO_KV_BITS if kv_bits == "auto" else kv_bits]
        codec = {"key_bits": key_bits, "value_bits": value_bits, "near_bits": NEAR_BITS}
    page = PageLayout(
        config.num_kv_heads,
        config.page_dim,
        PAGE_TOKENS,
        raw_dtype=raw_dtype,
        shared_from=config.values_from,
        **codec,
    )
    pages, cell = shaped_pages(config, page), CELL_TOKENS
    least = min(of.record_payload_bytes for of in pages)
    while cell < MOST_CELL_TOKENS and cell // PAGE_TOKENS * least < LEAST_RECORD_BYTES:
        cell *= 2
    geometry = make_geometry(cell, SPAN_TOKENS, _group_pages(pages, cell))
    return geometry.selecting(config) if selects else geometry


def shaped_pages(config: ModelConfig, page: PageLayout) -> list[PageLayout]:
    """Pages like this one, in the shape of each layer that keeps some."""
    shapes = [config.shape_of(layer) for layer in config.kv_layers[: config.num_page_layers]]
    return [replace(page, kv_heads=of.kv_heads, head_dim=of.page_dim) for of in shapes]


def make_geometry(cell_tokens: int, span_tokens: int, layouts: list[PageLayout]) -> Geometry:
    """For layers of these layouts, whose records are padded to one size.

    span_tokens: of the layers with the most tokens in a record; more where a cell needs it.
    """
    own = _even(layouts)
    tokens = [layout.record_tokens for layout in own]
    records = max(span_tokens // max(tokens), cell_tokens // min(tokens))
    are_alike = len(set(own)) == 1
    return Geometry(cell_tokens, records * tokens[0], own[0], own_layouts=() if are_alike else own)


def _even(layouts: Iterable[PageLayout]) -> tuple[PageLayout, ...]:
    """The same with records of one size."""
    layouts = tuple(layouts)
    most = max((layout.record_bytes for layout in layouts), default=0)
    return tuple(
        layout if layout.record_bytes == most else replace(layout, least_record_bytes=most)
        for layout in layouts
    )


@cache
def _finer(layout: PageLayout) -> PageLayout:
    """Fewer bits are left for the record, which is padded to the others'."""
    record_bytes = layout.record_bytes
    return replace(layout, near_bits=FINER_NEAR_BITS, least_record_bytes=record_bytes)


def choose_finer_layers(config: ModelConfig) -> tuple[int, ...]:
    """The first layers that select: those without a sliding window, whose pages are all attended.

    What they estimate wrong, all later layers build on; docs/design.md has the measurement.
    """
    windows = config.kv_windows[: config.num_page_layers]
    selecting = [kv for kv, window in enumerate(windows) if window is None]
    return tuple(selecting[:NUM_FINER_LAYERS])


def _group_pages(pages: list[PageLayout], cell_tokens: int) -> list[PageLayout]:
    """Neighbouring pages in one record, as few as make it long enough and waste little; of smaller
    pages more, so that records are about as long in all layers."""
    shapes = list(dict.fromkeys(pages))
    sizes = {of.record_bytes for page in shapes for of in _groups(page, cell_tokens)}
    least = max(page.record_bytes for page in shapes)
    choices = [
        {page: _most_pages(page, cell_tokens, size) for page in shapes}
        for size in sorted(sizes)
        if size >= least
    ]

    def padding(choice: dict[PageLayout, PageLayout]) -> float:
        return max(layout.padding_share for layout in _even(choice.values()))

    def is_long(choice: dict[PageLayout, PageLayout]) -> bool:
        return max(of.record_payload_bytes for of in choice.values()) >= LEAST_RECORD_BYTES

    good = list(filter(is_long, choices)) or choices[-1:]
    chosen = next((c for c in good if padding(c) <= MOST_PADDING), min(good, key=padding))
    return [chosen[page] for page in pages]


def _groups(page: PageLayout, cell_tokens: int) -> list[PageLayout]:
    """With 1, 2, 4 ... pages in a record, as long as a cell holds it."""
    choices, count = [], 1
    while count * page.page_tokens <= cell_tokens:
        choices.append(replace(page, pages_per_record=count))
        count *= 2
    return choices


def _most_pages(page: PageLayout, cell_tokens: int, record_bytes: int) -> PageLayout:
    """With as many pages in a record as fit it."""
    return [of for of in _groups(page, cell_tokens) if of.record_bytes <= record_bytes][-1]
