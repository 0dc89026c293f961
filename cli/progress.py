"""Shows how far a long phase is: a bar on a real terminal, else a line now and then.

Is called with Progress objects (phase, done_tokens, total_tokens, elapsed_s, tokens_per_s, eta_s;
the counts are bytes for the phase "load", pages or chapters for "extract", and of "write", whose
end nobody knows, total_tokens is the most). Does not know who calls, and keeps no time of its own
but the one between two lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from ebbtide import format_size

from .terminal import Terminal, is_fancy
from .values import show_duration

_LINE_EVERY_S = 5.0
# A bar that flashes up and is gone tells nobody anything.
_BAR_AFTER_S = 0.4
_TITLES = {
    "load": "loading",
    "restore": "taking from disk",
    "prefill": "reading",
    "extract": "extracting",
    "write": "writing",
}


def amounts(progress: Any) -> tuple[str, str]:
    """What is done and how fast, in the phase's unit: ('1,024 of 8,192 tokens', '310 tokens/s')."""
    if progress.phase == "load":
        done = f"{format_size(progress.done_tokens)} of {format_size(progress.total_tokens)}"
        return done, f"{format_size(progress.tokens_per_s or 0)}/s"
    if progress.phase == "extract":
        done = f"{progress.done_tokens:,} of {progress.total_tokens:,}"
        return done, f"{progress.tokens_per_s or 0:,.0f}/s"
    if progress.phase == "write":
        return f"{progress.done_tokens:,} tokens", f"{progress.tokens_per_s or 0:,.1f} tokens/s"
    done = f"{progress.done_tokens:,} of {progress.total_tokens:,} tokens"
    return done, f"{progress.tokens_per_s or 0:,.0f} tokens/s"


def sentence(progress: Any) -> str:
    """The same, as a line for a log."""
    done, speed = amounts(progress)
    line = f"{_TITLES.get(progress.phase, progress.phase)}: {done}, {speed}"
    if progress.eta_s is not None and progress.done_tokens < progress.total_tokens:
        line += f", about {show_duration(progress.eta_s)} left"
    return line


class ProgressDisplay:
    """A context manager, and the callable to be set as `on_progress`.

    `check` is called first each time: it may raise, which is how a wish to stop reaches a long
    prefill. `title` names what is worked on, where there are several.
    """

    def __init__(
        self, terminal: Terminal, check: Callable[[], None] = lambda: None, title: str = ""
    ):
        self._terminal = terminal
        self._check = check
        self._title = f"{title}: " if title else ""
        self._bar: Any = None
        self._task: Any = None
        self._phase: str | None = None
        self._last_line_s = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()

    def __call__(self, progress: Any) -> None:
        self._check()
        if self._terminal.quiet:
            return
        if is_fancy(sys.stderr):
            self._show_bar(progress)
        elif time.monotonic() - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self._terminal.note(self._title + sentence(progress))

    def clear(self) -> None:
        """Takes the bar away. The answer follows on a clean line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._phase = None

    def _show_bar(self, progress: Any) -> None:
        if progress.phase != self._phase:
            self.clear()
        if self._bar is None and progress.elapsed_s >= _BAR_AFTER_S:
            self._start_bar(progress)
        if self._bar is None:
            return
        done, speed = amounts(progress)
        eta = "" if progress.eta_s is None else f"{show_duration(progress.eta_s)} left"
        self._bar.update(
            self._task,
            completed=progress.done_tokens,
            total=progress.total_tokens,
            done=done,
            speed=speed,
            eta=eta,
            refresh=True,
        )

    def _start_bar(self, progress: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        # No refresh thread: it would draw into an answer that has begun.
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[done]}, {task.fields[speed]}  {task.fields[eta]}"),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
        )
        self._phase = phase = progress.phase
        title = f"{self._title}{_TITLES.get(phase, phase)}"
        self._task = self._bar.add_task(title, done="", speed="", eta="")
        self._bar.start()
