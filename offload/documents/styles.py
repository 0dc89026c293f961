"""What the names of paragraph styles say: DOCX and RTF know them by the same ones."""

from __future__ import annotations

import re

_HEADING = re.compile(r"heading ([1-9])", re.I)


def heading_level(style: str) -> int:
    """1 for "heading 1" and "Title"; 0 for other styles."""
    found = _HEADING.match(style)
    return int(found[1]) if found else int(style.lower() == "title")


def is_list(style: str) -> bool:
    return style.lower().startswith("list ") and style.lower() != "list paragraph"


def is_contents(style: str) -> bool:
    """Lines of a table of contents: headings that come again where they stand."""
    return style.lower().startswith(("toc ", "table of figures"))
