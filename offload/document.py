"""Reads what `ask` and `summarize` are asked about: plain text, Markdown, standard input.

A document becomes a name and a text, or one InputError that says what is wrong with the file and
what would help. Knows no formats but text: others are recognised only to be refused by name.
"""

from __future__ import annotations

import codecs
import os
import shlex
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import InputError

STANDARD_INPUT = "-"
MAX_BYTES = 256 * 2**20  # some 60 million tokens, beyond any model's context

# (first bytes, what that is, what makes text of it)
OTHER_FORMATS = (
    (b"%PDF-", "a PDF", "convert it first: pdftotext -layout FILE FILE.txt"),
    (
        b"PK\x03\x04",
        "a zip archive (docx, odt, epub, ...)",
        "convert it first: pandoc -t plain FILE",
    ),
    (b"\xd0\xcf\x11\xe0", "an old Office file", "save it as text, or convert it with LibreOffice"),
    (b"{\\rtf", "an RTF file", "save it as text, or convert it first: pandoc -t plain FILE"),
    (b"\x1f\x8b", "gzip-compressed", "unpack it first: gunzip FILE"),
    (b"BZh", "bzip2-compressed", "unpack it first: bunzip2 FILE"),
    (b"\xfd7zXZ\x00", "xz-compressed", "unpack it first: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it first: unzstd FILE"),
    (b"\x7fELF", "a program", ""),
    (b"MZ\x90\x00", "a program", ""),
    (b"\x89PNG", "an image", ""),
    (b"\xff\xd8\xff", "an image", ""),
    (b"GIF8", "an image", ""),
    (b"GGUF", "a model's weights", ""),
    (b"SQLite format 3\x00", "a database", ""),
)
# UTF-32's mark begins with UTF-16's, so it is looked for first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)


@dataclass(frozen=True)
class Document:
    """`name`: the file's name, or "standard input". `text`: not blank, lines end in \\n alone."""

    name: str
    text: str


def read_document(path: str | os.PathLike[str], stdin: IO[Any] | None = None) -> Document:
    """The document at `path`; "-" is standard input (`stdin`, else the process's own).

    The text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. InputError for what is not there,
    cannot be read, is a folder, has no text in it, or is not text.
    """
    if os.fspath(path) == STANDARD_INPUT:
        return _document("standard input", _read_stream(stdin))
    return _document(str(path), _read_file(Path(path)), Path(path).name)


def _document(source: str, data: bytes | str, name: str | None = None) -> Document:
    text = data if isinstance(data, str) else _decoded(source, data)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        what = "is empty" if not text else "holds nothing but white space"
        raise InputError(f"{source} {what}")
    return Document(name or source, text)


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            if stat.S_ISDIR(os.fstat(file.fileno()).st_mode):
                raise IsADirectoryError
            data = file.read(MAX_BYTES + 1)
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
        data = stdin.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise InputError("standard input is a folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"standard input cannot be read: {error}") from None
    return _limited("standard input", data)


def _limited(source: str, data: Any) -> Any:
    if len(data) > MAX_BYTES:
        raise InputError(f"{source} is larger than {MAX_BYTES // 2**20} MiB, the most that is read")
    return data


def _decoded(source: str, data: bytes) -> str:
    # Some programs write a line or two before a PDF's first bytes.
    head = data[:1024].lstrip()
    for magic, what, remedy in OTHER_FORMATS:
        if data.startswith(magic) or (magic == b"%PDF-" and head.startswith(magic)):
            advice = remedy.replace("FILE", _file(source))
            hint = f"; {advice}" if advice else ""
            raise InputError(f"{source} is {what}, and only plain text can be read yet{hint}")
    encoding, shown = "utf-8", "UTF-8"
    for mark, marked_encoding, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            encoding, shown = marked_encoding, name
            break
    if encoding.startswith("utf-8") and (at := data.find(b"\0")) >= 0:
        raise InputError(
            f"{source} is binary, or UTF-16 without a byte order mark: byte {at} is zero. Text in "
            f"another encoding is converted by: iconv -f UTF-16LE -t UTF-8 {_file(source)}"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the mark.
        at = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
        raise InputError(
            f"{source} is not {shown}: byte {at} (0x{data[at]:02x}) does not fit. Text in another "
            f"encoding is converted by: iconv -f WINDOWS-1252 -t UTF-8 {_file(source)}"
        ) from None


def _file(source: str) -> str:
    """How a command names it."""
    return "FILE" if source == "standard input" else shlex.quote(source)
