"""The paragraphs and tables that are made of what an RTF file says, piece by piece."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What stands before a numbered paragraph, such as "3." or "(b)"; other signs are bullets.
_NUMBERED = re.compile(r"\W?(?:[0-9]+|[a-zA-Z]{1,4}[.)])")

_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f]")


@dataclass
class Paragraph:
    """How one is set. style: its number; level: of an outline, 0 for none; in_table: in a cell."""

    style: int = 0
    level: int = 0
    in_table: bool = False


class Text:
    """Where text goes: the body, a footnote, a text box. blocks: (text, Paragraph) of what is
    done, but for what is empty."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, Paragraph]] = []
        self._pieces: list[str] = []
        self._cells: list[str] = []
        self._boxes: list[tuple[str, Paragraph]] = []
        self._label = ""

    def add(self, text: str) -> None:
        self._pieces.append(text)

    def add_box(self, box: Text) -> None:
        """It stands behind the paragraph."""
        self._boxes += box.finish()

    def set_label(self, label: str) -> None:
        """Of the paragraph: the sign before an item of a list."""
        self._label = f"{label} " if _NUMBERED.match(label) else "- "

    def end_paragraph(self, paragraph: Paragraph) -> None:
        if paragraph.in_table:
            self.add(" ")
            return
        if self._cells:  # of a table that was left open
            self.end_row()
        if text := self._take():
            self.blocks.append((text, paragraph))
        self._end_boxes()

    def end_cell(self) -> None:
        self._cells.append(" ".join(self._take().split()))

    def end_row(self) -> None:
        if any(self._cells):
            self.blocks.append((" | ".join(self._cells).rstrip(" |"), Paragraph()))
        self._cells.clear()
        self._end_boxes()

    def finish(self) -> list[tuple[str, Paragraph]]:
        """All blocks, what was left open too."""
        if self._cells:
            self.end_cell()
        self.end_paragraph(Paragraph())
        return self.blocks

    def _end_boxes(self) -> None:
        self.blocks += self._boxes
        self._boxes.clear()

    def _take(self) -> str:
        text, label = _CONTROL.sub("", "".join(self._pieces)).strip(), self._label
        self._pieces.clear()
        self._label = ""
        # Letters beyond 16 bits come in two halves; a half alone is none.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return label + text if text else ""
