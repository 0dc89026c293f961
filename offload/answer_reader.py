"""From sampled tokens to what is thought and what is answered, piece by piece.

An AnswerReader is made for one answer by `Tokenizer.answer_reader`. Here is the one for models that
put marks around a thought, and for text without thoughts; `harmony.py` has the one for models that
answer in channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .detokenizer import TextStream
from .thinking import Thoughts


class AnswerReader(Protocol):
    """Reads one answer. However its text was cut into tokens, the pieces join to the same."""

    @property
    def warnings(self) -> Sequence[str]:
        """What a user should know of the answer so far, in whole sentences."""
        ...

    def push(self, token_id: int) -> tuple[str, str]:
        """(thought, answer): what this token makes certain, in whole characters."""
        ...

    def finish(self) -> tuple[str, str]:
        """What was held back, at the end of the answer."""
        ...


class MarkedReader:
    """thoughts: Thoughts(None) where there are none."""

    warnings = ()

    def __init__(self, decoded: TextStream, thoughts: Thoughts):
        self._decoded, self._thoughts = decoded, thoughts

    def push(self, token_id: int) -> tuple[str, str]:
        return self._thoughts.push(self._decoded.push(token_id))

    def finish(self) -> tuple[str, str]:
        last, rest = self._thoughts.push(self._decoded.finish()), self._thoughts.finish()
        return last[0] + rest[0], last[1] + rest[1]
