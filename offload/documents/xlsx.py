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
from .document import Place
from .extract import Extract, Report, refused_if_damaged
from .limits import MAX_SECTIONS, MAX_TEXT_CHARS
from .page_ranges import PageRanges

_MOST_ROWS = 2**20  # of a sheet, in every spreadsheet
_MIDNIGHT = datetime.time()
# A cell whose formula has no value behind it, or an empty one; that is a value where it is text.
_UNCOMPUTED = re.compile(
    rb"""<c\b(?![^>]{0,300}\bt=["']str["'])[^>]{0,300}>\s*"""
    rb"<f\b(?:[^>]{0,300}/>|[^>]{0,300}>[^<]*</f>)\s*(?:<v\s*/>|<v>\s*</v>)?\s*</c>"
)
# Ten empty cells and more: a cell that was touched far from all others is no table.
_GAP = re.compile(r"(?: \| ){10,}")


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """A sheet's name as a heading, a line for each row that is not empty, bars between cells."""
    archive = Archive(data)
    archive.check_for_library()
    with refused_if_damaged("XLSX file"):
        found = _read(data, report)
    sheets = [name for name in archive.names if name.startswith("xl/worksheets/")]
    if missing := sum(len(_UNCOMPUTED.findall(archive.read(name))) for name in sheets):
        cells = "1 formula was" if missing == 1 else f"{missing:,} formulas were"
        told = f"{cells} never computed, and left out: open the file in a spreadsheet and save it."
        if not found.text.strip():
            raise InputError(f"holds no text: {told[:-1]}")
        found.warnings.append(told)
    return found


def _read(data: bytes, report: Report) -> Extract:
    import openpyxl

    book = openpyxl.load_workbook(
        io.BytesIO(data), read_only=True, data_only=True, keep_links=False
    )
    sheets = book.worksheets
    if len(sheets) > MAX_SECTIONS:
        raise InputError(f"has {len(sheets):,} sheets, and {MAX_SECTIONS:,} are the most")
    found, lines, size, empty = Extract(""), [], 0, []
    # As the tabs are counted, those with nothing but a chart among them.
    numbers = {name: number for number, name in enumerate(book.sheetnames, 1)}
    for done, sheet in enumerate(sheets):
        report(done, len(sheets))
        title, start, number = " ".join(sheet.title.split()), size, numbers[sheet.title]
        heading = f"# {title}\n\n"
        for line in _lines(sheet):
            if size == start:
                found.places.append(Place(start, "sheet", number, title))
                lines.append(heading)
                size += len(heading)
            lines.append(line)
            size += len(line)
            if size > MAX_TEXT_CHARS:
                break  # refused by whoever called
        if size == start:
            empty.append(title)
        else:
            lines.append("\n")
            size += 1
        if size > MAX_TEXT_CHARS:
            break
    report(len(sheets), len(sheets))
    if empty and lines:
        shown = ", ".join(empty[:12]) + (", ..." if len(empty) > 12 else "")
        found.warnings.append(f"No text on {len(empty)} of {len(sheets)} sheets: {shown}.")
    found.text = "".join(lines).rstrip("\n") + "\n"
    return found


def _lines(sheet: Any) -> Iterator[str]:
    """Rows that are not empty; cells keep their places behind a few that are empty."""
    # What a file says of its size may be anything: a cell in each of sixteen billion places.
    sheet.reset_dimensions()
    for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
        if number > _MOST_ROWS:  # the library counts up to any row that a file names
            raise InputError(f"is a damaged XLSX file: it has a row beyond {_MOST_ROWS:,}")
        cells = [_shown(value) for value in row]
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            yield _GAP.sub(" | ... | ", " | ".join(cells)) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}"  # as many digits as spreadsheets have
    if isinstance(value, datetime.datetime):
        whole_day = value.time() == _MIDNIGHT
        return value.date().isoformat() if whole_day else value.isoformat(" ")
    return " ".join(str(value).split())
