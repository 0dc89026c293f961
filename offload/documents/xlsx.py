"""XLSX: the sheets of a workbook, row by row, by openpyxl, hidden ones among them. Runs in the
worker.

Formulas are read as the values that were saved with them; nothing is computed. Programs that write
formulas and no values are common, so what is missing is said.
"""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Iterator
from typing import Any

from ..errors import InputError
from .archive import Archive
from .extract import Extract, Report, refused_if_damaged
from .page_ranges import PageRanges
from .sheets import MOST_ROWS, number_text, sheets_text, tell_uncomputed

_MIDNIGHT = datetime.time()
# A cell whose formula has no value behind it, or an empty one; that is a value where it is text.
_UNCOMPUTED = re.compile(
    rb"""<c\b(?![^>]{0,300}\bt=["']str["'])[^>]{0,300}>\s*"""
    rb"<f\b(?:[^>]{0,300}/>|[^>]{0,300}>[^<]*</f>)\s*(?:<v\s*/>|<v>\s*</v>)?\s*</c>"
)


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """See sheets_text."""
    archive = Archive(data)
    archive.check_for_library()
    with refused_if_damaged("XLSX file"):
        found = sheets_text(_sheets(data, report))
    sheets = [name for name in archive.names if name.startswith("xl/worksheets/")]
    tell_uncomputed(found, sum(len(_UNCOMPUTED.findall(archive.read(name))) for name in sheets))
    return found


def _sheets(data: bytes, report: Report) -> Iterator[tuple[int, str, Iterator[list[str]]]]:
    book = _opened(data)
    sheets = book.worksheets
    # As the tabs are counted, those with nothing but a chart among them.
    numbers = {name: number for number, name in enumerate(book.sheetnames, 1)}
    for done, sheet in enumerate(sheets):
        report(done, len(sheets))
        yield numbers[sheet.title], sheet.title, _rows(sheet)
    report(len(sheets), len(sheets))


def _opened(data: bytes) -> Any:
    from openpyxl.chartsheet import Chartsheet
    from openpyxl.reader.excel import ExcelReader

    class Reader(ExcelReader):
        """openpyxl's, but a sheet that is a chart is counted alone: it holds no cells, and the
        library fails on one without a drawing."""

        def read_chartsheet(self, sheet: Any, rel: Any) -> None:
            chart = Chartsheet(parent=self.wb)
            chart.title = sheet.name
            book: Any = self.wb  # where all sheets are added, by a name for the library alone
            book._add_sheet(chart)

    reader = Reader(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)
    reader.read()
    return reader.wb


def _rows(sheet: Any) -> Iterator[list[str]]:
    # What a file says of its size may be anything: a cell in each of sixteen billion places.
    sheet.reset_dimensions()
    for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
        if number > MOST_ROWS:  # the library counts up to any row that a file names
            raise InputError(f"is a damaged XLSX file: it has a row beyond {MOST_ROWS:,}")
        yield [_shown(value) for value in row]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, datetime.timedelta):
        return _hours(value)
    if isinstance(value, datetime.datetime):
        whole_day = value.time() == _MIDNIGHT
        return value.date().isoformat() if whole_day else value.isoformat(" ")
    return " ".join(str(value).split())


def _hours(duration: datetime.timedelta) -> str:
    """As spreadsheets show one: 30:00:00, which Python calls "1 day, 6:00:00"."""
    minutes, seconds = divmod(round(abs(duration).total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    sign = "-" if duration < datetime.timedelta() else ""
    return f"{sign}{hours}:{minutes:02d}:{seconds:02d}"
