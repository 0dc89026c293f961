"""EPUB: its chapters in reading order, by the standard library alone. Runs in the worker.

Nothing outside the archive is ever fetched, and entities are not expanded.
"""

from __future__ import annotations

import posixpath
import xml.etree.ElementTree as ET
from urllib.parse import unquote, urlsplit

from ..errors import InputError
from .archive import Archive
from .document import Place
from .extract import Extract, Report
from .html_text import html_text
from .limits import MAX_SECTIONS, MAX_TEXT_CHARS
from .page_ranges import PageRanges
from .xml_tree import name_of

_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
_XHTML = ("application/xhtml+xml", "text/html")


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """A chapter for each file of the spine that holds text, titled by its first heading."""
    archive = Archive(data)
    paths = _reading_order(archive)
    _refuse_protected(archive, paths)
    found, parts, size, missing, number = Extract(""), [], 0, [], 0
    for done, path in enumerate(paths):
        report(done, len(paths))
        if path not in archive.names:
            missing.append(path)
            continue
        text, sections = html_text(_decoded(archive.read(path)))
        if not text:
            continue
        number += 1
        title = sections[0].title if sections else ""
        found.places.append(Place(size, "chapter", number, title))
        inner = [place for place in sections if place.start > 0]
        # Headings inside a chapter are places to cut at, and cited as the chapter.
        found.places += [Place(size + p.start, "chapter", number, p.title) for p in inner]
        parts.append(text + "\n\n")
        size += len(parts[-1])
        if size > MAX_TEXT_CHARS or len(found.places) > MAX_SECTIONS:
            break  # the former is refused by whoever called
    report(len(paths), len(paths))
    if missing:
        found.warnings.append(f"{len(missing)} of {len(paths)} chapters are missing in the file.")
    found.text = "".join(parts).rstrip("\n") + "\n"
    return found


def _reading_order(archive: Archive) -> list[str]:
    container = _xml(archive.read(_CONTAINER), _CONTAINER)
    root = next((e.get("full-path") for e in container.iter() if name_of(e) == "rootfile"), None)
    if root is None:
        raise InputError("is a damaged EPUB: it does not say where its contents are")
    package = _xml(archive.read(root), root)
    items = {
        e.get("id"): e.get("href", "")
        for e in package.iter()
        if name_of(e) == "item" and e.get("media-type", "") in _XHTML
    }
    wanted = [e.get("idref") for e in package.iter() if name_of(e) == "itemref"]
    base = posixpath.dirname(root)
    hrefs = [items[i] for i in wanted if i in items] or list(items.values())
    paths = [posixpath.normpath(posixpath.join(base, unquote(urlsplit(h).path))) for h in hrefs]
    if not paths:
        raise InputError("is a damaged EPUB: it names no chapters")
    return list(dict.fromkeys(paths))


def _refuse_protected(archive: Archive, paths: list[str]) -> None:
    """Shops encrypt chapters; fonts alone may be scrambled in free books too."""
    if _ENCRYPTION not in archive.names:
        return
    listed = _xml(archive.read(_ENCRYPTION), _ENCRYPTION).iter()
    hidden = {unquote(e.get("URI", "")) for e in listed if name_of(e) == "CipherReference"}
    if hidden.intersection(paths):
        raise InputError("is protected by its shop (DRM): its chapters are encrypted")


def _xml(data: bytes, name: str) -> ET.Element:
    text = _decoded(data)
    if "<!ENTITY" in text:
        raise InputError(f"declares entities of its own in {name}, which no EPUB needs; not read")
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise InputError(f"is a damaged EPUB: {name}: {error}") from None


def _decoded(data: bytes) -> str:
    """EPUB allows UTF-8 and UTF-16 with a mark; older files are seldom anything else."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("windows-1252", "replace")
