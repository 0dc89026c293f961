"""HTML: what a page is about, by trafilatura; menus and the like are left out. Runs in the worker
and fetches nothing.
"""

from __future__ import annotations

import re

from ..errors import InputError
from .extract import Extract, Report
from .html_text import html_text, without_readings
from .page_ranges import PageRanges
from .plain import markdown_sections

# Where less than this share of the page's own words is found, too much was left out.
_LEAST_SHARE = 0.25
# Where more is found, and no headings, all of the page is better: it has them, and few menus.
_MOST_FLAT_SHARE = 0.5
# Telling a page's text from what is around it takes minutes above this; such a page is a book.
_LARGEST_BYTES = 4 * 2**20
_DECLARED = re.compile(rb"""<meta[^>]+charset=["']?([A-Za-z0-9_-]+)""", re.I)


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """The main text as Markdown; where hardly any is found, all of the page's text."""
    report(0, 1)
    markup = _decoded(data)
    if len(data) > _LARGEST_BYTES:
        text, places = html_text(markup)
        told = "The page is too large to tell its text from its menus: all of it is read."
        return Extract(text + "\n" if text else "", places, warnings=[told])
    import trafilatura

    found = trafilatura.extract(
        without_readings(markup),
        output_format="markdown",
        favor_recall=True,
        include_comments=False,
        include_tables=True,
        include_links=False,
    )
    everything, places = html_text(markup)
    report(1, 1)
    sections = list(markdown_sections(found or ""))
    share = len(found or "") / max(1, len(everything))
    # On short pages the library finds lines and no headings.
    lacks_headings = bool(places) and not sections
    if found is None or share < _LEAST_SHARE or (lacks_headings and share > _MOST_FLAT_SHARE):
        if not everything:
            raise InputError("holds no text: its words may be made by scripts, which are not run")
        return Extract(everything + "\n", places)
    return Extract(found.rstrip("\n") + "\n", sections)


def _decoded(data: bytes) -> str:
    """By its byte order mark, else as it declares, else UTF-8, else what the web falls back to."""
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    declared = _DECLARED.search(data[:4096])
    names = ["utf-8-sig", "windows-1252"]
    if declared is not None:
        names.insert(0, declared[1].decode())
    for name in names:
        try:
            return data.decode(name)
        except (UnicodeDecodeError, LookupError):
            continue
    return data.decode("utf-8", "replace")
