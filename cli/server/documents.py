"""Documents and files within a message, as text under their titles, as `ebbtide ask` joins files.

Text alone: a parser of PDFs takes memory of its own, which the server's budget has no room for
while a model is loaded. Nothing is fetched, and no files are kept.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from .bad_request import BadRequest, kind_of

_NO_PDF = (
    "PDFs are not read here, because reading one takes memory beside the model's: 'ebbtide ask "
    "QUESTION FILE.pdf' reads them, or send the text of it"
)
_NOT_FETCHED = "files are not fetched and not kept here; send the text itself"


def titled(text: str, *above: str) -> str:
    """above: a title, then what else is told before the text; empty ones are left out."""
    title, *notes = above
    heading = f"# {' '.join(title.split())}" if title.strip() else ""
    return "\n\n".join(filter(None, [heading, *notes, text]))


def check_source(source: dict[str, Any], where: str) -> None:
    """Of a document of Anthropic's. Raises BadRequest for all but plain text and a content."""
    kind, medium = source.get("type"), source.get("media_type", "text/plain")
    if kind == "content":
        return
    if kind == "text" and medium == "text/plain" and isinstance(source.get("data"), str):
        return
    reasons = {
        "text": "its 'data' must be a text of the media type text/plain",
        "base64": _NO_PDF,
        "url": _NOT_FETCHED,
        "file": _NOT_FETCHED,
    }
    reason = reasons.get(kind, "there is none") if isinstance(kind, str) else "that is no text"
    raise BadRequest(
        f"{where} of the type {kind!r} cannot be read: {reason}. Allowed are "
        '{"type": "text", "media_type": "text/plain", "data": ...} and '
        '{"type": "content", "content": ...}.',
        param=where,
    )


def file_text(file: Any, where: str) -> str:
    """Of a file of OpenAI's: {"filename": title, "file_data": base64}. Raises BadRequest for what
    is no text in UTF-8."""
    if not isinstance(file, dict):
        raise BadRequest(f"{where}: a file must be an object, not {kind_of(file)}.", param=where)
    data, title = file.get("file_data"), file.get("filename") or ""
    if not isinstance(data, str):
        raise BadRequest(
            f"{where}: a file must have its 'file_data', a text in base64, not {kind_of(data)}: "
            f"{_NOT_FETCHED}.",
            param=where,
        )
    if not isinstance(title, str):
        raise BadRequest(f"{where}: 'filename' must be a text, not {kind_of(title)}.", param=where)
    return titled(_decoded(data, where), title)


def _decoded(data: str, where: str) -> str:
    """data: base64, with or without a URL's beginning, data:text/plain;base64, before it."""
    begin, comma, rest = data.partition(",")
    try:
        raw = base64.b64decode(rest if comma else begin, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{where}: 'file_data' is not base64: {error}.", param=where) from None
    if raw.startswith(b"%PDF"):
        raise BadRequest(f"{where}: the file is a PDF. {_NO_PDF}.", param=where)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadRequest(
            f"{where}: the file is not text in UTF-8, and other files are not read here; "
            "'ebbtide ask QUESTION FILE' reads documents of many kinds.",
            param=where,
        )
    return text
