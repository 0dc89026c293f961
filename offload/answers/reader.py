"""From sampled tokens to what is thought and what is answered, piece by piece.

An AnswerReader is made for one answer by `Tokenizer.answer_reader`. Here is the one for models that
put marks around a thought, and for text without thoughts; `harmony.py` has the one for models that
answer in channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..output import ToolCall
from ..text.detokenizer import TextStream
from .stop_strings import StopStrings
from .text_trace import TextTrace
from .thinking import Thoughts

if TYPE_CHECKING:
    from .call_reader import CallReader


class AnswerReader(Protocol):
    """Reads one answer. However its text was cut into tokens, the pieces join to the same. It is
    made with StopStrings, which are looked for in each message of the answer, and in no thought.
    """

    @property
    def warnings(self) -> Sequence[str]:
        """What a user should know of the answer so far, in whole sentences."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the answer has ended by what it says: nothing more of it is read."""
        ...

    @property
    def stop_string(self) -> str | None:
        """What ended the answer, if it was one of those."""
        ...

    def trace(self, trace: TextTrace) -> None:
        """Tell it of the answer from now on. Called before the first token, if at all."""
        ...

    def push(self, token_id: int) -> tuple[str, str]:
        """(thought, answer): what this token makes certain, in whole characters."""
        ...

    def finish(self) -> tuple[str, str]:
        """What was held back, at the end of the answer. It may be over only then, too."""
        ...

    def take_calls(self) -> list[ToolCall]:
        """The calls of functions that have become whole since the last time."""
        ...


class MarkedReader:
    """thoughts: Thoughts(None) where there are none. calls: None where no tools are offered."""

    warnings = ()

    def __init__(
        self,
        decoded: TextStream,
        thoughts: Thoughts,
        stops: StopStrings,
        calls: CallReader | None = None,
    ):
        self._decoded, self._thoughts, self._stops = decoded, thoughts, stops
        self._calls = calls

    @property
    def is_over(self) -> bool:
        has_called = self._calls is not None and self._calls.is_over
        return has_called or self._stops.matched is not None

    @property
    def stop_string(self) -> str | None:
        return self._stops.matched

    def take_calls(self) -> list[ToolCall]:
        return [] if self._calls is None else self._calls.calls.take()

    def trace(self, trace: TextTrace) -> None:
        self._decoded.trace(trace)
        last = self._thoughts.follow(self._decoded)
        if self._calls is not None:
            last = self._calls.follow(last)
        self._stops.follow(last, trace.told)

    def push(self, token_id: int) -> tuple[str, str]:
        return self._until_stop(self._thoughts.push(self._decoded.push(token_id)))

    def finish(self) -> tuple[str, str]:
        if self.is_over:
            return "", ""
        thought, answer = self._until_stop(self._thoughts.push(self._decoded.finish()))
        last_thought, last = self._until_stop(self._thoughts.finish())
        if self._calls is not None:
            last += self._stops.push(self._calls.finish())
        return thought + last_thought, answer + last + self._stops.finish()

    def _until_stop(self, said: tuple[str, str]) -> tuple[str, str]:
        thought, answer = said
        if self._calls is not None:
            answer = self._calls.push(answer)
        return thought, self._stops.push(answer)
