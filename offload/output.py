"""What a run gives back: pieces while it goes, one Output at its end, progress in between. Plain
values, no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Progress:
    """How far a long phase is. phase: "load" (amounts are bytes), "restore" (tokens that were read
    before, whose pages come from disk) or "prefill" (tokens); eta_s: None at the start.
    """

    phase: str
    done_tokens: int
    total_tokens: int
    elapsed_s: float
    tokens_per_s: float
    eta_s: float | None


@dataclass(frozen=True)
class ToolCall:
    """A function that the model calls. arguments: a JSON object, as text. id: by which the message
    with its result names it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability. bytes: what it adds to a text, which
    may be a part of a character. top: the likeliest tokens in its place, as many as were asked for.
    """

    token_id: int
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def token(self) -> str:
        """The bytes as text, with U+FFFD for parts of characters."""
        return self.bytes.decode("utf-8", "replace")


class TextToken(NamedTuple):
    """A token of an answer's text. place: among all tokens of the answer, from 0 on; offset: how
    many characters of the text begin before it; logprobs: its own, alone, made when it is looked
    at."""

    place: int
    offset: int
    logprobs: Sequence[TokenLogprob]


@dataclass(frozen=True)
class Piece:
    """A bit of an answer: whole characters only. finish_reason is None until the last piece.
    thought: a bit of what a reasoning model thinks before it answers a chat. tool_calls: those that
    are whole with this piece. logprobs: one for each of token_ids, where they were asked for.
    text_tokens: then, too, the tokens of which `text` is the first to show something; text may be
    held back for a while, and those of thoughts, calls and marks are none.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: Sequence[TokenLogprob] = ()
    text_tokens: tuple[TextToken, ...] = ()


@dataclass(frozen=True)
class Output:
    """An answer and what it took; the dictionaries are what `--json` prints. token_ids ends with
    EOS if it was chosen. stop_string: the one that ended it; it is not in `text`.

    finish_reason: stop (EOS or a stop string), tool_calls (the same, where there are some), length
    (max_new_tokens or the context's end) or cancelled. tool_calls: in the order in which they were
    made; not in `text`. thought: what a reasoning model thought before it answered a chat; neither.
    logprobs: one for each of token_ids, those of thoughts, calls and ends included, where they were
    asked for; see logprobs.py for which distribution they are of.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: dict[str, Any]
    timings: dict[str, Any]
    memory: dict[str, Any]
    kv: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    thought: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: Sequence[TokenLogprob] | None = None
    stop_string: str | None = None


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its getrusage counts what the parent had before the exec, too
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory: Any = psutil.Process().memory_info()  # whose fields differ by system
        return memory.peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
