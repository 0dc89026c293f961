"""One answer, piece by piece: samples, decodes text, stops where it should, and says what it took.

Knows a session (whose tokens it extends) and the sampler; knows no pages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING

from ..answers.text_trace import TextTrace
from ..answers.tools import Calls, parameters_of
from ..output import Output, Piece, TextToken, ToolCall
from ..running.logprobs import Logprobs
from ..running.sampler import Sampler
from .generation import GenerationConfig

if TYPE_CHECKING:
    from ..answers.constraint import Constraint
    from .session import Session


class Stream(Iterator[Piece]):
    """Iterates the pieces of one answer. `close()` stops it; `output` is there at any time, whole
    at the end. One that is dropped unfinished is closed. restored_tokens: of the prompt, tokens
    that were read before, whose pages came from disk.

    States: unbegun --first step--> answering --end, error or close--> ended (`_fields` is set).
    """

    def __init__(
        self,
        session: Session,
        config: GenerationConfig,
        constraint: Constraint | None = None,
        *,
        closes_session: bool,
        chat: bool,
    ):
        """chat: whether messages are answered; thoughts are told from answers only there.
        constraint: what the answer is kept to."""
        self._fields: tuple[dict, dict] | None = ({}, {})  # there is nothing to end yet
        self._session, self._config, self._closes = session, config, closes_session
        self._llm = session._llm
        self.token_ids: list[int] = []
        self._text, self._thought = StringIO(), StringIO()  # `+=` would copy all of it each time
        self._thought_tokens = self._silent_tokens = 0  # silent: marks and parts of characters
        self._finish: str | None = None
        self._prompt_tokens = len(session._sequence.tokens)
        self._began = time.perf_counter()
        self._cached = self._recomputed = self.restored_tokens = 0
        self._guesses_before = session.guesses()
        self._guesses: tuple[int, int] | None = None  # accepted, rejected, at the end
        self._prefill_s = self._ttft_s = self._decode_s = 0.0
        self._warnings = [*config.warnings]
        room = session.context - self._prompt_tokens
        self._most = room if config.max_new_tokens is None else min(room, config.max_new_tokens)
        if config.max_new_tokens is not None and room < config.max_new_tokens:
            self._warnings.append(
                f"The context leaves room for {room:,} of the {config.max_new_tokens:,} tokens "
                "the answer may have."
            )
        self._sampler: Sampler | None = None  # None until the first step
        self._constraint = constraint
        self.tool_calls: list[ToolCall] = []
        self._logprobs: Logprobs | None = None
        if config.logprobs is not None:
            num_top = min(config.logprobs, self._llm.config.vocab_size)
            self._logprobs = Logprobs(num_top, self._llm.tokenizer.bytes_of)
        most_calls = None if config.parallel_tool_calls else 1
        self._reader = self._llm.tokenizer.answer_reader(
            session._sequence.tokens if chat else None,
            config.stop_strings,
            Calls(parameters_of(config.offered_tools), most_calls)
            if config.offered_tools
            else None,
        )
        self._trace: TextTrace | None = None
        if self._logprobs is not None:
            self._trace = TextTrace()
            self._reader.trace(self._trace)
        session.make_pending()
        session.find_kept()
        self._cached = session.num_processed
        self._recomputed = session.take_recomputed()
        self.restored_tokens = session.take_restored()
        self._fields = None
        session.begin_answer(self)

    def __next__(self) -> Piece:
        if self._fields is not None:
            raise StopIteration
        try:
            piece = self._step()
        except BaseException as error:
            self._finish = "cancelled"
            self._end()
            if isinstance(error, StopIteration):  # of a caller's function: it is not the end here
                raise RuntimeError("what the answer calls raised StopIteration") from error
            raise
        if self._finish is not None:
            self._end()
        return piece

    def _step(self) -> Piece:
        """One token: what follows the last one, its text, and whether it is the end."""
        session, config = self._session, self._config
        if self._sampler is None:
            logits = session.last_logits()
            self._sampler = Sampler(config, self._constraint, self._prompt_tokens)
            session.take_snapshot()
            self._prefill_s = time.perf_counter() - self._began
        else:
            # The last token is processed when another is wanted.
            most = self._most - len(self.token_ids) - 1
            logits = session.decode(self.token_ids[-1], self._sampler, most)
        token = self._sampler.choose(logits, session._sequence.tokens)
        self.token_ids.append(token)
        if self._logprobs is not None and self._trace is not None:
            self._trace.place = len(self._logprobs)
            self._logprobs.add(logits, token)
        if len(self.token_ids) == 1:
            self._ttft_s = time.perf_counter() - self._began
        is_eos = token in config.eos_token_ids
        thought, text = ("", "") if is_eos else self._reader.push(token)
        is_complete = self._constraint is not None and self._constraint.is_over
        if is_eos or is_complete or self._reader.is_over:
            self._finish = "stop"
        elif len(self.token_ids) >= self._most:
            self._finish = "length"
        elif not session.has_room(self._prompt_tokens + len(self.token_ids) + 1):
            self._finish = "length"
            self._warnings.append(
                f"The answer ended after {len(self.token_ids):,} tokens: sessions that share its "
                "pages have taken the room for more. Close one of them."
            )
        self._take(thought, text)
        if self._finish is not None:
            last_thought, last = self._take(*self._reader.finish())
            thought, text = thought + last_thought, text + last
            if self._reader.is_over:
                self._finish = "stop"
        self._count_thought(thought, text)
        calls = self._take_calls()
        self._decode_s = time.perf_counter() - self._began - self._ttft_s
        piece = Piece(text, [token], self._finish, thought, tuple(calls))
        return piece if self._logprobs is None else self._with_logprobs(piece, self._logprobs)

    def _with_logprobs(self, piece: Piece, logprobs: Logprobs) -> Piece:
        assert self._trace is not None
        tokens = [TextToken(at, offset, logprobs[at : at + 1]) for at, offset in self._trace.take()]
        return replace(piece, logprobs=logprobs[-1:], text_tokens=tuple(tokens))

    def _take_calls(self) -> list[ToolCall]:
        calls = self._reader.take_calls()
        self.tool_calls += calls
        if self.tool_calls and self._finish == "stop":
            self._finish = "tool_calls"
        return calls

    def _count_thought(self, thought: str, text: str) -> None:
        """Whether the last token was thought, and those before it that told nothing."""
        self._silent_tokens += 1
        if thought:
            self._thought_tokens += self._silent_tokens
        if thought or text:
            self._silent_tokens = 0

    def _take(self, thought: str, text: str) -> tuple[str, str]:
        self._thought.write(thought)
        self._text.write(text)
        return thought, text

    def close(self) -> None:
        """Stop. The answer so far stays in `output`, as "cancelled", and in the session; what was
        held back of it is there too, though no piece had it."""
        self._finish = self._finish or "cancelled"
        self._end()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            if self._fields is None or self._is_left:
                self._llm.sessions.abandon(self)
        except Exception:
            pass  # nobody is there to hear it, and at the interpreter's end half is gone

    @property
    def _is_left(self) -> bool:
        """Whether it should have closed its session, and was interrupted."""
        return self._closes and self._session in self._llm.sessions

    def _end(self) -> None:
        if self._fields is None:
            self._end_answer()
        if self._closes:
            self._session.close()

    def _end_answer(self) -> None:
        if self._finish == "cancelled":
            self._take(*self._reader.finish())
            self._take_calls()
        if self._prompt_tokens + len(self.token_ids) > len(self._session._sequence.tokens):
            self._session.hold(self.token_ids[-1])  # it was shown, so it stays
        self._guesses = self._guesses or self._count_guesses()
        usage = self._session.usage
        self._fields = usage.memory(), usage.kv()
        usage.begin_count()
        self._warnings += [*self._reader.warnings, *self._session.end_answer(self)]

    def _count_guesses(self) -> tuple[int, int]:
        accepted, rejected = self._session.guesses()
        return accepted - self._guesses_before[0], rejected - self._guesses_before[1]

    def tiers(self) -> dict[str, dict[str, int]]:
        """Where the pages lie now; see `Session.tiers`."""
        return self._session.tiers()

    @property
    def output(self) -> Output:
        """The Output; before the end, of what there is so far."""
        memory, kv = self._fields or (self._session.usage.memory(), self._session.usage.kv())
        new = self._prompt_tokens - self._cached
        accepted, rejected = self._guesses or self._count_guesses()
        num = len(self.token_ids)
        load_s = self._llm.load_s
        return Output(
            text=self._text.getvalue(),
            token_ids=list(self.token_ids),
            finish_reason=self._finish or "cancelled",
            usage={
                "prompt_tokens": self._prompt_tokens,
                "completion_tokens": num,
                "total_tokens": self._prompt_tokens + num,
                "prompt_tokens_details": {"cached_tokens": self._cached},
                "completion_tokens_details": {
                    "reasoning_tokens": self._thought_tokens,
                    "accepted_prediction_tokens": accepted,
                    "rejected_prediction_tokens": rejected,
                },
                "recomputed_tokens": self._recomputed,
            },
            timings={
                "load_s": load_s,
                "prefill_s": self._prefill_s,
                "ttft_s": self._ttft_s,
                "decode_s": self._decode_s,
                "prefill_tokens_per_s": new / self._prefill_s if self._prefill_s else 0.0,
                "decode_tokens_per_s": (num - 1) / self._decode_s
                if self._decode_s and num > 1
                else 0.0,
            },
            memory=memory,
            kv=kv,
            warnings=list(dict.fromkeys([*self._llm.warnings, *self._warnings])),
            plan=self._session._runtime.plan.to_dict(),
            thought=self._thought.getvalue(),
            tool_calls=list(self.tool_calls),
            logprobs=None if self._logprobs is None else self._logprobs[:],
            stop_string=self._reader.stop_string,
        )
