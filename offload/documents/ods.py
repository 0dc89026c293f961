"""ODS: the sheets of a workbook, row by row, hidden ones among them, by the standard library alone.
Runs in the worker.

Cells have the values that were saved with them, as in XLSX; nothing is computed. A file says of
cells and rows how often they repeat: what is empty repeats for nothing, and the rest within limits.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from ..errors import InputError
from .extract import Extract, Report, refused_if_damaged
from .limits import MAX_TEXT_CHARS
from .opendocument import STYLES, content_of, flat, number, opened
from .opendocument_fonts import Fonts
from .page_ranges import PageRanges
from .sheets import MOST_COLUMNS, MOST_ROWS, number_text, sheets_text, tell_uncomputed
from .xml_tree import attribute, name_of

_CELLS = ("table-cell", "covered-table-cell")
_NUMBERS = ("float", "currency", "percentage")
_COPIED = "'file:"  # begins the names of sheets that are kept of other files
_REPORT_EVERY = 10_000


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """See sheets_text."""
    archive = opened(data)
    with refused_if_damaged("ODS file"):
        styles = [ET.fromstring(archive.read(STYLES))] if STYLES in archive.names else []
        reader = _Reader(content_of(archive), styles, report)
        found = sheets_text(reader.sheets())
    if not reader.num_sheets:
        raise InputError("is a damaged ODS file: it has no sheets")
    tell_uncomputed(found, reader.num_uncomputed)
    return found


class _Reader:
    """Rows are read one by one: a sheet as a tree takes ten times its text. styles: the root of
    the other part that has some."""

    def __init__(self, content: bytes, styles: list[ET.Element], report: Report):
        self._size = len(content)
        self._stream = io.BytesIO(content)
        self._events = ET.iterparse(self._stream, ("start", "end"))
        self._report = report
        self._roots, self._fonts = styles, Fonts([])
        self.num_sheets = self.num_uncomputed = 0

    def sheets(self) -> Iterator[tuple[int, str, Iterator[list[str]]]]:
        for event, element in self._events:
            name = name_of(element) if event == "start" else ""
            if name == "document-content":
                self._roots.append(element)
            elif name == "body":
                self._fonts = Fonts(self._roots)  # what is to come holds no styles
            elif name == "table":
                name, rows = attribute(element, "name"), self._rows()
                if name.startswith(_COPIED):
                    for _ in rows:
                        pass
                    continue
                self.num_sheets += 1
                yield self.num_sheets, name, rows
        self._report(self._size, self._size)

    def _rows(self) -> Iterator[list[str]]:
        """Up to the sheet's end. A table in a cell is a part of the cell's text."""
        depth, num_read, num_rows = 1, 0, 0  # num_rows: with those that repeat
        for event, element in self._events:
            name = name_of(element)
            if name == "table":
                depth += 1 if event == "start" else -1
                if not depth:
                    element.clear()
                    return
            elif event == "end" and name == "table-row" and depth == 1:
                num_read += 1
                if num_read % _REPORT_EVERY == 0:
                    self._report(self._stream.tell(), self._size)
                times = number(element, "number-rows-repeated")
                self._fonts.show(element)
                cells = self._cells(element)
                element.clear()
                num_rows += times
                if not cells:
                    continue
                if num_rows > MOST_ROWS:
                    raise InputError(f"is a damaged ODS file: it has a row beyond {MOST_ROWS:,}")
                for _ in range(times):
                    yield [*cells]

    def _cells(self, row: ET.Element) -> list[str]:
        """Without the empty ones at its end. InputError for a row that no sheet holds."""
        cells: list[str] = []
        num_chars = num_empty = 0
        for cell in row:
            if name_of(cell) not in _CELLS:
                continue
            times = number(cell, "number-columns-repeated")
            if not (shown := self._shown(cell)):
                num_empty += times
                continue
            if len(cells) + num_empty + times > MOST_COLUMNS:
                raise InputError(f"is a damaged ODS file: it has a column beyond {MOST_COLUMNS:,}")
            num_chars += len(shown) * times
            if num_chars > MAX_TEXT_CHARS:
                raise InputError("has a row that holds more text than a document may")
            cells += [""] * num_empty + [shown] * times
            num_empty = 0
        return cells

    def _shown(self, cell: ET.Element) -> str:
        kind = attribute(cell, "value-type")
        if kind in _NUMBERS:
            try:
                return number_text(float(attribute(cell, "value")))
            except ValueError:
                return flat(cell)
        if kind == "boolean":
            return attribute(cell, "boolean-value").upper()
        if kind == "date":
            return attribute(cell, "date-value").replace("T", " ")
        text = flat(cell)
        if attribute(cell, "formula") and not kind and not text:
            self.num_uncomputed += 1
        return text
