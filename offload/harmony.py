"""Answers in channels, as gpt-oss gives them: OpenAI's harmony format.

    header --<|message|>--> content --<|end|>, <|return|>, <|call|>--> header ...
       ^-------<|start|>, <|channel|>---'

An answer is one message or several. A header says who speaks, in which channel, and to whom:

    <|start|>assistant<|channel|>analysis<|message|>thoughts<|end|>
    <|start|>assistant<|channel|>commentary<|message|>what the model is about to do<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

What is said in analysis is thought, all else is for the user. No tools are offered: a message to
one is shown, and a warning names the tool. Headers that are damaged cost no text.

Reads token ids, not strings: an answer about the format spells it in letters, and that is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from .detokenizer import TextStream


class Mark(Enum):
    """What a control token does. The values are how tokenizers and templates spell them."""

    START = "<|start|>"
    CHANNEL = "<|channel|>"
    MESSAGE = "<|message|>"
    CONSTRAIN = "<|constrain|>"  # before the format of a call
    END = "<|end|>"  # of a message
    RETURN = "<|return|>"  # of the last one
    CALL = "<|call|>"  # of one to a tool


# A model whose tokenizer lacks one of these does not answer in channels.
NEEDED = (Mark.START, Mark.CHANNEL, Mark.MESSAGE, Mark.END)
# These end an answer, whatever else does.
LAST = (Mark.RETURN, Mark.CALL)
_BREAKS = (Mark.START, Mark.END, *LAST)
# Behind the first, which templates end with, the second leaves no room for thoughts.
GENERATION_PROMPT = "<|start|>assistant"
WITHOUT_THOUGHTS = "<|channel|>final<|message|>"

_ROLES = ("assistant", "user", "system", "developer", "tool")
_CHANNELS = ("analysis", "commentary", "final")
_TO = "to="
_PEOPLE = ("all", "user", "assistant")  # may be spoken to, and are no tools


class _Kind(Enum):
    THOUGHT = "thought"
    ANSWER = "answer"


class _Header:
    """What stands before <|message|>. has_role: the prompt said already who speaks."""

    def __init__(self, has_role: bool = False):
        self._has_role = has_role
        self._before = ""  # up to <|channel|>
        self._channel: str | None = None  # and from there on

    @property
    def has_channel(self) -> bool:
        return self._channel is not None

    def begin_channel(self) -> None:
        self._channel = ""

    def add(self, text: str) -> None:
        if self._channel is None:
            self._before += text
        else:
            self._channel += text

    @property
    def is_text(self) -> bool:
        """Whether the model answered without a header: neither a channel nor a recipient comes."""
        begun = self._before.lstrip()
        return self._has_role and not self.has_channel and not _TO.startswith(begun[: len(_TO)])

    @property
    def kind(self) -> _Kind:
        # The channel's name may run into what follows it ("analysisto=python").
        is_thought = (self._channel or "").lstrip().startswith("analysis")
        return _Kind.THOUGHT if is_thought and self.tool is None else _Kind.ANSWER

    @property
    def tool(self) -> str | None:
        """The tool that is spoken to."""
        words = f"{self._before} {self._channel or ''}".split()
        names = [word.partition(_TO)[2] for word in words if _TO in word]
        return next((name for name in names if name and name not in _PEOPLE), None)

    def unread(self) -> str:
        """What is no header, where <|message|> never came. Any of it may be cut short."""
        if self._channel is not None:
            text = _without_first(self._channel, _CHANNELS)
        else:
            text = self._before if self._has_role else _without_first(self._before, _ROLES)
        is_header = self.tool is not None or _TO.startswith(text.strip())
        return "" if is_header else text


class HarmonyReader:
    """An AnswerReader. marks: what each control token does. decoded: leaves out control tokens.
    prompt_ids: what is answered; may end inside a header or a message.
    """

    def __init__(self, marks: Mapping[int, Mark], decoded: TextStream, prompt_ids: Sequence[int]):
        self._marks, self._decoded = marks, decoded
        self._header: _Header | None = _Header()  # None: in the content of a message
        self._kind = _Kind.ANSWER  # of that content
        self._begin_answer()
        for token_id in _last_message(prompt_ids, marks):
            self.push(token_id)
        self._begin_answer()
        if self._header is not None and not self._header.has_channel:
            self._header = _Header(has_role=True)

    def _begin_answer(self) -> None:
        """Nothing has been said yet."""
        self._decoded.finish()
        self._num_messages = 0
        self._spoken: dict[_Kind, int] = {}  # the last message of each kind that said something
        self._tools: list[str] = []

    @property
    def warnings(self) -> Sequence[str]:
        return [
            f"The model called {tool}, though it was offered no tools; the call is shown as it is."
            for tool in dict.fromkeys(self._tools)
        ]

    def push(self, token_id: int) -> tuple[str, str]:
        mark = self._marks.get(token_id)
        if mark is None:
            return self._add(self._decoded.push(token_id))
        said = [self._add(self._decoded.finish())]  # half a character stays half
        # <|start|> and the role may have been left out before <|channel|>.
        if mark in _BREAKS or (mark is Mark.CHANNEL and self._header is None):
            said.append(self._end_message())
            self._header = _Header()
        if self._header is not None:
            if mark is Mark.CHANNEL:
                self._header.begin_channel()
            elif mark is Mark.CONSTRAIN:
                self._header.add(" ")
            elif mark is Mark.MESSAGE:
                self._begin_message(self._header)
        return _joined(said)

    def finish(self) -> tuple[str, str]:
        return _joined([self._add(self._decoded.finish()), self._end_message()])

    def _begin_message(self, header: _Header) -> None:
        self._kind, self._header = header.kind, None
        self._num_messages += 1
        if header.tool is not None:
            self._tools.append(header.tool)

    def _end_message(self) -> tuple[str, str]:
        """What a header that led to no content holds besides."""
        if self._header is None:
            return "", ""
        text = self._header.unread()
        self._begin_message(self._header)
        return self._say(text)

    def _add(self, text: str) -> tuple[str, str]:
        if self._header is None:
            return self._say(text)
        self._header.add(text)
        if not self._header.is_text:
            return "", ""
        return self._end_message()

    def _say(self, text: str) -> tuple[str, str]:
        if not text:
            return "", ""
        # Messages are paragraphs of one thought, or of one answer.
        if self._spoken.setdefault(self._kind, self._num_messages) != self._num_messages:
            text = "\n\n" + text
        self._spoken[self._kind] = self._num_messages
        return (text, "") if self._kind is _Kind.THOUGHT else ("", text)


def _without_first(text: str, names: Sequence[str]) -> str:
    """What follows a name, or its beginning; the whole text where it does not begin with one."""
    first, *rest = text.split(maxsplit=1) or [""]
    return "".join(rest) if any(name.startswith(first) for name in names) else text


def _last_message(ids: Sequence[int], marks: Mapping[int, Mark]) -> Sequence[int]:
    """From the last <|start|> on; nothing where there is none."""
    for at in range(len(ids) - 1, -1, -1):
        if marks.get(ids[at]) is Mark.START:
            return ids[at:]
    return ()


def _joined(said: list[tuple[str, str]]) -> tuple[str, str]:
    return "".join(thought for thought, _ in said), "".join(answer for _, answer in said)
