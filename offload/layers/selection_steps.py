"""How one layer's records are selected and attended, step by step: what bounded decoding does.

    choose    the records to attend in full: what is resident or on its way never enters
    fetch     begins to read them
    estimate  every other page is one token: its estimated mass, its mean value
    attend    to chosen records, one partial each, in whatever parts they come
    finish    everything to one output, in record order

`CompiledSteps` do so in a few calls, to the bit as one call does for a whole token; `TorchSteps`
for any selector and device. Knows queries and pages, and of the weights only how far a head's
output carries.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Protocol, TypeVar

import torch

from ...kernels.attention import Partial, empty_parts
from ...kernels.bounds import bound_pages
from ...kernels.effect import (
    Standing,
    composed_norms,
    head_effect,
    output_norms,
    stand,
    value_spread,
)
from ...kernels.layer_selection import Choice, LayerSelection
from ...kernels.matmul import decoded_rows
from ...kernels.means import attend_left_out
from ...kernels.paged_attention import attend_records, merge_records
from ...kernels.pages import rotate
from ...kernels.score import score_pages
from ...prefetch.evidence import Evidence
from ...prefetch.source import Selector
from ...prefetch.top_p import TopP
from ..pages.record_reader import RecordReader
from ..pages.selected import Placed, Selected
from ..running.sequence import Sequence
from ..weights.weights import LayerTensors
from .attention import Query, TieredAttention

_NORM_ROWS = 256  # of an output projection that are decoded at once: no plan counts more


class Known:
    """What is known of a layer before any record is read. output_norms: those found so far, by
    layer. head_dims: of each layer, without what pads heads in pages."""

    def __init__(
        self,
        tiered: TieredAttention,
        records: RecordReader,
        output_norms: dict[int, torch.Tensor],
        head_dims: list[int],
    ):
        self.tiered, self.records = tiered, records
        self._output_norms, self._head_dims = output_norms, head_dims

    def output_norms(self, layer: int, w: LayerTensors) -> torch.Tensor:
        """(kv_heads, num_rows): see kernels.effect."""
        if layer not in self._output_norms:
            projection = w["self_attn.o_proj.weight"]
            parts = (
                decoded_rows(projection, start, min(start + _NORM_ROWS, projection.shape[0]))
                for start in range(0, projection.shape[0], _NORM_ROWS)
            )
            values = w.get("self_attn.v_b_proj.weight")
            if values is None:
                head_dim, kv_heads = self._head_dims[layer], self.tiered.layouts[layer].kv_heads
                norms = (output_norms(rows, kv_heads, head_dim) for rows in parts)
                self._output_norms[layer] = reduce(add, (n.square() for n in norms)).sqrt()
            else:  # a latent goes through both
                num_heads = w["self_attn.k_b_proj.weight"].shape[0] // values.shape[1]
                self._output_norms[layer] = composed_norms(parts, values, num_heads)
        return self._output_norms[layer]

    def stand(
        self, layer: int, sequence: Sequence, query: Query, residual, w: LayerTensors
    ) -> Standing:
        """What is known without pages. residual: (1, hidden_size), what enters the layer."""
        tiered, norms = self.tiered, self.output_norms(layer, w)
        if tiered.decode.serves(query.q):
            raw = tiered.decode.raw(layer, sequence, query.position, None)
            q, x = query.q.contiguous(), residual.contiguous()
            return stand(q, raw, tiered.layouts[layer], tiered.softcap, norms, x)
        raw = tiered.raw_partial(layer, sequence, query, None)
        first = tiered.layouts[layer].shared_from or 0
        spread = value_spread(tiered.raw_values(layer, sequence, query.position)[..., first:])
        out = raw.out[..., first:] / raw.sum.unsqueeze(-1)
        effect = head_effect(norms, residual.norm(), out, spread)
        return Standing(raw, raw.max + raw.sum.log(), effect)

    def evidence(
        self, layer: int, sequence: Sequence, query: Query, bias, raw_log_mass, effect
    ) -> Evidence:
        """bias: as score_bias gives it, of all tokens of the layer's records."""
        near, rows = self.records.near_plane(sequence.table, layer)
        layout = self.tiered.layouts[layer]
        q = rotate(query.q) if layout.rotate else query.q
        scores = score_pages(q, near, rows, layout, self.tiered.softcap, bias)
        scores.log_mass[..., 0] = -torch.inf  # the sink, which is attended raw
        rehearsed = sequence.trail.rehearsed.get(layer)
        if rehearsed is None or rehearsed.shape != scores.log_mass.shape:  # from before a seal
            rehearsed = scores.log_mass
        return Evidence(
            scores.log_mass,
            scores.unevenness,
            raw_log_mass,
            layout.pages_per_record,
            layout.record_tokens,
            effect=effect,
            upper_bound=lambda: bound_pages(q, near, rows, layout),
            rehearsed_log_mass=rehearsed,
            previous=sequence.trail.last.get(layer),
        )

    def score_bias(
        self, layer: int, sequence: Sequence, query: Query, key_bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What a key bias adds to the scores of all records, (kv_heads, num_rows, num_tokens), a
        span at a time: the rotated biases are large."""
        if key_bias is None:
            return None
        num_tokens = sequence.table.num_records(layer) * self.tiered.layouts[layer].record_tokens
        step = self.tiered.span_tokens[layer]
        parts = (
            self.tiered.score_bias(layer, query, base, min(step, num_tokens - base), key_bias)
            for base in range(0, num_tokens, step)
        )
        return torch.cat([part for part in parts if part is not None], -1)

    def attend(
        self,
        layer: int,
        query: Query,
        records: torch.Tensor,
        selected: Selected,
        bias: torch.Tensor | None,
        into: Partial,
    ) -> None:
        """Some of the records' partials, one each, to their places. bias: of all the layer's."""
        layout, records = self.tiered.layouts[layer], records[selected.positions]
        if bias is not None:
            bias = bias.unflatten(-1, (-1, layout.record_tokens))[:, :, records].flatten(-2)
        partial = attend_records(
            rotate(query.q) if layout.rotate else query.q,
            selected.near,
            selected.near_rows,
            selected.sources,
            layout,
            skip_first=layout.page_tokens if records[0] == 0 else 0,
            softcap=self.tiered.softcap,
            score_bias=bias,
        )
        for of_all, part in zip(into, partial, strict=True):
            of_all[selected.positions] = part


_Part = TypeVar("_Part", Selected, Placed)


class Steps(Protocol[_Part]):
    """One layer at a time, in the order of its methods. _Part: how parts of a selection are given
    and taken."""

    def choose(
        self,
        layer: int,
        sequence: Sequence,
        query: Query,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        w: LayerTensors,
    ) -> torch.Tensor:
        """The records to attend in full, ascending, (n,) int64. Also notes in the sequence's trail
        what a rehearsal goes by."""
        ...

    def fetch(self, layer: int, sequence: Sequence, chosen: torch.Tensor) -> Iterator[_Part]:
        """Begins to read what will be attended, which may be less than was asked for: parts for
        `attend`. See RecordReader.fetch."""
        ...

    def estimate(self, chosen: torch.Tensor) -> None:
        """chosen: what will be attended."""
        ...

    def attend(self, part: _Part) -> None:
        """To some of the chosen records."""
        ...

    def finish(self) -> tuple[torch.Tensor, list[float]]:
        """The attention output (kv_heads, num_rows, head_dim), and the mean and the greatest share
        of all mass that a query head missed, and the same of misplaced shares."""
        ...

    def left_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages' shares of all mass, (kv_heads, num_rows, num_pages), 0 for what was attended, and
        the log of all mass, (kv_heads, num_rows)."""
        ...


class CompiledSteps:
    """With the default selector, where records are read in place."""

    def __init__(self, known: Known, choice: Choice):
        self._known, self._selection = known, LayerSelection(choice)

    def choose(self, layer, sequence, query, bias, residual, w) -> torch.Tensor:
        tiered, records = self._known.tiered, self._known.records
        q, layout = query.q.contiguous(), tiered.layouts[layer]
        addresses = records.addresses(sequence.table, layer)
        assert addresses is not None, "records are not read in place"
        chosen = self._selection.choose(
            q,
            rotate(q).contiguous() if layout.rotate else q,
            tiered.decode.raw(layer, sequence, query.position, None),
            addresses.near_at,
            layout,
            tiered.softcap,
            None if bias is None else bias.to(torch.float32).contiguous(),
            self._known.output_norms(layer, w),
            residual.contiguous(),
        )
        sequence.trail.standing[layer] = self._selection.known()
        return chosen

    def fetch(self, layer, sequence, chosen) -> Iterator[Placed]:
        return self._known.records.fetch_in_place(sequence.table, layer, chosen.numpy())

    def estimate(self, chosen) -> None:
        self._selection.estimate(chosen)

    def attend(self, part: Placed) -> None:
        self._selection.attend(part.positions, part.record_at)

    def finish(self) -> tuple[torch.Tensor, list[float]]:
        return self._selection.finish()

    def left_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._selection.left_out()


class TorchSteps:
    """With any selector, on any device."""

    def __init__(self, known: Known, selector: Selector):
        self._known, self._selector = known, selector

    def choose(self, layer, sequence, query, bias, residual, w) -> torch.Tensor:
        known = self._known
        self._standing = standing = known.stand(layer, sequence, query, residual, w)
        self._layer, self._query, self._bias = layer, query, bias
        self._plane = known.records.near_plane(sequence.table, layer)
        self._evidence = known.evidence(layer, sequence, query, bias, *standing[1:])
        sequence.trail.standing[layer] = standing[1:]
        return self._selector.select(self._evidence)

    def fetch(self, layer, sequence, chosen) -> Iterator[Selected]:
        return self._known.records.fetch(sequence.table, layer, chosen.cpu().numpy())

    def estimate(self, chosen) -> None:
        evidence, layout = self._evidence, self._known.tiered.layouts[self._layer]
        estimate, self._left = attend_left_out(
            evidence.shares, evidence.unevenness, chosen, *self._plane, layout
        )
        self._chosen, self._parts = chosen, empty_parts(len(chosen) + 2, self._query.q)
        for i, part in enumerate((estimate, self._standing.raw)):
            for of_all, one in zip(self._parts, part, strict=True):
                of_all[len(chosen) + i] = one

    def attend(self, part: Selected) -> None:
        self._known.attend(self._layer, self._query, self._chosen, part, self._bias, self._parts)

    def finish(self) -> tuple[torch.Tensor, list[float]]:
        whole = merge_records(self._parts)
        self._log_total = whole.max + whole.sum.log()
        # Of all mass, as it is known now.
        self._scale = (self._evidence.shares.log_total - self._log_total).exp()
        missed, misplaced = self._left.missed * self._scale, self._left.misplaced * self._scale
        figures = torch.stack([missed.mean(), missed.max(), misplaced.mean(), misplaced.max()])
        return whole.out / whole.sum.unsqueeze(-1), figures.tolist()

    def left_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._left.shares * self._scale.unsqueeze(-1), self._log_total


def compiled_choice(selector: Selector) -> Choice | None:
    """How the compiled kernels select as the selector does; None where they cannot."""
    if type(selector) is not TopP:  # what extends it may choose otherwise
        return None
    return Choice(selector.epsilon, selector.criterion != "mass", selector.criterion == "effect")
