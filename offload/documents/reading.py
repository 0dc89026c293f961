"""Reads what `ask` and `summarize` are asked about: a file or standard input, of any known kind.

A document becomes text with places, or one InputError that says what is wrong with the file and
what would help.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..errors import InputError
from . import limits, parsing
from .document import Document, Place
from .page_ranges import PageRanges
from .plain import decoded, markdown_sections
from .sniff import sniff

STANDARD_INPUT = "-"
_PAGED = ("pdf", "pptx", "odp")


def read_document(
    path: str | os.PathLike[str],
    stdin: IO[Any] | None = None,
    *,
    pages: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    keep_in: Path | None = None,
) -> Document:
    """The document at `path`; "-" is standard input (`stdin`, else the process's own).

    PDF, EPUB, Office and OpenDocument files, RTF, HTML, Markdown and text are told apart by their
    content. Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. pages: "10-40", "7", "90-"
    or several with commas, of a PDF or of slides. on_progress: called with the pages (or parts)
    done and their number. keep_in: a private folder where the text of formats that take time is
    kept, and found again.

    InputError for what is not there, cannot be read, is a folder, has no text in it, is encrypted,
    damaged, beyond the limits, or of a kind that needs `pip install 'ebbtide[docs]'`.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is {path!r}; allowed are a file's name, or - for standard input")
    ranges = None
    if pages is not None:
        if not isinstance(pages, str):
            raise InputError(f"pages is {pages!r}; allowed are texts such as '10-40', '7' or '90-'")
        try:
            ranges = PageRanges.parse(pages)
        except ValueError as error:
            raise InputError(f"--pages: {error}") from None
    if not os.fspath(path):
        raise InputError("'' is not the name of a file; name one, or - for standard input")
    if os.fspath(path) == STANDARD_INPUT:
        source = name = "standard input"
        data = _read_stream(stdin)
    else:
        source, name = str(path), Path(path).name
        data = _read_file(Path(path))
    kind = "text" if isinstance(data, str) else sniff(source, data, name)
    if ranges is not None and kind not in _PAGED:
        raise InputError(
            f"{source} has no pages to choose from; --pages is for PDF, PPTX and ODP files"
        )
    if not isinstance(data, str) and kind in parsing.FORMATS:
        found = parsing.parse(source, kind, data, ranges, on_progress, keep_in)
        return Document(name=name, format=kind, **found)
    text = data if isinstance(data, str) else decoded(source, data)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        what = "is empty" if not text else "holds nothing but white space"
        raise InputError(f"{source} {what}")
    if len(text) > limits.MAX_TEXT_CHARS:
        most = limits.MAX_TEXT_CHARS // 2**20
        raise InputError(f"{source} holds more than {most} million characters, the most allowed")
    places: tuple[Place, ...] = ()
    if kind == "markdown" or name == "standard input":
        places = markdown_sections(text)
    return Document(name, text, "markdown" if places else kind, places)


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            if stat.S_ISDIR(os.fstat(file.fileno()).st_mode):
                raise IsADirectoryError
            data = file.read(limits.MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: name the files in it") from None
    except PermissionError:
        if path.is_dir():  # what Windows says of folders
            raise InputError(f"{path} is a folder: name the files in it") from None
        raise InputError(f"{path} may not be read: permission denied") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot be read: {reason}") from None
    return _limited(str(path), data)


def _read_stream(stdin: IO[Any] | None) -> bytes | str:
    if stdin is None:
        stdin = getattr(sys.stdin, "buffer", sys.stdin)  # None where there is no standard input
    if stdin is None:
        raise InputError("standard input is closed: name a file")
    try:
        data = stdin.read(limits.MAX_BYTES + 1)
    except IsADirectoryError:
        raise InputError("standard input is a folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"standard input cannot be read: {error}") from None
    return _limited("standard input", data)


def _limited(source: str, data: Any) -> Any:
    if len(data) > limits.MAX_BYTES:
        most = limits.MAX_BYTES // 2**20
        raise InputError(f"{source} is larger than {most} MiB, the most that is read")
    return data
