"""RTF's bytes as tokens. Knows braces, control words, letters and binary data, and no meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_TOKEN = re.compile(
    rb"\\(?P<word>[a-zA-Z]{1,32})(?P<number>-?[0-9]{1,9})?[0-9]* ?"
    rb"|\\'(?P<hex>[0-9a-fA-F]{2})"
    rb"|\\(?P<sign>[^a-zA-Z])"
    rb"|(?P<brace>[{}])"
    rb"|(?P<blank>[\r\n]+)"
    rb"|(?P<letters>[^\\{}\r\n]+)"
    rb"|\\",  # the file's last byte
    re.DOTALL,
)


class Token(NamedTuple):
    """kind: "word" (text: its name), "hex" (letters: a byte), "sign" (text), "brace" (text),
    "letters" or "binary". number: of a word, None where it has none. end: offset behind it."""

    kind: str
    end: int
    text: str = ""
    number: int | None = None
    letters: bytes = b""


def tokens(data: bytes) -> Iterator[Token]:
    """All of them; binary data is passed over by its length, whatever bytes are in it."""
    at = 0
    while found := _TOKEN.match(data, at):
        at = found.end()
        kind = found.lastgroup
        if kind in ("word", "number"):
            word = found["word"].decode("ascii")
            number = None if found["number"] is None else int(found["number"])
            if word == "bin":
                at += max(0, number or 0)
                yield Token("binary", at)
            else:
                yield Token("word", at, word, number)
        elif kind == "letters":
            yield Token("letters", at, letters=found["letters"])
        elif kind == "hex":
            yield Token("hex", at, letters=bytes.fromhex(found["hex"].decode("ascii")))
        elif kind in ("sign", "brace"):
            yield Token(kind, at, found[kind].decode("latin-1"))
