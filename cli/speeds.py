"""How fast a model read and wrote here before: what an estimate of time is made from.

A small file in the user's state folder; without it there is no estimate, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ebbtide import errors

from .job import job_key

_FEWEST_TOKENS = 64  # of a reading that says anything about speed
_MOST_ENTRIES = 200


def _path() -> Path:
    import ebbtide

    return ebbtide.state_dir() / "speeds.json"


def _key(llm: Any, settings: Any) -> str:
    parts = [llm.fingerprint, settings.device, settings.threads, str(settings.weight_bits)]
    return job_key([*parts, str(settings.kv_bits)])


def recall(llm: Any, settings: Any) -> dict[str, float] | None:
    """{"prefill", "decode"}: tokens per second of the last run; None when there was none."""
    try:
        found = json.loads(_path().read_bytes())[_key(llm, settings)]
        return {name: float(found[name]) for name in ("prefill", "decode") if found[name] > 0}
    except (OSError, ValueError, KeyError, TypeError, errors.EbbtideError):
        return None


def _tokens_read(answer: dict[str, Any]) -> int:
    """0 where most came from what was kept: the few behind it say little of a text's speed."""
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    read = usage["prompt_tokens"] - cached
    return read if read >= cached else 0


def remember(llm: Any, settings: Any, answers: list[dict[str, Any]]) -> None:
    """From the answers of a run; the longest reading counts. Failing to is nobody's trouble."""
    longest = max(answers, key=_tokens_read, default=None)
    if longest is None or _tokens_read(longest) < _FEWEST_TOKENS:
        return
    timings = longest["timings"]
    speeds = {
        "prefill": timings["prefill_tokens_per_s"],
        "decode": timings["decode_tokens_per_s"],
    }
    with contextlib.suppress(OSError, ValueError, errors.EbbtideError):
        path = _path()
        try:
            known = json.loads(path.read_bytes())
        except (OSError, ValueError):
            known = {}
        known.pop(_key(llm, settings), None)
        kept = dict([*known.items(), (_key(llm, settings), speeds)][-_MOST_ENTRIES:])
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(kept))
        os.replace(temporary, path)
