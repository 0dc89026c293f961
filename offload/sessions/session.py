"""A conversation or a document with questions: tokens that stay, and answers that grow out of them.

Tokens that were appended are processed when an answer needs them (whole cells at once, see
`append`). What was processed is never processed again unless something before it changes; what is,
is counted. Knows the tokenizer and the sampler; knows no pages (engine.py does).
"""

from __future__ import annotations

import os
import weakref
from functools import partial
from typing import Any

import torch

from ..errors import InputError, StorageError
from ..output import Output
from ..prefixes.keeper import PrefixKeeper
from ..running.drafts import Drafts
from ..running.sampler import Sampler
from ..running.sequence import MOST_SNAPSHOTS
from ..text.prompt import Messages, Prompt, check_room, is_messages, is_whole
from ..text.text import Think
from .async_stream import AsyncStream
from .session_file import KeptTokens, SessionFile
from .session_reading import SessionReading
from .session_usage import SessionUsage
from .stream import Stream


class Session:
    """Made by `LLM.session()` or `fork()`; a context manager. Closing it frees its pages.

    context: the most tokens it may hold. Question and answer stay in it. Used by one thread at a
    time, for one answer at a time: while a stream of it is unfinished, only `close` is allowed.
    name: under which its tokens are kept on disk; None where they are not. is_open: until `close`.
    """

    def __init__(
        self,
        llm,
        runtime,
        sequence,
        context: int,
        *,
        keeps_snapshots: bool = True,
        prefixes: PrefixKeeper | None = None,
    ):
        self._llm, self._runtime, self._sequence = llm, runtime, sequence
        self._engine = runtime.engine
        self.context = context
        self._keeps_snapshots, self._prefixes = keeps_snapshots, prefixes
        self._logits: torch.Tensor | None = None  # (vocab,), of the last token, if it is processed
        self._turns: list[int] = []  # where each answer's prompt began
        self._is_chat = False  # whether the newest tokens are of messages, or of answers to them
        self._reading = SessionReading(llm, runtime, sequence, prefixes)
        self.usage = SessionUsage(runtime, sequence, llm.device_peak_bytes)
        self.is_open = True
        self._process = os.getpid()
        self._drafts = Drafts(self._engine, runtime.make_drafter) if runtime.plan.drafts else None
        self._answer: weakref.ref[Stream] | None = None  # weak: a dropped stream closes itself
        self._file: SessionFile | None = None

    # ---- tokens ------------------------------------------------------------------------------

    @property
    def tokens(self) -> list[int]:
        """All token ids: prompts and answers, as they were given and sampled."""
        return self._sequence.tokens.tolist()

    def append(self, prompt: Prompt, *, process: bool = True, think: Think = None) -> None:
        """Add text (as it is), token ids or, to an empty session, messages. Nothing is answered.

        Cells that became full are processed now, the rest when an answer needs it. think: as the
        answers to messages will have it, which some templates write first. Raises ContextOverflow,
        or DoesNotFit where forks took the room for pages, before anything is added.
        """
        self._check_free()
        ids = self._encode(prompt, think)
        self._admit(len(self._sequence.tokens) + len(ids))
        self._extend(ids)
        self._is_chat = is_messages(prompt)
        if process:
            self._process_whole_cells()

    async def aappend(self, prompt: Prompt, *, process: bool = True, think: Think = None) -> None:
        """Like append, while the loop goes on. Cancelling the task stops the reading between two
        layers; what was appended stays, and an answer reads the rest."""
        begin = partial(self.append, prompt, process=process, think=think)
        await self._llm.async_answers.call(begin, self)

    def prepare(self, messages: Messages, *, think: Think = None) -> None:
        """Make messages, a whole conversation, the session's tokens, and process their full cells:
        an answer to them, or to more after them, begins sooner. What the session holds already is
        kept. think: see `append`. Raises as `append` does, before anything changes.
        """
        self._check_free()
        self._llm.refuse_too_long(messages, self.context)
        ids, common = self._llm.tokenizer.continue_chat(
            self.tokens, messages, add_generation_prompt=False, think=think
        )
        self._admit(len(ids), common)
        self._replace_from(common, ids)
        self._is_chat = True
        self._process_whole_cells()

    def truncate(self, length: int) -> None:
        """Forget everything from token `length` on. Recent tokens cost nothing (where layers keep
        states, the rest of a cell); going back further restores what an answer began with, or what
        is kept on disk, and processes the rest again (counted as recomputed tokens). Raises
        DoesNotFit, before anything changes, where a fork holds the pages that it would take."""
        self._check_free()
        self._truncate(length)

    def _truncate(self, length: int) -> None:
        sequence = self._sequence
        if not is_whole(length) or not 0 <= (length := int(length)) <= len(sequence.tokens):
            raise InputError(f"cannot truncate {len(sequence.tokens)} tokens to {length!r}")
        if length == len(sequence.tokens):
            return
        with self._llm.sessions.running():
            self._runtime.room.check(sequence, length, length)
            self._changed()
            self._reading.forget_snapshots(length)
            if length < sequence.length:
                self._reading.rewind(length)
            del sequence.tokens[length:], sequence.remembered[length:]
            self._runtime.room.end_promise(sequence)  # of tokens that were decoded one by one
            self._reading.known = min(self._reading.known, length)
            if sequence.length == length and sequence.snapshots:
                newest = sequence.snapshots[-1]
                self._logits = newest.logits if newest.length == length else None
            self._turns = [turn for turn in self._turns if turn < length]

    def undo(self) -> None:
        """Forget the last question and its answer: what is left of the answer before is what the
        chat template kept of it. Raises InputError when there is none."""
        self._check_free()
        while self._turns and self._turns[-1] >= len(self._sequence.tokens):
            self._turns.pop()  # of an answer without a question that came to nothing
        if not self._turns:
            raise InputError("there is nothing to undo")
        self.truncate(self._turns[-1])

    def fork(self) -> Session:
        """A session that goes its own way from here; pages are shared, not copied. What both come
        to hold has the room of one context, what they share counted once. Raises DoesNotFit."""
        self._check_free()
        llm, engine = self._llm, self._engine
        with llm.sessions.running():
            llm.reserve_raw(engine)
            sequence = self._runtime.fork(self._sequence)
            other = Session(llm, self._runtime, sequence, self.context, keeps_snapshots=False)
            other._logits, other._turns = self._logits, self._turns[:]
            other._is_chat = self._is_chat
            llm.sessions.add(other)
        return other

    # ---- answers -----------------------------------------------------------------------------

    def generate(self, prompt: Prompt | None = None, **generation: Any) -> Output:
        """Append a prompt and answer it. Messages are the whole conversation: see `stream`."""
        stream = self.stream(prompt, **generation)
        for _ in stream:
            pass
        return stream.output

    def stream(self, prompt: Prompt | None = None, **generation: Any) -> Stream:
        """Like generate, piece by piece.

        A list of messages is the *whole* conversation: the tokens it shares with what the session
        holds are kept as they are, and only the rest is processed.
        """
        self._check_free()
        config = self._llm.generation.resolve(**generation)
        held = self.tokens
        if is_messages(prompt):
            self._llm.refuse_too_long(prompt, self.context)
            tokenizer, options = self._llm.tokenizer, config.chat_options
            ids, common = tokenizer.continue_chat(held, prompt, **options)
            turn = common
            if common < min(len(held), len(ids)):
                # The template changed an earlier answer; undo leaves what it made of that.
                turn = max(common, tokenizer.num_answered(ids, prompt, **options))
        else:
            ids = held + ([] if prompt is None else self._encode(prompt))
            turn = common = len(held)
        if not ids:
            raise InputError("the prompt is empty; there is nothing to answer")
        chat = self._is_chat if prompt is None else is_messages(prompt)
        constraint = self._llm.rules.constraint(config, ids if chat else None)
        most = config.max_new_tokens
        self._admit(len(ids) + (1 if most is None else min(1, most)), common)
        self._replace_from(common, ids)
        self._is_chat = chat
        made_again = is_messages(prompt) and turn == len(ids) and self._turns
        if not made_again:  # else undo goes back to before the same question
            self._turns.append(turn)
        return Stream(self, config, constraint, closes_session=False, chat=chat)

    def astream(self, prompt: Prompt | None = None, **generation: Any) -> AsyncStream:
        """Like stream, for asyncio: `async for piece in session.astream(...)`; see AsyncStream."""
        begin = partial(self.stream, prompt, **generation)
        return self._llm.async_answers.stream(begin, self)

    async def agenerate(self, prompt: Prompt | None = None, **generation: Any) -> Output:
        """Like generate, while the loop goes on. Several at once are answered in turn."""
        begin = partial(self.stream, prompt, **generation)
        return await self._llm.async_answers.output(begin, self)

    # ---- a name ------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        return None if self._file is None else self._file.name

    def keep_as(self, name: str) -> None:
        """Keep the tokens on disk under this name from now on, in place of what had it before.

        They are written here, after each answer and by `close`; `LLM.session(name)` finds them
        again. Raises InputError where `name` is in use or not allowed, and StorageError.
        """
        self._check_open()
        if self._file is not None and name == self.name:
            self.save()
            return
        file = SessionFile(name, self._llm.tokens_fingerprint)
        before, self._file = self._file, file
        try:
            self._save_file()
        except BaseException:
            self._file = before
            file.close()
            raise
        if before is not None:
            before.close()

    def save(self) -> None:
        """Write the tokens of a named session now. Raises InputError without a name, StorageError
        where they cannot be written."""
        self._check_open()
        if self._file is None:
            raise InputError("the session has no name; keep_as(name) gives it one")
        self._save_file()

    def restore(self, file: SessionFile) -> None:
        """Take over a named session's file and the tokens in it. For `LLM.session`."""
        kept = file.load()
        self._llm.encode(kept.tokens)
        self._admit(len(kept.tokens))
        self._extend(kept.tokens)
        self._turns, self._sequence.remembered = kept.turns[:], kept.computed()
        self._reading.known = kept.num_processed
        self._file = file

    def _to_keep(self) -> KeptTokens:
        num_processed = max(self._sequence.length, self._reading.known)
        return KeptTokens.of(self._sequence.as_computed(), self._turns[:], num_processed)

    def _save_file(self) -> None:
        assert self._file is not None
        self._file.save(self._to_keep())

    # ---- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Free the pages; a named session's tokens stay. May be called again; the LLM does where
        Ctrl-C came in between, before it opens anything, so each step may be done twice. Raises
        StorageError when they could not be written; the pages are freed all the same."""
        if self not in self._llm.sessions:
            return
        if self._is_elsewhere:
            self.is_open = False
            self._llm.sessions.remove(self)
            return
        self._llm.async_answers.stop(self)
        with self._llm.sessions.at_rest():
            self._close()

    def _close(self) -> None:
        if (stream := self._unfinished()) is not None:
            stream.close()
        try:
            if self.is_open and self._file is not None:
                if not self._file.holds(self._to_keep()):
                    self._save_file()
                if self._prefixes is not None:
                    self._prefixes.keep(self._sequence, decoded=True, is_last=True)
        finally:
            self.is_open = False
            if self._file is not None:
                self._file.close()
            self._sequence.snapshots.clear()
            try:
                self._runtime.release(self._sequence)
            except StorageError:  # of a disk that does not answer: nobody can do more
                self._llm.sessions.remove(self)
                raise
            self._llm.sessions.remove(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- inside ------------------------------------------------------------------------------

    @property
    def _is_elsewhere(self) -> bool:
        """Whether a process has it that forked this one: both would write to its files on disk."""
        return self._process != os.getpid()

    def _check_open(self) -> None:
        if not self.is_open:
            raise InputError("the session is closed")
        if self._is_elsewhere:
            raise InputError("the session is another process's, which forked this one; open one")
        with self._llm.sessions.running():  # nothing may change under another thread's run
            pass

    def _check_free(self) -> None:
        self._check_open()
        self._llm.sessions.sweep()
        if self._unfinished() is not None:
            raise InputError(
                "the session is still answering; read its stream to the end or close it first"
            )

    def _unfinished(self) -> Stream | None:
        return None if self._answer is None else self._answer()

    def begin_answer(self, stream: Stream) -> None:
        self._answer = weakref.ref(stream)

    def end_answer(self, stream: Stream) -> list[str]:
        """A stream has ended. Returns warnings: that the session could not be saved."""
        if self._drafts is not None:
            self._drafts.forget()
        if self._unfinished() in (None, stream):
            self._answer = None
            self._runtime.room.end_promise(self._sequence)
        if self._file is not None and self.is_open and not self._is_elsewhere:
            try:
                self._save_file()
            except StorageError as error:
                return [str(error)]
        return []

    def _encode(self, prompt: Prompt, think: Think = None) -> list[int]:
        self._llm.refuse_too_long(prompt, self.context)
        if is_messages(prompt):
            if len(self._sequence.tokens):
                raise InputError(
                    "messages can be appended to an empty session only; use stream or generate"
                )
            return self._llm.encode(prompt, think=think)
        return self._llm.encode(prompt, begins=not len(self._sequence.tokens))

    def _admit(self, num_tokens: int, common: int | None = None) -> None:
        """Before it comes to have so many tokens, of its own the first `common`; default: all."""
        check_room(num_tokens, self.context, self._llm.config.max_positions)
        self._runtime.room.check(self._sequence, num_tokens, common)

    def has_room(self, num_tokens: int) -> bool:
        """Whether an answer may make it so many tokens. If so, there is room until its end."""
        return self._runtime.room.promise(self._sequence, num_tokens)

    def _extend(self, ids) -> None:
        if len(ids):
            self._changed()
            self._sequence.tokens.extend(ids)

    def _replace_from(self, common: int, ids: list[int]) -> None:
        """Make `ids` the session's tokens; the first `common` are the same already."""
        if common < len(self._sequence.tokens):
            self._truncate(common)
        self._extend(ids[common:])

    def _process_whole_cells(self) -> None:
        cell = self._sequence.cell_tokens
        whole = len(self._sequence.tokens) // cell * cell
        if whole > self._sequence.length:
            self.find_kept(whole)
            self._prefill(stop_at=whole)

    def _prefill(self, stop_at: int | None = None) -> torch.Tensor | None:
        """Process pending tokens; the last one's residual."""
        stop = len(self._sequence.tokens) if stop_at is None else stop_at
        self._runtime.room.check(self._sequence, stop)
        if self._drafts is not None:
            self._drafts.begin_answer()
        return self._reading.prefill(stop, decoded=self._file is not None)

    def find_kept(self, most: int | None = None) -> None:
        """Take in what is kept on disk of the first `most` pending tokens, if that is much; default
        all but the last, which an answer needs processed."""
        before = self._sequence.length
        try:
            self._reading.find_kept(len(self._sequence.tokens) - 1 if most is None else most)
        finally:
            if self._sequence.length != before:
                self._changed()

    def make_pending(self) -> None:
        """If the last token's logits are wanted and gone, make that token wait to be processed."""
        if self._logits is None and self._sequence.length == len(self._sequence.tokens):
            with self._llm.sessions.running():
                self._reading.rewind(self._sequence.length - 1)
            self._reading.known = max(self._reading.known, len(self._sequence.tokens))

    def last_logits(self) -> torch.Tensor:
        """Logits (vocab,) of the last token, processing what is pending."""
        self._check_open()
        logits = self._logits
        if logits is None:
            if not self._sequence.tokens:
                raise InputError("the session is empty; nothing follows no token")
            self.make_pending()
            residual = self._prefill()
            assert residual is not None, "nothing was pending"
            with self._llm.sessions.running():
                logits = self._logits = self._engine.logits(residual)[0]
        return logits

    def decode(
        self, token: int, sampler: Sampler | None = None, most: int | None = None
    ) -> torch.Tensor:
        """Add a sampled token and process it: its logits (vocab,). sampler: what will choose the
        next ones; with it, what follows may be guessed and processed too, for later calls. most:
        how many more may be processed; None: as many as the context holds. What waits before it is
        processed first. Raises InputError for what is no token, ContextOverflow, and DoesNotFit
        where a fork has the room; nothing is added then.
        """
        self._check_open()
        if sampler is None:  # else it chose the token
            self._llm.encode([token])  # which says what is none
        sequence, drafts = self._sequence, self._drafts
        num_tokens = len(sequence.tokens) + 1
        if num_tokens > self.context or not self.has_room(num_tokens):
            self._admit(num_tokens)  # which says why not
        if sequence.length + 1 < num_tokens:
            self.last_logits()
        self._logits = None  # should this be interrupted
        with self._llm.sessions.running():
            logits = None if drafts is None else drafts.take(sequence, token)
            sequence.tokens.append(token)
            if logits is not None:
                self._engine.take_in(sequence)
            elif drafts is None or sampler is None:
                logits = self._engine.logits(self._engine.decode(sequence))[0]
            else:
                room = self.context - len(sequence.tokens)
                logits = drafts.decode(sequence, sampler, room if most is None else most)
        self._logits = logits
        return logits

    def hold(self, token: int) -> None:
        """Add a sampled token that nothing follows yet; it is processed with what comes next."""
        self._changed()
        self._sequence.tokens.append(token)

    def _changed(self) -> None:
        """The tokens are no longer those that the last logits follow."""
        self._logits = None
        if self._drafts is not None:
            self._drafts.begin_answer()

    def take_snapshot(self) -> None:
        """Remember this point, so that the answer that starts here can be made again or undone."""
        if not self._keeps_snapshots:
            return
        sequence, snapshots = self._sequence, self._sequence.snapshots
        if snapshots and snapshots[-1].length == sequence.length:
            return
        old = snapshots.pop(0) if len(snapshots) >= MOST_SNAPSHOTS else None
        snapshots.append(self._engine.sequences.snapshot(sequence, self._logits, old))

    def guesses(self) -> tuple[int, int]:
        """Guesses of tokens that were accepted and rejected since the session began."""
        return (0, 0) if self._drafts is None else self._drafts.counts

    @property
    def num_processed(self) -> int:
        return self._sequence.length

    def take_recomputed(self) -> int:
        """Tokens processed again since the last answer, those that wait for it included."""
        return self._reading.take_recomputed()

    def take_restored(self) -> int:
        """Tokens that came from the prefix store since the last answer."""
        return self._reading.take_restored()

    def tiers(self) -> dict[str, dict[str, int]]:
        """By tier name: `pages` of this session (forks count shared ones too), and of the tier's
        frames `used_bytes`, `peak_bytes` and `capacity_bytes`. For looking on: may be called while
        another thread reads or answers."""
        return self.usage.tiers()
