"""Turns what users write for an option into a value: sizes, numbers, choices.

Each parser takes the text and returns the value, or raises ValueError with a sentence that says
what is allowed. Knows neither which option it serves nor where the text came from, and imports
nothing heavy, so that a usage error is answered at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

Parser = Callable[[str], Any]

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_SIZES_ALLOWED = "allowed are sizes such as 512MiB, 6GiB or 2GB, auto, and 0 to switch the tier off"


def size(text: str) -> int | str:
    """Bytes, or "auto". A bare number other than 0 is refused: `8` would mean eight bytes."""
    word = text.strip()
    if word.lower() == "auto":
        return "auto"
    if re.fullmatch(r"0+(\.0+)?\s*[A-Za-z]*", word) and word.lstrip("0. ").upper() in {"", *_UNITS}:
        return 0
    match = _SIZE.fullmatch(word)
    if match is None:
        if re.fullmatch(r"\d+(\.\d+)?", word):
            raise ValueError(f"{text!r} has no unit; did you mean {word}GiB? ({_SIZES_ALLOWED})")
        raise ValueError(f"{text!r} is not a size; {_SIZES_ALLOWED}")
    number, unit = match.groups()
    if unit.upper() not in _UNITS:
        hint = (
            f"did you mean {number}{unit.upper()}iB? "
            if unit.upper() in {"K", "M", "G", "T"}
            else ""
        )
        raise ValueError(f"{text!r} has the unknown unit {unit!r}; {hint}({_SIZES_ALLOWED})")
    # A string of digits can be longer than a float holds.
    num_bytes = float(number) * _UNITS[unit.upper()]
    if not num_bytes < 2**63:
        raise ValueError(f"{text!r} is more than any machine has; {_SIZES_ALLOWED}")
    return int(num_bytes)


def whole(minimum: int, maximum: int | None = None) -> Parser:
    """A parser of whole numbers from minimum up."""
    allowed = (
        f"a whole number, {minimum} or more"
        if maximum is None
        else f"a whole number from {minimum} to {maximum}"
    )

    def parse(text: str) -> int:
        # int() alone would take 1_000 and digits of other scripts.
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip()):
            raise ValueError(f"{text!r} is not {allowed}")
        value = int(text)
        if value < minimum or (maximum is not None and value > maximum):
            raise ValueError(f"{text!r} is not allowed: it must be {allowed}")
        return value

    return parse


def number(
    minimum: float, maximum: float = math.inf, *, above: bool = False, below: bool = False
) -> Parser:
    """A parser of decimal numbers in [minimum, maximum]; above and below leave the ends out."""
    low = f"more than {minimum:g}" if above else f"{minimum:g} or more"
    high = f"less than {maximum:g}" if below else f"at most {maximum:g}"
    allowed = f"a number, {low}" + ("" if maximum == math.inf else f" and {high}")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {allowed}") from None
        inside = minimum <= value <= maximum and math.isfinite(value)
        if not inside or (above and value == minimum) or (below and value == maximum):
            raise ValueError(f"{text!r} is not allowed: it must be {allowed}")
        return value

    return parse


def choice(*allowed: str) -> Parser:
    """A parser that takes one of the words given, in any case."""

    def parse(text: str) -> str:
        word = text.strip().lower()
        if word not in allowed:
            raise ValueError(f"{text!r} is not allowed; choose from {', '.join(allowed)}")
        return word

    return parse


def choice_so_far(existing: str, *planned: str) -> Parser:
    """A parser of a choice of which only `existing` can be had yet."""

    def parse(text: str) -> str:
        word = text.strip().lower()
        if word in planned:
            raise ValueError(f"{word!r} does not exist yet; only {existing!r} does so far")
        if word != existing:
            raise ValueError(f"{text!r} is not allowed; only {existing!r} exists so far")
        return word

    return parse


def bits(*allowed: str) -> Parser:
    """As choice, with digits turned into numbers: "auto", "full", 8, 6, 4."""
    parse_word = choice(*allowed)

    def parse(text: str) -> int | str:
        word = parse_word(text)
        return int(word) if word.isdigit() else word

    return parse


def switch_word(text: str) -> bool:
    """on or off."""
    return choice("on", "off")(text) == "on"


def plain(text: str) -> str:
    """Any text that is not empty and was valid in the terminal's encoding."""
    if not text.strip():
        raise ValueError("it is empty")
    return unbroken(text)


def unbroken(text: str) -> str:
    """The text itself, unless it holds bytes that were no valid characters: no tokenizer takes
    those.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(
            "it holds bytes that are no valid text in this terminal's encoding (UTF-8 is safe)"
        )
    return text


def show_size(num_bytes: float) -> str:
    """A size as people read it: 1536 -> '1.5 KiB'."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def show_duration(seconds: float) -> str:
    """A time as people read it: 75 -> '1 min 15 s'."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
