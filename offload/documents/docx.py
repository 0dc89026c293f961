"""DOCX: paragraphs, headings, lists and tables in order, by python-docx. Runs in the worker."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from .archive import Archive
from .extract import Extract, Report, refused_if_damaged
from .page_ranges import PageRanges

_HEADING = re.compile(r"heading ([1-9])", re.I)
_REPORT_EVERY = 200


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """Headings as Markdown writes them; the cells of a table's row with bars between."""
    import docx

    Archive(data).check_for_library()
    with refused_if_damaged("DOCX file"):
        document = docx.Document(io.BytesIO(data))
    return Extract.of_blocks(_blocks(document, report))


def _blocks(document: Any, report: Report) -> Iterator[tuple[str, int]]:
    """(text, heading level or 0) of what is not empty."""
    items = list(document.iter_inner_content())
    for number, item in enumerate(items):
        if number % _REPORT_EVERY == 0:
            report(number, len(items))
        if hasattr(item, "rows"):
            yield from ((row, 0) for row in _rows(item))
            continue
        if not item.text.strip():
            continue
        style = (item.style.name or "") if item.style is not None else ""
        heading = _HEADING.match(style)
        level = int(heading[1]) if heading else 1 if style.lower() == "title" else 0
        prefix = "- " if style.lower().startswith("list") else ""
        yield prefix + item.text.strip(), level
    report(len(items), len(items))


def _rows(table: Any) -> Iterator[str]:
    for row in table.rows:
        cells: list[str] = []
        last = None
        for cell in row.cells:
            if cell._tc is not last:  # a merged cell comes once for each column it spans
                cells.append(" ".join(cell.text.split()))
            last = cell._tc
        if any(cells):
            yield " | ".join(cells)
