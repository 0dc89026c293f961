"""The protocols of this folder: where wishes go, what a predictor is, what a selector is.

Knows neither tiers nor tables: a table is an opaque handle that the source gave out itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from .evidence import Evidence


@runtime_checkable
class PageSource(Protocol):
    """Whoever reads pages. `offload.span_reader.SpanReader` is one; tests use a small fake."""

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


@runtime_checkable
class Selector(Protocol):
    """Says which records a layer attends in full, from what is known before any is read."""

    def select(self, evidence: Evidence) -> torch.Tensor:
        """Record numbers, ascending, each once: (num_selected,) int64 where the evidence lies.

        A pure function of the evidence: what is resident or on its way never enters. Ties go to the
        lowest number; records that are not there for the choice are never taken.
        """
        ...


class Foresight(Protocol):
    """Says which records a layer will select. needs_query: whether it makes use of a rehearsal."""

    needs_query: bool

    def expect(self, rehearsed: torch.Tensor | None, last: torch.Tensor | None) -> torch.Tensor:
        """Record numbers, (k,) int64, most urgent first.

        rehearsed: what the selector makes of a rehearsed query, most urgent first, None where there
        is none; last: what the layer selected a step ago, or None.
        """
        ...
