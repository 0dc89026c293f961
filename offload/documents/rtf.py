"""RTF: paragraphs, headings, lists and tables in order. Runs in the worker.

Footnotes and endnotes stand in brackets where their mark is, text boxes behind the paragraph that
holds them, what a section's pages have at their head before the section. What was deleted and is
still remembered, hidden text, comments, formulas and tables of contents are left out. (Libraries
were looked at: docs/log.md.)
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from ..errors import InputError
from .extract import Extract, Report
from .page_ranges import PageRanges
from .rtf_text import Paragraph, Text
from .rtf_tokens import Token, tokens
from .styles import heading_level, is_contents
from .symbol_fonts import is_symbol_font, shown

_MOST_NESTED = 10_000  # groups in each other; programs write a dozen
_REPORT_EVERY = 50_000
_SIGNS = {
    **{"tab": "\t", "line": "\n", "emdash": "\u2014", "endash": "\u2013", "bullet": "\u2022"},
    **{"lquote": "\u2018", "rquote": "\u2019", "ldblquote": "\u201c", "rdblquote": "\u201d"},
    **{"emspace": " ", "enspace": " ", "qmspace": " ", "nestcell": " ", "nestrow": " "},
    **{"~": "\xa0", "_": "-", "{": "{", "}": "}", "\\": "\\"},
}
# What begins with \* is left out but for these, which are groups around text.
_OPENED = {"shpinst", "footnote", "do", "ud", "nesttableprops"}
_LEFT_OUT = {
    *("colortbl", "info", "pict", "sp", "shprslt", "fldinst", "nonshppict", "nonesttables"),
    *("footer", "footerf", "footerl", "footerr", "objdata", "objclass", "objname", "objtime"),
    *("ftnsep", "ftnsepc", "aftnsep", "aftnsepc", "ftncn", "aftncn", "revtbl", "filetbl", "upr"),
    *("listtable", "listoverridetable", "annotation", "atnid", "atnauthor", "template", "xe", "tc"),
    *("mmath", "datafield", "private", "bkmkstart", "bkmkend", "rxe", "txe", "pntxta", "pntxtb"),
}
# A font's charset -> how its letters are coded; others as the file says for all.
_CHARSETS = {
    **{0: "cp1252", 2: "cp1252", 77: "mac_roman", 128: "cp932", 129: "cp949", 130: "johab"},
    **{134: "gbk", 136: "cp950", 161: "cp1253", 162: "cp1254", 163: "cp1258", 177: "cp1255"},
    **{178: "cp1256", 186: "cp1257", 204: "cp1251", 222: "cp874", 238: "cp1250"},
    **{254: "cp437", 255: "cp850"},
}
_CODINGS = {"ansi": "cp1252", "mac": "mac_roman", "pc": "cp437", "pca": "cp850"}


@dataclass
class _Group:
    """What holds in a group and in those inside it, until they say otherwise.

    text: where its text goes, None for nowhere; hidden, deleted: so is its text; font: its
    number; num_instead: letters that stand for a Unicode one; paragraph: how it is set.
    starred: nothing but \\* was read of it; entry: what is done with the text of each group in it,
    of tables of styles and fonts; upr: where its form in Unicode goes, which is a group in it; end:
    what is done when it ends.
    """

    text: Text | None
    hidden: bool = False
    deleted: bool = False
    font: int = 0
    num_instead: int = 1
    paragraph: Paragraph = field(default_factory=Paragraph)
    starred: bool = False
    entry: Callable[[Text], None] | None = None
    upr: Text | None = None
    end: Callable[[], None] | None = None


def extract(data: bytes, ranges: PageRanges | None, report: Report) -> Extract:
    """Headings as Markdown writes them; the cells of a table's row with bars between."""
    reader = _Reader()
    for number, token in enumerate(tokens(data)):
        if number % _REPORT_EVERY == 0:
            report(token.end, len(data))
        reader.read(token)
        if reader.is_done:
            break
    is_cut = not reader.is_done
    found = Extract.of_blocks(reader.blocks())
    if is_cut:
        found.warnings.append("The file is cut short: its end is missing.")
    report(len(data), len(data))
    return found


class _Reader:
    def __init__(self) -> None:
        self._body = Text()
        self._group = _Group(self._body)
        self._outer: list[_Group] = []
        self._coding = "cp1252"  # of fonts that do not say theirs
        self._fonts: dict[int, str] = {}
        self._symbol_fonts: dict[int, str] = {}  # number -> name
        self._styles: dict[int, tuple[str, int]] = {}  # number -> (name, level)
        self._heads: set[str] = set()  # that were told
        self._waiting = bytearray()  # letters that are not decoded yet: one may take two bytes
        self._num_skipped = 0  # letters to come that stand for a Unicode one
        self._plain_font = 0
        self.is_done = False

    def read(self, token: Token) -> None:
        if token.kind == "brace":
            self._flush()
            self._num_skipped = 0
            if token.text == "{":
                self._begin_group()
            else:
                self._end_group()
        elif token.kind in ("letters", "hex"):
            letters = token.letters[self._num_skipped :]
            self._num_skipped -= len(token.letters) - len(letters)
            if self._is_shown():
                self._waiting += letters
        elif self._num_skipped and (token.kind == "binary" or token.text in _SIGNS):
            self._num_skipped -= 1
        elif token.kind == "word":
            self._flush()
            self._num_skipped = 0
            self._word(token.text, token.number)
        elif token.kind == "sign":
            self._flush()
            self._sign(token.text)
        self._group.starred &= token.kind == "sign"

    def blocks(self) -> Iterator[tuple[str, int]]:
        """(text, heading level or 0); groups that are still open end here."""
        self._flush()
        while self._outer:
            self._end_group()
        for told, paragraph in self._body.finish():
            name, level = self._styles.get(paragraph.style, ("", 0))
            if not is_contents(name):
                yield told, paragraph.level or heading_level(name) or level

    def _begin_group(self) -> None:
        if len(self._outer) >= _MOST_NESTED:
            raise InputError("cannot be read: its parts are nested too deeply")
        self._outer.append(self._group)
        group = self._group
        own = replace(group.paragraph)
        self._group = replace(group, paragraph=own, starred=False, entry=None, end=None)
        if (define := group.entry) is not None:
            self._group.text = name = Text()
            self._group.end = lambda: define(name)

    def _end_group(self) -> None:
        if self._group.end is not None:
            self._group.end()
        if self._outer:
            self._group = self._outer.pop()
        self.is_done = not self._outer  # what follows the first group is no part of the document

    def _word(self, word: str, number: int | None) -> None:
        group = self._group
        if group.starred and word not in _OPENED:
            # What begins with \* may be passed over by those who do not know it.
            group.text = None
        elif word in _LEFT_OUT:
            if word == "upr":
                group.upr = group.text
            group.text = None
        elif word == "ud":
            group.text = group.upr
        elif word in _SIGNS:
            self._add(_SIGNS[word])
        elif word in _CODINGS:
            self._coding = _CODINGS[word]
        elif handler := _WORDS.get(word):
            handler(self, number)

    def _sign(self, sign: str) -> None:
        if sign == "*":
            self._group.starred = True
        elif sign in "\r\n":
            self._end_paragraph(None)
        elif sign in _SIGNS:
            self._add(_SIGNS[sign])

    # Text.

    def _is_shown(self) -> bool:
        return self._group.text is not None and not (self._group.hidden or self._group.deleted)

    def _add(self, text: str) -> None:
        if self._is_shown():
            assert self._group.text is not None
            self._group.text.add(text)

    def _flush(self) -> None:
        if self._waiting:
            font = self._group.font
            if font in self._symbol_fonts:
                text = shown(self._symbol_fonts[font], self._waiting.decode("latin-1"))
            else:
                text = self._waiting.decode(self._fonts.get(font, self._coding), "replace")
            self._add(text)
            self._waiting.clear()

    def _unicode(self, number: int | None) -> None:
        self._num_skipped = self._group.num_instead
        if number and -0x8000 <= number <= 0x10FFFF:
            letter = chr(number if number >= 0 else number + 0x10000)
            self._add(shown(self._symbol_fonts.get(self._group.font, ""), letter))

    def _end_paragraph(self, number: int | None) -> None:
        if self._group.text is not None:
            self._group.text.end_paragraph(replace(self._group.paragraph))

    def _end_cell(self, number: int | None) -> None:
        if self._group.text is not None:
            self._group.text.end_cell()

    def _end_row(self, number: int | None) -> None:
        if self._group.text is not None:
            self._group.text.end_row()

    # Groups whose text goes elsewhere.

    def _divert(self, end: Callable[[Text, Text], None]) -> None:
        """end: is given where the text would have gone, and the text, when the group ends."""
        outside, inside = self._group.text, Text()
        if outside is not None and self._is_shown():
            self._group.text = inside
            self._group.paragraph = Paragraph()
            self._group.end = lambda: end(outside, inside)

    def _note(self, number: int | None) -> None:
        def end(outside: Text, note: Text) -> None:
            if told := _flat(note):
                outside.add(f" [{told}]")

        self._divert(end)

    def _label(self, number: int | None) -> None:
        self._divert(lambda outside, label: outside.set_label(_flat(label)))

    def _box(self, number: int | None) -> None:
        self._divert(lambda outside, box: outside.add_box(box))

    def _head(self, number: int | None) -> None:
        """What stands at the head of pages, but for their numbers; nothing twice."""

        def end(outside: Text, head: Text) -> None:
            for text, paragraph in head.finish():
                if text not in self._heads and any(map(str.isalpha, text)):
                    self._heads.add(text)
                    outside.blocks.append((text, paragraph))

        self._divert(end)

    # How letters and paragraphs are set.

    def _font_table(self, number: int | None) -> None:
        self._group.text = None
        self._group.entry = self._define_font

    def _define_font(self, name: Text) -> None:
        told = _flat(name).rstrip(";")
        if is_symbol_font(told):
            self._symbol_fonts[self._group.font] = told

    def _charset(self, number: int | None) -> None:
        """Of the font that the table has named last."""
        if number in _CHARSETS:
            self._fonts[self._group.font] = _CHARSETS[number]

    def _default_font(self, number: int | None) -> None:
        self._plain_font = self._group.font = number or 0

    def _font(self, number: int | None) -> None:
        self._group.font = number or 0

    def _code_page(self, number: int | None) -> None:
        with contextlib.suppress(LookupError):
            self._coding = codecs.lookup(f"cp{number}").name

    def _num_instead(self, number: int | None) -> None:
        self._group.num_instead = max(0, 1 if number is None else number)

    def _style_sheet(self, number: int | None) -> None:
        self._group.text = None
        self._group.entry = self._define_style

    def _define_style(self, name: Text) -> None:
        if told := _flat(name).rstrip(";"):
            paragraph = self._group.paragraph
            self._styles[paragraph.style] = (told, paragraph.level)

    def _style(self, number: int | None) -> None:
        self._group.paragraph.style = number or 0

    def _outline_level(self, number: int | None) -> None:
        """From 0 in the file; 9 is what is no heading."""
        self._group.paragraph.level = 0 if number is None or number > 8 else number + 1

    def _in_table(self, number: int | None) -> None:
        self._group.paragraph.in_table = True

    def _new_paragraph(self, number: int | None) -> None:
        self._group.paragraph = Paragraph()

    def _plain(self, number: int | None) -> None:
        self._group.hidden = self._group.deleted = False
        self._group.font = self._plain_font

    def _hidden(self, number: int | None) -> None:
        self._group.hidden = number != 0

    def _deleted(self, number: int | None) -> None:
        self._group.deleted = number != 0


def _flat(text: Text) -> str:
    return " ".join(" ".join(told for told, _ in text.finish()).split())


_WORDS: dict[str, Callable[[_Reader, int | None], None]] = {
    **dict.fromkeys(("par", "sect", "page", "column"), _Reader._end_paragraph),
    **{"cell": _Reader._end_cell, "row": _Reader._end_row, "u": _Reader._unicode},
    **{"footnote": _Reader._note, "shptxt": _Reader._box, "dptxbxtext": _Reader._box},
    **dict.fromkeys(("listtext", "pntext"), _Reader._label),
    **dict.fromkeys(("header", "headerf", "headerl", "headerr"), _Reader._head),
    **{"fonttbl": _Reader._font_table, "fcharset": _Reader._charset, "f": _Reader._font},
    **{"deff": _Reader._default_font, "ansicpg": _Reader._code_page, "uc": _Reader._num_instead},
    **{"stylesheet": _Reader._style_sheet, "s": _Reader._style, "pard": _Reader._new_paragraph},
    **{"outlinelevel": _Reader._outline_level, "intbl": _Reader._in_table},
    **{"plain": _Reader._plain, "v": _Reader._hidden, "deleted": _Reader._deleted},
}
