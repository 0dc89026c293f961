"""Numbers before items and headings as word processors write them."""

from __future__ import annotations

BULLET = "- "
_ROMAN = (
    *((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l")),
    *((40, "xl"), (10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i")),
)
_MOST_ROMAN = 4999


def written(count: int, kind: str) -> str:
    """kind: decimal, decimalZero (01), lowerLetter, upperLetter (aa follows z, then bb), lowerRoman
    or upperRoman; others count as decimal, as do numbers that a kind cannot write."""
    if kind in ("lowerLetter", "upperLetter") and count > 0:
        text = chr(ord("a") + (count - 1) % 26) * (1 + (count - 1) // 26 % 100)
    elif kind in ("lowerRoman", "upperRoman") and 0 < count <= _MOST_ROMAN:
        text = ""
        for value, letters in _ROMAN:
            text += letters * (count // value)
            count %= value
    else:
        return f"{count:02d}" if kind == "decimalZero" else str(count)
    return text.upper() if kind.startswith("upper") else text
