"""What ODT, ODS and ODP have in common, by the standard library alone: texts and tables.

What was deleted and is still remembered, comments, hidden text and tables of contents are left out;
footnotes stand in brackets where their mark is, what a frame says behind the paragraph that holds
it.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from ..errors import InputError
from .archive import Archive
from .xml_tree import attribute, name_of

STYLES = "styles.xml"
_CONTENT, _MANIFEST = "content.xml", "META-INF/manifest.xml"
_LEFT_OUT = {
    *("tracked-changes", "annotation", "table-of-content", "note-citation", "forms"),
    *("hidden-text", "hidden-paragraph", "ruby-text"),
}
_OF_PICTURES = "svg-compatible:1.0}"  # their titles and descriptions
_DRAWING = "{urn:oasis:names:tc:opendocument:xmlns:drawing:1.0}"
_WHITE_SPACE = re.compile(r"[ \t\r\n]+")
_MOST_BLANKS = 100  # that one mark may stand for


def opened(data: bytes) -> Archive:
    """The archive of a file without a password, which declares no entities. Raises InputError."""
    archive = Archive(data)
    archive.check_parts()
    if _MANIFEST in archive.names and b"encryption-data" in archive.read(_MANIFEST):
        raise InputError("is encrypted with a password; save a copy without one")
    return archive


def content_of(archive: Archive) -> bytes:
    """XML."""
    return archive.read(_CONTENT)


def body_of(root: ET.Element, name: str, what: str) -> ET.Element:
    """The element that holds all that the document says. root: of the content."""
    for office in root:
        if name_of(office) == "body":
            for body in office:
                if name_of(body) == name:
                    return body
    raise InputError(f"is a damaged {what} file: it has no {name} body")


def rows(table: ET.Element) -> Iterator[list[str]]:
    """Of the table itself: one in a cell is a part of the cell's text."""
    for child in table:
        if name_of(child) == "table-row":
            yield [flat(cell) for cell in child if name_of(cell) == "table-cell"]
        elif not is_left_out(child):
            yield from rows(child)  # header rows, groups of rows


def text_of(element: ET.Element, drawings: list[ET.Element] | None = None) -> str:
    """All of it, paragraphs in it on lines of their own. drawings: takes those that are found,
    whose texts are no part of it then."""
    parts = [_one_blank(element.text)]
    for child in element:
        name = name_of(child)
        if name == "s":
            parts.append(" " * min(number(child, "c"), _MOST_BLANKS))
        elif name in ("tab", "line-break"):
            parts.append("\t" if name == "tab" else "\n")
        elif name == "note":
            parts.append(f" [{flat(child)}]")
        elif drawings is not None and child.tag.startswith(_DRAWING) and name != "a":
            drawings.append(child)
        elif not is_left_out(child):
            inner = text_of(child, drawings)
            parts.append(f"\n{inner}\n" if name in ("p", "h") else inner)
        parts.append(_one_blank(child.tail))
    return "".join(parts)


def flat(element: ET.Element) -> str:
    """All of it on one line."""
    return " ".join(text_of(element).split())


def is_left_out(element: ET.Element) -> bool:
    return name_of(element) in _LEFT_OUT or _OF_PICTURES in element.tag


def number(element: ET.Element, name: str) -> int:
    """An attribute by its name without the namespace; 1 where it is no number."""
    value = attribute(element, name)
    return int(value) if re.fullmatch("[0-9]{1,9}", value) else 1


def _one_blank(text: str | None) -> str:
    """White space as the format has it: whatever there is of it is one blank."""
    return _WHITE_SPACE.sub(" ", text or "")
