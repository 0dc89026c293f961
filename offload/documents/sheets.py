"""The sheets of a workbook as text: what XLSX and ODS have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import InputError
from .document import Place
from .extract import Extract
from .limits import MAX_SECTIONS, MAX_TEXT_CHARS

MOST_ROWS, MOST_COLUMNS = 2**20, 2**14  # of a sheet, in every spreadsheet
_LARGEST_WHOLE = 1e21  # beyond it digits are noise
# Ten empty cells and more: a cell that was touched far from all others is no table.
_GAP = re.compile(r"(?: \| ){10,}")


def number_text(value: float) -> str:
    """Integers whole, others with as many digits as spreadsheets have."""
    whole = value.is_integer() and abs(value) < _LARGEST_WHOLE
    return f"{value:.0f}" if whole else f"{value:.15g}"


def sheets_text(sheets: Iterable[tuple[int, str, Iterable[list[str]]]]) -> Extract:
    """A sheet's name as a heading, a line for each row that is not empty, bars between cells.

    sheets: (number, name, rows); a row's cells keep their places behind a few that are empty. The
    rows of one are read before the next sheet is asked for.
    """
    found, lines, size, empty, num_sheets = Extract(""), [], 0, [], 0
    for number, name, rows in sheets:
        num_sheets += 1
        if num_sheets > MAX_SECTIONS:
            raise InputError(f"has more than {MAX_SECTIONS:,} sheets, the most that are read")
        title, start = " ".join(name.split()), size
        for cells in rows:
            while cells and not cells[-1]:
                cells.pop()
            if not cells:
                continue
            if size == start:
                found.places.append(Place(start, "sheet", number, title))
                lines.append(f"# {title}\n\n")
                size += len(lines[-1])
            lines.append(_GAP.sub(" | ... | ", " | ".join(cells)) + "\n")
            size += len(lines[-1])
            if size > MAX_TEXT_CHARS:
                break  # refused by whoever called
        if size == start:
            empty.append(title)
        else:
            lines.append("\n")
            size += 1
        if size > MAX_TEXT_CHARS:
            break
    if empty and lines:
        shown = ", ".join(empty[:12]) + (", ..." if len(empty) > 12 else "")
        found.warnings.append(f"No text on {len(empty)} of {num_sheets} sheets: {shown}.")
    found.text = "".join(lines).rstrip("\n") + "\n"
    return found


def tell_uncomputed(found: Extract, num_formulas: int) -> None:
    """That formulas have no values; InputError where there is nothing else."""
    if not num_formulas:
        return
    cells = "1 formula was" if num_formulas == 1 else f"{num_formulas:,} formulas were"
    told = f"{cells} never computed, and left out: open the file in a spreadsheet and save it."
    if not found.text.strip():
        raise InputError(f"holds no text: {told[:-1]}")
    found.warnings.append(told)
