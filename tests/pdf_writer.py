"""Writes small PDF files for tests and benchmarks: lines of text on pages, bookmarks, no more.

Also broken ones: a page without text, and whatever a test does to the bytes.
"""

from __future__ import annotations

import zlib

_LINE_CHARS, _LEADING = 90, 13
_FIELD = (
    b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (%d) /V (%s) /Rect [50 1900 250 1920] "
    b"/DA (/F1 10 Tf) >>"
)


def write_pdf(
    pages: list[str], titles: dict[int, str] | None = None, filled: dict[int, str] | None = None
) -> bytes:
    """A PDF with a page for each text (Latin-1; an empty one has no text at all), in Helvetica.

    titles: bookmarks by page index. filled: by page index too, what a field of a form holds.
    """
    titles, filled = titles or {}, filled or {}
    objects: list[bytes] = [b"", b""]  # the catalog and the page tree come last

    def add(body: bytes) -> int:
        objects.append(body)
        return len(objects)

    font = add(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    kids, fields = [], []
    for index, text in enumerate(pages):
        annotations = b""
        if index in filled:
            fields.append(add(_FIELD % (index, filled[index].encode())))
            annotations = b"/Annots [%d 0 R] " % fields[-1]
        content = zlib.compress(_content(text))
        length = f"<< /Length {len(content)} /Filter /FlateDecode >>".encode()
        stream = add(length + b"\nstream\n" + content + b"\nendstream")
        kids.append(
            add(
                b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 2000] /Contents %d 0 R %s"
                b"/Resources << /Font << /F1 %d 0 R >> >> >>" % (stream, annotations, font)
            )
        )
    outlines = _add_outlines(add, kids, titles, len(objects))
    form = b" /AcroForm << /Fields [%s] /DR << /Font << /F1 %d 0 R >> >> >>"
    form = form % (_references(fields), font) if fields else b""
    objects[0] = b"<< /Type /Catalog /Pages 2 0 R%s%s >>" % (outlines, form)
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (_references(kids), len(kids))
    return _assemble(objects)


def _references(numbers: list[int]) -> bytes:
    return b" ".join(b"%d 0 R" % number for number in numbers)


def _content(text: str) -> bytes:
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if len(line) + len(word) > _LINE_CHARS:
                lines.append(line)
                line = ""
            line += f" {word}" if line else word
        lines.append(line)
    if not text:
        return b"0 0 100 100 re f"
    shown = b""
    for line in lines:
        raw = line.encode("cp1252", "replace")
        for char in (b"\\", b"(", b")"):
            raw = raw.replace(char, b"\\" + char)
        shown += b"(" + raw + b") Tj T*\n"
    return b"BT /F1 10 Tf %d TL 50 1950 Td\n" % _LEADING + shown + b"ET"


def _add_outlines(add, kids: list[int], titles: dict[int, str], last: int) -> bytes:
    if not titles:
        return b""
    root, count = last + 1, len(titles)
    add(b"<< /Type /Outlines /First %d 0 R /Last %d 0 R >>" % (root + 1, root + count))
    for number, (index, title) in enumerate(sorted(titles.items()), 1):
        links = b"/Prev %d 0 R " % (root + number - 1) if number > 1 else b""
        links += b"/Next %d 0 R " % (root + number + 1) if number < count else b""
        add(
            b"<< /Title (%s) /Parent %d 0 R %s/Dest [%d 0 R /Fit] >>"
            % (title.encode("latin-1"), root, links, kids[index])
        )
    return b" /Outlines %d 0 R" % root


def _assemble(objects: list[bytes]) -> bytes:
    out, offsets = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n" % (len(objects) + 1)
    return out + b"%d\n%%%%EOF\n" % start
