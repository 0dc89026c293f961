"""ODT: paragraphs, headings, lists and tables in order. Runs in the worker. What pages have at
their head comes first. Items and headings have the numbers that LibreOffice counts.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from functools import partial

from .extract import Extract, Report, refused_if_damaged
from .item_numbers import BULLET
from .odt_numbers import List, Numbers
from .opendocument import STYLES, body_of, content_of, is_left_out, number, opened, rows, text_of
from .opendocument_fonts import Fonts
from .page_ranges import PageRanges
from .xml_tree import descendants, name_of

_HEADS = ("header-first", "header", "header-left")  # of the first page, of right and of left ones
_Block = tuple[str, int]  # text, heading level or 0


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """Headings as Markdown writes them; the cells of a table's row with bars between."""
    report(0, 1)
    archive = opened(data)
    with refused_if_damaged("ODT file"):
        content = ET.fromstring(content_of(archive))
        body, roots = body_of(content, "text", "ODT"), [content]
        if STYLES in archive.names:
            roots.insert(0, ET.fromstring(archive.read(STYLES)))
            Fonts(roots[:1]).show(roots[0])
        fonts = Fonts(roots)
        fonts.show(body)
        reader = _Reader(Numbers(roots, fonts))
        heads = reader.heads(roots[0]) if len(roots) > 1 else ()
        found = Extract.of_blocks([*heads, *reader.blocks(body)])
    report(1, 1)
    return found


class _Reader:
    def __init__(self, numbers: Numbers):
        self._numbers = numbers

    def heads(self, styles: ET.Element) -> Iterator[_Block]:
        """What stands at the head of pages, but for their numbers; nothing twice."""
        told: set[str] = set()
        for page in descendants(styles, "master-page"):
            for kind in _HEADS:
                for head in descendants(page, kind):
                    for text, level in self.blocks(head):
                        if text not in told and any(map(str.isalpha, text)):
                            told.add(text)
                            yield text, level

    def blocks(
        self, element: ET.Element, within: List | None = None, mark: Callable[[], str] | None = None
    ) -> Iterator[_Block]:
        """Of what is not empty. within: the list that the element is a part of; mark: what stands
        before the first paragraph of an item: it counts when that is met."""
        for child in element:
            name = name_of(child)
            if is_left_out(child):
                continue
            if name in ("p", "h"):
                yield from self._paragraph(child, mark)
                mark = None
            elif name == "list":
                yield from self.blocks(child, self._numbers.begin(child, within))
            elif name == "list-item":
                count = None if within is None else partial(self._numbers.mark, child, within)
                yield from self.blocks(child, within, count)
            elif name == "table":
                yield from ((" | ".join(row).rstrip(" |"), 0) for row in rows(child) if any(row))
            else:
                yield from self.blocks(child, within, mark)

    def _paragraph(
        self, paragraph: ET.Element, item_mark: Callable[[], str] | None
    ) -> Iterator[_Block]:
        """Its text, and that of the drawings it holds."""
        drawings: list[ET.Element] = []
        text = text_of(paragraph, drawings).strip()
        level, mark = 0, "" if item_mark is None else item_mark()  # of empty ones too
        if name_of(paragraph) == "h":
            level = number(paragraph, "outline-level")
            if item_mark is None:
                mark = self._numbers.heading(paragraph, level) if text else ""
        if text:
            yield ("" if level and mark == BULLET else mark) + text, level
        for drawing in drawings:
            yield from self.blocks(drawing)
