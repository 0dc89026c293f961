"""Writes small Office and OpenDocument files for tests. Not tests."""

from __future__ import annotations

import io
import zipfile

from book_writer import write_zip

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_ODF = "urn:oasis:names:tc:opendocument:xmlns:"
_NAMES = " ".join(
    f'xmlns:{short}="{_ODF}{full}:1.0"'
    for short, full in {
        **{"office": "office", "text": "text", "table": "table", "draw": "drawing"},
        **{"svg": "svg-compatible", "style": "style", "presentation": "presentation"},
        "chart": "chart",
    }.items()
)
_NAMES += ' xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:loext="urn:loext"'
_KINDS = {"odt": "text", "ods": "spreadsheet", "odp": "presentation"}


def members_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def word_part(root, content):
    """A part of a DOCX file."""
    names = f'xmlns:w="{WORD}" xmlns:r="{RELATIONS}" xmlns:m="urn:math" xmlns:mc="urn:mc"'
    return f'<w:{root} {names} xmlns:v="urn:v">{content}</w:{root}>'


def write_docx(body, **parts):
    """body: WordprocessingML. parts: a part's name without .xml, such as footnotes or header1 ->
    what is in it; its relation has that name for an id."""
    roots = {name: "hdr" if name.startswith("header") else name for name in parts}
    related = "".join(
        f'<Relationship Id="{name}" Type="{RELATIONS}/{name.rstrip("0123456789")}" '
        f'Target="{name}.xml"/>'
        for name in parts
    )
    main = f'<Relationship Id="a" Type="{RELATIONS}/officeDocument" Target="/word/document.xml"/>'
    members = {
        "[Content_Types].xml": "<Types/>",
        "_rels/.rels": f"<Relationships>{main}</Relationships>",
        "word/document.xml": word_part("document", f"<w:body>{body}</w:body>"),
        "word/_rels/document.xml.rels": f"<Relationships>{related}</Relationships>",
    }
    for name, content in parts.items():
        members[f"word/{name}.xml"] = word_part(roots[name], content)
    return write_zip(members)


def open_document(root, content):
    """A part of an OpenDocument file."""
    return f"<office:{root} {_NAMES}>{content}</office:{root}>"


def write_open_document(format, body, **replaced):
    """format: odt, ods or odp. body: what is in its body; replaced: parts by their names."""
    kind = _KINDS[format]
    content = f"<office:body><office:{kind}>{body}</office:{kind}></office:body>"
    members = {
        "mimetype": f"application/vnd.oasis.opendocument.{kind}",
        "content.xml": open_document("document-content", content),
        "META-INF/manifest.xml": "<manifest/>",
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, part in {**members, **replaced}.items():
            archive.writestr(name, part, zipfile.ZIP_DEFLATED if len(part) > 10_000 else None)
    return out.getvalue()
