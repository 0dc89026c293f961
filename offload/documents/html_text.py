"""XHTML and HTML to text, by the standard library: headings, paragraphs, lists and tables stay
apart, everything else is dropped. Follows no links and knows no styles.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

from .document import Place

_BLOCKS = {
    *("p", "div", "section", "article", "blockquote", "figure", "figcaption", "table", "tr"),
    *("ul", "ol", "dl", "dt", "dd", "pre", "header", "footer", "aside", "main", "hr", "body"),
}
_HEADINGS = {f"h{level}" for level in range(1, 7)}
_DROPPED = {"script", "style", "template", "svg", "math", "noscript", "title"}
_BLANKS = re.compile(r"[ \t\r\n\f\xa0]+")


# How words are to be read (ruby), up to the next part of it, since many pages end no such element;
# and the tags of what is left.
_READINGS = re.compile(
    r"<r[tp]\b[^<>]*(?<!/)>.{0,500}?(?=</?(?:ruby|rb|rt|rtc|rp)\b)"
    r"|</?(?:ruby|rb|rt|rtc|rp)\b[^<>]*>",
    re.DOTALL | re.I,
)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.headings: list[tuple[int, str]] = []  # (index of the block, title)
        self._line = ""
        self._dropped = self._kept_blanks = 0
        self._heading = ""
        self._prefix = ""
        self._lists: list[int | None] = []  # the number of the next item, None where they have none

    def handle_starttag(self, tag, attrs):
        if tag in _DROPPED:
            self._dropped += 1
        elif tag in _BLOCKS or tag in _HEADINGS or tag == "li":
            self.end_block()
            if tag in _HEADINGS:
                self._heading = "#" * int(tag[1]) + " "
            elif tag in ("ul", "ol"):
                self._lists.append(_number(attrs, "start", 1) if tag == "ol" else None)
            elif tag == "li":
                self._prefix = self._item(attrs)
            elif tag == "pre":
                self._kept_blanks += 1
        elif tag == "br":
            self._line += "\n"
        elif tag in ("td", "th") and self._line.strip():
            self._line += " | "

    def handle_startendtag(self, tag, attrs):
        if tag not in _DROPPED:  # <script/> is over at once in XHTML
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag in _DROPPED:
            self._dropped = max(0, self._dropped - 1)
        elif tag in _BLOCKS or tag in _HEADINGS or tag == "li":
            self.end_block()
            if tag in ("ul", "ol") and self._lists:
                self._lists.pop()
            elif tag == "pre":
                self._kept_blanks = max(0, self._kept_blanks - 1)

    def _item(self, attrs) -> str:
        """What stands before an item of the innermost list."""
        if not self._lists or self._lists[-1] is None:
            return "- "
        number = _number(attrs, "value", self._lists[-1])
        self._lists[-1] = number + 1
        return f"{number}. "

    def handle_data(self, data):
        if self._dropped:
            return
        if self._kept_blanks:
            self._line += data
            return
        data = _BLANKS.sub(" ", data)
        if not self._line or self._line[-1] in " \n":
            data = data.lstrip(" ")
        self._line += data

    def end_block(self) -> None:
        text = self._line.strip("\n") if self._kept_blanks else self._line.strip()
        self._line = ""
        if not text.strip():
            return
        if self._heading:
            text = " ".join(text.split())
            self.headings.append((len(self.blocks), text))
        self.blocks.append(self._heading + self._prefix + text)
        self._heading = self._prefix = ""


def _number(attrs: list[tuple[str, str | None]], name: str, default: int) -> int:
    given = dict(attrs).get(name) or ""
    return int(given) if re.fullmatch(r"-?[0-9]{1,9}", given) else default


def without_readings(markup: str) -> str:
    """Without the readings that stand above words, as in Japanese books: they would stand in the
    middle of them.
    """
    return _READINGS.sub("", markup)


def html_text(markup: str) -> tuple[str, list[Place]]:
    """Its text, a blank line between blocks, and a section for each heading."""
    reader = _Reader()
    reader.feed(without_readings(markup))
    reader.close()
    reader.end_block()
    starts, at = [], 0
    for block in reader.blocks:
        starts.append(at)
        at += len(block) + 2
    places = [
        Place(starts[index], "section", number, title)
        for number, (index, title) in enumerate(reader.headings, 1)
    ]
    return "\n\n".join(reader.blocks), places
