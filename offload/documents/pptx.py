"""PPTX: the slides of a presentation with their titles, texts, tables and notes, by python-pptx.
Runs in the worker.

Slides count from 1 in the order in which they are shown, hidden ones among them. What pictures and
diagrams say is not read.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from ..errors import InputError
from .archive import Archive
from .document import Place
from .extract import Extract, Report, refused_if_damaged
from .limits import MAX_PAGES, MAX_TEXT_CHARS
from .page_ranges import PageRanges, show_pages

# What newer programs draw otherwise than older ones, formulas in a text above all, comes twice.
_ALTERNATIVES, _FIRST = (
    f"{{http://schemas.openxmlformats.org/markup-compatibility/2006}}{name}"
    for name in ("AlternateContent", "Choice")
)
# The same on every slide.
_FURNITURE = ("DATE", "FOOTER", "SLIDE_NUMBER")


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """Titles as Markdown's headings, a table's cells with bars between, notes behind "Notes:"."""
    Archive(data).check_for_library()
    with refused_if_damaged("PPTX file"):
        return _read(data, ranges, report)


def _read(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    # Presentation() takes no slide shows and no templates, which are the same but for their kind.
    from pptx.package import Package

    slides = Package.open(io.BytesIO(data)).main_document_part.presentation.slides
    if len(slides) > MAX_PAGES:
        raise InputError(f"has {len(slides):,} slides, and {MAX_PAGES:,} are the most")
    if not len(slides):
        raise InputError("has no slides")
    numbers = range(1, len(slides) + 1) if ranges is None else _chosen(ranges, len(slides))
    found, parts, size, empty = Extract("", num_pages=len(slides)), [], 0, []
    for done, number in enumerate(numbers):
        report(done, len(numbers))
        title, text = _told(slides[number - 1])
        if not text:
            empty.append(number)
            continue
        found.places.append(Place(size, "slide", number, title))
        parts.append(text + "\n\n")
        size += len(parts[-1])
        if size > MAX_TEXT_CHARS:
            break  # refused by whoever called
    report(len(numbers), len(numbers))
    if empty:
        found.warnings.append(
            f"No text on {len(empty)} of {len(numbers)} slides (pictures or nothing): "
            f"{show_pages(empty)}."
        )
    found.text = "".join(parts).rstrip("\n") + "\n"
    return found


def _chosen(ranges: PageRanges, num_slides: int) -> list[int]:
    try:
        return ranges.chosen(num_slides, "slides")
    except ValueError as error:
        raise InputError(str(error)) from None


def _told(slide: Any) -> tuple[str, str]:
    """Its title, and all that it says, the title first wherever it stands."""
    _choose_alternatives(slide.shapes._spTree)
    named = slide.shapes.title
    title = "" if named is None else " ".join(named.text_frame.text.split())
    blocks = [f"# {title}"] if title else []
    for shape in slide.shapes:
        # Not by their ids: programs give one to several shapes.
        if named is None or shape._element is not named._element:
            blocks += _texts(shape)
    if slide.has_notes_slide and (frame := slide.notes_slide.notes_text_frame) is not None:
        if notes := _lines(frame):
            blocks.append(f"Notes: {notes}")
    return title, "\n\n".join(blocks)


def _choose_alternatives(tree: Any) -> None:
    """The library passes over shapes that come in several forms: the first takes their place."""
    for alternatives in list(tree.iter(_ALTERNATIVES)):
        for shape in alternatives.findall(_FIRST)[:1]:
            for part in list(shape):
                alternatives.addprevious(part)


def _texts(shape: Any) -> Iterator[str]:
    """What a shape says; of a group, what is in it."""
    if hasattr(shape, "shapes"):
        for inner in shape.shapes:
            yield from _texts(inner)
    elif getattr(shape, "has_table", False) and shape.has_table:
        rows = [[" ".join(cell.text.split()) for cell in row.cells] for row in shape.table.rows]
        yield from _table(rows)
    elif getattr(shape, "has_chart", False) and shape.has_chart:
        with contextlib.suppress(Exception):  # of a kind that the library does not know
            yield from _table(_numbers(shape.chart))
    elif shape.has_text_frame and not _is_furniture(shape):
        if text := _lines(shape.text_frame):
            yield text


def _numbers(chart: Any) -> list[list[str]]:
    """What a chart shows: a row for each series, under the categories."""
    title = chart.chart_title.text_frame.text if chart.has_title else ""
    rows = [[" ".join(f"Chart: {title}".split())]]
    for plot in chart.plots:
        rows.append(["", *(" ".join(str(name).split()) for name in plot.categories)])
        for series in plot.series:
            values = ("" if value is None else f"{value:.15g}" for value in series.values)
            rows.append([" ".join(series.name.split()), *values])
    return rows


def _table(rows: list[list[str]]) -> Iterator[str]:
    """Nothing where nothing is in it."""
    if any(map(any, rows)):
        yield "\n".join(" | ".join(cells) for cells in rows if any(cells))


def _is_furniture(shape: Any) -> bool:
    return shape.is_placeholder and shape.placeholder_format.type.name in _FURNITURE


def _lines(frame: Any) -> str:
    """Paragraphs, deeper ones further in."""
    lines = []
    for paragraph in frame.paragraphs:
        # A vertical tab is a line break inside a paragraph.
        for line in paragraph.text.replace("\v", "\n").split("\n"):
            if line.strip():
                lines.append("  " * paragraph.level + line.strip())
    return "\n".join(lines)
