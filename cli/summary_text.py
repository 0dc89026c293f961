"""A summary on its way to the reader: citations checked, and in the format that was asked for."""

from __future__ import annotations

import json
import re
from typing import Any

FORMATS = ("md", "txt", "json")
_HEADING = re.compile(r"^\s{0,3}#{1,6}\s+")
_RULE = re.compile(r"^\s*([-*_])(\s*\1){2,}\s*$")
_EMPHASIS = re.compile(r"(\*\*|__|`)(?=\S)(.+?)(?<=\S)\1")
_STAR = re.compile(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])")
_BULLET = re.compile(r"^(\s*)[*+]\s+")


class SummaryText:
    """Takes pieces of the answer and gives back what to show; `text` is all of it so far.

    checker: a CitationChecker, or None for answers that are left as they are.
    """

    def __init__(self, checker: Any, format: str):
        self._checker, self._is_plain = checker, format == "txt"
        self._line = ""
        self.text = ""

    def push(self, piece: str) -> str:
        shown = piece if self._checker is None else self._checker.push(piece)
        if self._is_plain:
            self._line += shown
            *lines, self._line = self._line.split("\n")
            shown = "".join(without_markdown(line) + "\n" for line in lines)
        self.text += shown
        return shown

    def finish(self) -> str:
        """The rest."""
        shown = "" if self._checker is None else self._checker.finish()
        if self._is_plain:
            shown = without_markdown(self._line + shown)
            self._line = ""
        self.text += shown
        return shown


def without_markdown(line: str) -> str:
    """A line as plain text: headings, emphasis and code lose their signs; lists keep theirs."""
    if _RULE.match(line):
        return ""
    line = _BULLET.sub(r"\1- ", _HEADING.sub("", line))
    return _STAR.sub(r"\1", _EMPHASIS.sub(r"\2", line))


def as_json(fields: dict[str, Any]) -> str:
    """The file that `--format json` writes."""
    names = ("schema", "model", "finish_reason", "usage", "documents", "citations", "map_reduce")
    kept = {name: fields[name] for name in names if name in fields}
    kept = {"schema": kept.pop("schema"), "summary": fields["text"], **kept}
    return json.dumps({**kept, "warnings": fields["warnings"]}, ensure_ascii=False, indent=2)
