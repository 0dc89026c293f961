"""ODT: paragraphs, headings, lists and tables in order, by the standard library alone. Runs in the
worker.

What was deleted and is still remembered, comments, and tables of contents are left out; footnotes
stand in brackets where their mark is.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from ..errors import InputError
from .archive import Archive
from .extract import Extract, Report, refused_if_damaged
from .page_ranges import PageRanges

_CONTENT, _MANIFEST = "content.xml", "META-INF/manifest.xml"
_LEFT_OUT = ("tracked-changes", "annotation", "table-of-content", "note-citation")
_OF_PICTURES = "svg-compatible:1.0}"  # their titles and descriptions
_WHITE_SPACE = re.compile(r"[ \t\r\n]+")
_MOST_BLANKS = 100  # that one mark may stand for


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """Headings as Markdown writes them; the cells of a table's row with bars between."""
    report(0, 1)
    archive = Archive(data)
    archive.check_for_library()
    if _MANIFEST in archive.names and b"encryption-data" in archive.read(_MANIFEST):
        raise InputError("is encrypted with a password; save a copy without one")
    with refused_if_damaged("ODT file"):
        root = ET.fromstring(archive.read(_CONTENT))
    body = next((e for e in root.iter() if _name(e) == "text"), None)
    if body is None:
        raise InputError("is a damaged ODT file: it has no text body")
    found = Extract.of_blocks(_blocks(body))
    report(1, 1)
    return found


def _blocks(element: ET.Element, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(text, heading level or 0) of what is not empty. prefix: of a list's first paragraph."""
    for child in element:
        name = _name(child)
        if _is_left_out(child):
            continue
        if name in ("p", "h"):
            if text := _text(child).strip():
                yield prefix + text, _number(child, "outline-level") if name == "h" else 0
                prefix = ""
        elif name == "list-item":
            yield from _blocks(child, "- ")
        elif name == "table":
            yield from ((row, 0) for row in _rows(child))
        else:
            yield from _blocks(child, prefix)


def _rows(table: ET.Element) -> Iterator[str]:
    """Of the table itself: one in a cell is a part of the cell's text."""
    for child in table:
        if _name(child) == "table-row":
            cells = [" ".join(_text(cell).split()) for cell in child if _name(cell) == "table-cell"]
            if any(cells):
                yield " | ".join(cells).rstrip(" |")
        elif not _is_left_out(child):
            yield from _rows(child)  # header rows, groups of rows


def _text(element: ET.Element) -> str:
    """All of it, paragraphs in it on lines of their own."""
    parts = [_flat(element.text)]
    for child in element:
        name = _name(child)
        if name == "s":
            parts.append(" " * min(_number(child, "c"), _MOST_BLANKS))
        elif name in ("tab", "line-break"):
            parts.append("\t" if name == "tab" else "\n")
        elif name == "note":
            parts.append(f" [{' '.join(_text(child).split())}]")
        elif not _is_left_out(child):
            inner = _text(child)
            parts.append(f"\n{inner}\n" if name in ("p", "h") else inner)
        parts.append(_flat(child.tail))
    return "".join(parts)


def _flat(text: str | None) -> str:
    """White space as the format has it: whatever there is of it is one blank."""
    return _WHITE_SPACE.sub(" ", text or "")


def _is_left_out(element: ET.Element) -> bool:
    return _name(element) in _LEFT_OUT or _OF_PICTURES in element.tag


def _number(element: ET.Element, name: str) -> int:
    """An attribute by its name without the namespace; 1 where it is no number."""
    found = (value for key, value in element.items() if key.rpartition("}")[2] == name)
    value = next(found, "")
    return int(value) if re.fullmatch("[0-9]{1,9}", value) else 1


def _name(element: ET.Element) -> str:
    """Without its namespace."""
    return str(element.tag).rpartition("}")[2]
