"""Tells the calls in an answer from its text, while the text comes.

    text --opening--> block --closing, and it reads as calls--> calls, or text after all --> text
                        '----the answer's end: the same

What looks like calls and is none is text, all of it. White space before and between calls belongs
to them. Knows strings; how calls are written is the format's business.
"""

from __future__ import annotations

from .text_trace import Stage
from .tool_formats import Found, ToolFormat
from .tools import Calls

# Characters of one block that are read again: all before each closing that stands in an argument.
# What has so many and so late repeats itself, and is no call.
_MOST_READ_AGAIN = 1 << 20


class CallReader(Stage):
    """Reads the text of one answer; what it calls goes into `calls`."""

    def __init__(self, format: ToolFormat, calls: Calls):
        super().__init__()
        self._format, self.calls = format, calls
        if format.takes_one:
            calls.most = 1
        self._held = ""  # text that may turn out to be white space before calls, or their opening
        self._block: str | None = None  # calls, from their opening on
        self._blanks = ""  # before them
        self._looked = 0  # how far in the block no closing is that ends calls
        self._read_again = 0  # characters of it
        self._has_text = False
        self._drops_blanks = False  # right behind calls

    @property
    def is_over(self) -> bool:
        """Whether more calls would be too many."""
        return self.calls.are_enough

    @property
    def num_held(self) -> int:
        in_block = 0 if self._block is None else len(self._blanks) + len(self._block)
        return in_block + len(self._held)

    def push(self, text: str) -> str:
        """What is text of the answer for certain by now."""
        self._take_in(text)
        said = ""
        self._held += text
        while True:
            if self._block is None:
                shown, is_open = self._before_block()
                said += self._pass_on(shown)
                if not is_open:
                    return said
            shown, is_over = self._end_of_block()
            said += self._pass_on(shown)
            if not is_over:
                return said

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        text, self._held = self._held, ""
        if self._block is None:
            return self._pass_on(self._shown(text))
        block, self._block = self._block, None
        for end in dict.fromkeys(("", self._format.closing)):  # which some models leave out
            if self.calls.add(self._read(block + end)):
                return ""
        return self._pass_on(self._shown(self._blanks + block))

    def _before_block(self) -> tuple[str, bool]:
        """(what is text, whether a block has begun). What is held back becomes less."""
        if self._format.at_start:
            return self._at_start()
        text, opening = self._held, self._format.opening
        at = text.find(opening)
        if at >= 0:
            self._block, self._held, self._looked = text[at:], "", len(opening)
            self._read_again = 0
            before = text[:at].rstrip()
            self._blanks = text[len(before) : at]
            return self._shown(before), True
        num_held = len(text) - len(_without_begun(text, opening).rstrip())
        self._held = text[len(text) - num_held :]
        return self._shown(text[: len(text) - num_held]), False

    def _at_start(self) -> tuple[str, bool]:
        text, openings = self._held, (self._format.opening, *self._format.marks)
        begun = text.lstrip()
        if not self._has_text and begun.startswith(openings):
            self._block, self._held, self._looked = text, "", 0
            return "", True
        if not self._has_text and any(opening.startswith(begun) for opening in openings):
            return "", False
        self._held, self._has_text = "", True
        return text, False

    def _end_of_block(self) -> tuple[str, bool]:
        """(what is text after all, whether the block has ended). What follows it is held."""
        assert self._block is not None
        closing = self._format.closing
        self._block, self._held = self._block + self._held, ""
        while closing:
            at = self._block.find(closing, self._looked)
            if at < 0:
                self._looked = max(self._looked, len(self._block) - len(closing) + 1)
                return "", False
            self._looked = at + len(closing)
            block = self._block[: self._looked]
            found = self._read(block)
            if found is None and self._read_again < _MOST_READ_AGAIN:
                if self._format.is_open(block, self.calls):
                    self._read_again += len(block)
                    continue
            self._held, self._block = self._block[self._looked :], None
            if not self.calls.add(found):  # damaged, or of no function that is offered
                return self._shown(self._blanks + block), True
            self._drops_blanks = True
            return "", True
        return "", False

    def _read(self, block: str) -> Found:
        return self._format.read(block, self.calls)

    def _shown(self, text: str) -> str:
        if self._drops_blanks:
            text = text.lstrip()
        if text:
            self._drops_blanks = False
        return text


def _without_begun(text: str, word: str) -> str:
    """The text without its end, where that may be the beginning of `word`."""
    for size in range(min(len(word) - 1, len(text)), 0, -1):
        if word.startswith(text[-size:]):
            return text[:-size]
    return text
