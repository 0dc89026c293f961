"""Log-probabilities of the tokens of an answer's text, as OpenAI's protocol has them.

Left out are tokens that are none of the text: thoughts, calls, what marks them, the end, and what a
stop string cut off. A token of which a part is text is told whole.

Knows pieces and their tokens, and no model.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ebbtide import Piece, TokenLogprob

_LEAST = -9999.0  # as OpenAI has it for what cannot come; JSON has no infinity


class AnswerLogprobs:
    """Of one answer. is_chat: chats have one shape, plain texts another."""

    def __init__(self, is_chat: bool):
        self._columns, self._begin = (_CHAT, {"refusal": None}) if is_chat else (_PLAIN, {})
        self._places, self._offsets = array("i"), array("i")  # of the text's tokens

    def note(self, piece: Piece) -> None:
        """A piece of an answer that is told whole."""
        for token in piece.text_tokens:
            self._places.append(token.place)
            self._offsets.append(token.offset)

    def whole(self, logprobs: Sequence[TokenLogprob]) -> Iterator[bytes]:
        """The object of a whole answer, in pieces of JSON: it may take a thousand times the memory
        of its text. logprobs: of all tokens."""
        begin = json.dumps(self._begin)[:-1] + (", " if self._begin else "")
        for name, told in self._columns.items():
            yield f'{begin}"{name}": ['.encode()
            comma = ""
            for place, offset in zip(self._places, self._offsets, strict=True):
                item = told(logprobs[place], offset)
                yield (comma + json.dumps(item, ensure_ascii=False)).encode()
                comma = ", "
            begin = "], "
        yield b"]}"

    def of_piece(self, piece: Piece) -> dict[str, Any] | None:
        """The object of a piece of an answer; None where no token became certain."""
        placed = [(token.logprobs[0], token.offset) for token in piece.text_tokens]
        if not placed:
            return None
        columns = {name: [told(*item) for item in placed] for name, told in self._columns.items()}
        return {**self._begin, **columns}


def _logprob(token: TokenLogprob) -> float:
    return max(token.logprob, _LEAST)


def _spelled(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": _logprob(token), "bytes": [*token.bytes]}


def _with_top(token: TokenLogprob, _: int) -> dict[str, Any]:
    return {**_spelled(token), "top_logprobs": [*map(_spelled, token.top)]}


def _by_text(token: TokenLogprob, _: int) -> dict[str, float]:
    """The likeliest tokens, and the one that was chosen. Of several with one text the first."""
    found: dict[str, float] = {}
    for other in (*token.top, token):
        found.setdefault(other.token, _logprob(other))
    return found


_Column = Callable[[TokenLogprob, int], Any]  # of a token, and the text's characters before it
_CHAT: dict[str, _Column] = {"content": _with_top}
_PLAIN: dict[str, _Column] = {
    "tokens": lambda token, _: token.token,
    "token_logprobs": lambda token, _: _logprob(token),
    "top_logprobs": _by_text,
    "text_offset": lambda _, num_chars: num_chars,
}
