"""PDF: the text of each page, by pypdfium2, or by pypdf where that is not installed or gives up.

Runs in the worker. Pages count from 1 as they lie in the file, whatever is printed on them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

from ..errors import InputError
from .document import Place
from .extract import Extract, Report
from .limits import MAX_PAGES, MAX_TEXT_CHARS
from .page_ranges import PageRanges, show_pages

_PASSWORD_ERROR = 4  # pdfium's number
# Line breaks inside a hyphenated word come as one of these, with or without the break.
_HYPHENS = re.compile("[\x02\ufffe\u00ad]\n?")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_BLANKS_AT_END = re.compile(r"[ \t]+\n")
_MOST_BOOKMARKS = 5_000
_FULL_LINE = 0.75  # of a page's width: ragged lines are broken somewhere in the last quarter
_FULL_END = 0.9  # the same of a line that ends a sentence, and maybe its paragraph
_LEAST_WIDTH = 50  # characters: a page of short lines alone was broken by whoever wrote it
_SENTENCE_ENDS = tuple(".!?:")
_LIST_ITEM = re.compile(r"(?:\d{1,3}|[a-zA-Z])[.)]\s")


class _Pdf(Protocol):
    num_pages: int

    def text(self, index: int) -> str: ...

    def titles(self) -> dict[int, str]: ...


class _Encrypted(Exception):
    pass


class _Pdfium:
    def __init__(self, data: bytes):
        import pypdfium2

        try:
            self._pdf = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            if getattr(error, "err_code", None) == _PASSWORD_ERROR:
                raise _Encrypted from None
            raise
        self.num_pages = len(self._pdf)
        self._pdf.init_forms()  # fields that say how they look by their value alone get a look

    def text(self, index: int) -> str:
        import pypdfium2.raw as pdfium

        page = self._pdf[index]
        # What was filled into a form, and notes, are no part of a page until it is flat.
        if pdfium.FPDFPage_Flatten(page, pdfium.FLAT_NORMALDISPLAY) == pdfium.FLATTEN_SUCCESS:
            page.close()
            page = self._pdf[index]
        try:
            text_page = page.get_textpage()
            try:
                return text_page.get_text_bounded()
            finally:
                text_page.close()
        finally:
            page.close()

    def titles(self) -> dict[int, str]:
        """Bookmarks by page index; the first one of a page."""
        found: dict[int, str] = {}
        for number, bookmark in enumerate(self._pdf.get_toc(max_depth=3)):
            if number == _MOST_BOOKMARKS:
                break
            target = bookmark.get_dest()
            index = None if target is None else target.get_index()
            if index is not None:
                found.setdefault(index, " ".join(bookmark.get_title().split()))
        return found


class _Pypdf:
    def __init__(self, data: bytes):
        import pypdf

        self._pdf = pypdf.PdfReader(io.BytesIO(data))
        if self._pdf.is_encrypted and not self._pdf.decrypt(""):
            raise _Encrypted
        self.num_pages = len(self._pdf.pages)

    def text(self, index: int) -> str:
        return self._pdf.pages[index].extract_text()

    def titles(self) -> dict[int, str]:
        return {}


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """Each page that was asked for; a blank line ends a page."""
    pdf = _open(data)
    if not pdf.num_pages:
        raise InputError("is a PDF without pages")
    if pdf.num_pages > MAX_PAGES:
        raise InputError(f"has {pdf.num_pages:,} pages, and {MAX_PAGES:,} are the most")
    numbers = list(range(1, pdf.num_pages + 1))
    if ranges is not None:
        try:
            numbers = ranges.chosen(pdf.num_pages)
        except ValueError as error:
            raise InputError(str(error)) from None
    try:
        titles = pdf.titles()
    except Exception:  # a broken outline takes nothing from the text
        titles = {}
    found = Extract("", num_pages=pdf.num_pages)
    parts: list[str] = []
    size, empty, broken = 0, [], []
    spare = _Spare(data, pdf)
    for done, number in enumerate(numbers):
        report(done, len(numbers))
        text = spare.text(number - 1)
        if text is None:
            broken.append(number)
            continue
        text = _clean(text)
        if not text:
            empty.append(number)
            continue
        found.places.append(Place(size, "page", number, titles.get(number - 1, "")))
        parts.append(text + "\n\n")
        size += len(parts[-1])
        if size > MAX_TEXT_CHARS:
            break  # refused by whoever called
    report(len(numbers), len(numbers))
    if not parts:
        _refuse_empty(numbers, empty, broken)
    if empty:
        found.warnings.append(
            f"No text on {len(empty)} of {len(numbers)} pages (scanned, pictures or blank): "
            f"{show_pages(empty)}."
        )
    if broken:
        found.warnings.append(f"These pages are damaged and left out: {show_pages(broken)}.")
    found.text = "".join(parts).rstrip("\n") + "\n"
    return found


def _refuse_empty(numbers: list[int], empty: list[int], broken: list[int]) -> None:
    if len(broken) == len(numbers):
        raise InputError("is damaged: none of its pages can be read")
    which = "its page has" if len(numbers) == 1 else f"its {len(numbers):,} pages have"
    raise InputError(
        f"has no text layer: {which} pictures of text at best, as scans do. Give it one first: "
        "ocrmypdf FILE.pdf OUT.pdf"
    )


def _open(data: bytes) -> _Pdf:
    """By the first library that can. InputError when none can."""
    reasons = []
    with _password_told():
        for library in _LIBRARIES:
            try:
                return library(data)
            except ImportError:
                continue
            except (_Encrypted, MemoryError):
                raise
            except Exception as error:
                if "encrypt" in str(error).lower() or "cryptography" in str(error).lower():
                    raise _Encrypted from None
                reasons.append(" ".join(str(error).split())[:200])
    raise InputError(f"is a damaged PDF, or none: {reasons[0] if reasons else 'no library'}")


@contextmanager
def _password_told() -> Iterator[None]:
    try:
        yield
    except _Encrypted:
        raise InputError(
            "is encrypted and needs a password. Make a copy without one: "
            "qpdf --decrypt --password=... FILE.pdf OUT.pdf"
        ) from None


class _Spare:
    """Reads pages, and tries the other library for one that the first cannot read."""

    def __init__(self, data: bytes, pdf: _Pdf):
        self._data, self._pdf = data, pdf
        self._other: _Pdf | None = None

    def text(self, index: int) -> str | None:
        """None when neither can."""
        try:
            return self._pdf.text(index)
        except MemoryError:
            raise
        except Exception:
            pass
        try:
            if self._other is None:
                self._other = _Pypdf(self._data)
            return self._other.text(index)
        except MemoryError:
            raise
        except Exception:
            return None


_LIBRARIES: tuple[Callable[[bytes], Any], ...] = (_Pdfium, _Pypdf)


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROLS.sub("", _HYPHENS.sub("", text))
    return _flowing(_BLANKS_AT_END.sub("\n", text).strip())


def _flowing(text: str) -> str:
    """Lines that the page's width broke are one again; short lines, lists and numbers stay."""
    lines = text.split("\n")
    width = sorted(map(len, lines))[-1 - len(lines) // 10]  # a few may stick out
    width = max(width, _LEAST_WIDTH)
    out = lines[0]
    for before, line in pairwise(lines):
        full = _FULL_END if before[-1:] in _SENTENCE_ENDS else _FULL_LINE
        is_broken = (
            len(before) >= full * width
            and line[:1].isalnum()
            and not _LIST_ITEM.match(line)
            and not _is_numbers(before)
            and not _is_numbers(line)
        )
        out += (" " if is_broken else "\n") + line
    return out


def _is_numbers(line: str) -> bool:
    """A row of a table, most likely."""
    return sum(char.isdigit() for char in line) > 0.3 * len(line)
