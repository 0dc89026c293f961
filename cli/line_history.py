"""The lines a user typed, for the arrow keys: a file for its owner alone, that stays small."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prompt_toolkit.history import FileHistory, InMemoryHistory

_MOST_LINES = 1000
# A pasted document is no line to come back to.
_MOST_CHARS = 4000


def history_path() -> Path:
    """The file; its folder is made. Raises InputError where it cannot be."""
    import ebbtide

    return ebbtide.state_dir() / "history"


def open_history(remember: bool) -> Any:
    """A history for prompt_toolkit; one that is forgotten where a file is not wanted or not
    possible.
    """
    if not remember:
        return InMemoryHistory()
    from ebbtide import errors

    try:
        path = history_path()
        # Whatever the umask, and whoever made it.
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        os.chmod(path, 0o600)
        history = _ShortHistory(str(path))
        history.trim()
    except (OSError, errors.EbbtideError):
        return InMemoryHistory()  # a history that cannot be kept is no reason to fail
    return history


class _ShortHistory(FileHistory):
    """Of the newest lines, and of lines alone."""

    def store_string(self, string: str) -> None:
        if len(string) > _MOST_CHARS:
            return
        try:
            super().store_string(string)
        except OSError:
            pass

    def trim(self) -> None:
        """Leaves the newest lines when there are twice as many as are kept."""
        lines = list(self.load_history_strings())  # newest first
        if len(lines) <= 2 * _MOST_LINES:
            return
        path = Path(os.fsdecode(self.filename))
        path.write_text("")
        for line in reversed(lines[:_MOST_LINES]):
            self.store_string(line)
