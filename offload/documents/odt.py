"""ODT: paragraphs, headings, lists and tables in order. Runs in the worker. What pages have at
their head comes first.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from .archive import Archive
from .extract import Extract, Report, refused_if_damaged
from .opendocument import blocks, body_of, opened
from .page_ranges import PageRanges
from .xml_tree import descendants

_STYLES = "styles.xml"
_HEADS = ("header-first", "header", "header-left")  # of the first page, of right and of left ones


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """Headings as Markdown writes them; the cells of a table's row with bars between."""
    report(0, 1)
    archive = opened(data)
    with refused_if_damaged("ODT file"):
        body = body_of(archive, "text", "ODT")
        found = Extract.of_blocks([*_heads(archive), *blocks(body)])
    report(1, 1)
    return found


def _heads(archive: Archive) -> Iterator[tuple[str, int]]:
    """What stands at the head of pages, but for their numbers; nothing twice."""
    if _STYLES not in archive.names:
        return
    told: set[str] = set()
    styles = ET.fromstring(archive.read(_STYLES))
    for page in descendants(styles, "master-page"):
        for kind in _HEADS:
            for head in descendants(page, kind):
                for text, level in blocks(head):
                    if text not in told and any(map(str.isalpha, text)):
                        told.add(text)
                        yield text, level
