"""Checks a text's citations against the document it speaks of.

A citation is a mark such as [p. 12], and what it vouches for the quoted words before it. Words are
compared as words: case, punctuation, line breaks and hyphenation at line ends do not count. A
sentence that stands in the document word for word, and has no mark, is given one. Knows no models.
"""

from __future__ import annotations

import bisect
import enum
import re
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any

from .document import Document

_QUOTE = re.compile(
    r"\"([^\"\n]{2,800})\"|“([^”\n]{2,800})”|«([^»\n]{2,800})»|„([^“”\n]{2,800})[“”]"
)
_MARK = re.compile(r"\[([^\[\]\n]{1,200})\]")
_NUMBERED = re.compile(
    r"(.*?)\b(pp?|ch|sec|slides?|sheets?)\.?\s*(\d+)(?:\s*[-–]\s*(?:pp?\.?\s*)?(\d+))?", re.I
)
_ABBREVIATION = {
    **{"p": "p.", "pp": "p.", "ch": "ch.", "sec": "sec."},
    **{"slide": "slide", "slides": "slide", "sheet": "sheet", "sheets": "sheet"},
}
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s|$)")
_BULLET = re.compile(r"\s*(?:[-*•]|\d+[.)]|#{1,6})\s+")
_LEAST_WORDS = 3  # fewer in quotes are an expression, not a quotation
_LEAST_SENTENCE_WORDS = 4
_NEAR_CHARS = 80  # between a quotation and its mark
_MOST_LISTED = 20  # pages of a long range


class Verdict(enum.Enum):
    """What a look into the document said."""

    VERIFIED = "verified"  # the quoted words stand where the mark says
    ELSEWHERE = "elsewhere"  # they stand at another place
    NOT_FOUND = "not_found"  # they stand nowhere
    NO_SUCH_PLACE = "no_such_place"  # the document has no such page
    UNQUOTED = "unquoted"  # a mark without quoted words: nothing to check
    ADDED = "added"  # the words stand there, and the mark is ours


@dataclass(frozen=True)
class Citation:
    """words: what is vouched for ("" for none); cited: labels the text gave; found: labels where
    the words stand.
    """

    words: str
    cited: tuple[str, ...]
    found: tuple[str, ...]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict.value}


class CitationChecker:
    """Takes a text in pieces, and gives it back line by line with its citations checked.

    What is wrong is said inside the brackets: [p. 12: words not found]. adds_marks: whether
    sentences and quotations without a mark get one.
    """

    def __init__(self, document: Document, *, adds_marks: bool = True):
        self._words = _Words(document)
        self._adds_marks = adds_marks and bool(document.places)
        self._line = ""
        self.citations: list[Citation] = []

    def push(self, piece: str) -> str:
        """What can be shown now: whole lines."""
        self._line += piece
        *lines, self._line = self._line.split("\n")
        return "".join(self._checked(line) + "\n" for line in lines)

    def finish(self) -> str:
        """The last line."""
        line, self._line = self._line, ""
        return self._checked(line)

    @property
    def num_doubtful(self) -> int:
        bad = (Verdict.ELSEWHERE, Verdict.NOT_FOUND, Verdict.NO_SUCH_PLACE)
        return sum(citation.verdict in bad for citation in self.citations)

    # ---- a line

    def _checked(self, line: str) -> str:
        quotes = [m for m in _QUOTE.finditer(line)]
        marks = [m for m in _MARK.finditer(line) if self._labels(m[1])]
        if not quotes and not marks:
            return self._with_marks(line)
        edits: list[tuple[int, int, str]] = []  # (start, end, what to put there)
        taken = set()
        for number, quote in enumerate(quotes):
            limit = quotes[number + 1].start() if number + 1 < len(quotes) else len(line)
            near = [
                m
                for m in marks
                if quote.end() <= m.start() <= min(limit, quote.end() + _NEAR_CHARS)
            ]
            words = next(group for group in quote.groups() if group is not None)
            if near:
                taken.add(near[0].start())
            self._check_quote(words, quote.end(), near[0] if near else None, edits)
        for mark in marks:
            if mark.start() not in taken:
                self._check_mark(mark, edits)
        for start, end, text in sorted(edits, reverse=True):
            line = line[:start] + text + line[end:]
        return line

    def _check_quote(self, words: str, end: int, mark: Any, edits: list) -> None:
        cited = self._labels(mark[1]) if mark is not None else []
        if mark is None and len(_words(words).split()) < _LEAST_WORDS:
            return
        found = self._words.where(words, prefer=cited)
        if mark is None:
            if found and self._adds_marks and found[0]:
                self._note(words, [], found[:1], Verdict.ADDED)
                edits.append((end, end, f" [{found[0]}]"))
            elif not found:
                self._note(words, [], [], Verdict.NOT_FOUND)
                edits.append((end, end, " [words not found]"))
            return
        if not self._words.known(cited):
            self._note(words, cited, found, Verdict.NO_SUCH_PLACE)
            edits.append((mark.start(), mark.end(), f"[{mark[1]}: there is no such place]"))
        elif not found:
            self._note(words, cited, [], Verdict.NOT_FOUND)
            edits.append((mark.start(), mark.end(), f"[{mark[1]}: words not found]"))
        elif set(found) & set(cited):
            self._note(words, cited, [x for x in found if x in cited], Verdict.VERIFIED)
        else:
            self._note(words, cited, found, Verdict.ELSEWHERE)
            where = found[0] or "the beginning"
            edits.append((mark.start(), mark.end(), f"[{mark[1]}: the words stand at {where}]"))

    def _check_mark(self, mark: Any, edits: list) -> None:
        cited = self._labels(mark[1])
        if self._words.known(cited):
            self._note("", cited, [], Verdict.UNQUOTED)
        else:
            self._note("", cited, [], Verdict.NO_SUCH_PLACE)
            edits.append((mark.start(), mark.end(), f"[{mark[1]}: there is no such place]"))

    def _with_marks(self, line: str) -> str:
        """A mark behind each sentence that stands in the document."""
        if not self._adds_marks:
            return line
        bullet = _BULLET.match(line)
        head, rest = (bullet[0], line[bullet.end() :]) if bullet else ("", line)
        out = head
        for sentence in _SENTENCE_END.split(rest):
            out += sentence
            if len(_words(sentence).split()) >= _LEAST_SENTENCE_WORDS:
                found = self._words.where(sentence)
                if found and found[0]:
                    self._note(sentence.strip(), [], found[:1], Verdict.ADDED)
                    out += f" [{found[0]}]"
        return out

    def _note(self, words: str, cited: list[str], found: list[str], verdict: Verdict) -> None:
        self.citations.append(Citation(words, tuple(cited), tuple(found[:3]), verdict))

    def _labels(self, inside: str) -> list[str]:
        """The labels that brackets hold; [] when they hold anything else."""
        labels, source, kind = [], "", "p."
        for part in re.split(r"[,;]|\band\b", inside):
            part = " ".join(part.split())
            if self._words.known([part]):
                labels.append(part)
                continue
            if labels and re.fullmatch(r"\d+(?:\s*[-–]\s*\d+)?", part):  # [pp. 3, 5-7]
                part = f"{kind} {part}"
            found = _NUMBERED.fullmatch(part)
            if found is None:
                return []
            source = found[1].strip() or source
            first, last = int(found[3]), int(found[4] or found[3])
            kind = _ABBREVIATION[found[2].lower()]
            numbers = (
                range(first, min(last, first + _MOST_LISTED) + 1) if last >= first else [first]
            )
            labels += [f"{source} {kind} {number}".strip() for number in numbers]
        return labels


class _Words:
    """A document as words alone, and where its places begin in them."""

    def __init__(self, document: Document):
        self._labels = {place.label for place in document.places}
        starts = [0, *(place.start for place in document.places if place.start > 0)]
        self._starts: list[int] = []
        self._names: list[str] = []
        chunks, size = [], 1
        for start, end in zip(starts, [*starts[1:], len(document.text)], strict=True):
            place = document.place_at(start)
            chunk = _words(document.text[start:end])
            self._starts.append(size - 1)
            self._names.append(place.label if place is not None else "")
            if chunk:
                chunks.append(chunk)
                size += len(chunk) + 1
        self._text = " " + " ".join(chunks) + " "

    def known(self, labels: list[str]) -> bool:
        return any(label in self._labels for label in labels)

    def where(self, quoted: str, prefer: list[str] | None = None) -> list[str]:
        """Labels of the places that the words begin in, [""] where the document has no places, []
        when they stand nowhere. Words left out (...) may be anything: then the places of the first
        piece, if all pieces are there.
        """
        pieces = [_words(piece) for piece in re.split(r"\.\.\.|…|\[[^\]]*\]", quoted)]
        pieces = [piece for piece in pieces if piece]
        if not pieces or any(f" {piece} " not in self._text for piece in pieces):
            return []
        found: list[str] = []
        at = self._text.find(f" {pieces[0]} ")
        while at >= 0 and len(found) < 1000:
            name = self._names[max(0, bisect.bisect_right(self._starts, at) - 1)]
            if name not in found:
                found.append(name)
            # Words that begin at the end of a page may be cited by the next one.
            after = self._names[max(0, bisect.bisect_right(self._starts, at + len(pieces[0])) - 1)]
            if after not in found:
                found.append(after)
            if prefer and set(prefer) & set(found):
                break
            at = self._text.find(f" {pieces[0]} ", at + 1)
        return found


def _words(text: str) -> str:
    """Letters and digits in lower case, one blank between words."""
    text = unicodedata.normalize("NFKC", text)
    # A hyphen at a line's end may be the word's own or the typesetter's: none counts.
    text = re.sub(r"(?<=\w)[-\u2010\u2011](?:\s*\n\s*)?(?=\w)", "", text)
    text = re.sub(r"['’\u00ad]", "", text)
    return " ".join(re.sub(r"[\W_]+", " ", text).split()).casefold()
