"""The slides of a presentation as text: what PPTX and ODP have in common."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import InputError
from .document import Place
from .extract import Extract, Report
from .limits import MAX_PAGES, MAX_TEXT_CHARS
from .page_ranges import PageRanges, show_pages


def slides_text(
    num_slides: int,
    ranges: PageRanges | None,
    report: Report,
    told: Callable[[int], tuple[str, list[str]]],
) -> Extract:
    """Titles as Markdown's headings, an empty line between the blocks of a slide.

    told: the title ("" for none) and the other blocks of a slide, by its number from 1.
    """
    if num_slides > MAX_PAGES:
        raise InputError(f"has {num_slides:,} slides, and {MAX_PAGES:,} are the most")
    if not num_slides:
        raise InputError("has no slides")
    numbers = range(1, num_slides + 1) if ranges is None else _chosen(ranges, num_slides)
    found, parts, size, empty = Extract("", num_pages=num_slides), [], 0, []
    for done, number in enumerate(numbers):
        report(done, len(numbers))
        title, blocks = told(number)
        text = "\n\n".join([f"# {title}", *blocks] if title else blocks)
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


def table_text(rows: list[list[str]]) -> str:
    """A line for each row that is not empty, bars between cells."""
    return "\n".join(" | ".join(cells) for cells in rows if any(cells))


def _chosen(ranges: PageRanges, num_slides: int) -> list[int]:
    try:
        return ranges.chosen(num_slides, "slides")
    except ValueError as error:
        raise InputError(str(error)) from None
