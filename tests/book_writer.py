"""Writes small EPUB and zip files for tests, good ones and bad ones."""

from __future__ import annotations

import io
import zipfile

CONTAINER = """<?xml version="1.0"?>
<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0">
<rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>"""


def write_zip(members: dict[str, str | bytes], level: int = 9) -> bytes:
    """An archive with these members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def write_epub(chapters: dict[str, str], **replaced: str | bytes) -> bytes:
    """An EPUB with a file for each chapter: name without .xhtml -> body.

    replaced: members to replace or add, "/" and "." in their names written as "__" and "_0_".
    """
    items = "".join(
        f'<item id="i{n}" href="{name}.xhtml" media-type="application/xhtml+xml"/>'
        for n, name in enumerate(chapters)
    )
    spine = "".join(f'<itemref idref="i{n}"/>' for n in range(len(chapters)))
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
        f"<manifest>{items}</manifest><spine>{spine}</spine></package>"
    )
    members: dict[str, str | bytes] = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": CONTAINER,
        "OEBPS/book.opf": package,
    }
    for name, body in chapters.items():
        members[f"OEBPS/{name}.xhtml"] = (
            f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>t</title>'
            f"<style>p {{}}</style></head><body>{body}</body></html>"
        )
    for name, data in replaced.items():
        members[name.replace("__", "/").replace("_0_", ".")] = data
    return write_zip(members)
