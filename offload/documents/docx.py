"""DOCX: paragraphs, headings, lists and tables in order, by the standard library alone. Runs in the
worker.

Footnotes and endnotes stand in brackets where their mark is, text boxes behind the paragraph that
holds them, what a section's pages have at their head before the section. What was deleted and is
still remembered, hidden text, comments and tables of contents are left out. Formulas are written on
one line. Items and headings have the numbers that Word counts. Of forms what is ticked and chosen
is shown.
"""

from __future__ import annotations

import posixpath
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from functools import partial

from ..errors import InputError
from .archive import Archive
from .docx_formulas import formula_part
from .docx_numbers import Numbers, font_of
from .extract import Extract, Report, refused_if_damaged
from .item_numbers import BULLET
from .page_ranges import PageRanges
from .styles import heading_level, is_contents, is_list
from .symbol_fonts import shown, sign
from .xml_tree import attribute, descendants, name_of

_SIGNS = {"tab": "\t", "ptab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_LEFT_OUT = {
    *("pPr", "rPr", "sdtPr", "sectPr", "del", "moveFrom", "instrText", "delText", "rt"),
}
_HEADS = ("first", "default", "even")  # pages of a section that may have heads of their own
_LIST_LEVELS = tuple("012345678")
_MOST_STYLES = 10  # that one comes from: those of a damaged file may come from each other
_REPORT_EVERY = 200
_Block = tuple[str, int]  # text, heading level or 0


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """Headings as Markdown writes them; the cells of a table's row with bars between."""
    archive = Archive(data)
    archive.check_parts()
    with refused_if_damaged("DOCX file"):
        return Extract.of_blocks(_Reader(archive).blocks(report))


class _Reader:
    def __init__(self, archive: Archive):
        self._archive = archive
        parts = [target for kind, target in self._related("").values() if kind == "officeDocument"]
        self._main = parts[0] if parts else "word/document.xml"
        self._parts = self._related(self._main)
        self._styles = {attribute(e, "styleId"): e for e in self._all("styles", "style")}
        # Each is told once: a mark may stand in a million places.
        self._notes = {
            (kind, attribute(note, "id")): note
            for kind in ("footnote", "endnote")
            for note in self._all(f"{kind}s", kind)
        }
        makes, lists = (self._all("numbering", name) for name in ("abstractNum", "num"))
        self._numbers = Numbers([*makes, *lists])
        self._heads_told: set[str] = set()
        # Fields that the text is in, of one paragraph: whether it is their result, that is shown.
        self._fields: list[bool] = []

    def blocks(self, report: Report) -> Iterator[_Block]:
        """Of what is not empty."""
        root = ET.fromstring(self._archive.read(self._main))
        body = next((child for child in root if name_of(child) == "body"), None)
        if body is None:
            raise InputError("is a damaged DOCX file: it has no body")
        done, section = 0, []
        for child in body:
            section.append(child)
            for properties in _section_ends(child):
                yield from self._heads(properties)
                yield from self._told(section, done, len(body), report)
                done, section = done + len(section), []
        yield from self._told(section, done, len(body), report)
        report(len(body), len(body))

    def _told(
        self, section: list[ET.Element], done: int, total: int, report: Report
    ) -> Iterator[_Block]:
        for number, child in enumerate(section, done):
            if number % _REPORT_EVERY == 0:
                report(number, total)
            yield from self._blocks([child])

    def _heads(self, properties: ET.Element) -> Iterator[_Block]:
        """What stands at the head of a section's pages, but for their numbers; nothing twice."""
        heads = _children(properties, "headerReference")
        ids = {attribute(e, "type"): attribute(e, "id") for e in heads}
        for kind in _HEADS:
            _, part = self._parts.get(ids.get(kind, ""), ("", ""))
            if part not in self._archive.names:
                continue
            for text, level in self._blocks(ET.fromstring(self._archive.read(part))):
                if text not in self._heads_told and any(map(str.isalpha, text)):
                    self._heads_told.add(text)
                    yield text, level

    def _blocks(self, elements: Iterable[ET.Element]) -> Iterator[_Block]:
        for element in elements:
            name = name_of(element)
            if name == "p":
                yield from self._paragraph(element)
            elif name == "tbl":
                yield from ((row, 0) for row in self._rows(element))
            elif name == "AlternateContent":
                yield from self._blocks(_alternative(element))
            elif name not in _LEFT_OUT:
                yield from self._blocks(element)  # content controls, insertions, text boxes

    def _paragraph(self, paragraph: ET.Element) -> Iterator[_Block]:
        """Its text, and that of the text boxes it holds."""
        boxes: list[ET.Element] = []
        outer, self._fields = self._fields, []
        text = self._text(paragraph, boxes).strip()
        self._fields = outer
        properties = {name_of(e): e for e in next(_children(paragraph, "pPr"), ())}
        style = properties.get("pStyle")
        style = None if style is None else self._styles.get(attribute(style, "val"))
        name = self._name(style)
        list_id, list_level = self._list_of(properties.get("numPr"), style)
        mark = self._numbers.mark(list_id, list_level) if list_id else ""  # of empty ones too
        if text and not is_contents(name):
            level = self._level(properties, style)
            mark = mark or (BULLET if is_list(name) else "")
            yield ("" if level and mark == BULLET else mark) + text, level
        for box in boxes:
            yield from self._blocks(box)

    def _text(self, element: ET.Element, boxes: list[ET.Element]) -> str:
        """boxes: takes the text boxes that are found."""
        parts, font = [], font_of(element)
        for child in element:
            name = name_of(child)
            if name == "fldChar":
                if all(self._fields):
                    parts.append(_filled_in(child))
                self._field(attribute(child, "fldCharType"))
            elif not all(self._fields) and name in ("t", "sym", *_SIGNS):
                pass
            elif name == "t":
                parts.append(shown(font, child.text or ""))
            elif name == "sym":
                parts.append(sign(attribute(child, "font"), _code(attribute(child, "char"))))
            elif name in _SIGNS:
                parts.append(_SIGNS[name])
            elif name in ("footnoteReference", "endnoteReference"):
                note = self._notes.pop((name.removesuffix("Reference"), attribute(child, "id")), ())
                if told := self._flat(note):
                    parts.append(f" [{told}]")
            elif name in ("drawing", "pict", "object"):
                boxes += _boxes(child)
            elif name == "AlternateContent":
                parts.append(self._text(_alternative(child), boxes))
            elif (part := formula_part(child, partial(self._text, boxes=boxes))) is not None:
                parts.append(part)
            elif not (name in _LEFT_OUT or _is_hidden(child)):
                parts.append(self._text(child, boxes))
        return "".join(parts)

    def _list_of(self, own: ET.Element | None, style: ET.Element | None) -> tuple[str, int]:
        """The list of a paragraph, by its own properties or its style's, and the level in it; ""
        for none."""
        found = [] if own is None else [own]
        for _ in range(_MOST_STYLES):
            if style is None:
                break
            for settings in _children(style, "pPr"):
                found += _children(settings, "numPr")
            style = self._styles.get(_value(style, "basedOn"))
        list_id = next(filter(None, (_value(e, "numId") for e in found)), "0")
        level = next(filter(None, (_value(e, "ilvl") for e in found)), "0")
        return ("" if list_id == "0" else list_id), int(level) if level in _LIST_LEVELS else 0

    def _field(self, kind: str) -> None:
        """A field begins with its instruction, of which other fields may be parts."""
        if kind == "begin":
            self._fields.append(False)
        elif self._fields and kind == "separate":
            self._fields[-1] = True
        elif self._fields and kind == "end":
            self._fields.pop()

    def _rows(self, table: ET.Element) -> Iterator[str]:
        for child in table:
            if name_of(child) == "tr":
                cells = [self._flat(cell) for cell in _cells(child)]
                if any(cells):
                    yield " | ".join(cells).rstrip(" |")
            elif name_of(child) not in _LEFT_OUT:
                yield from self._rows(child)

    def _flat(self, elements: Iterable[ET.Element]) -> str:
        return " ".join(" ".join(text for text, _ in self._blocks(elements)).split())

    def _name(self, style: ET.Element | None) -> str:
        return "" if style is None else _value(style, "name")

    def _level(self, properties: dict[str, ET.Element], style: ET.Element | None) -> int:
        """By the paragraph's own outline level, its style, or the one that comes from."""
        if "outlineLvl" in properties:
            return _outline_level(attribute(properties["outlineLvl"], "val"))
        own = style
        for _ in range(_MOST_STYLES):
            if style is None:
                return 0
            if level := heading_level(self._name(style)):
                # What comes from the title's style is a subtitle, or names who wrote it.
                return level if style is own or self._name(style).lower() != "title" else 0
            for settings in _children(style, "pPr"):
                if level := _value(settings, "outlineLvl"):
                    return _outline_level(level)
            style = self._styles.get(_value(style, "basedOn"))
        return 0

    def _related(self, part: str) -> dict[str, tuple[str, str]]:
        """The parts that a part names: id -> (kind, name)."""
        folder, name = posixpath.split(part)
        listed = posixpath.join(folder, "_rels", f"{name}.rels")
        if listed not in self._archive.names:
            return {}
        return {
            attribute(e, "Id"): (
                attribute(e, "Type").rpartition("/")[2],
                posixpath.normpath(posixpath.join("/", folder, attribute(e, "Target")))[1:],
            )
            for e in ET.fromstring(self._archive.read(listed))
        }

    def _all(self, kind: str, name: str) -> Iterator[ET.Element]:
        """The elements of a name in the parts of a kind, those that are not there having none."""
        for found, part in self._parts.values():
            if found == kind and part in self._archive.names:
                yield from descendants(ET.fromstring(self._archive.read(part)), name)


def _children(element: ET.Element, name: str) -> Iterator[ET.Element]:
    return (child for child in element if name_of(child) == name)


def _section_ends(child: ET.Element) -> Iterator[ET.Element]:
    """The properties of the section that a child of the body ends, if it ends one: they stand in
    the last paragraph, those of the last section in the body itself."""
    if name_of(child) == "sectPr":
        yield child
    elif name_of(child) == "p":
        for own in _children(child, "pPr"):
            yield from _children(own, "sectPr")


def _value(element: ET.Element, name: str) -> str:
    """Of the child of this name; "" where there is none."""
    return next((attribute(child, "val") for child in _children(element, name)), "")


def _outline_level(value: str) -> int:
    """From 0 in the file; 9 is what is no heading."""
    return int(value) + 1 if value in tuple("012345678") else 0


def _code(char: str) -> int:
    """Of a sign, from four hexadecimal digits; 0 for others."""
    return int(char, 16) if re.fullmatch("[0-9A-Fa-f]{1,4}", char) else 0


def _filled_in(field: ET.Element) -> str:
    """What the box of a form holds where a field begins: a tick, or what was chosen of a list. What
    was typed is the field's result."""
    for form in _children(field, "ffData"):
        for box in _children(form, "checkBox"):
            marks = [e for name in ("default", "checked") for e in _children(box, name)]
            return "☒" if marks and _is_on(marks[-1]) else "☐"
        for chosen in _children(form, "ddList"):
            entries = [attribute(e, "val") for e in _children(chosen, "listEntry")]
            number = _value(chosen, "result") or _value(chosen, "default") or "0"
            return entries[int(number)] if number in map(str, range(len(entries))) else ""
    return ""


def _is_on(mark: ET.Element) -> bool:
    return attribute(mark, "val") not in ("0", "false", "off")


def _is_hidden(run: ET.Element) -> bool:
    for properties in _children(run, "rPr"):
        for mark in _children(properties, "vanish"):
            return _is_on(mark)
    return False


def _alternative(element: ET.Element) -> ET.Element:
    """What newer programs draw otherwise than older ones comes twice: the first form counts."""
    return next(iter(element), ET.Element("nothing"))


def _boxes(element: ET.Element) -> Iterator[ET.Element]:
    """The text boxes in a drawing; those in one of them are found when it is read."""
    for child in element:
        name = name_of(child)
        if name == "txbxContent":
            yield child
        elif name == "AlternateContent":
            yield from _boxes(_alternative(child))
        else:
            yield from _boxes(child)


def _cells(row: ET.Element) -> Iterator[ET.Element]:
    for child in row:
        if name_of(child) == "tc":
            yield child
        elif name_of(child) not in _LEFT_OUT:
            yield from _cells(child)  # in content controls
