"""Attention of one token over one layer, by the compiled kernels or those for GPUs: one call where
every span is in memory; else one for each run of spans that are or come from disk together, in
order, and one that joins them. Or of several tokens, one after the other, for which each run is
fetched once.

To the bit the same in all cases: partials belong to spans, and are joined by the same code. Knows
where pages lie through the store alone.
"""

from __future__ import annotations

import torch

from ...kernels import dispatch
from ...kernels.attention import Partial, empty_parts
from ...kernels.layer_attention import (
    Raw,
    Records,
    attend_layer,
    attend_raw,
    attend_spans,
    join_parts,
)
from ...kernels.layout import PageLayout
from ...kernels.paged_attention import gpu_for, serves
from ...kernels.token_step import RawRows
from ..pages.span_addresses import SpanRun
from ..pages.windows import first_seen
from ..running.sequence import Sequence


class DecodeAttention:
    """Of one model over a page store."""

    def __init__(
        self,
        layouts: list[PageLayout],
        cell_tokens: int,
        span_tokens: list[int],
        store,
        softcap: float,
        null_scores: list[torch.Tensor | None],
        in_chunks: bool = False,
    ):
        self._layouts, self._store, self._softcap = layouts, store, softcap
        self._kinds = list(dict.fromkeys(layouts))
        self._null_scores, self._in_chunks = null_scores, in_chunks
        self._page_tokens = layouts[0].page_tokens
        self._cell_tokens, self._span_tokens = cell_tokens, span_tokens

    def serves(self, q: torch.Tensor) -> bool:
        """Whether the compiled kernels take queries q (kv_heads, num_rows, head_dim)."""
        return dispatch.compiled_for(q) is not None and self.serves_rows(q.shape[1])

    def takes(self, q: torch.Tensor) -> bool:
        """Whether one token's queries are attended here: by compiled kernels or those for GPUs."""
        return self.serves(q) or all(gpu_for(q, layout) is not None for layout in self._kinds)

    def serves_rows(self, num_rows: int) -> bool:
        """Whether they take so many rows of each KV head, where they are."""
        return all(serves(num_rows, layout) for layout in self._kinds)

    def raw_partial(
        self, layer: int, sequence: Sequence, q: torch.Tensor, position: int, window: int | None
    ) -> Partial:
        """The partial of one token's queries over the keys that are raw."""
        q = q.contiguous()
        parts = empty_parts(1, q)
        attend_raw(q, self.raw(layer, sequence, position, window), self._softcap, parts)
        return Partial(*(part[0] for part in parts))

    def run(
        self,
        layer: int,
        sequence: Sequence,
        q: torch.Tensor,
        page_q: torch.Tensor,
        position: int,
        window: int | None,
        spans: range,
        sealed_tokens: int,
        score_bias,
    ) -> torch.Tensor:
        """(1, num_heads * head_dim) of one token's queries q (kv_heads, groups, head_dim).

        page_q: as pages are scored, rotated where they are. spans: of sealed pages, those wanted;
        sealed_tokens: the table may hold more, which are not seen yet.
        score_bias(base, tokens): what is added to the scores of so many tokens, or None.
        """
        q, page_q = q.contiguous(), page_q.contiguous()
        raw, layout = self.raw(layer, sequence, position, window), self._layouts[layer]
        span_tokens = self._span_tokens[layer]

        def records(near_at, record_at, span: int, stop: int) -> Records:
            base, tokens = span * span_tokens, len(record_at) * layout.record_tokens
            return Records(
                near_at,
                record_at,
                span_tokens // layout.record_tokens,
                self.visible(base, tokens, position, window, sealed_tokens),
                score_bias(base, tokens),
            )

        if not spans:
            none = torch.empty(0, dtype=torch.int64)
            nothing = Records(none, none, 1, (0, 0))
            return attend_layer(q, page_q, nothing, layout, raw, self._softcap).view(1, -1)

        parts, span = None, spans.start
        while span < spans.stop:
            with self.fetch(sequence, layer, span, spans.stop) as run:
                part = records(run.near_at, run.record_at, span, run.stop)
                if (span, run.stop) == (spans.start, spans.stop):
                    out = attend_layer(q, page_q, part, layout, raw, self._softcap)
                    return out.view(1, -1)
                if parts is None:
                    parts = empty_parts(len(spans) + 1, q)
                into = Partial(*(of_all[span - spans.start :] for of_all in parts))
                attend_spans(page_q, part, layout, self._softcap, into)
            span = run.stop
        assert parts is not None
        attend_raw(q, raw, self._softcap, Partial(*(part[-1] for part in parts)))
        return join_parts(parts).view(1, -1)

    def run_several(
        self,
        layer: int,
        sequence: Sequence,
        q: torch.Tensor,
        page_q: torch.Tensor,
        position: int,
        window: int | None,
        spans: list[range],
        sealed_tokens: int,
        score_bias,
        most_spans: int,
    ) -> torch.Tensor:
        """(num_tokens, num_heads * head_dim) of consecutive tokens of one cell, the first of which
        is at `position`: for each what `run` gives.

        q, page_q: (num_tokens, kv_heads, groups, head_dim); spans: of each token.
        score_bias(first, stop, base, tokens): of the tokens first .. stop - 1, with their groups
        side by side. most_spans: how many are attended in one call.
        """
        num_tokens, kv_heads, groups, dim = q.shape
        layout, span_tokens = self._layouts[layer], self._span_tokens[layer]
        # Tokens that see the same pages are one.
        step = num_tokens if window is None else 1
        views = []
        for first in range(0, num_tokens, step):
            side_by_side = page_q[first : first + step].permute(1, 0, 2, 3)
            rows = side_by_side.reshape(kv_heads, step * groups, dim).contiguous()
            views.append((first, spans[first], rows, empty_parts(len(spans[first]) + 1, rows)))
        span, stop = min(s.start for s in spans), max(s.stop for s in spans)
        while span < stop:
            until = min(stop, span + most_spans)
            with self.fetch(sequence, layer, span, until) as run:
                for first, wanted, rows, parts in views:
                    begin = max(run.first, wanted.start)
                    skipped = (begin - run.first) * span_tokens // layout.record_tokens
                    record_at = run.record_at[skipped:]
                    base, tokens = begin * span_tokens, len(record_at) * layout.record_tokens
                    records = Records(
                        run.near_at[skipped:],
                        record_at,
                        span_tokens // layout.record_tokens,
                        self.visible(base, tokens, position + first, window, sealed_tokens),
                        score_bias(first, first + step, base, tokens),
                    )
                    into = Partial(*(of_all[begin - wanted.start :] for of_all in parts))
                    if len(record_at):
                        attend_spans(rows, records, layout, self._softcap, into)
            span = run.stop
        out = torch.empty((num_tokens, kv_heads, groups, dim))
        for first, _, _, parts in views:
            for token in range(first, first + step):
                rows = slice((token - first) * groups, (token - first + 1) * groups)
                own = Partial(*(part[:, :, rows].contiguous() for part in parts))
                raw = self.raw(layer, sequence, position + token, window)
                attend_raw(
                    q[token].contiguous(), raw, self._softcap, Partial(*(part[-1] for part in own))
                )
                out[token] = join_parts(own)
        return out.view(num_tokens, -1)

    def fetch(self, sequence: Sequence, layer: int, span: int, until: int) -> SpanRun:
        """Some of the spans from this one to until - 1 by address, for a `with` block."""
        run = self._store.spans.fetch_run(sequence.table, layer, span, until)
        if run is not None:
            return run
        # A span that is copied before it is read.
        pages = self._store.spans.fetch(sequence.table, layer, span)
        rows = torch.arange(len(pages.records), device=pages.records.device)
        near_at, record_at = (
            dispatch.addresses(plane, rows) for plane in (pages.near, pages.records)
        )
        return SpanRun(span, span + 1, near_at, record_at, (), pages.close)

    def visible(
        self, base: int, tokens: int, position: int, window: int | None, sealed_tokens: int
    ) -> tuple[int, int]:
        """Which of so many sealed tokens from `base` on a token at `position` sees: from .. to - 1.
        The sink is attended raw.
        """
        first = self._page_tokens
        if window is not None:
            first = max(first, first_seen(position, window, self._in_chunks))
        return max(0, first - base), min(tokens, sealed_tokens - base)

    def raw(self, layer: int, sequence: Sequence, position: int, window: int | None) -> Raw:
        """The raw tokens that a token at `position` sees: the sink, the cell before, its own."""
        raw, runs = sequence.raw, []
        for rows in self.raw_rows(sequence, position, window):
            runs += [*raw.at(layer, rows), rows.count]
        return Raw(raw.dtype, runs, self._null_scores[layer])

    def raw_rows(self, sequence: Sequence, position: int, window: int | None) -> list[RawRows]:
        """Their rows, in order: the same in all layers with that window."""
        raw, cells = sequence.raw, self._cell_tokens
        cell, row = divmod(position, cells)
        first = 0 if window is None else max(0, first_seen(position, window, self._in_chunks))
        found = []
        if cell >= 2 and first < self._page_tokens:
            found.append(raw.sink_rows(first))
        if cell and first < cell * cells:
            found.append(raw.rows(cell - 1, max(0, first - (cell - 1) * cells), cells))
        found.append(raw.rows(cell, max(0, first - cell * cells), row + 1))
        return found
