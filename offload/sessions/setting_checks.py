"""The settings of an answer, one by one: what each may be, and in which words another is refused.

Knows names and values only; what holds between settings is GenerationConfig's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from ..answers.json_schema import checked_schema
from ..answers.tools import checked_choice, checked_tools
from ..errors import InputError

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1000
MOST_TOP_LOGPROBS = 20
MOST_IDS = 1024  # of tokens that a setting names
THINK_LEVELS = ("low", "medium", "high")

# One check per field: (name, value) -> the value in its own type, or InputError.


def _refuse(name: str, value: Any, allowed: str) -> InputError:
    return InputError(f"{name} must be {allowed}, not {value!r}")


def _whole(low: int, high: int, optional: bool = False):
    allowed = f"a whole number from {low} to {high}"

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise _refuse(name, value, allowed)
        if not low <= int(value) <= high:
            raise _refuse(name, value, allowed)
        return int(value)

    return check


def _number(low: float, high: float):
    upper = f"a number from {low:g} to {high:g}"
    allowed = f"a number of at least {low:g}" if high == math.inf else upper

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise _refuse(name, value, allowed)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (low <= number <= high and math.isfinite(number)):
            raise _refuse(name, value, allowed)
        return number

    return check


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "True or False")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise _refuse(name, value, "text, or a list of texts")
    if len(texts) > MAX_STOP_STRINGS:
        raise InputError(f"{name} may hold {MAX_STOP_STRINGS} texts at most, not {len(texts)}")
    for text in texts:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InputError(
                f"{name}: each must have 1 to {MAX_STOP_CHARS} characters, one has {len(text)}"
            )
    return tuple(dict.fromkeys(texts))


def _think(name: str, value: Any) -> bool | str | None:
    is_level = isinstance(value, str) and value in THINK_LEVELS
    if not (value is None or isinstance(value, bool) or is_level):
        raise _refuse(name, value, f"True, False or one of {', '.join(THINK_LEVELS)}")
    return value


def _schema(name: str, value: Any) -> str | None:
    return None if value is None else checked_schema(name, value)


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def ids_of(name: str, value: Any) -> tuple[int, ...]:
    allowed = "a token id, or a list of them"
    ids = (value,) if isinstance(value, (int, float, str)) else value
    if not isinstance(ids, Iterable) or isinstance(ids, Mapping):
        raise _refuse(name, value, allowed)
    ids = tuple(ids)
    if not all(map(_is_id, ids)):
        raise _refuse(name, value, allowed)
    return tuple(dict.fromkeys(int(item) for item in ids))


def _few_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = ids_of(name, value)
    if len(ids) > MOST_IDS:
        raise InputError(f"{name} may name {MOST_IDS:,} tokens at most, not {len(ids):,}")
    return ids


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    words = list(value) if isinstance(value, (list, tuple)) else [value]
    are_words = all(isinstance(word, (list, tuple)) and word for word in words)
    if not are_words or not all(_is_id(token) for word in words for token in word):
        raise _refuse(name, value, "a list of words, each a list of token ids")
    found = tuple(tuple(map(int, word)) for word in words)
    if (count := sum(map(len, found))) > MOST_IDS:
        raise InputError(f"{name} may name {MOST_IDS:,} tokens at most, not {count:,}")
    return found


_bias_of = _number(-100, 100)


def _bias(name: str, value: Any) -> dict[int, float]:
    """JSON has the ids as texts."""
    if not isinstance(value, Mapping):
        raise _refuse(name, value, "an object of token ids and numbers from -100 to 100")
    if len(value) > MOST_IDS:
        raise InputError(f"{name} may name {MOST_IDS:,} tokens at most, not {len(value):,}")
    found: dict[int, float] = {}
    for key, number in value.items():
        is_text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token = int(key) if is_text else key
        if not _is_id(token):
            raise _refuse(f"{name}: a key", key, "a token id")
        found[int(token)] = _bias_of(f"{name} of {token}", number)
    return found


def _processors(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    # A list of them may be callable itself, as Hugging Face's is.
    found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(map(callable, found)):
        raise _refuse(name, value, "a list of functions (ids, logits) -> logits")
    return found


CHECKS = {
    "max_new_tokens": _whole(1, 2**31 - 1, optional=True),
    "min_new_tokens": _whole(0, 2**31 - 1),
    "do_sample": _switch,
    "temperature": _number(0, math.inf),
    "top_k": _whole(0, 2**31 - 1),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),  # beyond, penalised logits leave float32
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _bias,
    "no_repeat_ngram_size": _whole(0, 2**31 - 1),
    "suppress_tokens": _few_ids,
    "bad_words_ids": _words,
    "logits_processors": _processors,
    "stop_strings": _texts,
    "seed": _whole(0, 2**64 - 1, optional=True),
    "eos_token_ids": ids_of,
    "think": _think,
    "json_schema": _schema,
    "tools": checked_tools,
    "tool_choice": checked_choice,
    "parallel_tool_calls": _switch,
    "logprobs": _whole(0, MOST_TOP_LOGPROBS, optional=True),
}
