"""Reads what a user types: a line, a pasted text, or several lines between triple quotes.

On a terminal that can, lines are edited, remembered and completed (prompt_toolkit); elsewhere they
are read plainly. Knows nothing of what the text means.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from .terminal import is_fancy

_MANY = '"""'
_REFRESH_S = 0.25


class Quoted(str):
    """What stood between triple quotes: a text, whatever it begins with."""


class LineEditor:
    """A context manager; inside it, `read` gives texts.

    remember: keep the lines in the user's history file. completer: of prompt_toolkit, or None.
    """

    def __init__(self, remember: bool, make_completer: Callable[[], Any] = lambda: None):
        self._remember, self._make_completer = remember, make_completer
        self._session: Any = None
        self._is_editing = False
        self._wish: BaseException | None = None  # what `read` is to raise, from a signal's handler

    def __enter__(self) -> LineEditor:
        if _can_edit():
            self._session = self._open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None

    def read(self, prompt: str, status: Callable[[], str] | None = None, style: str = "") -> str:
        """One text. status: what a line below the prompt shows, asked again as time passes; style:
        of the prompt, where there are colours.

        Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C, both on an empty line.
        """
        if self._session is not None:
            text = self._edited(prompt, status, style)
            return _unquoted(text) if text.startswith(_MANY) else text
        line = _plain_line(prompt)
        if not line.startswith(_MANY):
            return line
        lines = [line]
        while not _is_closed("\n".join(lines)):
            lines.append(_plain_line("... "))
        return _unquoted("\n".join(lines))

    def interrupt(self, wish: BaseException) -> bool:
        """Make `read` raise `wish`, from a signal's handler. False where nothing is being edited:
        then raising it there does.
        """
        if not self._is_editing:
            return False
        self._wish = wish
        app = self._session.app
        if app.is_running and app.loop is not None:
            app.loop.call_soon_threadsafe(self._leave)
        return True

    def _edited(self, prompt: str, status: Callable[[], str] | None, style: str) -> str:
        """A wish may come before the editor runs, and when it has its line already: an event loop
        is under way then too, and would swallow what a handler raises."""
        self._is_editing = True
        try:
            return self._session.prompt(
                [(style, prompt)],
                bottom_toolbar=status,
                refresh_interval=_REFRESH_S if status is not None else 0,
                pre_run=self._leave,
            )
        finally:
            self._is_editing = False
            wish, self._wish = self._wish, None
            if wish is not None:
                raise wish

    def _leave(self) -> None:
        """Ends the editing where that is wished and has not happened."""
        future = self._session.app.future
        if self._wish is not None and future is not None and not future.done():
            self._session.app.exit(exception=self._wish)

    def _open(self) -> Any:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output import ColorDepth, create_output
        from prompt_toolkit.styles import Style

        from .line_history import open_history

        keys = KeyBindings()
        # Alt-Enter adds a line, where Enter sends.
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        keys.add("c-c")(_interrupt_or_clear)
        session: Any = None

        @Condition
        def is_within_quotes() -> bool:
            text = session.default_buffer.text
            return text.startswith(_MANY) and not _is_closed(text)

        shown = sys.stdout if sys.stdout.isatty() else sys.stderr
        session = PromptSession(
            history=open_history(self._remember),
            completer=self._make_completer(),
            complete_while_typing=False,
            complete_in_thread=True,
            multiline=is_within_quotes,
            prompt_continuation="... ",
            key_bindings=keys,
            style=Style.from_dict({"bottom-toolbar": "noreverse"}),
            color_depth=None if is_fancy(shown) else ColorDepth.DEPTH_1_BIT,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            output=create_output(stdout=shown),
        )
        return session


def _interrupt_or_clear(event: Any) -> None:
    """Ctrl-C takes back what was typed; on an empty line it is the user's wish to stop."""
    if event.current_buffer.text:
        event.current_buffer.reset()
    else:
        event.app.exit(exception=KeyboardInterrupt, style="class:aborting")


def _can_edit() -> bool:
    if os.environ.get("TERM") == "dumb" or sys.stdin is None or not sys.stdin.isatty():
        return False
    # With neither to draw on, there is nothing to edit.
    return any(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


def _plain_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    # Redirected: the file is for answers alone.
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def _is_closed(text: str) -> bool:
    rest = text[len(_MANY) :].rstrip()
    return rest.endswith(_MANY)


def _unquoted(text: str) -> Quoted:
    """The text between triple quotes; an end that is missing is forgiven."""
    rest = text[len(_MANY) :].rstrip()
    return Quoted(rest.removesuffix(_MANY).strip("\n"))
