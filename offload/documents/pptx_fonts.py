"""Fonts of signs in PPTX files: what they show, in place of letters.

A font is named by a run, or for a level of paragraphs by their shape or the placeholders that it
comes from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .symbol_fonts import PRIVATE_USE, is_symbol_font, shown, tick

_A = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_BODY = "txBody"
_LEVELS = tuple("012345678")


def show_signs(shapes: Any) -> None:
    """Put signs in place of letters in all texts of a slide or of its notes, and boxes and ticks
    before the paragraphs that have such bullets. shapes: the library's."""
    bases = {shape._element: [*_bases(shape)] for shape in shapes if shape.is_placeholder}
    for body in shapes._spTree.iter("{*}" + _BODY):
        styles = [*body.iterchildren(_A + "lstStyle")]
        for base in bases.get(body.getparent(), ()):
            styles += base.iterfind(f"{{*}}{_BODY}/{_A}lstStyle")
        for paragraph in body.iterchildren(_A + "p"):
            _show(paragraph, styles)


def _bases(shape: Any) -> Iterator[Any]:
    """The placeholders of the layout and of the master that one comes from."""
    with contextlib.suppress(Exception):  # of a kind that the library does not know
        while (shape := getattr(shape, "_base_placeholder", None)) is not None:
            yield shape._element


def _show(paragraph: Any, styles: list[Any]) -> None:
    own = paragraph.find(_A + "pPr")
    level = "0" if own is None else own.get("lvl", "0")
    name = f"{_A}lvl{int(level) + 1 if level in _LEVELS else 0}pPr"  # which counts from 1
    levels = [found for style in styles for found in style.iterchildren(name)]
    defaults = [part for found in levels for part in found.iterchildren(_A + "defRPr")]
    texts = [text for text in paragraph.iter(_A + "t") if text.text]
    for text in texts:
        named = [*text.getparent().iterchildren(_A + "rPr"), *defaults]
        text.text = _signs(_typeface(named, "latin"), _typeface(named, "sym"), text.text)
    if texts and (bullet := _bullet(levels if own is None else [own, *levels])):
        texts[0].text = f"{bullet} {texts[0].text}"


def _signs(latin: str, symbols: str, text: str) -> str:
    """Of a font for symbols a run has letters that are no signs too: what is typed behind one keeps
    it. Those that PowerPoint puts in place of --> and the like are runs of one letter."""
    if is_symbol_font(latin):
        return shown(latin, text)
    if len(text.strip()) == 1 and "\x80" <= text.strip() <= "\xff":
        return shown(symbols, text)
    return "".join(shown(symbols, c) if PRIVATE_USE.match(c) else c for c in text)


def _typeface(properties: list[Any], kind: str) -> str:
    """That the first of some properties of text names which names one; "" where none does."""
    fonts = (font for part in properties for font in part.iterchildren(_A + kind))
    return next((font.get("typeface", "") for font in fonts), "")


def _bullet(levels: list[Any]) -> str:
    """The box or tick that the first of some properties of paragraphs has which has a bullet."""
    for level in levels:
        for kind in level.iterchildren(
            _A + "buChar", _A + "buAutoNum", _A + "buBlip", _A + "buNone"
        ):
            return tick(_typeface(levels, "buFont"), kind.get("char", ""))
    return ""
