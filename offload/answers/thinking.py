"""Tells what a reasoning model thinks from what it answers, while the text comes.

    start --the opening mark--> thinking --the closing mark--> answering
      '---------------anything else-----------------------------^

The thought stands at the beginning of an answer or nowhere: a mark further on is text. Knows
strings; which marks a model has is read from its chat template.
"""

from __future__ import annotations

from enum import Enum

from .text_trace import Stage

# What templates put around thoughts; one that holds the closing mark is one that knows it.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)


class _State(Enum):
    START = "start"
    THINKING = "thinking"
    ANSWERING = "answering"


def marks_of(template_source: str) -> tuple[str, str] | None:
    """The opening and closing mark of a chat template, or None where it knows no thoughts."""
    return next((pair for pair in MARKS if pair[1] in template_source), None)


def is_open(text: str, marks: tuple[str, str]) -> bool:
    """Whether a prompt ends with an opening mark: the model's first word is a thought."""
    return text.rstrip().endswith(marks[0])


class Thoughts(Stage):
    """Splits the text of one answer. marks: None for text without thoughts; inside: see is_open."""

    def __init__(self, marks: tuple[str, str] | None, inside: bool = False):
        super().__init__()
        self._marks = marks or ("", "")
        self._state = _State.THINKING if inside else _State.START
        if marks is None:
            self._state = _State.ANSWERING
        self._held = ""
        self._drops_lines = inside  # the empty lines around marks belong to them

    @property
    def num_held(self) -> int:
        return len(self._held)

    def push(self, text: str) -> tuple[str, str]:
        """(thought, answer): what is certain by now."""
        self._take_in(text)
        thought, answer = self._split(text)
        return thought, self._pass_on(answer)

    def _split(self, text: str) -> tuple[str, str]:
        text = self._held + text
        self._held = ""
        if self._state is _State.START:
            opening, begun = self._marks[0], text.lstrip()
            if opening.startswith(begun):  # nothing yet, or a part of the mark
                self._held = text
                return "", ""
            if not begun.startswith(opening):
                self._state = _State.ANSWERING
                return "", text
            self._state, self._drops_lines = _State.THINKING, True
            text = begun[len(opening) :]
        thought = ""
        if self._state is _State.THINKING:
            thought, closing, text = text.partition(self._marks[1])
            if not closing:
                thought, self._held = _split_at_mark(thought, self._marks[1])
            thought = self._without_lines(thought)
            if closing:
                self._state, self._drops_lines = _State.ANSWERING, True
        return thought, self._without_lines(text)

    def finish(self) -> tuple[str, str]:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return (held, "") if self._state is _State.THINKING else ("", self._pass_on(held))

    def _without_lines(self, text: str) -> str:
        if self._drops_lines and text:
            text = text.lstrip("\n")
            self._drops_lines = not text
        return text


def _split_at_mark(text: str, mark: str) -> tuple[str, str]:
    """(text, its end that may be the beginning of the mark)."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            return text[:-size], text[-size:]
    return text, ""
