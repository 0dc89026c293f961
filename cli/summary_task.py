"""What a model is asked to do for a summary: in one go, for a part, and from summaries of parts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Words that are asked for.
LENGTHS = {"short": 100, "medium": 300, "long": 800}
# The one instruction that the built-in model was taught.
BUILTIN_INSTRUCTION = "Summarize the document."
_HONEST = (
    "Cover the main points from beginning to end, keep names and numbers exact, and add nothing "
    "that the text does not say. Answer with the summary alone."
)
_CITE = (
    " Marks such as [{example}] show where each place of the text begins. After each statement, "
    'quote a few words of the text that bear it out, in "double quotes", followed by their mark.'
)
_AS_JSON = " Write it as JSON that this schema allows, and write nothing else: {schema}"
_KEEP_MARKS = " Keep quoted words, and marks such as [{example}], as they are."


def part_name(number: int, num_parts: int, label: str) -> str:
    """Which part it is, and what its label says besides."""
    name = f"part {number}"
    return f"{name} of {num_parts}" + (f" ({label})" if label != name else "")


@dataclass(frozen=True)
class SummaryTask:
    """words: about how many are asked for. prompt: the user's own wish, in place of a plain
    summary. example: a label of the text, where the model is to cite; else "". json_schema: what
    the last answer is kept to.
    """

    words: int
    prompt: str | None
    builtin: bool
    several: bool
    example: str = ""
    json_schema: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def most_tokens(self) -> int:
        """At which an answer that does not end is cut: about three times as many as words."""
        return 64 + self.words * 16 // 5

    def whole(self) -> str:
        """After documents that are read in one context."""
        if self.prompt is not None:
            return self.prompt + self._cite() + self._as_json()
        if self.builtin:
            return BUILTIN_INSTRUCTION
        what = "the documents above together, in one summary" if self.several else "the text above"
        how = f"in about {self.words} words. {_HONEST}{self._cite()}{self._as_json()}"
        return f"Summarize {what}, {how}"

    def part(self, number: int, num_parts: int, label: str) -> str:
        """After one part of many, or after the only one."""
        as_json = self._as_json() if num_parts == 1 else ""
        where = f"{part_name(number, num_parts, label)} of a longer text"
        if self.prompt is not None:
            return (
                f"The text above is {where}. As far as it allows, do this, and leave the rest "
                f"out: {self.prompt}{self._cite()}{as_json}"
            )
        if self.builtin:
            return BUILTIN_INSTRUCTION
        return (
            f"The text above is {where}. Summarize this part in about {self.words} words. "
            f"{_HONEST}{self._cite()}{as_json}"
        )

    def merge(self, is_last: bool) -> str:
        """After summaries of consecutive parts."""
        keep = _KEEP_MARKS.format(example=self.example) if self.example else ""
        as_json = self._as_json() if is_last else ""
        above = "Above are summaries of consecutive parts of one text."
        if self.prompt is not None:
            above = f"Above is what consecutive parts of one text gave for this: {self.prompt}\n"
            return f"{above}Put it together into one answer for the whole text.{keep}{as_json}"
        words = self.words if is_last else self.words // 2
        return (
            f"{above} Write one summary of the whole text from them, in about {words} words. "
            f"{_HONEST}{keep}{as_json}"
        )

    def _as_json(self) -> str:
        return _AS_JSON.format(schema=self.json_schema) if self.json_schema is not None else ""

    def _cite(self) -> str:
        return _CITE.format(example=self.example) if self.example else ""
