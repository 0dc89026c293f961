"""The two protocols of this folder: where wishes go, and what a predictor is.

Knows neither tiers nor tables: a table is an opaque handle that the source gave out itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class PageSource(Protocol):
    """Whoever owns the pages. `offload.pager.PageStore` is one; tests use a fake of a few lines."""

    def prefetch(self, table: Any, layer: int, spans: Sequence[int] | None = None) -> None:
        """Wishes for spans of one layer, most urgent first; None: as a predictor says.

        Never blocks. A wrong wish costs time only.
        """
        ...

    def is_ready(self, table: Any, layer: int, span: int) -> bool:
        """True when fetching the span now would not wait."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """Says which spans a layer will want. State is its own; it never sees a page."""

    def predict(self, layer: int, num_spans: int) -> list[int]:
        """The spans of 0..num_spans-1 that the layer is expected to use, in the order of use."""
        ...

    def record(self, layer: int, spans: Sequence[int]) -> None:
        """Tells what the layer really used, in the order of use, once per pass."""
        ...
