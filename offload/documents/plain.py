"""Text and Markdown: bytes to characters, headings to places."""

from __future__ import annotations

import codecs
import re

from ..errors import InputError
from .document import Place
from .limits import MAX_SECTIONS
from .sniff import file_in_command

# UTF-32's mark begins with UTF-16's, so it is looked for first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
# A fence; a heading behind signs; or one alone between an empty line and a line of signs.
_LINE = re.compile(
    r"^(?:(?P<fence>```|~~~)|#{1,6}[ \t]+(?P<title>\S[^\n]*)"
    r"|(?:(?<=\n\n)|\A) {0,3}(?P<underlined>(?![-+*>|]|\d+[.)])[^\s#][^\n]{0,200})"
    r"\n(?:={2,}|-{3,})[ \t]*$)",
    re.MULTILINE,
)


def decoded(source: str, data: bytes) -> str:
    """The characters: UTF-8, or UTF-16 or UTF-32 with a byte order mark. InputError for others."""
    encoding, shown = "utf-8", "UTF-8"
    for mark, marked_encoding, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            encoding, shown = marked_encoding, name
            break
    if data and not data.strip(b"\0"):
        raise InputError(f"{source} holds nothing but zeros: it was damaged, or never written")
    if encoding.startswith("utf-8") and (at := data.find(b"\0")) >= 0:
        raise InputError(
            f"{source} is binary, or UTF-16 without a byte order mark: byte {at} is zero. Text in "
            f"another encoding is converted by: iconv -f UTF-16LE -t UTF-8 "
            f"{file_in_command(source)}"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the mark.
        at = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
        raise InputError(
            f"{source} is not {shown}: byte {at} (0x{data[at]:02x}) does not fit. Text in another "
            f"encoding is converted by: iconv -f WINDOWS-1252 -t UTF-8 {file_in_command(source)}"
        ) from None


def markdown_sections(text: str) -> tuple[Place, ...]:
    """The sections that headings begin; those in fenced code are none."""
    places: list[Place] = []
    fence = None
    for found in _LINE.finditer(text):
        if found["fence"]:
            fence = None if fence == found["fence"] else fence or found["fence"]
        elif fence is None:
            title = (found["underlined"] or found["title"].rstrip("# \t")).rstrip()
            places.append(Place(found.start(), "section", len(places) + 1, title))
            if len(places) == MAX_SECTIONS:
                break
    return tuple(places)
