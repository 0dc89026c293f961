"""How fast a model read and wrote here before: what an estimate of time is made from.

A long text takes more time for each token than a short one, since each sees those before it. So
speeds are kept by length, in classes that double, the last run of each class; an estimate takes the
nearest. A small file in the user's state folder; without it there is no estimate, and nothing else
changes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebbtide import errors

from .job import job_key

_FEWEST_TOKENS = 64  # of a reading that says anything about speed
_MOST_ENTRIES = 200
_DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError),
    errors.EbbtideError,
)


@dataclass
class Speeds:
    """Tokens per second of earlier runs, by the length of what was read: see `_length_class`."""

    prefill: dict[int, float] = field(default_factory=dict)
    decode: dict[int, float] = field(default_factory=dict)

    def reading_s(self, num_tokens: int) -> float | None:
        """What a text of so many tokens takes; None where no speed is known."""
        return _seconds(self.prefill, num_tokens, num_tokens)

    def writing_s(self, num_tokens: int, depth: int) -> float | None:
        """What so many tokens take, the answer to a text of `depth`."""
        return _seconds(self.decode, num_tokens, depth)

    def add(self, answer: dict[str, Any]) -> None:
        """What an answer's numbers say, in place of what was known of texts of its length."""
        length, timings = _length_class(answer["usage"]["prompt_tokens"]), answer["timings"]
        for known, name in ((self.prefill, "prefill"), (self.decode, "decode")):
            if _is_speed(speed := timings[f"{name}_tokens_per_s"]):
                known[length] = speed

    @classmethod
    def parse(cls, found: Any) -> Speeds:
        """The inverse of `to_dict`. Raises ValueError, KeyError, TypeError, AttributeError or
        OverflowError for what is none."""
        parts = [
            {int(length): float(speed) for length, speed in found[name].items()}
            for name in ("prefill", "decode")
        ]
        if not all(_is_speed(speed) for part in parts for speed in part.values()):
            raise ValueError("a speed is none")
        return cls(*parts)

    def to_dict(self) -> dict[str, dict[int, float]]:
        return {"prefill": self.prefill, "decode": self.decode}


def _is_speed(tokens_per_s: float) -> bool:
    """Not of nothing, nor of what took no time."""
    return 0 < tokens_per_s < math.inf


def _length_class(num_tokens: int) -> int:
    """The same for texts of 2**n tokens to less than twice as many."""
    return num_tokens.bit_length()


def _seconds(known: dict[int, float], num_tokens: int, length: int) -> float | None:
    """By the speed of the nearest length; of two that are as near by the longer one's, which is the
    slower one."""
    if not known:
        return None
    wanted = _length_class(length)
    return num_tokens / known[min(known, key=lambda one: (abs(one - wanted), -one))]


def _path() -> Path:
    import ebbtide

    return ebbtide.state_dir() / "speeds.json"


def _key(llm: Any, settings: Any) -> str:
    parts = [llm.fingerprint, settings.device, settings.threads, str(settings.weight_bits)]
    return job_key([*parts, str(settings.kv_bits)])


def recall(llm: Any, settings: Any) -> Speeds:
    """What is known; nothing where that cannot be read."""
    try:
        return Speeds.parse(json.loads(_path().read_bytes())[_key(llm, settings)])
    except _DAMAGED:
        return Speeds()


def _says_speed(answer: dict[str, Any]) -> bool:
    """Not where most came from what was kept: the few behind it say little of a text's speed."""
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"] - cached >= max(cached, _FEWEST_TOKENS)


def remember(llm: Any, settings: Any, answers: list[dict[str, Any]]) -> None:
    """From the answers of a run. Failing to is nobody's trouble."""
    told = [answer for answer in answers if _says_speed(answer)]
    if not told:
        return
    with contextlib.suppress(OSError, ValueError, errors.EbbtideError):
        path, key, speeds = _path(), _key(llm, settings), recall(llm, settings)
        for answer in told:
            speeds.add(answer)
        try:
            known = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            known = {}
        known.pop(key, None)
        kept = dict([*known.items(), (key, speeds.to_dict())][-_MOST_ENTRIES:])
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(kept))
        os.replace(temporary, path)
