"""The terminal: answers to standard output, everything else to standard error.

Knows when colours and cursor movements are wanted, and that a model's text is not to be trusted
with them. Knows nothing of models.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

from ebbtide import errors

from .markdown import MarkdownStyle

# All but newline and tab: a model's text must not move the cursor, set the title or fill the
# clipboard.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])
del _CONTROLS[ord("\n")], _CONTROLS[ord("\t")]

# What it takes to show the names of all options whole.
_HELP_COLUMNS = 80


class ClosedPipe(Exception):
    """Whoever read our standard output has gone; there is nobody left to tell."""


def is_fancy(stream: TextIO | None) -> bool:
    """True where escape codes are welcome: a real terminal, and neither NO_COLOR nor TERM=dumb."""
    if stream is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


class Terminal:
    """Where a command writes.

    `quiet` drops notes (not warnings); `as_json` keeps text off standard output.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, as_json: bool = False):
        self.quiet = quiet
        self.verbose = verbose
        self.as_json = as_json
        self.has_result = False  # one object per run, also when its cleanup fails
        self._warned: set[str] = set()
        self._line_open = False
        self._markdown: MarkdownStyle | None = None

    # --- standard output

    def use_markdown(self) -> None:
        """From here on answers are styled as Markdown. For a terminal that is_fancy."""
        self._markdown = MarkdownStyle()

    def answer(self, text: str) -> None:
        """A piece of the answer, shown at once."""
        if self.as_json or not text:
            return
        self._line_open = not text.endswith("\n")
        if sys.stdout.isatty():
            text = text.translate(_CONTROLS)
            if self._markdown is not None:
                text = self._markdown.feed(text)
        write_out(text)

    def end_answer(self) -> None:
        """Ends the last line of the answer, so that the prompt starts on its own."""
        if self._line_open:
            self._line_open = False
            write_out((self._markdown.finish() if self._markdown else "") + "\n")
        elif self._markdown is not None and (rest := self._markdown.finish()):
            write_out(rest)

    def result(self, value: dict[str, Any]) -> None:
        """The one object on one line that `--json` promises."""
        if not self.has_result:
            write_json(value)
        self.has_result = True

    # --- standard error

    def note(self, text: str) -> None:
        """What a user may like to know; -q silences it."""
        if not self.quiet:
            self._say(text)

    def tell(self, text: str) -> None:
        """What the user asked to see; nothing silences it."""
        self._say(text)

    def detail(self, text: str) -> None:
        """What only -v shows."""
        if self.verbose:
            self._say(text)

    def warn(self, text: str) -> None:
        """What a user must know, once."""
        if text not in self._warned:
            self._warned.add(text)
            self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        if self._line_open and sys.stdout.isatty():
            self.end_answer()
        say(text)


def write_out(text: str) -> None:
    """Write to standard output and flush.

    Raises ClosedPipe, or StorageError when the disk behind it is full.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ClosedPipe from None
    except OSError as error:
        # Windows reports a closed pipe as an invalid argument.
        if error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL):
            raise ClosedPipe from None
        raise errors.StorageError(f"Standard output cannot be written: {error.strerror}.") from None


def write_json(value: dict[str, Any]) -> None:
    """One object on one line; numbers that JSON does not have become null."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    write_out(json.dumps(_finite(value), ensure_ascii=not is_utf8, default=str) + "\n")


def say(text: str) -> None:
    """A line on standard error.

    One that cannot be written is dropped: it must not hide the result.
    """
    try:
        print(text.translate(_CONTROLS), file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        pass


def prepare_streams() -> None:
    """A character that the terminal's encoding lacks is shown as `?`, and stops nothing.

    Where standard output was closed before the start, writing to it is writing to a closed pipe.
    Where it has no buffer (PYTHONUNBUFFERED) it gets one: Python takes a write that a full disk or
    a closed pipe cut for a whole one there.
    """
    if sys.stdout is None:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        sys.stdout = open(sys.stdout.fileno(), "w", encoding=sys.stdout.encoding, closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def leave_room_for_help(environ: MutableMapping[str, str]) -> None:
    """The library lays help out for the columns that there are, and cuts the names of options where
    these are few, or none, as programs say that do not know: a terminal breaks long lines itself.
    """
    if environ.get("COLUMNS") == "0" or shutil.get_terminal_size().columns < _HELP_COLUMNS:
        environ.setdefault("TERMINAL_WIDTH", str(_HELP_COLUMNS))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
