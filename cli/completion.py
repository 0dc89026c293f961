"""Tab in a chat: the names of commands, then what a command's argument can be.

Knows the table of commands by name and kind of argument, and not what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document


class ChatCompleter(Completer):
    """kinds: command -> "path", "name", "option" or "" for what it takes; names, options: what
    these can be now.
    """

    def __init__(
        self,
        kinds: Mapping[str, str],
        names: Callable[[], Iterable[str]],
        options: Iterable[str],
    ):
        self._kinds, self._names, self._options = kinds, names, list(options)
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: Any) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        word, blank, rest = text[1:].partition(" ")
        if not blank:
            yield from _that_begin(word, self._kinds)
            return
        kind = self._kinds.get(word, "")
        if kind == "path":
            inner = Document(rest, len(rest))
            yield from self._paths.get_completions(inner, complete_event)
        elif kind == "name":
            yield from _that_begin(rest, self._names())
        elif kind == "option":
            yield from _that_begin(rest, (f"{option}=" for option in self._options))


def _that_begin(start: str, words: Iterable[str]) -> Iterable[Completion]:
    for word in sorted(words):
        if word.startswith(start):
            yield Completion(word, start_position=-len(start))
