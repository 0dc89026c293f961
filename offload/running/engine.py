"""Runs token sequences through the model: prefill cell by cell, decode token by token, pages sealed
on the way.

    prefill   some cells at a time (a sweep) go through each layer together, so that weights and far
              planes are read once for all of them; every cell's arithmetic is the same whatever the
              sweep
    decode    one token through all layers: at once where weights are in memory and nothing is to be
              done between layers, else one by one
    verify    a few guessed tokens through each layer together, for the bits of decoding each

Knows no text and no sampling; `session` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import copy
from functools import partial

import torch

from ...kernels.threads import torch_alone
from ...prefetch.foresight import make_foresight
from ...prefetch.registry import make_selector
from ..layers.attention import Query, TieredAttention
from ..layers.decoder import Decoder
from ..layers.layer_pages import LayerPages
from ..layers.selected_attention import SelectedAttention
from ..mode import Mode
from ..models.model_config import ModelConfig
from ..pages.geometry import Geometry
from ..pages.pager import PageStore
from ..planning.footprint import MOST_VERIFIED
from ..weights.weights import WeightStore
from .sequence import Sequence, Verified
from .sequences import Sequences
from .sweep import Sweeper
from .whole_token import make_whole_token

# rows (cell, residual (cell_tokens, residual_size), rows of it that are new)
OnRows = Callable[[int, torch.Tensor, slice], None]


class Engine:
    """A model, ready to run sequences whose pages lie in one store.

    sweep_cells: cells per prefill sweep; changes memory and time, never a result. With
    overlap=False nothing is requested ahead: the plain twin. mode: which pages decode attends to in
    full; prefill attends to all.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightStore,
        store: PageStore,
        geometry: Geometry,
        device: torch.device,
        *,
        sweep_cells: int = 1,
        overlap: bool = True,
        mode: Mode | None = None,
    ):
        self.config, self.weights, self.store, self.geometry = config, weights, store, geometry
        self.device, self.overlap = device, overlap
        self.decoder = Decoder(config, device, weights.is_resident)
        self._kv, self._state = config.kv_places, config.state_places
        layouts = geometry.layouts(config.kv_pages)
        self.attention = TieredAttention(
            layouts,
            geometry.cell_tokens,
            list(map(geometry.span_tokens_of, layouts)),
            store,
            [self.decoder.ropes[layer] for layer in config.kv_layers],
            device,
            config.attention_softcap,
            weights.null_scores,
            config.chunked,
        )
        self.sequences = Sequences(config, store, geometry, device, sweep_cells)
        self.selected: SelectedAttention | None = None
        self.choose_pages(mode or Mode())

    def choose_pages(self, mode: Mode, *, audits: bool = True) -> None:
        """From the next decoded token on, attend in full to the pages that `mode` says. Modes other
        than exact want a layout with mean values. audits: whether estimates are checked meanwhile.
        Not while tokens are verified that were not taken in."""
        self.selected, config = None, self.config
        if mode.selects:
            self.selected = SelectedAttention(
                self.attention,
                self.store.records,
                make_selector(mode.selector, **mode.selector_options),
                make_foresight(mode.foresight if self.overlap else "nothing"),
                self.weights.output_norms,
                [config.shape_of(layer).head_dim for layer in config.kv_layers],
                waits=mode.name != "deadline",
                audits=audits,
            )
        decoder, attention, weights = self.decoder, self.attention, self.weights
        store, geometry, selected = self.store, self.geometry, self.selected
        self._pages = LayerPages(
            decoder, attention, self.sequences, store, geometry, selected, overlap=self.overlap
        )
        most_cells = self.sequences.sweep_cells
        self._sweeper = Sweeper(decoder, weights, self._pages, geometry, self.device, most_cells)
        self.whole_token = make_whole_token(decoder, attention, weights, store, geometry, selected)

    def twin(self, mode: Mode) -> Engine:
        """One that serves the same sequences in another mode, which its layout must allow, and
        checks no estimates."""
        other = copy(self)
        other.choose_pages(mode, audits=False)
        return other

    def close(self) -> None:
        """Let go of what was prepared of the weights: who holds a closed session holds none."""
        self.decoder.close()
        self.whole_token = None

    # ---- running -----------------------------------------------------------------------------

    @torch_alone
    @torch.inference_mode()
    def prefill(
        self,
        sequence: Sequence,
        on_rows: OnRows | None = None,
        on_progress: Callable[[int], None] | None = None,
        stop_at: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> torch.Tensor | None:
        """Process pending tokens up to `stop_at` (default: all); returns the last row's residual
        (1, residual_size).

        on_rows gets every new row's residual after the last layer; without it the layers from the
        last one on that keeps something compute only what later tokens need. on_progress(length) is
        called after each sweep; what it raises stops the run between two sweeps, and the sequence
        is whole. check() is called before each layer; what it raises stops the run too, and the
        sweep has to be made again."""
        stop = len(sequence.tokens) if stop_at is None else stop_at
        last = None
        self.sequences.settle(sequence)
        while sequence.length < stop:
            sweep = self._sweeper.next(sequence, stop)
            end = sweep[-1]
            sequence.is_settled = False
            sequence.will_write(end.cell)
            stops = [part.cell * self.geometry.cell_tokens + part.rows.stop for part in sweep]
            if sequence.states is not None:
                sequence.states.begin(sequence.length, stops)
            for layer in range(self.config.num_layers):
                if check is not None:
                    check()
                needs_all = on_rows is not None or layer < self.config.last_keeper
                self._sweeper.run_layer(sequence, layer, sweep, stop, needs_all)
            if sequence.states is not None:
                sequence.states.end()
            sequence.prefilled(stops[-1])
            sequence.is_settled = True
            last = end.x[end.rows.stop - 1 : end.rows.stop]
            if on_rows is not None:
                for part in sweep:
                    on_rows(part.cell, part.x, part.rows)
            if on_progress is not None:
                on_progress(sequence.length)
        return last

    @torch_alone
    @torch.inference_mode()
    def decode(self, sequence: Sequence) -> torch.Tensor:
        """Process the one pending token; returns its residual (1, residual_size)."""
        self.sequences.settle(sequence)
        position = sequence.length
        token = sequence.tokens[position : position + 1]
        entering = self.weights.entering(token, self.weights.embed(token), slice(0, 1))
        sequence.will_write(position // self.geometry.cell_tokens)
        if sequence.states is not None:
            sequence.states.begin(position, [position + 1])
        whole = self.whole_token and self.whole_token.run(sequence, *entering)
        residual = self._decode_by_layers(sequence, *entering) if whole is None else whole
        if sequence.states is not None:
            sequence.states.end()
        sequence.decoded()
        return residual

    def room_to_verify(self, sequence: Sequence) -> int:
        """How many tokens `verify` takes at most now: they lie in one cell."""
        cells = self.geometry.cell_tokens
        return min(MOST_VERIFIED, cells - sequence.length % cells)

    @torch_alone
    @torch.inference_mode()
    def verify(self, sequence: Sequence, tokens: list[int]) -> torch.Tensor:
        """The residuals (num_tokens, residual_size) of tokens behind the processed ones: of each
        the bits that `decode` would give, while weights and pages are read once for all. Not in
        deadline mode, which attends to what has arrived.

        The sequence stays as it is, but that the tokens' keys and values lie behind its end:
        `take_in` makes them part of it, one by one. States cannot be taken back, so that they are
        made once more then."""
        self.sequences.settle(sequence)
        position, count = sequence.length, len(tokens)
        cell, row = divmod(position, self.geometry.cell_tokens)
        rows = slice(0, count)
        x, given = self.weights.entering(tokens, self.weights.embed(tokens), rows)
        sequence.will_write(cell)
        if sequence.states is not None:
            sequence.states.begin(position, [position + count])
        verified = [Verified([], []) for _ in tokens]
        for layer in range(self.config.num_layers):
            w, kv, mixed = self.weights.layer(layer), self._kv[layer], []
            x = self.decoder.predicted(w, x, rows)
            if kv is not None:
                bias = self._pages.bias(w)
                if row == 0:
                    self._pages.seal(sequence, kv, cell - 2, bias)
                q, own, gate = self.decoder.project(layer, w, x, rows, position)
                if own is not None:
                    sequence.raw.write(kv, cell, row, *own)
                query = Query(q, count, position, cell)
                if self._pages.selects(kv):
                    notes = [of.notes for of in verified]
                    first = x[:, : self.config.hidden_size]  # of streams, what is worked on
                    attended = self._selecting.run_several(
                        kv, sequence, query, bias, first, w, notes
                    )
                else:
                    self._pages.wish_ahead(sequence, kv, query, decodes=True)
                    window = self._pages.window(kv)
                    attended = self.attention.run_several(kv, sequence, query, window, bias)
                mixed.append(self.decoder.attention_output(layer, w, attended, gate, rows))
            place = self._state[layer]
            if place is not None:
                assert sequence.states is not None
                before, after = sequence.states.of(0, place)
                out, replay = self.decoder.recur_several(layer, w, x, before, after)
                mixed.append(out)
                for number, of in enumerate(verified):
                    of.replays.append(partial(replay, number))
            x = self.decoder.mix(layer, w, x, mixed, rows)
            x = self.decoder.end(layer, w, x, rows, given)
        sequence.verified = deque(verified)
        return x

    def take_in(self, sequence: Sequence) -> None:
        """Make the first token behind the sequence's end, which was verified, part of it."""
        taken, states = sequence.verified[0], sequence.states
        if states is not None:
            states.begin(sequence.length, [sequence.length + 1])
            for place, replay in enumerate(taken.replays):
                replay(*states.of(0, place))
            states.end()
        sequence.verified.popleft()
        sequence.decoded()
        for noted in taken.notes:
            self._selecting.note(sequence, noted)

    def _decode_by_layers(self, sequence: Sequence, x: torch.Tensor, given) -> torch.Tensor:
        """The pending token's residual after all layers. x, given: see WeightStore.entering."""
        position, rows = sequence.length, slice(0, 1)
        cell, row = divmod(position, self.geometry.cell_tokens)
        for layer in range(self.config.num_layers):
            w, kv, mixed = self.weights.layer(layer), self._kv[layer], []
            x = self.decoder.predicted(w, x, rows)
            selects = self._pages.selects(kv)
            following = self._following(layer) if selects or kv is None else None
            if following is not None:
                self._rehearse(sequence, following, x, position, early=True)
            if kv is not None:
                bias = self._pages.bias(w)
                if row == 0:
                    self._pages.seal(sequence, kv, cell - 2, bias)
                q, gate = self.decoder.project_row(
                    layer, w, x, position, sequence.raw, kv, cell, row
                )
                query = Query(q, 1, position, cell)
                if selects:
                    first = x[:, : self.config.hidden_size]  # of streams, what is worked on
                    attended = self._selecting.run(kv, sequence, query, bias, first, w)
                else:
                    attended = self._pages.attend(sequence, kv, [query], bias)[0]
                mixed.append(self.decoder.attention_output(layer, w, attended, gate, rows))
            place = self._state[layer]
            if place is not None:
                assert sequence.states is not None
                before, after = sequence.states.of(0, place)
                mixed.append(self.decoder.recur(layer, w, x, rows, before, after))
            if following is None and not self.weights.reads_experts:
                x = self.decoder.mix(layer, w, x, mixed, rows)
                x = self.decoder.end(layer, w, x, rows, given)
                continue
            between = self.decoder.add_mixed(layer, w, x, mixed, rows)
            if following is not None:
                self._rehearse(sequence, following, between, position, early=False)
            self._expect_experts(layer, between)
            entered, x = x, self.decoder.add_mlp(layer, w, between, rows, x)
            x = self.decoder.end(layer, w, x, rows, given)
            if following is not None:
                kv = self._kv[following]
                assert kv is not None
                self._selecting.note_changes(kv, sequence, entered, between, x)
        return x

    @property
    def _selecting(self) -> SelectedAttention:
        """In a mode that selects."""
        assert self.selected is not None
        return self.selected

    def _expect_experts(self, layer: int, x: torch.Tensor) -> None:
        """Have the experts of the next layer that has some read, where they are not in memory, once
        this layer's are under way: the ones that its router would choose for the residual
        x (1, hidden_size) before this layer's MLP."""
        if not self.weights.reads_experts or self.config.experts_of(layer) is None:
            return
        later = range(layer + 1, self.config.num_layers)
        following = next((i for i in later if self.config.experts_of(i) is not None), None)
        if following is not None:
            w = self.weights.layer(following)
            w.expect_experts(self.decoder.likely_experts(following, w, x))

    def _following(self, layer: int) -> int | None:
        """The next layer, if decode chooses among its pages."""
        following = layer + 1
        is_layer = following < self.config.num_layers
        return following if is_layer and self._pages.selects(self._kv[following]) else None

    @torch_alone
    @torch.inference_mode()
    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """Residual rows (rows, residual_size) after the last layer -> (rows, vocab_size)."""
        return self.decoder.head_output(self.weights.logits(residual))

    def _rehearse(
        self, sequence: Sequence, layer: int, x: torch.Tensor, position: int, *, early: bool
    ) -> None:
        """Ask for what a layer is expected to select, from the residual (1, residual_size) of the
        layer before, as if no more than usual were added to it: at one of two points, see
        IssuePoint."""
        selected, kv = self._selecting, self._kv[layer]
        assert kv is not None
        is_wanted = selected.wants_query(kv, sequence)
        w = self.weights.resident_layer(layer) if is_wanted else None
        if w is None:
            if early:
                selected.expect(kv, sequence, None, None)
            return
        is_due = selected.issue_point.is_early(kv) == early
        if is_due or (early and selected.issue_point.is_looking(position)):
            expected = selected.expected(kv, x, early=early)
            q = self.decoder.queries(layer, w, expected, slice(0, 1), position)
            if early:
                selected.issue_point.guess(kv, q)
            if is_due:
                query = Query(q, 1, position, position // self.geometry.cell_tokens)
                selected.expect(kv, sequence, query, self._pages.bias(w))
