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

from ..kernels.attention import Partial, merge
from ..kernels.layout import PageLayout
from ..kernels.means import attend_means
from ..kernels.paged_attention import attend_records, merge_records
from ..kernels.pages import key_box, rotate
from ..kernels.quantised import QuantisedWeight
from ..kernels.score import score_pages
from ..prefetch import audit
from ..prefetch.effect import head_effect, output_norms, value_spread
from ..prefetch.evidence import Evidence
from ..prefetch.fidelity import Fidelity
from ..prefetch.foresight import is_worth_scoring
from ..prefetch.issue_point import IssuePoint
from ..prefetch.source import Foresight, Selector
from ..prefetch.trail import Standing
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
        raw = self._tiered.raw_partial(layer, sequence, query, None)
        if not sequence.table.num_records(layer):
            return self._tiered.output(query, raw)
        standing = Standing(
            raw.max + raw.sum.log(), self._effect(layer, sequence, w, residual, raw, query.position)
        )
        evidence, bias = self._evidence(layer, sequence, query, key_bias, standing)
        asked = self._selector.select(evidence)
        chosen = asked if self._waits else self._arrived(layer, sequence, asked)
        coming = self._records.fetch(sequence.table, layer, _numbers(chosen))
        sequence.trail.note(layer, asked, chosen, standing, evidence.num_records)
        left_out = evidence.log_mass.clone()
        left_out.unflatten(-1, (evidence.num_records, -1))[:, :, chosen] = -torch.inf
        whole = merge(self._estimate(layer, sequence, left_out), raw)
        if len(chosen):
            attended = merge_records(self._partials(layer, query, chosen, coming, bias))
            whole = merge(attended, whole)
        shares = (left_out - (whole.max + whole.sum.log()).unsqueeze(-1)).exp_()
        if self._waits and audit.is_due(layer, len(self._tiered.ropes), query.position):
            self._look(layer, sequence, query, bias, evidence.by_record(shares), whole)
        self._note(evidence, chosen, len(asked) - len(chosen), shares)
        return self._tiered.output(query, whole)

    def expect(
        self, layer: int, sequence: Sequence, query: Query | None, key_bias: torch.Tensor | None
    ) -> None:
        """Ask for the records that a layer is expected to select. query: rehearsed, or None where
        the layer's weights are not at hand. Never waits."""
        trail, evidence = sequence.trail, None
        if query is not None and layer in trail.standing:
            evidence, _ = self._evidence(layer, sequence, query, key_bias, trail.standing[layer])
            trail.rehearsed[layer] = evidence.log_mass
        wanted = self._foresight.expect(evidence, self._selector, trail.last.get(layer))
        if len(wanted):
            self._records.prefetch(sequence.table, layer, wanted.tolist())

    def wants_query(self, layer: int, sequence: Sequence) -> bool:
        """Whether `expect` is worth a rehearsed query: see prefetch.foresight."""
        table, records = sequence.table, self._records
        if not (self._foresight.needs_query and records.any_on_disk(table, layer)):
            return False
        near_bytes = table.num_records(layer) * self._tiered.layouts[layer].near_record_bytes
        if records.near_plane(table, layer)[0].device.type != "cpu":
            near_bytes = 0  # scored where nothing else waits for it
        return layer not in sequence.trail.last or is_worth_scoring(
            near_bytes, records.lacked_bytes(table, layer)
        )

    # ---- inside ------------------------------------------------------------------------------

    def _effect(self, layer, sequence, w: LayerTensors, residual, raw: Partial, position: int):
        """What a unit of misplaced mass does to the residual stream: see prefetch.effect."""
        layout = self._tiered.layouts[layer]
        if layer not in self._output_norms:
            projection = w["self_attn.o_proj.weight"]
            if isinstance(projection, QuantisedWeight):
                projection = projection.rows(0, projection.out_features)
            self._output_norms[layer] = output_norms(projection, layout.kv_heads, layout.head_dim)
        return head_effect(
            self._output_norms[layer],
            residual.norm(),
            raw.out / raw.sum.unsqueeze(-1),
            value_spread(self._tiered.raw_values(layer, sequence, position)),
        )

    def _evidence(
        self, layer: int, sequence: Sequence, query: Query, key_bias, standing: Standing
    ) -> tuple[Evidence, torch.Tensor | None]:
        """Evidence, and what the key bias adds to the scores."""
        near, rows = self._records.near_plane(sequence.table, layer)
        layout = self._tiered.layouts[layer]
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

    def _partials(
        self, layer: int, query: Query, chosen: torch.Tensor, coming: Iterator[Selected], bias
    ) -> Partial:
        """The chosen records' partials, in record order whatever batches they came in."""
        layout, parts, done = self._tiered.layouts[layer], [], 0
        q = rotate(query.q) if layout.rotate else query.q
        if bias is not None:
            bias = bias.unflatten(-1, (-1, layout.record_tokens))
        for selected in coming:
            with selected:
                batch = chosen[done : done + len(selected.near_rows)]
                parts.append(
                    attend_records(
                        q,
                        selected.near,
                        selected.near_rows,
                        selected.sources,
                        layout,
                        skip_first=layout.page_tokens if batch[0] == 0 else 0,
                        softcap=self._tiered.softcap,
                        score_bias=None if bias is None else bias[:, :, batch].flatten(-2),
                    )
                )
                done += len(batch)
        return Partial(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _look(self, layer: int, sequence, query: Query, bias, shares, whole: Partial) -> None:
        """Read a few of the records that were left out, to see how true their estimate was.
        shares: (kv_heads, num_rows, num_records)."""
        drawn, counts = audit.draw(shares, query.position)
        if not len(drawn):
            return
        coming = self._records.fetch(sequence.table, layer, _numbers(drawn), is_look=True)
        found = self._partials(layer, query, drawn, coming, bias)
        log_total = whole.max + whole.sum.log()
        true_shares = (found.max - log_total).exp() * found.sum
        self.audit.note(shares.cpu(), true_shares.cpu(), drawn, counts)

    def _estimate(self, layer: int, sequence: Sequence, log_mass: torch.Tensor) -> Partial:
        """Pages as tokens: log_mass (kv_heads, num_rows, num_pages), -inf for those that are
        attended otherwise."""
        near, rows = self._records.near_plane(sequence.table, layer)
        return attend_means(log_mass, near, rows, self._tiered.layouts[layer])

    def _note(self, evidence: Evidence, chosen, dropped: int, shares: torch.Tensor) -> None:
        self.fidelity.note(
            evidence.num_records,
            len(chosen),
            dropped,
            shares.sum(-1),
            (shares * evidence.unevenness).sum(-1),
        )


def _numbers(records: torch.Tensor) -> Sequence_[int]:
    return records.cpu().numpy()


def _upper_bound(q: torch.Tensor, near: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The greatest score that a key in a page's box could have, key biases aside: (kv_heads,
    num_rows, num_pages)."""
    least, greatest = key_box(near, layout)  # (num_pages, kv_heads, head_dim)
    up, down = q.clamp(min=0), q.clamp(max=0)
    return torch.bmm(up, greatest.permute(1, 2, 0)) + torch.bmm(down, least.permute(1, 2, 0))
