"""Markdown shown in a terminal, character for character: bold and colour are added, and nothing
else changes, so what is copied from the screen is the Markdown itself.

Works on a text that arrives in pieces. Knows no terminal; the caller asks whether codes are wanted.
"""

from __future__ import annotations

_RESET, _BOLD, _CODE, _DIM = "\x1b[0m", "\x1b[1m", "\x1b[36m", "\x1b[2m"
_FENCES = ("```", "~~~")


class MarkdownStyle:
    """`feed` pieces; `finish` gives what was held back.

    A line's first characters are held back until they say what the line is, and a mark that may be
    half of `**` until the next one; never more than that. Styles end with their line.
    """

    def __init__(self) -> None:
        self._held = ""
        self._line = ""  # the beginning of this line, as far as it matters
        self._fence = ""  # that is open
        self._bold = self._code = self._heading = False
        self._now = ""  # the codes that are in force

    def feed(self, text: str) -> str:
        """The text with codes, as far as it can be shown yet."""
        text, self._held = self._held + text, ""
        out: list[str] = []
        at = 0
        while at < len(text):
            step = self._step(text, at, out)
            if step == 0:
                self._held = text[at:]
                break
            at += step
        return "".join(out)

    def finish(self) -> str:
        """The rest, and the end of every style."""
        out: list[str] = []
        text, self._held = self._held, ""
        for character in text:
            self._put(character, out)
        self._style("", out)
        self.__init__()
        return "".join(out)

    def _step(self, text: str, at: int, out: list[str]) -> int:
        """How many characters were put out; 0 where the next piece must be seen first."""
        character = text[at]
        if character == "\n":
            self._style("", out)
            out.append("\n")
            self._line, self._bold, self._code, self._heading = "", False, False, False
            return 1
        if not self._line.strip():
            rest = text[at : at + 3]
            if character in "`~" and len(rest) < 3 and rest == character * len(rest):
                return 0
            if rest in _FENCES and (not self._fence or rest == self._fence):
                self._line = rest
                self._fence = "" if self._fence else rest
                self._style(_DIM, out)
                out.append(rest)
                return 3
            self._heading = character == "#" and not self._line and not self._fence
        if self._line[:3] in _FENCES or self._fence:
            self._style(_DIM if self._line[:3] in _FENCES else _CODE, out)
            self._put(character, out)
            return 1
        if character == "`":
            self._put_inside(_CODE, character, out)
            self._code = not self._code
            return 1
        if character == "*" and not self._code:
            if at + 1 == len(text):
                return 0
            if text[at + 1] == "*":
                self._put_inside(_BOLD, "**", out)
                self._bold = not self._bold
                return 2
        self._style(self._wanted(), out)
        self._put(character, out)
        return 1

    def _wanted(self) -> str:
        if self._code:
            return _CODE
        return _BOLD if self._bold or self._heading else ""

    def _put_inside(self, style: str, marks: str, out: list[str]) -> None:
        """Marks look like what they enclose."""
        self._style(style, out)
        self._line = self._line or marks
        out.append(marks)

    def _put(self, character: str, out: list[str]) -> None:
        if len(self._line) < 4:
            self._line += character
        out.append(character)

    def _style(self, wanted: str, out: list[str]) -> None:
        if wanted != self._now:
            out.append((_RESET if self._now else "") + wanted)
            self._now = wanted
