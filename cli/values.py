"""Turns what users write for an option into a value: sizes, numbers, choices.

Each parser takes the text and returns the value, or raises ValueError with a sentence that says
what is allowed. Knows neither which option it serves nor where the text came from, and imports
nothing heavy, so that a usage error is answered at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

Parser = Callable[[str], Any]
_LONGEST_STOP = 1000  # as the runtime has it
_TOKENS = {"": 1, "k": 2**10, "m": 2**20}


def size(text: str) -> int | str:
    """Bytes, or "auto"."""
    import ebbtide

    return ebbtide.parse_size(text)


def tier_size(text: str) -> int | str:
    """Bytes, 0 for none, or "auto"."""
    import ebbtide

    return ebbtide.parse_tier_size(text)


def cache_size(text: str) -> int | str:
    """The same, or 0 for "off"."""
    import ebbtide

    return ebbtide.parse_cache_size(text)


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


def tokens(minimum: int = 1, maximum: int = 2**31 - 1) -> Parser:
    """A parser of numbers of tokens; 32k is 32,768 and 1M is 1,048,576, as makers of models
    count."""

    def parse(text: str) -> int:
        match = re.fullmatch(r"\+?([0-9]{1,20})(?:([kKmM])i?)?", text.strip())
        num_tokens = int(match[1]) * _TOKENS[(match[2] or "").lower()] if match else -1
        if not minimum <= num_tokens <= maximum:
            raise ValueError(
                f"{text!r} is not a number of tokens from {minimum} to {maximum}, such as 2048, "
                "32k or 1M"
            )
        return num_tokens

    return parse


def several(parse: Parser) -> Parser:
    """A parser of values with commas between them: a list."""
    return lambda text: [parse(part) for part in text.split(",")]


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


def duration(text: str) -> float:
    """Seconds: 90s, 10m, 2h, or infinity for "never"."""
    word = text.strip().lower()
    match = re.fullmatch(r"([0-9]{1,6})([smh])", word)
    if word != "never" and not (match and int(match[1])):
        raise ValueError(
            f"{text!r} is not a time; allowed are never, or one such as 90s, 10m or 2h"
        )
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else math.inf


def choice(*allowed: str) -> Parser:
    """A parser that takes one of the words given, in any case."""

    def parse(text: str) -> str:
        word = text.strip().lower()
        if word not in allowed:
            raise ValueError(f"{text!r} is not allowed; choose from {', '.join(allowed)}")
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


def think_word(text: str) -> bool | str:
    """on or off, or a level."""
    word = choice("on", "off", "low", "medium", "high")(text)
    return word == "on" if word in ("on", "off") else word


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
            "it holds bytes that are not valid text in this terminal's encoding (UTF-8 is safe)"
        )
    return text


def stop_text(text: str) -> str:
    """What ends an answer; blanks and line ends may."""
    if not 1 <= len(text) <= _LONGEST_STOP:
        raise ValueError(
            f"a text of 1 to {_LONGEST_STOP} characters is allowed, and this one has {len(text)}"
        )
    return unbroken(text)


def counted(number: int, noun: str) -> str:
    """A number of things: 1 token, 2,000 tokens."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Which known name was meant by one that is none, if any is near. Letters that changed places
    are the commonest slip, and count as two for difflib (`modle` is nearer to `mode`)."""
    known = sorted(known)
    exchanged = [name for name in known if sorted(name) == sorted(word)]
    near = exchanged or difflib.get_close_matches(word, known, n=1)
    return near[0] if near else None


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
