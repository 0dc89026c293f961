"""Formulas of DOCX on one line: what the parts of one are written as, around the text in them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator

from .xml_tree import attribute, name_of

_SIGNS = {"sup": "^", "sub": "_", "num": "", "den": "/"}
_JOINED = {"eqArr": "; ", "m": "; ", "mr": ", "}  # equations below each other, a matrix, its rows
_ABOVE, _BELOW, _HAT = "\u0305", "\u0332", "\u0302"  # of the letter before


def formula_part(element: ET.Element, text_of: Callable[[ET.Element], str]) -> str | None:
    """None for what is written as the text in it. text_of: gives that of any element."""
    name = name_of(element)
    if name in _SIGNS:
        return _SIGNS[name] + _grouped(text_of(element))
    if name in _JOINED:
        part = "mr" if name == "m" else "e"
        return _JOINED[name].join(
            formula_part(e, text_of) or text_of(e) for e in _of(element, part)
        )
    if name == "rad":
        degree = "".join(map(text_of, _of(element, "deg")))
        return "√" + (f"[{degree}]" if degree else "") + f"({_base(element, text_of)})"
    if name == "d":
        begin, end, between = (
            _setting(element, setting, default)
            for setting, default in (("begChr", "("), ("endChr", ")"), ("sepChr", "|"))
        )
        return begin + between.join(map(text_of, _of(element, "e"))) + end
    if name == "f" and _setting(element, "type", "") == "noBar":  # binomials
        over, under = (_grouped("".join(map(text_of, _of(element, n)))) for n in ("num", "den"))
        return f"{over} over {under}"
    if name == "acc":
        return _base(element, text_of) + _setting(element, "chr", _HAT)
    if name == "bar":
        return _base(element, text_of) + (
            _ABOVE if _setting(element, "pos", "") == "top" else _BELOW
        )
    if name == "naryPr":  # an integral, unless it says otherwise
        return next((attribute(e, "val") for e in _of(element, "chr")), "") or "∫"
    return None


def _grouped(text: str) -> str:
    return text if len(text) < 2 else f"({text})"


def _base(element: ET.Element, text_of: Callable[[ET.Element], str]) -> str:
    return "".join(map(text_of, _of(element, "e")))


def _of(element: ET.Element, name: str) -> Iterator[ET.Element]:
    return (child for child in element if name_of(child) == name)


def _setting(element: ET.Element, name: str, default: str) -> str:
    """Of the element's properties, the first part of it that is called so."""
    for properties in _of(element, f"{name_of(element)}Pr"):
        for setting in _of(properties, name):
            return attribute(setting, "val")
    return default
