"""Attention of a decode step over a selection of pages: the rest counts through its near plane.

    choose     the records to attend in full, from the true query and all near planes
    read       those of them that are not in memory, while all other pages are estimated
    attend     to them as they come, and join everything in record order

So a result depends on the query and the pages alone. `expect` chooses with a query that was
rehearsed, and only asks for reads. What each step computes is `selection_steps`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...kernels.attention import empty_parts
from ...kernels.layer_selection import Choice
from ...kernels.selection import by_record
from ...prefetch import audit
from ...prefetch.fidelity import Fidelity
from ...prefetch.foresight import for_rehearsal, heaviest_first, is_worth_scoring
from ...prefetch.issue_point import IssuePoint
from ...prefetch.mean_change import MeanChange
from ...prefetch.source import Foresight, Selector
from ..pages.record_reader import RecordReader
from ..running.sequence import Sequence
from ..weights.weights import LayerTensors
from .attention import Query, TieredAttention
from .selection_steps import CompiledSteps, Known, Steps, TorchSteps, compiled_choice


class Noted(NamedTuple):
    """What a layer asked for, and attended to of it, for one token: ascending (n,) int64. figures:
    as Steps.finish has them."""

    layer: int
    asked: torch.Tensor
    chosen: torch.Tensor
    num_records: int
    figures: list[float]


class SelectedAttention:
    """output_norms: of layers' output projections, as far as they are known; others are added.
    head_dims: of each layer, without what pads heads in pages. waits: False for deadline mode,
    which attends what has arrived and estimates the rest. audits: whether now and then some of what
    was left out is read, to see how true its estimate was.
    """

    def __init__(
        self,
        tiered: TieredAttention,
        records: RecordReader,
        selector: Selector,
        foresight: Foresight,
        output_norms: dict[int, torch.Tensor],
        head_dims: list[int],
        *,
        waits: bool = True,
        audits: bool = True,
    ):
        self.fidelity, self.audit = Fidelity(), audit.Audit()
        self.issue_point = IssuePoint()
        self._tiered, self._records, self._waits = tiered, records, waits
        self._audits = waits and audits
        self._selector, self._rehearsing = selector, for_rehearsal(selector)
        self._foresight = foresight
        # Other selectors choose by the rehearsed query itself: not by what ran before.
        self._changes = MeanChange() if self._rehearsing is not selector else None
        self._known = Known(tiered, records, output_norms, head_dims)
        self._steps: Steps[Any] | None = None

    def run(
        self,
        layer: int,
        sequence: Sequence,
        query: Query,
        key_bias: torch.Tensor | None,
        residual: torch.Tensor,
        w: LayerTensors,
        notes: list[Noted] | None = None,
        *,
        looks: bool = True,
    ) -> torch.Tensor:
        """The output of one token's query, (1, num_heads * head_dim) float32.

        residual: (1, hidden_size), what enters the layer; w: the layer's tensors, of which only the
        output projection is read. notes: gets what is to be counted should the token be taken in;
        without it that is counted now. looks: whether estimates may be checked. The rest as
        TieredAttention.run has it.
        """
        if notes is None:
            self.issue_point.compare(layer, query.q)
        table = sequence.table
        if not table.num_records(layer):
            raw = self._tiered.raw_partial(layer, sequence, query, None)
            return self._tiered.output(query, raw)
        steps = self._steps_for(query)
        bias = self._known.score_bias(layer, sequence, query, key_bias)
        asked = steps.choose(layer, sequence, query, bias, residual, w)
        chosen = asked if self._waits else self._arrived(layer, sequence, asked)
        coming = steps.fetch(layer, sequence, chosen)
        if len(chosen) < len(asked):  # the next token may want it too
            self._records.prefetch(table, layer, asked.tolist())
        steps.estimate(chosen)
        for part in coming:
            with part:
                steps.attend(part)
        out, figures = steps.finish()
        noted = Noted(layer, asked, chosen, table.num_records(layer), figures)
        if notes is None:
            self.note(sequence, noted)
        else:
            notes.append(noted)
        if looks and self.looks_at(query.position) == layer:
            self.look(layer, sequence, query, key_bias, *steps.left_out())
        return out.view(1, -1)

    def expect(
        self, layer: int, sequence: Sequence, query: Query | None, key_bias: torch.Tensor | None
    ) -> None:
        """Ask for the records that a layer is expected to select. query: rehearsed, or None where
        the layer's weights are not at hand. Never waits."""
        trail, rehearsed = sequence.trail, None
        if query is not None and layer in trail.standing:
            bias = self._known.score_bias(layer, sequence, query, key_bias)
            evidence = self._known.evidence(layer, sequence, query, bias, *trail.standing[layer])
            trail.rehearsed[layer] = evidence.log_mass
            rehearsed = heaviest_first(evidence, self._rehearsing.select(evidence))
        wanted = self._foresight.expect(rehearsed, trail.last.get(layer))
        if len(wanted):
            self._records.prefetch(sequence.table, layer, wanted.tolist())

    def rehearses(self, layer: int, sequence: Sequence) -> bool:
        """Whether `expect` has any use for rehearsed queries of a layer."""
        reads = self._records.any_on_disk(sequence.table, layer)
        return self._foresight.needs_query and reads

    def expected(self, layer: int, x: torch.Tensor, *, early: bool) -> torch.Tensor:
        """A residual (1, hidden_size) as it is expected to enter the layer."""
        return x if self._changes is None else self._changes.add_to((layer, early), x)

    def note_changes(self, layer: int, sequence: Sequence, before, between, x) -> None:
        """The residual that enters a layer, and what it was at its early and late rehearsal."""
        if self._changes is not None and self.rehearses(layer, sequence):
            self._changes.note((layer, True), x - before)
            self._changes.note((layer, False), x - between)

    def wants_query(self, layer: int, sequence: Sequence) -> bool:
        """Whether `expect` is worth a rehearsed query now: see prefetch.foresight."""
        table, records = sequence.table, self._records
        if not self.rehearses(layer, sequence):
            return False
        lacked = records.lacked_bytes(table, layer)
        if records.near_plane(table, layer)[0].device.type != "cpu":
            return lacked > 0  # it is computed where nothing else waits for it
        near_bytes = table.num_records(layer) * self._tiered.layouts[layer].near_record_bytes
        return is_worth_scoring(near_bytes, lacked)

    # ---- for a whole token in one call -----------------------------------------------------------

    def serves_tokens(self, layers: list[int], sequence: Sequence) -> bool:
        """Whether nothing is to be done between the layers: nothing is asked for ahead, and each
        layer waits for what it selects."""
        return self._waits and not any(self._expects(layer, sequence) for layer in layers)

    def _expects(self, layer: int, sequence: Sequence) -> bool:
        """Whether anything would be asked for before the layer's turn."""
        if not self._records.any_on_disk(sequence.table, layer):
            return False
        last = sequence.trail.last.get(layer)
        return self.wants_query(layer, sequence) or len(self._foresight.expect(None, last)) > 0

    def choice(self) -> Choice | None:
        """How the compiled kernels select as the selector does; None where they cannot."""
        return compiled_choice(self._selector)

    def output_norms(self, layer: int, w: LayerTensors) -> torch.Tensor:
        """(kv_heads, num_rows): see kernels.effect."""
        return self._known.output_norms(layer, w)

    def run_several(
        self,
        layer: int,
        sequence: Sequence,
        query: Query,
        key_bias: torch.Tensor | None,
        residual: torch.Tensor,
        w: LayerTensors,
        notes: list[list[Noted]],
    ) -> torch.Tensor:
        """(rows, num_heads * head_dim) of consecutive tokens of one cell, whose keys and values lie
        in it: of each what `run` gives, its own selection included. What one of them has read is at
        hand for the next. residual: (rows, hidden_size); notes: of each token.
        """
        kv_heads, _, dim = query.q.shape
        by_token = query.q.view(kv_heads, -1, query.rows, dim).unbind(2)
        outs = []
        for i, q in enumerate(by_token):
            one = Query(q.contiguous(), 1, query.position + i, query.cell)
            x, certain = residual[i : i + 1], i == 0  # the others may not be taken in
            outs.append(self.run(layer, sequence, one, key_bias, x, w, notes[i], looks=certain))
        return torch.cat(outs)

    def note(self, sequence: Sequence, noted: Noted) -> None:
        """Counts what a layer selected, and attended to of it."""
        layer, asked, chosen, num_records, figures = noted
        sequence.trail.note(layer, asked, chosen, num_records)
        self.fidelity.note(num_records, len(chosen), len(asked) - len(chosen), *figures)

    def looks_at(self, position: int) -> int | None:
        """The layer whose estimates are checked for the token at a position, if any."""
        return audit.layer_due(len(self._tiered.ropes), position) if self._audits else None

    def look(
        self, layer: int, sequence, query: Query, key_bias, shares: torch.Tensor, log_total
    ) -> None:
        """Read a few of the records that were left out, to see how true their estimate was.
        shares, log_total: as Steps.left_out has them."""
        shares = by_record(shares, self._tiered.layouts[layer].pages_per_record)
        drawn, counts = audit.draw(shares, query.position)
        if not len(drawn):
            return
        bias = self._known.score_bias(layer, sequence, query, key_bias)
        parts, numbers = empty_parts(len(drawn), query.q), drawn.cpu().numpy()
        for part in self._records.fetch(sequence.table, layer, numbers, is_look=True):
            with part:
                self._known.attend(layer, query, drawn, part, bias, parts)
        true_shares = (parts.max - log_total).exp() * parts.sum
        self.audit.note(shares.cpu(), true_shares.cpu(), drawn, counts)

    # ---- inside ------------------------------------------------------------------------------

    def _steps_for(self, query: Query) -> Steps[Any]:
        """The steps that serve such queries: settled by the first one."""
        if self._steps is None:
            in_place = self._records.reads_in_place and self._tiered.decode.serves(query.q)
            choice = self.choice() if in_place else None
            if choice is None:
                self._steps = TorchSteps(self._known, self._selector)
            else:
                self._steps = CompiledSteps(self._known, choice)
        return self._steps

    def _arrived(self, layer: int, sequence: Sequence, asked: torch.Tensor) -> torch.Tensor:
        """What can be attended now."""
        is_ready = self._records.is_ready(sequence.table, layer, asked.tolist())
        return asked[torch.from_numpy(is_ready)]
