"""The runs of an answer: what is thought, said and called, each until the next one begins.

For protocols that tell them apart, each with a beginning and an end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from io import StringIO

from ebbtide import Output, Piece, ToolCall

from .answer import Answer
from .request import Request


class RunKind(Enum):
    THOUGHT = auto()
    TEXT = auto()
    CALL = auto()


@dataclass
class Run:
    """index: its place in the answer."""

    index: int
    kind: RunKind
    call: ToolCall | None = None
    _written: StringIO = field(default_factory=StringIO)  # `+=` would copy all of it each time

    def add(self, text: str) -> None:
        self._written.write(text)

    @property
    def text(self) -> str:
        """So far; of a call its arguments, which come at once."""
        return self._written.getvalue()


class RunAnswer(Answer):
    """An answer that is told in runs; subclasses say how each begins, goes on and ends."""

    def __init__(self, request: Request, model: str, prefix: str):
        super().__init__(request, model, prefix)
        self._runs: list[Run] = []

    def note(self, piece: Piece) -> None:
        for _ in self._added(piece):
            pass

    def piece(self, piece: Piece) -> bytes:
        found = b""
        for run, text, is_new in self._added(piece):
            if is_new:
                found += self._end_of(self._runs[:-1], is_cut=False) + self._begin(run)
            found += self._more(run, text)
        return found

    def last(self, output: Output) -> bytes:
        is_cut = output.finish_reason == "length"
        return self._end_of(self._runs, is_cut=is_cut) + self._close(output)

    def _added(self, piece: Piece) -> Iterator[tuple[Run, str, bool]]:
        """The runs that a piece belongs to, what it adds, and whether they begin with it."""
        for kind, text in ((RunKind.THOUGHT, piece.thought), (RunKind.TEXT, piece.text)):
            if text:
                is_new = not self._runs or self._runs[-1].kind is not kind
                yield self._add(kind, text, None, is_new), text, is_new
        for call in piece.tool_calls:
            yield self._add(RunKind.CALL, call.arguments, call, True), call.arguments, True

    def _add(self, kind: RunKind, text: str, call: ToolCall | None, is_new: bool) -> Run:
        if is_new:
            self._runs.append(Run(len(self._runs), kind, call))
        run = self._runs[-1]
        run.add(text)
        return run

    def _end_of(self, runs: list[Run], is_cut: bool) -> bytes:
        return self._end(runs[-1], is_cut) if runs else b""

    @abstractmethod
    def _begin(self, run: Run) -> bytes: ...

    @abstractmethod
    def _more(self, run: Run, text: str) -> bytes: ...

    @abstractmethod
    def _end(self, run: Run, is_cut: bool) -> bytes:
        """is_cut: whether it is the last one, and has no end of its own."""

    @abstractmethod
    def _close(self, output: Output) -> bytes:
        """What follows the end of the last run."""
