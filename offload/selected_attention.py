"""Attention of a decode step over a selection of pages: the rest counts through its near plane.

    score      the true query against all near planes: every page's mass, and how uneven it is
    select     the records to attend in full; what is resident or on its way never enters
    estimate   every other page is one token: its estimated mass, its mean value
    attend     those records, which are read meanwhile, one partial each, joined in record order

So a result depends on the query and the pages alone. `expect` does the first two steps with a
query that was rehearsed, and only asks for reads. Knows queries and pages, and of the weights
only how far a head's output carries.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Sequence_

import torch

from ..kernels.attention import Partial
from ..kernels.effect import Standing, head_effect, output_norms, stand, value_spread
from ..kernels.layer_attention import empty_parts
from ..kernels.layout import PageLayout
from ..kernels.means import attend_left_out
from ..kernels.paged_attention import attend_records, merge_records
from ..kernels.pages import key_box, rotate
from ..kernels.quantised import QuantisedWeight
from ..kernels.score import score_pages
from ..kernels.selection import by_record
from ..kernels.token_step import Choice
from ..prefetch import audit
from ..prefetch.evidence import Evidence
from ..prefetch.fidelity import Fidelity
from ..prefetch.foresight import heaviest_first, is_worth_scoring
from ..prefetch.issue_point import IssuePoint
from ..prefetch.source import Foresight, Selector
from ..prefetch.top_p import TopP
from .attention import Query, TieredAttention
from .record_reader import RecordReader
from .selected import Selected
from .sequence import Sequence
from .weights import LayerTensors


class SelectedAttention:
    """waits: False for deadline mode, which attends what has arrived and estimates the rest."""

    def __init__(
        self,
        tiered: TieredAttention,
        records: RecordReader,
        selector: Selector,
        foresight: Foresight,
        *,
        waits: bool = True,
    ):
        self.fidelity, self.audit = Fidelity(), audit.Audit()
        self._tiered, self._records, self._waits = tiered, records, waits
        self._selector, self._foresight = selector, foresight
        self.issue_point = IssuePoint()
        self._output_norms: dict[int, torch.Tensor] = {}  # by layer, (kv_heads, num_rows)

    def run(
        self,
        layer: int,
        sequence: Sequence,
        query: Query,
        key_bias: torch.Tensor | None,
        residual: torch.Tensor,
        w: LayerTensors,
    ) -> torch.Tensor:
        """The output of one token's query, (1, num_heads * head_dim) float32.

        residual: (1, hidden_size), what enters the layer; w: the layer's tensors, of which only the
        output projection is read. The rest as TieredAttention.run has it.
        """
        self.issue_point.compare(layer, query.q)
        standing = self._stand(layer, sequence, query, residual, w)
        if not sequence.table.num_records(layer):
            return self._tiered.output(query, standing.raw)
        evidence, bias = self._evidence(layer, sequence, query, key_bias, standing)
        asked = self._selector.select(evidence)
        chosen = asked if self._waits else self._arrived(layer, sequence, asked)
        coming = self._records.fetch(sequence.table, layer, _numbers(chosen))
        near, rows = self._records.near_plane(sequence.table, layer)
        estimate, left = attend_left_out(
            evidence.shares, evidence.unevenness, chosen, near, rows, self._tiered.layout
        )
        parts = empty_parts(len(chosen) + 2, query.q)
        for i, part in enumerate((estimate, standing.raw)):
            for of_all, one in zip(parts, part, strict=True):
                of_all[len(chosen) + i] = one
        self._attend(query, chosen, coming, bias, parts)
        whole = merge_records(parts)
        log_total = whole.max + whole.sum.log()
        # Of all mass, as it is known now.
        scale = (evidence.shares.log_total - log_total).exp()
        missed, misplaced = left.missed * scale, left.misplaced * scale
        figures = torch.stack([missed.mean(), missed.max(), misplaced.mean(), misplaced.max()])
        self.note(layer, sequence, asked, chosen, evidence.num_records, figures.tolist())
        sequence.trail.standing[layer] = standing
        if self.looks_at(query.position) == layer:
            shares = left.shares * scale.unsqueeze(-1)
            self.look(layer, sequence, query, key_bias, shares, log_total)
        return self._tiered.output(query, whole)

    def choice(self) -> Choice | None:
        """How the compiled kernels select as the selector does; None where they cannot."""
        if not isinstance(self._selector, TopP):
            return None
        criterion = self._selector.criterion
        return Choice(self._selector.epsilon, criterion != "mass", criterion == "effect")

    def output_norms(self, layer: int, w: LayerTensors) -> torch.Tensor:
        """(kv_heads, num_rows): see kernels.effect."""
        layout = self._tiered.layout
        if layer not in self._output_norms:
            projection = w["self_attn.o_proj.weight"]
            if isinstance(projection, QuantisedWeight):
                projection = projection.rows(0, projection.out_features)
            self._output_norms[layer] = output_norms(projection, layout.kv_heads, layout.head_dim)
        return self._output_norms[layer]

    def note(
        self,
        layer: int,
        sequence: Sequence,
        asked: torch.Tensor,
        chosen: torch.Tensor,
        num_records: int,
        figures: list[float],
    ) -> None:
        """Counts what a layer selected, and of it attended to. figures: the mean and the greatest
        missed share of a query head, and the same of misplaced ones."""
        sequence.trail.note(layer, asked, chosen, num_records)
        self.fidelity.note(num_records, len(chosen), len(asked) - len(chosen), *figures)

    def looks_at(self, position: int) -> int | None:
        """The layer whose estimates are checked for the token at a position, if any."""
        return audit.layer_due(len(self._tiered.ropes), position) if self._waits else None

    def look(
        self, layer: int, sequence, query: Query, key_bias, shares: torch.Tensor, log_total
    ) -> None:
        """Read a few of the records that were left out, to see how true their estimate was.
        shares: (kv_heads, num_rows, num_pages), of all mass, the log of which is log_total."""
        layout = self._tiered.layout
        shares = by_record(shares, layout.pages_per_record)
        drawn, counts = audit.draw(shares, query.position)
        if not len(drawn):
            return
        coming = self._records.fetch(sequence.table, layer, _numbers(drawn), is_look=True)
        found = empty_parts(len(drawn), query.q)
        num_tokens = shares.shape[-1] * layout.record_tokens
        bias = self._bias(layer, query, num_tokens, key_bias)
        self._attend(query, drawn, coming, bias, found)
        true_shares = (found.max - log_total).exp() * found.sum
        self.audit.note(shares.cpu(), true_shares.cpu(), drawn, counts)

    def expect(
        self, layer: int, sequence: Sequence, query: Query | None, key_bias: torch.Tensor | None
    ) -> None:
        """Ask for the records that a layer is expected to select. query: rehearsed, or None where
        the layer's weights are not at hand. Never waits."""
        trail, rehearsed = sequence.trail, None
        if query is not None and layer in trail.standing:
            evidence, _ = self._evidence(layer, sequence, query, key_bias, trail.standing[layer])
            trail.rehearsed[layer] = evidence.log_mass
            rehearsed = heaviest_first(evidence, self._selector.select(evidence))
        wanted = self._foresight.expect(rehearsed, trail.last.get(layer))
        if len(wanted):
            self._records.prefetch(sequence.table, layer, wanted.tolist())

    def wants_query(self, layer: int, sequence: Sequence) -> bool:
        """Whether `expect` is worth a rehearsed query: see prefetch.foresight."""
        table, records = sequence.table, self._records
        if not (self._foresight.needs_query and records.any_on_disk(table, layer)):
            return False
        near_bytes = table.num_records(layer) * self._tiered.layout.near_record_bytes
        if records.near_plane(table, layer)[0].device.type != "cpu":
            near_bytes = 0  # scored where nothing else waits for it
        return layer not in sequence.trail.last or is_worth_scoring(
            near_bytes, records.lacked_bytes(table, layer)
        )

    # ---- inside ------------------------------------------------------------------------------

    def _stand(self, layer, sequence, query: Query, residual, w: LayerTensors) -> Standing:
        """What is known before pages are looked at."""
        tiered, norms = self._tiered, self.output_norms(layer, w)
        if tiered.decode.serves(query.q):
            raw = tiered.decode.raw(layer, sequence, query.position, None)
            q, x = query.q.contiguous(), residual.contiguous()
            return stand(q, raw, tiered.layout, tiered.softcap, norms, x)
        raw = tiered.raw_partial(layer, sequence, query, None)
        spread = value_spread(tiered.raw_values(layer, sequence, query.position))
        effect = head_effect(norms, residual.norm(), raw.out / raw.sum.unsqueeze(-1), spread)
        return Standing(raw, raw.max + raw.sum.log(), effect)

    def _evidence(
        self, layer: int, sequence: Sequence, query: Query, key_bias, standing: Standing
    ) -> tuple[Evidence, torch.Tensor | None]:
        """Evidence, and what the key bias adds to the scores."""
        near, rows = self._records.near_plane(sequence.table, layer)
        layout = self._tiered.layout
        q = rotate(query.q) if layout.rotate else query.q
        bias = self._bias(layer, query, len(rows) * layout.record_tokens, key_bias)
        scores = score_pages(q, near, rows, layout, self._tiered.softcap, bias)
        scores.log_mass[..., 0] = -torch.inf  # the sink, which is attended raw
        evidence = Evidence(
            scores.log_mass,
            scores.unevenness,
            standing.raw_log_mass,
            layout.pages_per_record,
            layout.record_tokens,
            effect=standing.effect,
            upper_bound=lambda: _upper_bound(q, near[rows], layout),
            rehearsed_log_mass=sequence.trail.rehearsed.get(layer, scores.log_mass),
            previous=sequence.trail.last.get(layer),
        )
        return evidence, bias

    def _bias(self, layer: int, query: Query, num_tokens: int, key_bias) -> torch.Tensor | None:
        """(kv_heads, num_rows, num_tokens), a span at a time: the rotated biases are large."""
        if key_bias is None:
            return None
        step = self._tiered.span_tokens
        parts = [
            self._tiered.score_bias(layer, query, base, min(step, num_tokens - base), key_bias)
            for base in range(0, num_tokens, step)
        ]
        return torch.cat(parts, -1)

    def _arrived(self, layer: int, sequence: Sequence, asked: torch.Tensor) -> torch.Tensor:
        """What can be attended now; the rest is asked for, since the next token may want it too."""
        is_ready = self._records.is_ready(sequence.table, layer, asked.tolist())
        arrived = asked[torch.from_numpy(is_ready)]
        if len(arrived) < len(asked):
            self._records.prefetch(sequence.table, layer, asked.tolist())
        return arrived

    def _attend(
        self, query: Query, chosen: torch.Tensor, coming: Iterator[Selected], bias, parts: Partial
    ) -> None:
        """The chosen records' partials, to the first of `parts`, in record order whatever batches
        they come in."""
        layout, done = self._tiered.layout, 0
        q = rotate(query.q) if layout.rotate else query.q
        if bias is not None:
            bias = bias.unflatten(-1, (-1, layout.record_tokens))
        for selected in coming:
            with selected:
                batch = slice(done, done + len(selected.near_rows))
                records = chosen[batch]
                attend_records(
                    q,
                    selected.near,
                    selected.near_rows,
                    selected.sources,
                    layout,
                    skip_first=layout.page_tokens if records[0] == 0 else 0,
                    softcap=self._tiered.softcap,
                    score_bias=None if bias is None else bias[:, :, records].flatten(-2),
                    into=Partial(*(of_all[batch] for of_all in parts)),
                )
                done = batch.stop


def _numbers(records: torch.Tensor) -> Sequence_[int]:
    return records.cpu().numpy()


def _upper_bound(q: torch.Tensor, near: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The greatest score that a key in a page's box could have, key biases aside: (kv_heads,
    num_rows, num_pages)."""
    least, greatest = key_box(near, layout)  # (num_pages, kv_heads, head_dim)
    up, down = q.clamp(min=0), q.clamp(max=0)
    return torch.bmm(up, greatest.permute(1, 2, 0)) + torch.bmm(down, least.permute(1, 2, 0))
