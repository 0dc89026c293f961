"""Exact attention over pages wherever they are: near planes, far planes and raw cells, reduced in a
fixed order.

Every span of token positions gives one partial (maximum, sum, output), computed by one kernel
whatever the tier it came from, and partials are merged by a tree over span index. Arrival order,
budget and prediction never enter, so the result is the same to the bit. Knows queries and pages;
knows nothing of weights, files or budgets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ...kernels import dispatch
from ...kernels.attention import Partial, attend, empty_parts, finish_rows, merge_into
from ...kernels.layer_attention import Records, attend_spans
from ...kernels.layout import PageLayout
from ...kernels.paged_attention import attend_pages, gpu_for, serves_any
from ...kernels.pages import rotate, unpack
from ...kernels.raw_rows import read_rows
from ...kernels.rope_scores import rope_scores
from ..pages.windows import first_seen
from ..planning.footprint import BIASED_SPANS
from ..running.sequence import Sequence
from .decode_attention import DecodeAttention
from .rope import Factors, Rope

_MOST_MASKS = 8  # that are kept, a byte for each row and key


class MergeTree:
    """Merges partials pushed in span order as a binary counter does: the shape depends on their
    number only. What is pushed is used up.
    """

    def __init__(self):
        self._stack: list[tuple[int, Partial]] = []

    def push(self, partial: Partial) -> None:
        size = 1
        while self._stack and self._stack[-1][0] == size:
            partial = merge_into(self._stack.pop()[1], partial)
            size *= 2
        self._stack.append((size, partial))

    def result(self) -> Partial | None:
        """The whole, or None of nothing; the tree is empty then."""
        stack, self._stack = self._stack, []
        if not stack:
            return None
        partial = stack[-1][1]
        for _, earlier in reversed(stack[:-1]):
            partial = merge_into(earlier, partial)
        return partial


@dataclass
class Query:
    """Queries of one cell, or some rows of it (prefill), or of one token (decode) of one layer.

    q: (kv_heads, groups * rows, head_dim) float32, after RoPE and scaled; row index = group * rows
    + i. position: of the first row; cell: the cell it lies in.
    """

    q: torch.Tensor
    rows: int
    position: int
    cell: int
    tree: MergeTree = field(default_factory=MergeTree)


def _tiles(
    layouts: list[PageLayout], num_tokens: list[int], device: torch.device
) -> list[torch.Tensor]:
    """Room for keys and values of so many tokens of each layer, (2, kv_heads, num_tokens,
    head_dim): the same memory for all."""
    shapes = [
        (2, of.kv_heads, tokens, of.head_dim)
        for of, tokens in zip(layouts, num_tokens, strict=True)
    ]
    room = torch.empty(max(map(math.prod, shapes)), device=device)
    return [room[: math.prod(shape)].view(shape) for shape in shapes]


# A query, its rows as pages are scored, and what key biases have for them, if by position.
_Asking = tuple[Query, torch.Tensor, Factors | None]


class TieredAttention:
    """Attention of one model over a page store. Owns the tiles that spans are unpacked to."""

    def __init__(
        self,
        layouts: list[PageLayout],
        cell_tokens: int,
        span_tokens: list[int],
        store,
        ropes: list[Rope],
        device,
        softcap: float = 0.0,
        null_scores: list[torch.Tensor | None] | None = None,
        in_chunks: bool = False,
    ):
        self.layouts = layouts  # of each layer
        self.softcap = softcap  # see kernels.attention
        self._in_chunks = in_chunks  # what windows are, see ModelConfig.chunked
        # Of each layer: (num_heads,), or None; see kernels.layer_attention.
        self.null_scores: list[torch.Tensor | None] = null_scores or [None] * len(layouts)
        self.cell_tokens = cell_tokens
        self.span_tokens = span_tokens  # of each layer
        self.store = store
        self.ropes = ropes  # one for each layer
        raw_tokens = layouts[0].page_tokens + 2 * cell_tokens
        self._span_tiles = _tiles(layouts, span_tokens, device)
        self._raw_tiles = _tiles(layouts, [raw_tokens] * len(layouts), device)
        self._raw_masks: dict[tuple, torch.Tensor] = {}
        self.decode = DecodeAttention(
            layouts, cell_tokens, span_tokens, store, softcap, self.null_scores, in_chunks
        )

    def run(
        self,
        layer: int,
        sequence: Sequence,
        queries: list[Query],
        window: int | None,
        key_bias: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Attention output of each query: (rows, num_heads * head_dim) float32, heads in the
        model's order.

        Queries come in order of their cells. window: tokens a query sees, itself included, or None.
        key_bias: (kv_heads, head_dim) that quantised pages leave out, or None.
        """
        if queries[0].rows == 1 and self.decode.takes(queries[0].q):
            return [self._decode_one(layer, sequence, queries[0], window, key_bias)]
        self._sealed(layer, sequence, queries, window, key_bias)
        outputs = []
        for query in queries:
            raw, sealed = self.raw_partial(layer, sequence, query, window), query.tree.result()
            outputs.append(self.output(query, raw if sealed is None else merge_into(sealed, raw)))
        return outputs

    def _decode_one(self, layer, sequence, query: Query, window, key_bias) -> torch.Tensor:
        return self.decode.run(
            layer,
            sequence,
            query.q,
            rotate(query.q) if self.layouts[layer].rotate else query.q,
            query.position,
            window,
            self.spans_wanted(layer, query.position, query.cell, window),
            self.sealed_tokens(query.cell),
            lambda base, tokens: self.score_bias(layer, query, base, tokens, key_bias),
        )

    def run_several(
        self,
        layer: int,
        sequence: Sequence,
        query: Query,
        window: int | None,
        key_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """(rows, num_heads * head_dim) of consecutive tokens of one cell, whose keys and values lie
        in it: of each the bits that `run` gives for it alone. For rows that `decode` serves.
        """
        kv_heads, _, dim = query.q.shape

        def by_token(q: torch.Tensor) -> torch.Tensor:  # groups are the outer rows of a query
            return q.view(kv_heads, -1, query.rows, dim).permute(2, 0, 1, 3)

        def score_bias(first: int, stop: int, base: int, tokens: int) -> torch.Tensor | None:
            if key_bias is None:
                return None
            rows = q[first:stop].permute(1, 0, 2, 3).reshape(kv_heads, -1, dim)
            return rope_scores(*self.ropes[layer].factors(rows, key_bias), base, tokens)

        q = by_token(query.q)
        positions = range(query.position, query.position + query.rows)
        spans = [self.spans_wanted(layer, at, query.cell, window) for at in positions]
        return self.decode.run_several(
            layer,
            sequence,
            q,
            by_token(rotate(query.q)) if self.layouts[layer].rotate else q,
            query.position,
            window,
            spans,
            self.sealed_tokens(query.cell),
            score_bias,
            BIASED_SPANS if key_bias is not None else sum(map(len, spans)),
        )

    def spans_wanted(self, layer: int, position: int, cell: int, window: int | None) -> range:
        """Which spans of a layer's sealed pages a query attends to that begins at `position` of a
        cell."""
        sealed, span_tokens = self.sealed_tokens(cell), self.span_tokens[layer]
        first = 0 if window is None else max(0, first_seen(position, window, self._in_chunks))
        stop = -(-sealed // span_tokens)
        return range(first // span_tokens if first < sealed else stop, stop)

    def sealed_tokens(self, cell: int) -> int:
        """How many tokens a query in a cell sees sealed."""
        return max(0, cell - 1) * self.cell_tokens

    def _sealed(self, layer, sequence, queries, window, key_bias) -> None:
        # In prefill what the cell's first row wants, so that partials are merged alike whichever
        # rows there are.
        cells = self.cell_tokens
        starts = [q.position if q.rows == 1 else q.cell * cells for q in queries]
        wanted = [
            self.spans_wanted(layer, start, query.cell, window)
            for start, query in zip(starts, queries, strict=True)
        ]
        stop = max((spans.stop for spans in wanted), default=0)
        start = min((spans.start for spans in wanted if spans), default=stop)
        most_sealed = max(self.sealed_tokens(query.cell) for query in queries)
        layout, span_tokens = self.layouts[layer], self.span_tokens[layer]
        packed = self._attends_packed(layer, queries[0], window)
        asking: list[_Asking] = []
        for query in queries:
            factors = None
            if packed and key_bias is not None:
                factors = self.ropes[layer].factors(query.q, key_bias)
            asking.append((query, rotate(query.q) if layout.rotate else query.q, factors))
        # Spans whose partials take no more than those of a whole cell for one span.
        at_once = self.cell_tokens // max(query.rows for query in queries)
        if packed and queries[0].rows > 1 and at_once > 1:
            return self._sealed_at_once(
                layer, sequence, asking, wanted, range(start, stop), at_once
            )
        for span in range(start, stop):
            base = span * span_tokens
            tokens = min(span_tokens, most_sealed - base)
            k, v = self._span_tiles[layer][:, :, :tokens]
            records = tokens // layout.record_tokens
            # The sink is attended raw, so its sealed copy is passed over.
            first = layout.page_tokens if span == 0 else 0
            with self.store.spans.fetch(sequence.table, layer, span, records) as pages:
                seeing: list[tuple[_Asking, int]] = []  # and how many of the span's tokens are seen
                for asked, spans in zip(asking, wanted, strict=True):
                    last = min(tokens, self.sealed_tokens(asked[0].cell) - base)
                    if span in spans and last > first:
                        seeing.append((asked, last))
                if packed:
                    for (query, q, factors), last in seeing:
                        seen = first
                        if window is not None:
                            seen_from = first_seen(query.position, window, self._in_chunks)
                            seen = max(first, seen_from - base)
                        bias = None if factors is None else rope_scores(*factors, base, tokens)
                        partial = attend_pages(
                            q, pages.near, pages.records, layout, (seen, last), bias, self.softcap
                        )
                        query.tree.push(partial)
                    continue
                unpack(pages.near, pages.records, layout, k, v)
            if key_bias is not None:
                k += self._bias_of(layer, base, tokens, key_bias)
            for (query, q, _), last in seeing:
                mask = self._window_mask(query, window, base + first, last - first)
                query.tree.push(attend(q, k[:, first:last], v[:, first:last], mask, self.softcap))

    def _sealed_at_once(
        self, layer, sequence, asking: list[_Asking], wanted, spans: range, most: int
    ) -> None:
        """What `_sealed` does of packed pages, for a few rows: up to `most` spans in one call, to
        the bit the same."""
        layout, span = self.layouts[layer], spans.start
        span_tokens = self.span_tokens[layer]
        per_span = span_tokens // layout.record_tokens
        while span < spans.stop:
            until = min(spans.stop, span + most)
            with self.decode.fetch(sequence, layer, span, until) as run:
                for (query, q, factors), own in zip(asking, wanted, strict=True):
                    begin, end = max(run.first, own.start), min(run.stop, own.stop)
                    sealed, base = self.sealed_tokens(query.cell), begin * span_tokens
                    first = max(0, layout.page_tokens - base)  # the sink is attended raw
                    if begin >= end or sealed - base <= first:
                        continue
                    there = slice((begin - run.first) * per_span, (end - run.first) * per_span)
                    record_at = run.record_at[there]
                    tokens = len(record_at) * layout.record_tokens
                    bias = None if factors is None else rope_scores(*factors, base, tokens)
                    visible = first, min(tokens, sealed - base)
                    records = Records(run.near_at[there], record_at, per_span, visible, bias)
                    parts = empty_parts(end - begin, q)
                    attend_spans(q.contiguous(), records, layout, self.softcap, parts)
                    for partial in zip(*parts, strict=True):
                        query.tree.push(Partial(*partial))
                span = run.stop

    def _attends_packed(self, layer: int, query: Query, window) -> bool:
        """Whether pages are attended to as they are: by a token's few rows always; by a cell's
        where that is faster and all rows see the same. How many of a cell's rows there are does not
        enter.
        """
        if query.rows == 1:
            return True
        layout = self.layouts[layer]
        if window is not None:
            return False
        compiled = dispatch.compiled_for(query.q) is not None
        return (compiled and serves_any(layout)) or gpu_for(query.q, layout) is not None

    def _bias_of(self, layer: int, base: int, tokens: int, key_bias: torch.Tensor) -> torch.Tensor:
        """RoPE of the key bias at each position, rotated as the pages are: (kv_heads, tokens,
        head_dim).
        """
        bias = self.ropes[layer].turn_bias(key_bias, base, tokens).transpose(0, 1)
        return rotate(bias) if self.layouts[layer].rotate else bias

    def score_bias(
        self, layer: int, query: Query, base: int, tokens: int, key_bias: torch.Tensor | None
    ):
        """What the key bias adds to scores: (kv_heads, groups, tokens), or None without one."""
        if key_bias is None:
            return None
        return rope_scores(*self.ropes[layer].factors(query.q, key_bias), base, tokens)

    def _window_mask(self, query: Query, window: int | None, base: int, count: int):
        """Visibility (rows, count) of sealed keys from `base` on; None when every row sees all of
        them.
        """
        last = query.position + query.rows - 1
        if window is None or first_seen(last, window, self._in_chunks) <= base:
            return None
        device = query.q.device
        positions = torch.arange(query.position, query.position + query.rows, device=device)
        keys = torch.arange(base, base + count, device=device)
        return keys[None, :] >= first_seen(positions, window, self._in_chunks)[:, None]

    def raw_partial(self, layer, sequence: Sequence, query: Query, window: int | None) -> Partial:
        """A query's partial over the keys that are raw: the sink, the previous cell, its own; its
        null scores included."""
        if query.rows == 1 and self.decode.takes(query.q):
            return self.decode.raw_partial(layer, sequence, query.q, query.position, window)
        raw, parts, used = sequence.raw, [], 0
        if query.cell >= 2:
            parts.append((raw.sink_keys[layer], raw.sink_values[layer]))
        for cell in range(max(0, query.cell - 1), query.cell + 1):
            parts.append(raw.cell(layer, cell))
        for part in parts:
            stop = used + part[0].shape[1]
            for rows, tile in zip(part, self._raw_tiles[layer], strict=True):
                read_rows(rows, tile[:, used:stop])
            used = stop
        k, v = self._raw_tiles[layer][:, :, :used]
        partial = attend(query.q, k, v, self._raw_mask(query, window), self.softcap)
        scores = self.null_scores[layer]
        if scores is None:
            return partial
        scores = scores.view(len(query.q), -1).repeat_interleave(query.rows, 1)
        null = Partial(scores, torch.ones_like(scores), torch.zeros_like(query.q))
        return merge_into(partial, null)

    def _raw_mask(self, query: Query, window: int | None) -> torch.Tensor:
        """Which raw keys a query's rows see, (rows, keys). Some are kept: the layers of a model ask
        for the same, and without a window all cells from the third on do."""
        cells, device = self.cell_tokens, query.q.device
        place = (query.cell, query.position)
        if window is None:
            place = (min(query.cell, 2), query.position - query.cell * cells)
        asked = (*place, query.rows, window)
        mask = self._raw_masks.get(asked)
        if mask is None:
            first = max(0, query.cell - 1) * cells
            keys_at = torch.arange(first, (query.cell + 1) * cells, device=device)
            if query.cell >= 2:
                sink = torch.arange(self.layouts[0].page_tokens, device=device)
                keys_at = torch.cat([sink, keys_at])
            rows_at = torch.arange(query.position, query.position + query.rows, device=device)
            mask = keys_at[None, :] <= rows_at[:, None]
            if window is not None:
                mask &= keys_at[None, :] >= first_seen(rows_at, window, self._in_chunks)[:, None]
            if len(self._raw_masks) >= _MOST_MASKS:
                self._raw_masks.clear()
            self._raw_masks[asked] = mask
        return mask

    def raw_values(self, layer: int, sequence: Sequence, position: int) -> torch.Tensor:
        """The raw values that one token at `position` sees: (kv_heads, num_tokens, head_dim)."""
        cell, row = divmod(position, self.cell_tokens)
        parts = [sequence.raw.sink_values[layer]] if cell >= 2 else []
        if cell:
            parts.append(sequence.raw.cell(layer, cell - 1)[1])
        parts.append(sequence.raw.cell(layer, cell)[1][:, : row + 1])
        return torch.cat(parts, 1)

    @staticmethod
    def output(query: Query, whole: Partial) -> torch.Tensor:
        """(rows, num_heads * head_dim) of a query's partial over all that it sees."""
        return finish_rows(whole, query.rows)
