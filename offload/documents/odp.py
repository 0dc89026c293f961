"""ODP: the slides of a presentation with their titles, texts, tables, charts and notes, by the
standard library alone. Runs in the worker.

Slides count from 1 in the order in which they are shown, hidden ones among them. What pictures say
is not read.
"""

from __future__ import annotations

import posixpath
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from .archive import Archive
from .extract import Extract, Report, refused_if_damaged
from .opendocument import STYLES, body_of, content_of, flat, is_left_out, opened, rows, text_of
from .opendocument_fonts import Fonts
from .page_ranges import PageRanges
from .slides import slides_text, table_text
from .xml_tree import attribute, descendants, name_of

# The same on every slide, or no text at all.
_FURNITURE = ("header", "footer", "date-time", "page-number", "page")


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """See slides_text. A table's cells have bars between, notes stand behind "Notes:"."""
    archive = opened(data)
    with refused_if_damaged("ODP file"):
        root = ET.fromstring(content_of(archive))
        body = body_of(root, "presentation", "ODP")
        roots = [root]
        if STYLES in archive.names:
            roots.insert(0, ET.fromstring(archive.read(STYLES)))
        fonts = Fonts(roots)
        fonts.show(body)
        slides = [child for child in body if name_of(child) == "page"]
        reader = _Reader(archive, fonts)
        return slides_text(
            len(slides), ranges, report, lambda number: reader.told(slides[number - 1])
        )


class _Reader:
    def __init__(self, archive: Archive, fonts: Fonts):
        self._archive, self._fonts = archive, fonts

    def told(self, slide: ET.Element) -> tuple[str, list[str]]:
        """Its title, wherever it stands, and what else it says."""
        titles = (shape for shape in slide if attribute(shape, "class") == "title")
        named = next(titles, None)
        title = "" if named is None else flat(named)
        blocks = [text for shape in slide if shape is not named for text in self._texts(shape)]
        for notes in slide:
            if name_of(notes) == "notes":
                texts = [text for shape in notes for text in self._texts(shape) if text]
                if texts:
                    blocks.append("Notes: " + "\n".join(texts))
        return title, [*filter(None, blocks)]

    def _texts(self, shape: ET.Element) -> Iterator[str]:
        """What a shape says, which may be nothing; of a group, what is in it."""
        name = name_of(shape)
        if name == "notes" or is_left_out(shape) or attribute(shape, "class") in _FURNITURE:
            return
        if name in ("g", "a"):
            for inner in shape:
                yield from self._texts(inner)
        elif tables := [child for child in shape if name_of(child) == "table"]:
            for table in tables:
                yield table_text([*rows(table)])
        elif charts := [child for child in shape if name_of(child) == "object"]:
            for chart in charts:
                yield table_text(_numbers(self._archive, attribute(chart, "href")))
        else:
            yield "\n".join(self._lines(shape, 0, ""))

    def _lines(self, element: ET.Element, level: int, style: str) -> Iterator[str]:
        """Paragraphs, those of deeper lists further in. style: of the list that they are in."""
        bullet = self._fonts.bullet(style, level) if name_of(element) == "list-item" else ""
        for child in element:
            if is_left_out(child):
                continue
            if name_of(child) in ("p", "h"):
                for line in text_of(child).split("\n"):
                    if line.strip():
                        mark, bullet = f"{bullet} " if bullet else "", ""
                        yield "  " * max(0, level - 1) + mark + line.strip()
            elif name_of(child) == "list":
                yield from self._lines(child, level + 1, attribute(child, "style-name") or style)
            else:
                yield from self._lines(child, level, style)


def _numbers(archive: Archive, folder: str) -> list[list[str]]:
    """What a chart shows; nothing of other objects, such as formulas."""
    part = posixpath.normpath(posixpath.join(folder, "content.xml"))
    if part not in archive.names:
        return []
    charts = [*descendants(ET.fromstring(archive.read(part)), "chart")]
    if not charts:
        return []
    chart = charts[-1]  # in one that is the body
    titles = [flat(child) for child in chart if name_of(child) == "title"]
    tables = [row for table in descendants(chart, "table") for row in rows(table)]
    return [["Chart: " + " ".join(titles)], *tables]
