"""The sizes that fix every result: cells, spans, pages and bits, which differ by layer. Chosen from
model and options, never from a budget: in exact mode a plan may choose what near planes hold beside
them, of which no result depends.

The numbers behind the choices stand in docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..kernels.layout import PageLayout
from ..kernels.matmul import ROW_TILE
from .errors import InputError
from .model_config import ModelConfig

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
    and reads. layout: of every layer but the finer ones, and what all layers have in common: heads,
    pages, records. finer_layers: those whose near planes have FINER_NEAR_BITS bits of each key.
    """

    cell_tokens: int
    span_tokens: int
    layout: PageLayout
    finer_layers: tuple[int, ...] = ()

    def __post_init__(self):
        assert self.layout.value_means or not self.finer_layers, "who selects nothing needs no more"
        assert self.cell_tokens % ROW_TILE == 0, "a cell is multiplied in whole tiles"
        if self.cell_tokens % self.layout.record_tokens or self.span_tokens % self.cell_tokens:
            raise InputError(
                f"a span ({self.span_tokens} tokens) must hold whole cells "
                f"({self.cell_tokens}), and a cell whole "
                f"records ({self.layout.record_tokens})"
            )

    def layout_of(self, layer: int) -> PageLayout:
        """How a layer's pages lie in bytes; records of all layers have one size."""
        return self._finer_layout if layer in self.finer_layers else self.layout

    def layouts(self, num_layers: int) -> list[PageLayout]:
        """Of each layer."""
        return [self.layout_of(layer) for layer in range(num_layers)]

    def may_select(self, config: ModelConfig) -> bool:
        """Whether there is a `selecting`, and a layer without a sliding window to select in."""
        quantised = not (self.layout.is_full or self.layout.rotate)
        return quantised and bool(choose_finer_layers(config))

    def selecting(self, config: ModelConfig) -> Geometry:
        """The same with near planes to select pages by: no bit of what is attended in full changes.
        Not for full pages."""
        layout = replace(self.layout, value_means=True)
        return replace(self, layout=layout, finer_layers=choose_finer_layers(config))

    @cached_property
    def _finer_layout(self) -> PageLayout:
        """Fewer bits are left for the record, which is padded to the others'."""
        record_bytes = self.layout.record_bytes
        return replace(self.layout, near_bits=FINER_NEAR_BITS, least_record_bytes=record_bytes)

    @property
    def cell_records(self) -> int:
        return self.cell_tokens // self.layout.record_tokens

    @property
    def records_per_span(self) -> int:
        return self.span_tokens // self.layout.record_tokens

    def sealed_tokens(self, length: int) -> int:
        """How many of `length` tokens lie in sealed pages once all are processed."""
        return max(0, -(-length // self.cell_tokens) - 2) * self.cell_tokens

    def num_spans(self, length: int) -> int:
        """Spans of sealed pages of one layer after `length` tokens."""
        return -(-self.sealed_tokens(length) // self.span_tokens)

    @property
    def span_bytes(self) -> int:
        """Bytes of one layer's far planes for a span."""
        return self.records_per_span * self.layout.record_bytes


def choose_geometry(
    config: ModelConfig, kv_bits: str = "auto", *, selects: bool = False
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
    if kv_bits == "full":
        codec = {"codec": "full"}
    else:
        key_bits, value_bits = KV_BITS[AUTO_KV_BITS if kv_bits == "auto" else kv_bits]
        codec = {"key_bits": key_bits, "value_bits": value_bits, "near_bits": NEAR_BITS}
    page = PageLayout(
        config.num_kv_heads,
        config.head_dim,
        PAGE_TOKENS,
        raw_dtype=raw_dtype,
        shared_from=config.values_from,
        **codec,
    )
    cell = CELL_TOKENS
    while (
        cell < MOST_CELL_TOKENS
        and cell // PAGE_TOKENS * page.record_payload_bytes < LEAST_RECORD_BYTES
    ):
        cell *= 2
    geometry = Geometry(cell, max(SPAN_TOKENS, cell), _group_pages(page, cell))
    return geometry.selecting(config) if selects else geometry


def choose_finer_layers(config: ModelConfig) -> tuple[int, ...]:
    """The first layers that select: those without a sliding window, whose pages are all attended.

    What they estimate wrong, all later layers build on; docs/design.md has the measurement.
    """
    selecting = [kv for kv, window in enumerate(config.kv_windows) if window is None]
    return tuple(selecting[:NUM_FINER_LAYERS])


def _group_pages(page: PageLayout, cell_tokens: int) -> PageLayout:
    """Neighbouring pages in one record, as few as make it long enough and waste little."""
    choices, count = [], 1
    while count * page.page_tokens <= cell_tokens:
        choices.append(replace(page, pages_per_record=count))
        count *= 2
    good = [c for c in choices if c.record_payload_bytes >= LEAST_RECORD_BYTES] or choices[-1:]
    return next(
        (c for c in good if c.padding_share <= MOST_PADDING),
        min(good, key=lambda c: c.padding_share),
    )
