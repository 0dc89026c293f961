"""Numbers of lists and headings in ODT files, whose text has none: counted as LibreOffice does."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .item_numbers import BULLET, written
from .opendocument_fonts import Fonts
from .xml_tree import attribute, descendants, name_of

_LEVELS = 10
_KINDS = {"a": "lowerLetter", "A": "upperLetter", "i": "lowerRoman", "I": "upperRoman"}
_Levels = dict[int, ET.Element]  # level -> how it is written
_Counts = list[int | None]


@dataclass(frozen=True)
class List:
    """A list that is being read. level: from 1 on; counts: of the outermost list and those in it,
    level by level."""

    style: str
    level: int
    counts: _Counts


class Numbers:
    """roots: those of the parts that have styles."""

    def __init__(self, roots: Iterable[ET.Element], fonts: Fonts):
        self._fonts = fonts
        self._styles: dict[str, _Levels] = {}
        self._outline: _Levels = {}
        self._headings: _Counts = [None] * (_LEVELS + 1)
        self._last: dict[str, _Counts] = {}  # of the newest list of each style
        self._named: dict[str, _Counts] = {}  # of lists by their ids
        for root in roots:
            for style in descendants(root, "list-style"):
                self._styles[attribute(style, "name")] = _filled(_levels(style))
            for style in descendants(root, "outline-style"):
                self._outline = _levels(style)

    def begin(self, element: ET.Element, outer: List | None) -> List:
        """A list, in an item of another or not."""
        style = attribute(element, "style-name")
        if outer is not None:
            return replace(outer, style=style or outer.style, level=outer.level + 1)
        counts = self._counts_of(element, style)
        self._last[style] = self._named[attribute(element, "id")] = counts
        return List(style, 1, counts)

    def _counts_of(self, element: ET.Element, style: str) -> _Counts:
        new: _Counts = [None] * (_LEVELS + 1)
        if before := attribute(element, "continue-list"):
            return self._named.get(before, new)
        goes_on = attribute(element, "continue-numbering") == "true"
        return self._last.get(style, new) if goes_on else new

    def mark(self, item: ET.Element, of: List) -> str:
        """What stands before an item, with a blank; BULLET where nothing counts."""
        if bullet := self._fonts.bullet(of.style, of.level):
            return f"{BULLET}{bullet} "
        levels = self._styles.get(of.style, {})
        return _mark(levels, of.level, of.counts, attribute(item, "start-value")) or BULLET

    def heading(self, element: ET.Element, level: int) -> str:
        """What stands before a heading that is no item, with a blank; "" for nothing."""
        if attribute(element, "is-list-header") == "true":
            return ""
        begins = attribute(element, "restart-numbering") == "true"
        start = attribute(element, "start-value") or "1" if begins else ""
        return _mark(self._outline, level, self._headings, start)


def _mark(levels: _Levels, level: int, counts: _Counts, start: str) -> str:
    """start: what an item says that it counts as, or ""."""
    how = levels.get(level)
    if how is None or not 0 < level <= _LEVELS or name_of(how).endswith("bullet"):
        return ""
    before = counts[level]
    counts[level] = _whole(start, _start(how) if before is None else before + 1)
    counts[level + 1 :] = [None] * (_LEVELS - level)

    def number(at: int) -> str:
        above, count = levels.get(at), counts[at] if 0 < at <= _LEVELS else None
        if above is None or not (kind := attribute(above, "num-format")):
            return ""
        return written(_start(above) if count is None else count, _KINDS.get(kind, "decimal"))

    if not number(level):
        return ""
    if form := attribute(how, "num-list-format"):
        shown = re.sub(r"%([0-9]{1,2})%", lambda found: number(int(found[1])), form)
    else:
        first = max(1, level + 1 - _whole(attribute(how, "display-levels"), 1))
        shown = ".".join(filter(None, map(number, range(first, level + 1))))
        shown = attribute(how, "num-prefix") + shown + attribute(how, "num-suffix")
    return f"{shown.strip()} "


def _levels(style: ET.Element) -> _Levels:
    return {_whole(attribute(how, "level"), 0): how for how in style}


def _filled(levels: _Levels) -> _Levels:
    """A level of lists that is not defined is written as the next one above it."""
    found: _Levels = {}
    for at in range(1, _LEVELS + 1):
        if (how := levels.get(at, found.get(at - 1))) is not None:
            found[at] = how
    return found


def _start(how: ET.Element) -> int:
    return _whole(attribute(how, "start-value"), 1)


def _whole(text: str, default: int) -> int:
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else default
