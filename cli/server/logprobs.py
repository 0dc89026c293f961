"""Log-probabilities of the tokens of an answer's text, as OpenAI's protocol has them.

Left out are tokens that are none of the text: thoughts, calls, what marks them, the end, and what a
stop string cut off. A token of which a part is text is told whole.

Knows pieces and their tokens, and no model.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ebbtide import Piece, TokenLogprob

_LEAST = -9999.0  # as OpenAI has it for what cannot come; JSON has no infinity


class _Token(NamedTuple):
    """place: among all tokens of the answer. told: it alone; made when it is looked at. offset: the
    characters of the text before it."""

    place: int
    told: Sequence[TokenLogprob]
    offset: int = 0


class TextTokens:
    """Finds the tokens of an answer's text. Text is held back until it is certain what it is, and
    so its tokens wait."""

    def __init__(self) -> None:
        self._waiting: list[tuple[_Token | None, bytes]] = []  # None: the rest of one that is told
        self._num_tokens = 0
        self._is_behind_cut = False  # whether what waits begins with a mark
        self._num_chars = 0  # of the text so far

    def add(self, piece: Piece) -> list[_Token]:
        """The tokens whose text comes with this piece."""
        for at, token in enumerate(piece.logprobs):
            if token.bytes:
                waits = _Token(self._num_tokens, piece.logprobs[at : at + 1])
                self._waiting.append((waits, token.bytes))
            self._num_tokens += 1
        found = self._told(piece.text) if piece.text else []
        if (piece.thought and not piece.text) or piece.tool_calls:
            self._waiting, self._is_behind_cut = [], True
        return found

    def _told(self, text: str) -> list[_Token]:
        written = b"".join(spelled for _, spelled in self._waiting)
        start, stop = self._place_of(text, written)
        self._is_behind_cut = False
        told, rest, at = [], [], 0
        first, self._num_chars = self._num_chars, self._num_chars + len(text)
        if not written[start:stop].startswith(b"\n"):  # lines that nobody wrote
            first += len(text) - len(text.lstrip("\n"))
        for token, spelled in self._waiting:
            end = at + len(spelled)
            is_text = at < stop and end > start
            if is_text and token is not None:
                before = _num_chars(written[start : max(start, at)])
                told.append(token._replace(offset=min(first + before, self._num_chars)))
            if end > stop:
                rest.append((None if is_text else token, spelled[max(0, stop - at) :]))
            at = end
        self._waiting = rest
        return told

    def _place_of(self, text: str, written: bytes) -> tuple[int, int]:
        """Where the text is in what was written: at its beginning, unless that is a mark. All of
        it, where parts of characters became U+FFFD."""
        # Between messages of an answer in channels there is an empty line that nobody wrote.
        for said in (text.encode(), text.lstrip("\n").encode()):
            at = written.rfind(said)
            if not self._is_behind_cut and written.startswith(said):
                at = 0
            if at >= 0:
                return at, at + len(said)
        return 0, len(written)


class AnswerLogprobs:
    """Of one answer. is_chat: chats have one shape, plain texts another."""

    def __init__(self, is_chat: bool):
        self._columns, self._begin = (_CHAT, {"refusal": None}) if is_chat else (_PLAIN, {})
        self._tokens = TextTokens()
        self._places, self._offsets = array("i"), array("i")  # of the text's tokens

    def note(self, piece: Piece) -> None:
        """A piece of an answer that is told whole."""
        for token in self._tokens.add(piece):
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
        placed = [(token.told[0], token.offset) for token in self._tokens.add(piece)]
        if not placed:
            return None
        columns = {name: [told(*item) for item in placed] for name, told in self._columns.items()}
        return {**self._begin, **columns}


def _num_chars(spelled: bytes) -> int:
    """That begin in it: tokens may hold parts of some."""
    return sum(byte & 0xC0 != 0x80 for byte in spelled)


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
