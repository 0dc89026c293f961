"""What `--pages` says: 10-40, 7, 90-, or several of these with commas between."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class PageRanges:
    """Pages from 1; each range is (first, last), last None for the end of the document."""

    ranges: tuple[tuple[int, int | None], ...]

    @classmethod
    def parse(cls, text: str) -> PageRanges:
        """Raises ValueError with a sentence that says what is allowed."""
        ranges: list[tuple[int, int | None]] = []
        for part in text.split(","):
            found = re.fullmatch(r"\s*([0-9]{1,7})\s*(?:([-–])\s*([0-9]{1,7})?\s*)?", part)
            if found is None:
                raise ValueError(f"{text!r} is not a choice of pages; write 10-40, 7, 90- or 1-3,8")
            first, dash, last = found.groups()
            end = int(last) if last else None if dash else int(first)
            if int(first) < 1 or (end is not None and end < int(first)):
                raise ValueError(f"{part.strip()!r} holds no page: pages count from 1, upwards")
            ranges.append((int(first), end))
        return cls(tuple(ranges))

    def __str__(self) -> str:
        def one(first: int, last: int | None) -> str:
            if last is None:
                return f"{first}-"
            return str(first) if first == last else f"{first}-{last}"

        return ",".join(one(*pair) for pair in self.ranges)

    def chosen(self, num_pages: int, what: str = "pages") -> list[int]:
        """The pages of a document of so many that are meant, in order, each once; [] for none.
        what: they are, for messages.

        Raises ValueError when a range begins behind the document's end.
        """
        found: set[int] = set()
        for first, last in self.ranges:
            if first > num_pages:
                raise ValueError(f"has {num_pages:,} {what}, and --pages {self} begins behind them")
            found.update(range(first, min(last or num_pages, num_pages) + 1))
        return sorted(found)


def show_pages(numbers: list[int]) -> str:
    """[3, 7, 8, 9] -> "3, 7-9"; a long list is cut."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:12]]
    return ", ".join(shown) + (", ..." if len(runs) > 12 else "")
