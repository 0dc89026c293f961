"""Which tokens an answer's text is made of.

    tokens --TextStream--> characters --thoughts, calls, stop strings--> the answer's text

What reads an answer is a chain of stages. Each passes text on in its order, drops some of it, and
holds some back until it is certain what it is. Where they are traced each character has a source
that goes with it. Knows no marks and no formats.
"""

from __future__ import annotations

from array import array

# A source is a number: of the token that completed the character, among those that add bytes to a
# text, and in the last bits how many of these before it the character begins: three at most.
_PART_BITS = 2
_NOBODY = -1  # of a character that no token wrote


class TextTrace:
    """Of one answer. place: of the token that is being read, among those of the answer."""

    def __init__(self) -> None:
        self.place = 0
        self.told = array("i")  # the sources of text that has been told; taken by `take`
        self._places = array("i")  # of the tokens that add bytes
        self._num_chars = 0
        self._next = 0  # of these, the first that is neither told nor left out

    def number(self) -> int:
        """Of the token that is being read, which adds bytes."""
        self._places.append(self.place)
        return len(self._places) - 1

    def take(self) -> list[tuple[int, int]]:
        """The tokens of the text that was told since the last time: their places, and how many
        characters of the text begin before each."""
        found = []
        for source in self.told:
            if source != _NOBODY:
                last = source >> _PART_BITS
                first = last - (source & ((1 << _PART_BITS) - 1))
                for number in range(max(first, self._next), last + 1):
                    found.append((self._places[number], self._num_chars + (number > first)))
                self._next = max(self._next, last + 1)
            self._num_chars += 1
        del self.told[:]
        return found


class Stage:
    """One of the chain. A subclass takes text in, and what it passes on at once stood together, and
    right before what it still holds: num_held characters."""

    num_held = 0

    def __init__(self) -> None:
        self._before: Stage | None = None  # None: it is not traced
        self._sources = array("i")  # of the characters it holds
        self._passed = array("i")  # of those it has passed on

    def follow(self, before: Stage, passed: array[int] | None = None) -> Stage:
        """Be traced from now on. before: the stage whose text this one takes in; passed: where the
        sources go, if it is the last."""
        self._before = before
        if passed is not None:
            self._passed = passed
        return self

    def take_sources(self, num_chars: int) -> array[int]:
        """Of the last characters that were passed on; those before them are nobody's any more."""
        found = self._passed[len(self._passed) - num_chars :]
        del self._passed[:]
        return found

    def _take_in(self, text: str) -> None:
        if self._before is not None:
            self._sources += self._before.take_sources(len(text))

    def _pass_on(self, text: str) -> str:
        if self._before is not None:
            end = len(self._sources) - self.num_held
            self._passed += self._sources[end - len(text) : end]
            del self._sources[:end]
        return text

    def _pass_unwritten(self, text: str) -> str:
        """Text that no token wrote."""
        if self._before is not None:
            self._passed.extend([_NOBODY] * len(text))
        return text


class CharacterSources:
    """Of the characters that tokens complete, whose bytes may lie in several."""

    def __init__(self, trace: TextTrace):
        self._trace = trace
        self._begun = 0, 0  # the first and the last token of the character that is not yet whole

    def of(self, begun: bytes, piece: bytes, text: str, pending: bytes) -> list[int]:
        """The sources of `text`, which became whole with a token's bytes, or at the end with none.
        begun, pending: those of a character that was, and that is, not yet whole."""
        if not piece:
            return [_source(*self._begun)] * len(text)
        number = self._trace.number()
        own = first = number, number
        if begun:
            # One sign, unless the token's first byte does not go on with what was begun.
            goes_on = len((begun + piece[:1]).decode("utf-8", "replace")) == 1
            first = (self._begun[0], number) if goes_on else self._begun
        if pending:
            self._begun = own if text else first
        return [_source(*first), *([_source(*own)] * (len(text) - 1))] if text else []


def _source(first: int, last: int) -> int:
    return last << _PART_BITS | (last - first)
