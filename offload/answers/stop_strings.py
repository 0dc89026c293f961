"""Ends a stream of text before the first stop string, without showing any of it."""

from __future__ import annotations

from collections.abc import Iterable

from .text_trace import Stage


class StopStrings(Stage):
    """Passes text through until a stop string is complete; holds back what may become one.

    However the text is cut into pieces, the result is the same: the match that is complete first
    counts, and among those the one that starts first. `matched` is that string, else None.
    """

    def __init__(self, stop_strings: Iterable[str]):
        super().__init__()
        self._stops = tuple(stop_strings)
        self._held = ""
        self.matched: str | None = None

    @property
    def num_held(self) -> int:
        """Characters that were held back, or cut off."""
        return len(self._held)

    def push(self, text: str) -> str:
        """What may be shown now. After a match: "", whatever comes."""
        if self.matched is not None:
            return ""
        self._take_in(text)
        if not self._stops:
            return self._pass_on(text)
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, cut = min(found)
            self.matched = self._held[cut:end]
        else:
            cut = len(self._held) - self._num_to_hold()
        shown, self._held = self._held[:cut], self._held[cut:]
        return self._pass_on(shown)

    def finish(self) -> str:
        """What was held back, when the text ends without a match."""
        shown, self._held = self._held, ""
        return self._pass_on(shown if self.matched is None else "")

    def put_between(self, text: str) -> str:
        """Text that nobody has said, behind what was held back: no stop string begins in it, ends
        in it or spans it."""
        return self.finish() + self._pass_unwritten(text)

    def _num_to_hold(self) -> int:
        """Length of the longest end of the text that some stop string starts with."""
        longest = max(map(len, self._stops)) - 1
        for num_chars in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-num_chars:]
            if any(stop.startswith(end) for stop in self._stops):
                return num_chars
        return 0
