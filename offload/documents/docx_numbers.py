"""Numbers of lists and headings in DOCX files, whose text has none: counted as Word does."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator

from .item_numbers import BULLET, written
from .symbol_fonts import tick
from .xml_tree import attribute, name_of

_LEVELS = 9


class Numbers:
    """elements: those of the part `numbering`. Lists of one make (abstractNum) count on in each
    other, unless one says where it starts."""

    def __init__(self, elements: Iterable[ET.Element]):
        self._makes: dict[str, dict[int, ET.Element]] = {}  # id -> level -> how it is written
        self._lists: dict[str, tuple[str, dict[int, int]]] = {}  # id -> make, starts of its own
        self._counts: dict[str, list[int | None]] = {}  # by make
        for element in elements:
            if name_of(element) == "abstractNum":
                levels = {_whole(attribute(e, "ilvl"), 0): e for e in _of(element, "lvl")}
                self._makes[attribute(element, "abstractNumId")] = levels
            elif name_of(element) == "num":
                starts = {
                    _whole(attribute(e, "ilvl"), 0): _whole(_value(e, "startOverride"), 1)
                    for e in _of(element, "lvlOverride")
                    if _value(e, "startOverride")
                }
                make = _value(element, "abstractNumId")
                self._lists[attribute(element, "numId")] = (make, starts)

    def mark(self, list_id: str, level: int) -> str:
        """What stands before the next item of a list, with a blank; BULLET where nothing counts."""
        make, starts = self._lists.get(list_id, ("", {}))
        levels = self._makes.get(make, {})
        if level not in levels or not 0 <= level < _LEVELS:
            return BULLET
        counts = self._counts.setdefault(make, [None] * _LEVELS)
        if level in starts:
            counts[level] = starts.pop(level)
        else:
            before = counts[level]
            counts[level] = _start(levels[level]) if before is None else before + 1
        counts[level + 1 :] = [None] * (_LEVELS - level - 1)
        if _value(levels[level], "numFmt") in ("bullet", "none", ""):
            bullet = tick(font_of(levels[level]), _value(levels[level], "lvlText"))
            return f"{BULLET}{bullet} " if bullet else BULLET

        def number(found: re.Match[str]) -> str:
            at = int(found[1]) - 1
            above = levels.get(at)
            if above is None:
                return ""
            count = counts[at]
            return written(_start(above) if count is None else count, _value(above, "numFmt"))

        shown = re.sub(r"%([1-9])", number, _value(levels[level], "lvlText")).strip()
        return f"{shown} " if shown else BULLET


def font_of(run: ET.Element) -> str:
    """That a run names, or a level of lists for its bullets; "" where it names none."""
    for properties in _of(run, "rPr"):
        for fonts in _of(properties, "rFonts"):
            return attribute(fonts, "ascii") or attribute(fonts, "hAnsi")
    return ""


def _start(level: ET.Element) -> int:
    return _whole(_value(level, "start"), 1)


def _whole(text: str, default: int) -> int:
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else default


def _of(element: ET.Element, name: str) -> Iterator[ET.Element]:
    return (child for child in element if name_of(child) == name)


def _value(element: ET.Element, name: str) -> str:
    return next((attribute(child, "val") for child in _of(element, name)), "")
