"""A document as text that knows where its pages, chapters and sections begin.

Knows no file formats and no models.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# What a place is -> how a citation names it. A file is named by itself.
ABBREVIATIONS = {
    **{"page": "p.", "slide": "slide", "sheet": "sheet"},
    **{"chapter": "ch.", "section": "sec.", "file": ""},
}


@dataclass(frozen=True)
class Place:
    """Where something begins. start: offset in the text; kind: a key of ABBREVIATIONS; number:
    as the format counts, from 1; title: its heading, if it has one; source: the file's name, in a
    document that was joined from several.
    """

    start: int
    kind: str
    number: int
    title: str = ""
    source: str = ""

    @property
    def label(self) -> str:
        """How a citation names it: "p. 12", "talk.pptx slide 3", "notes.txt"."""
        own = "" if self.kind == "file" else f"{ABBREVIATIONS[self.kind]} {self.number}"
        return f"{self.source} {own}".strip()


@dataclass(frozen=True)
class Document:
    """`name`: the file's name, or "standard input". `text`: not blank, lines end in \\n alone.

    format: a key of `parsing.FORMATS`, markdown or text. places: in order of start; a
    page of which nothing could be read has none. num_pages: of the whole file, or its slides; None
    where there are none.
    warnings: what is missing from the text, in whole sentences.
    """

    name: str
    text: str
    format: str = "text"
    places: tuple[Place, ...] = ()
    num_pages: int | None = None
    warnings: tuple[str, ...] = ()
    _starts: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", [place.start for place in self.places])

    def place_at(self, offset: int) -> Place | None:
        """The place that an offset lies in; None before the first."""
        at = bisect.bisect_right(self._starts, offset) - 1
        return self.places[at] if at >= 0 else None

    def places_between(self, start: int, end: int) -> Sequence[Place]:
        """The places that begin in [start, end)."""
        low = bisect.bisect_left(self._starts, start)
        return self.places[low : bisect.bisect_left(self._starts, end)]

    def piece(self, start: int = 0, end: int | None = None, *, marked: bool = False) -> str:
        """The text from start to end. marked: a line such as [p. 12] begins every place, and the
        piece itself where it starts inside one.
        """
        end = len(self.text) if end is None else end
        if not marked:
            return self.text[start:end]
        out, at = [], start
        first = self.place_at(start)
        inner = [place for place in self.places_between(start + 1, end) if place.kind != "file"]
        for place in [*([first] if first and first.kind != "file" else []), *inner]:
            begin = max(place.start, start)
            out += [self.text[at:begin], f"[{place.label}]\n"]
            at = begin
        return "".join([*out, self.text[at:end]])

    def to_dict(self) -> dict[str, Any]:
        """As `--extract-only --json` prints it."""
        places = [{"start": p.start, "label": p.label, "title": p.title} for p in self.places]
        return {
            "name": self.name,
            "format": self.format,
            "num_pages": self.num_pages,
            "num_chars": len(self.text),
            "text": self.text,
            "places": places,
            "warnings": list(self.warnings),
        }


def join_documents(documents: Sequence[Document]) -> Document:
    """One document: several stand under headings with their names, and places name their file.
    Of names that repeat, the second and on are numbered: "a.pdf", "a.pdf (2)".
    """
    if len(documents) == 1:
        return _stripped(documents[0])
    text, places, warnings = "", [], []
    named = zip(map(_stripped, documents), _numbered([d.name for d in documents]), strict=True)
    for number, (document, name) in enumerate(named, 1):
        heading = f"# {name}\n\n"
        text += "\n\n" if text else ""
        places.append(Place(len(text), "file", number, name, name))
        shift = len(text) + len(heading)
        places += [replace(p, start=p.start + shift, source=name) for p in document.places]
        text += heading + document.text
        warnings += [f"{name}: {warning}" for warning in document.warnings]
    formats = {document.format for document in documents}
    return Document(
        f"{len(documents)} documents",
        text,
        formats.pop() if len(formats) == 1 else "mixed",
        tuple(places),
        warnings=tuple(warnings),
    )


def _numbered(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        found.append(next(n for n in itertools.chain([name], numbered) if n not in found))
    return found


def _stripped(document: Document) -> Document:
    """Without empty lines around it."""
    before = len(document.text) - len(document.text.lstrip("\n"))
    text = document.text.strip("\n")
    if len(text) == len(document.text):
        return document
    places = tuple(replace(p, start=max(0, p.start - before)) for p in document.places)
    return replace(document, text=text, places=places)
