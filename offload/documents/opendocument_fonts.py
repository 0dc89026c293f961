"""Fonts of signs in ODT, ODS and ODP files: what they show, in place of letters.

A font is named by the style of a word, a paragraph, a cell or a frame, by a style that one comes
from, or by the style of what is around it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator

from .symbol_fonts import is_symbol_font, shown, tick
from .xml_tree import attribute, descendants, name_of

_FAMILIES = {  # of an element's style; frames and other shapes have one of the two of _OF_SHAPES
    **{"p": "paragraph", "h": "paragraph", "span": "text", "a": "text"},
    **{"table-cell": "table-cell", "covered-table-cell": "table-cell"},
}
_OF_SHAPES = "presentation", "graphic"
_MOST_STYLES = 10  # that one comes from: those of a damaged file may come from each other
_Key = tuple[str, str]  # family and name


class Fonts:
    """roots: those of the parts that have styles, of which the last is the one that is shown."""

    def __init__(self, roots: Iterable[ET.Element]):
        parts = [part for root in roots for part in root if name_of(part) != "body"]
        faces = _all(parts, "font-face")
        self._faces = {attribute(e, "name"): _first(attribute(e, "font-family")) for e in faces}
        self._styles: dict[_Key, tuple[str, _Key]] = {}  # -> font or "", what it comes from
        for style in _all(parts, "style"):
            family = attribute(style, "family")
            above = family, attribute(style, "parent-style-name")
            self._styles[family, attribute(style, "name")] = self._named(style), above
        self._has_signs = any(is_symbol_font(font) for font, _ in self._styles.values())
        # List style and level -> the box or tick before its items; see `bullet`.
        self._bullets = {
            (attribute(style, "name"), attribute(level, "level")): found
            for style in _all(parts, "list-style")
            for level in style
            if (found := tick(self._named(level), attribute(level, "bullet-char")))
        }

    def bullet(self, list_style: str, level: int) -> str:
        """The box or tick before the items of a list, from level 1 on; "" where there is none."""
        return self._bullets.get((list_style, str(level)), "")

    def show(self, element: ET.Element) -> None:
        """Put signs in place of letters, in all that an element holds."""
        if self._has_signs:
            self._show(element, "")

    def _show(self, element: ET.Element, font: str) -> None:
        font = self._font_of(element) or font
        if element.text:
            element.text = shown(font, element.text)
        for child in element:
            self._show(child, font)
            if child.tail:
                child.tail = shown(font, child.tail)

    def _font_of(self, element: ET.Element) -> str:
        if not (name := attribute(element, "style-name")):
            return ""
        family = _FAMILIES.get(name_of(element))
        for one in _OF_SHAPES if family is None else (family,):
            key = one, name
            for _ in range(_MOST_STYLES):
                font, key = self._styles.get(key, ("", ("", "")))
                if font:
                    return font
        return ""

    def _named(self, style: ET.Element) -> str:
        for properties in style:
            if name_of(properties) == "text-properties":
                name = attribute(properties, "font-name")
                return _first(attribute(properties, "font-family")) or self._faces.get(name, name)
        return ""


def _all(parts: list[ET.Element], name: str) -> Iterator[ET.Element]:
    return (element for part in parts for element in descendants(part, name))


def _first(families: str) -> str:
    """Of fonts with commas between them, with or without quotes."""
    return families.partition(",")[0].strip(" '\"")
