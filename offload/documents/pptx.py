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

from .archive import Archive
from .extract import Extract, Report, refused_if_damaged
from .page_ranges import PageRanges
from .pptx_fonts import show_signs
from .slides import slides_text, table_text

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
    return slides_text(len(slides), ranges, report, lambda number: _told(slides[number - 1]))


def _told(slide: Any) -> tuple[str, list[str]]:
    """Its title, wherever it stands, and what else it says."""
    _choose_alternatives(slide.shapes._spTree)
    show_signs(slide.shapes)
    named = slide.shapes.title
    title = "" if named is None else " ".join(named.text_frame.text.split())
    blocks: list[str] = []
    for shape in slide.shapes:
        # Not by their ids: programs give one to several shapes.
        if named is None or shape._element is not named._element:
            blocks += filter(None, _texts(shape))
    if slide.has_notes_slide:
        show_signs(slide.notes_slide.shapes)
    if slide.has_notes_slide and (frame := slide.notes_slide.notes_text_frame) is not None:
        if notes := _lines(frame):
            blocks.append(f"Notes: {notes}")
    return title, blocks


def _choose_alternatives(tree: Any) -> None:
    """The library passes over shapes that come in several forms: the first takes their place."""
    for alternatives in list(tree.iter(_ALTERNATIVES)):
        for shape in alternatives.findall(_FIRST)[:1]:
            for part in list(shape):
                alternatives.addprevious(part)


def _texts(shape: Any) -> Iterator[str]:
    """What a shape says, which may be nothing; of a group, what is in it."""
    if hasattr(shape, "shapes"):
        for inner in shape.shapes:
            yield from _texts(inner)
    elif getattr(shape, "has_table", False) and shape.has_table:
        rows = [[" ".join(cell.text.split()) for cell in row.cells] for row in shape.table.rows]
        yield table_text(rows)
    elif getattr(shape, "has_chart", False) and shape.has_chart:
        with contextlib.suppress(Exception):  # of a kind that the library does not know
            yield table_text(_numbers(shape.chart))
    elif shape.has_text_frame and not _is_furniture(shape):
        yield _lines(shape.text_frame)


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
