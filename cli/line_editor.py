"""Reads what a user types: a line, or several between triple quotes; with readline if present.

Knows nothing of what the text means.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .terminal import is_fancy

_MANY = '"""'
_HISTORY_LINES = 1000


class LineEditor:
    """A context manager; inside it, `read` gives texts. The history file is for its owner alone."""

    def __init__(self, remember: bool):
        self._readline = None
        self._history: Path | None = None
        if remember:
            import platformdirs

            folder = platformdirs.user_state_dir("ebbtide")
            self._history = Path(folder) / "history"

    def __enter__(self) -> LineEditor:
        try:
            import readline
        except ImportError:  # Windows, and some builds
            return self
        self._readline = readline
        # A pasted text of several lines arrives as one input and not as many questions; the
        # terminal is told so by escape codes.
        switch = "on" if is_fancy(sys.stdout) else "off"
        readline.parse_and_bind(f"set enable-bracketed-paste {switch}")
        if self._history is not None:
            try:
                readline.read_history_file(self._history)
            except OSError:
                pass
        return self

    def __exit__(self, *exc: object) -> None:
        if self._readline is None or self._history is None:
            return
        try:
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))
            self._readline.set_history_length(_HISTORY_LINES)
            self._readline.write_history_file(self._history)
        except OSError:
            pass  # a history that cannot be kept is no reason to fail

    def read(self, prompt: str) -> str:
        """One text. Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C."""
        line = self._line(prompt)
        if not line.startswith(_MANY):
            return line
        lines = [line[len(_MANY) :]]
        while not lines[-1].rstrip().endswith(_MANY):
            lines.append(self._line("... "))
        lines[-1] = lines[-1].rstrip()[: -len(_MANY)]
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        # Redirected: the file is for answers alone.
        sys.stderr.write(prompt)
        sys.stderr.flush()
        return input()
