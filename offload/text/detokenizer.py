"""From token ids back to text, one at a time or all at once, with the same result.

Every token stands for fixed bytes: `Detokenizer` works them out from the decoder of tokenizer.json,
and `TextStream` turns them into characters as soon as a character is whole. Bytes that are no UTF-8
become U+FFFD, once it is certain that no later token completes them.

The tokenizers library decodes whole sequences only, and lets a later byte token change text that
has been shown already; hence our own. Knows nothing of special tokens: its callers leave them out.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

from ..answers.text_trace import CharacterSources, Stage, TextTrace
from ..errors import UnsupportedModel

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_table() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for the
    characters from U+0100 on (Radford et al. 2019, encoder.py's bytes_to_unicode)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(b): b for b in own} | {chr(0x100 + i): b for i, b in enumerate(others)}


class Detokenizer:
    """The bytes of each token. `decoder`: the "decoder" object of a tokenizer.json, None for none;
    ids from `num_ids` on are nobody's.

    UnsupportedModel for a decoder whose tokens have no bytes of their own.
    """

    def __init__(
        self,
        decoder: dict[str, Any] | None,
        id_to_token: Callable[[int], str | None],
        num_ids: int,
    ):
        self._id_to_token = id_to_token
        self._num_ids = num_ids
        self._pieces: dict[int, bytes] = {}
        self._byte_level: dict[str, int] | None = None
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        self.separator = b""  # between tokens
        self.num_stripped = 0  # leading spaces dropped from the whole text
        self.first_without_spaces = False
        steps = [decoder] if decoder else []
        if decoder and decoder["type"] == "Sequence":
            steps = decoder["decoders"]
        if not steps:
            self.separator = b" "
        is_fused = False
        for step in steps:
            kind = step["type"]
            if kind == "ByteLevel" and len(steps) <= 2:
                self._byte_level = _byte_level_table()
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Fuse":
                is_fused = True
            elif kind == "Replace" and len(step["pattern"].get("String", "")) == 1:
                self._replacements.append((step["pattern"]["String"], step["content"]))
            elif kind == "Metaspace":
                self._replacements.append((step["replacement"], " "))
                self.first_without_spaces = step.get("prepend_scheme", "always") != "never"
            elif kind == "Strip" and is_fused and step["content"] == " " and step["stop"] == 0:
                self.num_stripped = step["start"]
            else:
                raise UnsupportedModel(
                    f"its tokenizer.json decodes by {kind}, which Ebbtide cannot do token by "
                    "token; it can by ByteLevel, Metaspace, and Replace with ByteFallback"
                )

    def piece(self, token_id: int, keep: bool = True) -> bytes:
        """What a token adds to the text; b"" for an id that the tokenizer does not know. keep:
        whether it is likely to be asked for again."""
        piece = self._pieces.get(token_id)
        if piece is None:
            if not 0 <= token_id < self._num_ids:
                return b""
            piece = self._bytes_of(self._id_to_token(token_id))
            if keep:
                self._pieces[token_id] = piece
        return piece

    def _bytes_of(self, token: str | None) -> bytes:
        if token is None:
            return b""
        table = self._byte_level
        if table is not None:
            # Added tokens are stored as they are, and may hold characters outside the alphabet.
            if all(char in table for char in token):
                return bytes(table[char] for char in token)
            return token.encode("utf-8", "replace")
        if self._byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode("utf-8", "replace")


class TextStream(Stage):
    """The text of one sequence, as it grows. Never half a character, never one taken back."""

    def __init__(self, detokenizer: Detokenizer, left_out: frozenset[int] = frozenset()):
        super().__init__()
        self._characters: CharacterSources | None = None  # None: it is not traced
        self._detokenizer = detokenizer
        self._left_out = left_out
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_first = True
        self._num_to_strip = detokenizer.num_stripped

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" while there are none."""
        if token_id in self._left_out:
            return ""
        detokenizer = self._detokenizer
        piece = detokenizer.piece(token_id)
        if self._is_first:
            self._is_first = False
            if detokenizer.first_without_spaces:
                piece = piece.replace(b" ", b"")
        else:
            piece = detokenizer.separator + piece
        while self._num_to_strip and piece:
            if not piece.startswith(b" "):
                self._num_to_strip = 0
                break
            piece = piece[1:]
            self._num_to_strip -= 1
        return self._decoded(piece)

    def finish(self) -> str:
        """What is left at the end: U+FFFD where a character stayed incomplete."""
        return self._decoded(b"", final=True)

    def trace(self, trace: TextTrace) -> None:
        """Say from now on which tokens characters come from."""
        self._characters = CharacterSources(trace)

    def _decoded(self, piece: bytes, final: bool = False) -> str:
        begun = self._utf8.getstate()[0]
        text = self._utf8.decode(piece, final)
        if self._characters is not None:
            pending = self._utf8.getstate()[0]
            self._passed.extend(self._characters.of(begun, piece, text, pending))
        return text
