"""What happened in a run, noted as it happened, for the report: how far reading was when, when
tokens came, where pages lay.

Keeps few numbers however long the run: when there are many, every second one goes. Knows no page
and no picture.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

_MOST_SAMPLES = 2000
_SAMPLE_EVERY_S = 0.02


@dataclass(frozen=True)
class Sample:
    """A moment: at_s since the start; done: bytes (load) or tokens (prefill, decode) of this phase
    so far, in this answer; tier_bytes: in use by pages, by tier; rss_bytes: of the process.
    """

    at_s: float
    phase: str
    answer: int
    done: int
    tier_bytes: dict[str, int]
    rss_bytes: int


@dataclass
class Recorder:
    """`begin` each answer, then progress and pieces as they come, then `end` with its Output."""

    samples: list[Sample] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.perf_counter)
    _every_s: float = _SAMPLE_EVERY_S
    _num_tokens: int = 0

    def begin(self, title: str = "answer") -> None:
        self.titles.append(title)
        self._num_tokens = 0

    def progress(self, progress: Any, stream: Any) -> None:
        """A report of loading or reading. stream: has `tiers()`, or None before there is one."""
        is_last = progress.done_tokens >= progress.total_tokens
        self._note(progress.phase, progress.done_tokens, stream, is_last)

    def piece(self, piece: Any, stream: Any) -> None:
        is_first = self._num_tokens == 0
        self._num_tokens += len(piece.token_ids)
        # The pages of a stream are freed with its last piece.
        is_last = piece.finish_reason is not None
        self._note("decode", self._num_tokens, None if is_last else stream, is_first or is_last)

    def end(self, output: Any) -> None:
        self.outputs.append(output)

    def _note(self, phase: str, done: int, stream: Any, always: bool) -> None:
        at_s = time.perf_counter() - self.started_s
        before = self.samples[-1] if self.samples else None
        if not always and before and before.phase == phase and at_s - before.at_s < self._every_s:
            return
        tiers = stream.tiers() if stream is not None else None
        used = (
            {name: tier["used_bytes"] for name, tier in tiers.items()}
            if tiers is not None
            else dict(before.tier_bytes)
            if before
            else {}
        )
        answer = max(0, len(self.titles) - 1)
        self.samples.append(Sample(at_s, phase, answer, done, used, _resident_bytes()))
        if len(self.samples) > _MOST_SAMPLES:
            self._every_s *= 2
            self.samples = self.samples[::2]


def _resident_bytes() -> int:
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss
