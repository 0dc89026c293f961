"""Keeps the pages of a text that is being read, and finds those of one that was read before.

    span file   all sealed pages of one span of tokens, of every layer that keeps all of its own
    window file the same of the layers that keep what their windows show, where an end needs it
    end file    what it takes to go on from the end of a cell: the pages sealed since the last whole
                span, that cell raw, and the raw sink
    rows file   the raw rows behind an end, of which a text may use as many as it has in common
                (where layers keep states: all or none, for a session that is resumed)

A file's name says which tokens it is of (prefixes/names.py), and these are in the file too. Only a
session that knows which of its tokens were decoded finds those. Pages are kept in one layout
(prefixes/layout.py), so one file serves every mode and budget.

Knows the folder by its store, and pages by the engine's; nothing here may fail a request.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from array import array
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, suppress

import torch

from ...kernels.pages import repack
from ..disk.spill_dir import PREFIX_SUFFIXES
from ..errors import StorageError
from ..layers.states import States
from ..mode import Mode
from ..running.engine import Engine
from ..running.sequence import Sequence
from ..text.prompt import num_common
from .file import BadPrefixFile, file_bytes, read_prefix_file
from .layout import PrefixLayout
from .names import END_SUFFIX, ROWS_SUFFIX, SPAN_SUFFIX, WINDOW_SUFFIX, Link, PrefixNames
from .store import PrefixStore, PrefixStoreFull
from .texts import texts_of, why_not_found

_LEAST_TOKENS = 2048  # of a text, and to be gained by looking: fewer are read again as quickly
_END_TOKENS = 4096  # between two ends that are kept while a text is read
_NEAR_TOKENS = 512  # who can go on this close to the end of a text needs no other way
_NEAR_ROWS = 64  # tokens that a session which is closed may lose
_MOST_WAIT = 64  # readings between two failures to write
_NO_TOKEN = -(2**31)  # behind the tokens of a rows file
_MARK_BYTES = 32  # of a mode, in a rows file
# Failures to open or read that say nothing about the file.
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.ESTALE}
_log = logging.getLogger("ebbtide")
_Parts = Generator[torch.Tensor, None, None]  # of a file, of whatever shapes


class PrefixKeeper:
    """For the sequences of one engine. model: what tells its weights from others, weight bits
    included. mode: of decoding. warn: takes what a user should know."""

    def __init__(
        self,
        store: PrefixStore,
        engine: Engine,
        model: str,
        mode: Mode,
        warn: Callable[[str], None],
    ):
        self._store, self._engine, self._warn = store, engine, warn
        # What is attended in deadline mode depends on the disk's load: nobody could find it again.
        self._is_repeatable = mode.name != "deadline"
        geometry, config = engine.geometry, engine.config
        self._cells = geometry.cell_tokens
        self._least_cells = -(-_LEAST_TOKENS // self._cells)
        self._layout = PrefixLayout(config, geometry)
        self._span_cells = self._layout.span_cells
        # A state takes as much as the pages of thousands of tokens, and so does what windows show:
        # of ends there are so many that all of theirs take no more than half of all pages.
        state_bytes = States.num_bytes(config.recurrent)
        self._state_sizes = [state_bytes] if config.recurrent else []
        end_bytes = state_bytes + self._layout.window_bytes
        self._end_tokens = max(_END_TOKENS, int(2 * end_bytes / self._layout.bytes_per_token))
        depends_on = [
            *(model, repr(config), *map(repr, dict.fromkeys(self._layout.kept))),
            *(geometry.cell_tokens, geometry.span_tokens, self._layout.windowed),
        ]
        self._names = PrefixNames(self._layout, self._cells, depends_on, engine.device, mode)
        self._retries = _Retries()
        self._unusable: set[str] = set()  # names of files that failed

    def _all_files(self, names: list[str], boundary: int) -> list[str]:
        """The same with the ends before it that are kept now and then: each file behind those that
        it builds on."""
        ends = (cell for cell in range(1, boundary) if self._is_regular(cell))
        links = (link.name for cell in (*ends, boundary) for link in self._names.chain(names, cell))
        return list(dict.fromkeys(links))

    def _is_regular(self, boundary: int) -> bool:
        """Whether an end is kept there, wherever the text ends: no sealed pages belong to it."""
        spans = max(1, self._end_tokens // (self._span_cells * self._cells))
        is_place = (boundary - 1) % (spans * self._span_cells) == 0
        return is_place and not self._state_sizes  # where those are known depends on the sweeps

    # ---- keeping -----------------------------------------------------------------------------

    def keep(self, sequence: Sequence, *, decoded: bool, is_last: bool = False) -> None:
        """Write what is not kept yet of what was processed. Called between two sweeps of prefill.

        decoded: whether somebody will remember which tokens were decoded; else what follows the
        first is not kept. is_last: nothing will follow. Never raises: what cannot be kept is a
        warning, and is tried again in a later reading.
        """
        if len(sequence.tokens) < _LEAST_TOKENS:
            return
        if not self._retries.is_due(len(sequence.tokens)):
            return
        length = sequence.length
        if not (decoded and self._is_repeatable):
            length = sequence.num_prefilled
        try:
            self._keep(sequence, length, is_last and length == sequence.length)
        except (OSError, PrefixStoreFull, StorageError) as error:
            self._retries.note_failure()
            reason = getattr(error, "strerror", None) or error
            self._warn(
                f"Not all of what was read is kept on disk for the next time: {reason}. Make room "
                "('ebbtide cache'), name another folder (--spill-dir) or another size "
                "(--prefix-cache; off keeps nothing)."
            )

    def _keep(self, sequence: Sequence, length: int, is_last: bool) -> None:
        """Of the first `length` tokens."""
        newest = (length - 1) // self._cells
        if newest < 1:
            return
        names = self._names.of_cells(sequence.processed, newest)
        needed = {name + suffix for name in names for suffix in PREFIX_SUFFIXES}
        # Cell newest - 2 and those before it are sealed, once the first token of `newest` is there.
        if self._layout.whole:
            for span in range((newest - 1) // self._span_cells):
                self._keep_span(sequence, span, SPAN_SUFFIX, names, needed)
        if is_last:
            # After going back to the end of a cell, or an interruption, others are in the ring.
            is_there = newest >= self._least_cells and self._is_there(sequence, newest)
            if is_there and length - sequence.kept_tokens >= _NEAR_ROWS:
                self._keep_end(sequence, newest, names, needed)
                self._keep_rows(sequence, newest, length, names, needed, replaces=True)
            return
        last = (len(sequence.tokens) - 1) // self._cells
        for boundary in range(max(1, sequence.oldest_raw_cell + 1), newest + 1):
            is_wanted = self._wants_end(boundary, last, sequence.kept_tokens)
            if is_wanted and self._is_there(sequence, boundary):
                self._keep_end(sequence, boundary, names, needed)
                if boundary >= last - 1:
                    self._keep_rows(sequence, boundary, length, names, needed)
                # With rows behind the last end all of the text is kept; states have none there.
                has_rows = boundary == last and sequence.states is None
                if boundary != last - 1:  # of the last two both are kept, or none
                    sequence.kept_tokens = length if has_rows else boundary * self._cells

    def _is_there(self, sequence: Sequence, boundary: int) -> bool:
        """Whether all that an end holds is: the cell before it is raw, and the state known."""
        states = sequence.states
        is_known = states is None or states.knows(boundary * self._cells)
        return boundary > sequence.oldest_raw_cell and is_known

    def _wants_end(self, boundary: int, last: int, kept_tokens: int) -> bool:
        """Whether one may want to go on from there: now and then, and near the end of a text, which
        a question may follow that differs the next time."""
        if boundary < self._least_cells:
            return False
        if self._is_regular(boundary):
            return True
        if self._state_sizes and boundary < last - 1:
            return boundary * self._cells - kept_tokens >= self._end_tokens
        return boundary >= last - 1 and last * self._cells - kept_tokens >= _NEAR_TOKENS

    def _keep_span(
        self, sequence: Sequence, span: int, suffix: str, names: list[str], needed: set[str]
    ) -> None:
        """A whole span's pages, of all layers of which files with the suffix have them."""
        stop = (span + 1) * self._span_cells
        name = names[stop] + suffix
        if self._store.has(name):
            return
        head = self._names.head(suffix, sequence.processed, stop)
        shape = self._span_cells, self._names.layers_in(suffix)
        sizes = self._layout.sealed_sizes(*shape)
        self._write(name, head, self._sealed(sequence, span, *shape), sizes, needed)

    def _keep_end(
        self, sequence: Sequence, boundary: int, names: list[str], needed: set[str]
    ) -> None:
        # Some may be gone, though the end is there.
        for whole_span in self._layout.window_spans(boundary):
            self._keep_span(sequence, whole_span, WINDOW_SUFFIX, names, needed)
        name = names[boundary] + END_SUFFIX
        if self._store.has(name):
            return
        span, num_cells = divmod(boundary - 1, self._span_cells)
        shape = num_cells, self._names.layers_in(END_SUFFIX)
        head = self._names.head(END_SUFFIX, sequence.processed, boundary)

        def parts() -> _Parts:
            yield from self._sealed(sequence, span, *shape)
            yield from self._raw(sequence, boundary - 1)
            if sequence.states is not None:
                yield sequence.states.at(boundary * self._cells)

        sizes = [*self._layout.sealed_sizes(*shape), *self._end_sizes]
        self._write(name, head, parts(), sizes, needed)
        self._store.touch(self._all_files(names, boundary))

    def _keep_rows(
        self,
        sequence: Sequence,
        cell: int,
        length: int,
        names: list[str],
        needed: set[str],
        *,
        replaces: bool = False,
    ) -> None:
        """What the first `length` tokens have in a cell. What another text had there stays, unless
        it is replaced."""
        name = names[cell] + ROWS_SUFFIX
        # What another text has in common is mostly less than all, and of no use to states.
        is_wanted = sequence.states is None or replaces
        if not is_wanted or (self._store.has(name) and not replaces):
            return
        head = self._names.head(ROWS_SUFFIX, sequence.processed, cell)

        def parts() -> _Parts:
            tokens = torch.full((self._cells,), _NO_TOKEN, dtype=torch.int32)
            rows = sequence.processed[cell * self._cells : length][: self._cells]
            tokens[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
            yield tokens
            yield self._mode_mark(rows)
            yield from self._raw(sequence, cell, has_sink=False)
            if sequence.states is not None:
                yield sequence.states.at(length)

        self._write(name, head, parts(), self._rows_sizes, needed)

    def _write(
        self,
        name: str,
        head: bytes,
        parts: _Parts,
        sizes: list[int],
        needed: set[str],
    ) -> None:
        with closing(parts):  # it may hold pages
            num_bytes = file_bytes(head, sizes)
            self._store.write(name, head, parts, num_bytes, needed)
        self._engine.store.stats.kept_bytes_written += num_bytes
        self._retries.note_success()
        self._unusable.discard(name)

    def _sealed(self, sequence: Sequence, span: int, num_cells: int, layers: list[int]) -> _Parts:
        """Near planes and records of a span's first cells, layer by layer."""
        used, kept = self._layout.used, self._layout.kept
        for layer, at, _, count in self._layout.pieces(span, num_cells, layers):
            with self._engine.store.spans.look_at(sequence.table, layer, at) as pages:
                near, records = pages.near[:count].cpu(), pages.records[:count].cpu()
                yield from repack(near, records, used[layer], kept[layer])

    def _raw(self, sequence: Sequence, cell: int, *, has_sink: bool = True) -> _Parts:
        """Views of a cell's raw keys and values, and of the sink's, layer by layer."""
        raw = sequence.raw
        for layer, layout in enumerate(self._layout.used):
            views = [*raw.cell(layer, cell)]
            if has_sink:
                views += raw.sink_keys[layer], raw.sink_values[layer]
            yield from views[:: 1 + layout.shares_values]  # values that are the keys lie there

    @property
    def _end_sizes(self) -> list[int]:
        return [*self._layout.raw_sizes(has_sink=True), *self._state_sizes]

    @property
    def _rows_sizes(self) -> list[int]:
        sizes = self._layout.raw_sizes(has_sink=False)
        return [4 * self._cells, _MARK_BYTES, *sizes, *self._state_sizes]

    def _mode_mark(self, tokens: array) -> torch.Tensor:
        """(_MARK_BYTES,) uint8, of the mode that some of the tokens were decoded in."""
        mark = hashlib.sha256(self._names.decoded_by(tokens)).digest()
        return torch.frombuffer(bytearray(mark[:_MARK_BYTES]), dtype=torch.uint8)

    # ---- finding -----------------------------------------------------------------------------

    def restore(
        self,
        sequence: Sequence,
        wanted: array,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Take in as much as is kept of some tokens, if that is much more than the sequence has
        processed of them. wanted: its first tokens, as `Sequence.processed` has them.

        on_progress(length) is called now and then; what it raises stops the restoring, and the
        sequence is as it was or empty. What was not found, and why, is told to who debugs.
        """
        self._engine.sequences.settle(sequence)
        num_cells = len(wanted) // self._cells
        if num_cells < sequence.length // self._cells + self._least_cells:
            return
        self._restore(sequence, wanted, num_cells, on_progress)
        if _log.isEnabledFor(logging.DEBUG) and len(wanted) - sequence.length >= self._cells:
            with suppress(OSError):
                texts = texts_of(self._store.folder.iterdir())
                _log.debug("%s", why_not_found(texts, self._names.fingerprint, wanted))

    def _restore(self, sequence: Sequence, wanted: array, num_cells: int, on_progress) -> None:
        names = self._names.of_cells(wanted, num_cells)
        for boundary in range(num_cells, self._least_cells - 1, -1):
            if boundary < sequence.length // self._cells + self._least_cells:
                return
            chain = self._names.chain(names, boundary)
            files = [link.name for link in chain]
            if not self._store.has(files[-1]) or self._unusable.intersection(files):
                continue
            if all(map(self._store.has, files)):
                if self._take_in(sequence, wanted, boundary, chain, on_progress):
                    rows = names[boundary] + ROWS_SUFFIX
                    self._store.touch([*self._all_files(names, boundary), rows])
                    if self._store.has(rows):
                        self._take_rows(sequence, wanted, rows)
                    sequence.kept_tokens = sequence.length
                    return

    def _take_in(
        self, sequence: Sequence, wanted: array, boundary: int, chain: list[Link], on_progress
    ) -> bool:
        """Whether the sequence goes on from the end of cell boundary - 1 now; else it is empty."""
        done, sequences = False, self._engine.sequences
        name = chain[0].name
        sequences.begin_anew(sequence)
        if sequence.states is not None:
            sequence.states.forget_behind(0)
        try:
            sequence.oldest_raw_cell = boundary - 1
            for layer, num_records in self._layout.num_unseen(boundary):
                sequences.pass_over(sequence, layer, num_records)
            for link in chain:
                is_end, name = link is chain[-1], link.name
                stop = boundary if is_end else (link.span + 1) * self._span_cells
                self._read(sequence, link, self._names.head(link.suffix, wanted, stop), boundary)
                if on_progress is not None:
                    on_progress(stop * self._cells)
            sequence.processed[:] = wanted[: boundary * self._cells]
            sequence.is_settled = done = True
        except (OSError, BadPrefixFile, FloatingPointError) as error:
            self._tell_unusable(name, error)
        finally:
            if not done:
                sequences.rewind(sequence, 0)
        return done

    def _tell_unusable(self, name: str, error: Exception) -> None:
        """Of a file that another process removed meanwhile there is nothing to say. It is removed,
        to be written again, unless what is amiss may pass."""
        self._unusable.add(name)
        if isinstance(error, FileNotFoundError):
            return
        reason, where = getattr(error, "strerror", None) or error, str(self._store.path(name))
        passes = isinstance(error, FloatingPointError) or getattr(error, "errno", 0) in _PASSING
        if not passes and self._store.remove(name):
            where += ", which is removed"
        self._warn(
            "Some of the pages that are kept could not be used, and their text is read again: "
            f"{reason} ({where})."
        )

    def _take_rows(self, sequence: Sequence, wanted: array, name: str) -> None:
        """Go on behind the rows that the sequence, at the end of a cell, has in common with those
        that are kept. Rows behind its length are garbage, whatever becomes of them here."""
        cell = sequence.length // self._cells
        head, sizes = self._names.head(ROWS_SUFFIX, wanted, cell), self._rows_sizes
        room = torch.empty(max(sizes), dtype=torch.uint8)
        try:
            with read_prefix_file(self._store.path(name), head, sizes) as file:
                kept = file.take(room).view(torch.int32).tolist()
                mark = bytes(file.take(room).tolist())
                new = wanted[sequence.length :]
                new = new[: num_common(kept, new)]
                if mark != bytes(self._mode_mark(new).tolist()):  # what was decoded is another's
                    new = new[: _num_not_decoded(new)]
                is_whole = len(new) == self._cells or kept[len(new)] == _NO_TOKEN
                if not new or (sequence.states is not None and not is_whole):
                    return
                length = sequence.length + len(new)
                sequence.will_write(cell)
                self._take_raw(file, room, self._raw(sequence, cell, has_sink=False))
                self._take_state(file, room, sequence, length)
        except (OSError, BadPrefixFile) as error:
            self._tell_unusable(name, error)
            return
        sequence.processed.extend(new)

    def _read(self, sequence: Sequence, link: Link, head: bytes, boundary: int) -> None:
        """Append what a file has beyond the table's records; of an end file, the raw cell too."""
        is_end, num_cells = link.suffix == END_SUFFIX, self._span_cells
        if is_end:
            num_cells = boundary - 1 - link.span * self._span_cells
        layers = self._names.layers_in(link.suffix)
        sizes = self._layout.sealed_sizes(num_cells, layers) + self._end_sizes * is_end
        room = torch.empty(max(sizes), dtype=torch.uint8)
        table, store = sequence.table, self._engine.store
        used, kept = self._layout.used, self._layout.kept
        with read_prefix_file(self._store.path(link.name), head, sizes) as file:
            for layer, _, first, count in self._layout.pieces(link.span, num_cells, layers):
                near = file.take(room).view(count, -1).clone()
                records = file.take(room).view(count, -1)
                known = table.num_records(layer) - first
                if known < count:
                    near, records = repack(near, records, kept[layer], used[layer])
                    new = slice(max(0, known), count)
                    store.write(table, layer, first + new.start, near[new], records[new])
            if is_end:
                self._take_raw(file, room, self._raw(sequence, boundary - 1))
                self._take_state(file, room, sequence, boundary * self._cells)

    def _take_state(self, file, room: torch.Tensor, sequence: Sequence, length: int) -> None:
        """The state behind `length` tokens, which is a file's next part, if there are any."""
        if sequence.states is not None:
            copy = sequence.states.room()
            self._take_raw(file, room, [copy])
            sequence.states.name(copy, length)

    def _take_raw(self, file, room: torch.Tensor, views: Iterable[torch.Tensor]) -> None:
        """Fill views with a file's next parts, by way of `room`."""
        for view in views:
            view.copy_(file.take(room).view(view.dtype).view(view.shape))


class _Retries:
    """Whether to write after a failure: not in the same reading, whose every sweep would fail as
    well; then in the next one, and after each failure in a row twice as many readings later. A
    reading is known by how many tokens its text has."""

    def __init__(self) -> None:
        self._reading: int | None = None  # the latest one
        self._num_left = 0  # readings to be passed over, that one included
        self._wait = 1

    def is_due(self, reading: int) -> bool:
        if reading != self._reading:
            self._reading, self._num_left = reading, max(0, self._num_left - 1)
        return self._num_left == 0

    def note_failure(self) -> None:
        self._num_left, self._wait = self._wait, min(2 * self._wait, _MOST_WAIT)

    def note_success(self) -> None:
        self._wait = 1


def _num_not_decoded(tokens: array) -> int:
    return next((i for i, token in enumerate(tokens) if token < 0), len(tokens))
