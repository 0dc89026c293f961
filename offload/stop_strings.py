"""Ends a stream of text before the first stop string, without showing any of it."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Passes text through until a stop string is complete; holds back what may become one.

    However the text is cut into pieces, the result is the same: the match that is complete first
    counts, and among those the one that starts first. `matched` is that string, else None.
    """

    def __init__(self, stop_strings: Iterable[str]):
        self._stops = tuple(stop_strings)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now. After a match: "", whatever comes."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.matched = self._held[start:end]
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._num_to_hold()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back, when the text ends without a match."""
        shown, self._held = self._held, ""
        return shown

    def _num_to_hold(self) -> int:
        """Length of the longest end of the text that some stop string starts with."""
        longest = max(map(len, self._stops)) - 1
        for num_chars in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-num_chars:]
            if any(stop.startswith(end) for stop in self._stops):
                return num_chars
        return 0
