"""A long document in parts that fit: cut where files, headings or pages begin, as far as possible.

Knows tokens only through a function that counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import ContextOverflow
from .document import Document, Place

# How good a place is to cut at; parts may stay a third smaller than they could be for a better one.
_STRENGTHS = {"file": 4, "chapter": 3, "sheet": 3, "section": 2, "page": 1, "slide": 1}
_LEAST_FILL = 0.66
# Where a stretch without places is cut: paragraphs, lines, sentences, words.
_BREAKS = ("\n\n", "\n", ". ", " ")


@dataclass(frozen=True)
class Part:
    """Text from `start` to `end`; num_tokens as counted; label: its pages, such as "p. 3 - p. 9".

    Parts cover the document without overlap.
    """

    start: int
    end: int
    num_tokens: int
    label: str


@dataclass
class _Atom:
    """What is not cut any further, and how good its start is to cut at."""

    start: int
    end: int
    num_tokens: int
    strength: float


def split_document(
    document: Document, most_tokens: int, count: Callable[[str], int], *, marked: bool = False
) -> list[Part]:
    """Parts of at most `most_tokens` each, as even as good cuts allow.

    count: the tokens of a text; marked: whether the parts will be read with marks (see
    Document.piece). Raises ContextOverflow when not even a few characters fit.
    """

    def tokens(start: int, end: int) -> int:
        return count(document.piece(start, end, marked=marked))

    atoms = list(_atoms(document, most_tokens, tokens))
    total = sum(atom.num_tokens for atom in atoms)
    # Even parts: three of 70 % are read with more context each than two full ones and a rest.
    wanted = min(most_tokens, -(-total // max(1, -(-total // most_tokens))) * 1.1)
    parts: list[Part] = []
    first = 0
    while first < len(atoms):
        last = _end_of_part(atoms, first, wanted)
        start, end = atoms[first].start, atoms[last - 1].end
        num_tokens = tokens(start, end)
        while num_tokens > most_tokens and last > first + 1:  # joined, texts may count for more
            last -= 1
            end = atoms[last - 1].end
            num_tokens = tokens(start, end)
        label = _label(document, start, end) or f"part {len(parts) + 1}"
        parts.append(Part(start, end, num_tokens, label))
        first = last
    return parts


def _end_of_part(atoms: list[_Atom], first: int, wanted: float) -> int:
    """The index behind the part's last atom."""
    size, best, best_strength = 0, first + 1, -1.0
    for index in range(first, len(atoms)):
        size += atoms[index].num_tokens
        if size > wanted and index > first:
            break
        strength = atoms[index + 1].strength if index + 1 < len(atoms) else 9.0
        if size >= _LEAST_FILL * wanted and strength >= best_strength:
            best, best_strength = index + 1, strength
        elif best_strength < 0:
            best = index + 1
    return best


def _atoms(
    document: Document, most_tokens: int, tokens: Callable[[int, int], int]
) -> Iterator[_Atom]:
    places = [place for place in document.places if place.start < len(document.text)]
    starts = [0, *(place.start for place in places if place.start > 0)]
    strengths = {place.start: _strength(place) for place in reversed(places)}
    for start, end in zip(starts, [*starts[1:], len(document.text)], strict=True):
        if start < end:
            strength = strengths.get(start, 0.0)
            yield from _cut(document.text, start, end, strength, most_tokens, tokens)


def _strength(place: Place) -> float:
    """A titled page (a bookmark points there) is better than a section, a plain one worse."""
    return _STRENGTHS[place.kind] + (1.5 if place.kind == "page" and place.title else 0)


def _cut(
    text: str,
    start: int,
    end: int,
    strength: float,
    most_tokens: int,
    tokens: Callable[[int, int], int],
) -> Iterator[_Atom]:
    """Halves a stretch, near its middle, until its pieces fit."""
    num_tokens = tokens(start, end)
    if num_tokens <= most_tokens:
        yield _Atom(start, end, num_tokens, strength)
        return
    if end - start < 2:
        raise ContextOverflow(
            f"the context leaves {most_tokens:,} tokens for a part of the document, and a single "
            f"character takes {num_tokens:,}. Raise --context or use a larger model.",
            needed_tokens=num_tokens,
            available_tokens=most_tokens,
        )
    middle = _middle(text, start, end)
    yield from _cut(text, start, middle, strength, most_tokens, tokens)
    yield from _cut(text, middle, end, 0.0, most_tokens, tokens)


def _middle(text: str, start: int, end: int) -> int:
    half, reach = (start + end) // 2, (end - start) // 4
    for mark in _BREAKS:
        at = text.rfind(mark, half - reach, half + reach)
        if at >= 0 and start < at + len(mark) < end:
            return at + len(mark)
    return half


def _label(document: Document, start: int, end: int) -> str:
    first = document.place_at(start)
    last = document.place_at(end - 1)
    if first is None or last is None:
        inner = document.places_between(start, end)
        first = first or (inner[0] if inner else None)
    if first is None or last is None or first.label == last.label:
        return "" if first is None else first.label
    return f"{first.label} - {last.label}"
