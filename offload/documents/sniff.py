"""What kind of file some bytes are: by their content first, by the name's extension second.

Formats that are not read are recognised only to be refused by name, with what would help.
"""

from __future__ import annotations

import re
import shlex
from pathlib import PurePath

from ..errors import InputError

# (first bytes, what that is, what makes text of it)
OTHER_FORMATS = (
    (b"\xd0\xcf\x11\xe0", "an old Office file", "save it as docx or text with LibreOffice"),
    (b"\x1f\x8b", "gzip-compressed", "unpack it first: gunzip FILE"),
    (b"BZh", "bzip2-compressed", "unpack it first: bunzip2 FILE"),
    (b"\xfd7zXZ\x00", "xz-compressed", "unpack it first: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it first: unzstd FILE"),
    (b"\x7fELF", "a program", ""),
    (b"MZ\x90\x00", "a program", ""),
    (b"%!PS", "a PostScript file", "convert it first: ps2pdf FILE"),
    (b"\x89PNG", "an image", "read its text first: tesseract FILE out"),
    (b"\xff\xd8\xff", "an image", "read its text first: tesseract FILE out"),
    (b"GIF8", "an image", ""),
    (b"GGUF", "a model's weights", ""),
    (b"SQLite format 3\x00", "a database", ""),
)
# What an Office file with a password has in it, which is packed as the old ones are.
_ENCRYPTED_OFFICE = "EncryptedPackage".encode("utf-16-le")
_READABLE = (
    "PDF, EPUB, DOCX, PPTX, XLSX, ODT, ODP, ODS, RTF, HTML, Markdown and plain text can be read"
)
# What an Office file of each kind has in it.
_MAIN_PARTS = (
    ("docx", b"word/document"),  # some programs number it
    ("pptx", b"ppt/presentation.xml"),
    ("xlsx", b"xl/workbook.xml"),
)
# What an OpenDocument file says that it is, and how that goes on.
_OPEN_DOCUMENT = b"application/vnd.oasis.opendocument."
_OPEN_DOCUMENTS = (("odt", b"text"), ("ods", b"spreadsheet"), ("odp", b"presentation"))
_HTML_START = re.compile(rb"(?:\s|<!--.*?-->|<\?.*?\?>)*<(?:!doctype\s+html|html)\b", re.I | re.S)
_HTML_TAG = re.compile(rb"<(?:p|div|h[1-6]|body|table|ul|span|br|a)\b", re.I)
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def sniff(source: str, data: bytes, name: str) -> str:
    """A key of `parsing.FORMATS`, markdown or text (which may turn out to be none).

    source: for messages; name: whose extension counts. Raises InputError for formats that are not
    read.
    """
    head = data[:1024].lstrip()
    # Some programs write a line or two before a PDF's first bytes.
    if head.startswith(b"%PDF-") or (b"%PDF-" in data[:1024] and b"\0" in data[:4096]):
        return "pdf"
    if head.startswith(b"{\\rtf"):
        return "rtf"
    if data.startswith(b"PK\x03\x04"):
        return _kind_of_archive(source, data)
    if data.startswith(OTHER_FORMATS[0][0]) and _ENCRYPTED_OFFICE in data:
        raise InputError(f"{source} is encrypted with a password; save a copy without one")
    for magic, what, remedy in OTHER_FORMATS:
        if data.startswith(magic):
            advice = remedy.replace("FILE", file_in_command(source))
            raise InputError(f"{source} is {what}; {advice or 'only ' + _READABLE}")
    suffix = PurePath(name).suffix.lower()
    start = data[:4096]
    if start.startswith(_BYTE_ORDER_MARKS):
        start = start[2:].lstrip(b"\xbf").replace(b"\0", b"")
    if _HTML_START.match(start):
        return "html"
    if suffix in (".html", ".htm", ".xhtml") and _HTML_TAG.search(data[:65536]):
        return "html"
    if suffix in (".md", ".markdown", ".mkd"):
        return "markdown"
    return "text"


def _kind_of_archive(source: str, data: bytes) -> str:
    # Names stand in an archive as they are. Its directory is read in the worker: a hostile one
    # takes gigabytes. Here it is looked for: what is embedded has such names too, before it.
    end = data.rfind(b"PK\x05\x06")
    start = int.from_bytes(data[end + 16 : end + 20], "little") if end >= 0 else 0
    names = data[start:] if start < end else data
    if b"META-INF/container.xml" in names:
        return "epub"
    for kind, part in _MAIN_PARTS:
        if part in names:
            return kind
    if data[30:38] == b"mimetype":
        for kind, name in _OPEN_DOCUMENTS:
            if data.startswith(_OPEN_DOCUMENT + name, 38):
                return kind
        raise InputError(
            f"{source} is an OpenDocument file of another kind; save it as odt, odp, ods or PDF "
            "first"
        )
    if b"[Content_Types].xml" in names:
        raise InputError(
            f"{source} is an Office file of another kind; save it as docx, pptx, xlsx or PDF first"
        )
    raise InputError(f"{source} is a zip archive: unpack it and name the documents in it")


def file_in_command(source: str) -> str:
    """How a command names it."""
    return "FILE" if source == "standard input" else shlex.quote(source)
