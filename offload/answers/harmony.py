"""Answers in channels, as gpt-oss gives them: OpenAI's harmony format.

    header --<|message|>--> content --<|end|>, <|return|>, <|call|>--> header ...
       ^-------<|start|>, <|channel|>---'

An answer is one message or several. A header says who speaks, in which channel, and to whom:

    <|start|>assistant<|channel|>analysis<|message|>thoughts<|end|>
    <|start|>assistant<|channel|>commentary<|message|>what the model is about to do<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

What is said in analysis is thought, a message to a function that was offered is a call, all else is
for the user. A message to any other tool is shown, and a warning names the tool. Where the model
goes on to speak for others (user, system, developer), its answer is over. Headers that are damaged
cost no text.

Reads token ids, not strings: an answer about the format spells it in letters, and that is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum

from ..output import ToolCall
from ..text.detokenizer import TextStream
from .stop_strings import StopStrings
from .text_trace import TextTrace
from .tools import Calls


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

FUNCTIONS = "functions."  # before the names of those that are offered
_OTHERS = ("user", "system", "developer")  # for whom a model does not speak
_ROLES = ("assistant", "tool", *_OTHERS)
_CHANNELS = ("analysis", "commentary", "final")
_FORMATS = ("json", "code")  # of calls
_TO = "to="
_PEOPLE = ("all", "user", "assistant")  # may be spoken to, and are no tools
# A word of its own, or behind a name that runs into it ("analysisto=python").
_RECIPIENT = re.compile(rf"(?<!\S)(?:{'|'.join(_ROLES + _CHANNELS)})?{_TO}(\S*)")


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
    def is_of_others(self) -> bool:
        """Whether the model has begun to speak for somebody else."""
        role = next(iter(self._before.split(maxsplit=1)), "")
        return role in _OTHERS and not self._has_role

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
        names = _RECIPIENT.findall(f"{self._before} {self._channel or ''}")
        return next((name for name in names if name and name not in _PEOPLE), None)

    def unread(self) -> str:
        """What is no header, where none should be any longer or <|message|> never came."""
        if self._channel is not None:
            return _behind_header(self._channel, _CHANNELS)
        return _behind_header(self._before, () if self._has_role else _ROLES)


class HarmonyReader:
    """An AnswerReader. marks: what each control token does. decoded: leaves out control tokens.
    prompt_ids: what is answered; may end inside a header or a message. stops: see AnswerReader.
    offered: what may be called, and takes calls.
    """

    def __init__(
        self,
        marks: Mapping[int, Mark],
        decoded: TextStream,
        prompt_ids: Sequence[int],
        stops: StopStrings,
        offered: Calls | None = None,
    ):
        self._marks, self._decoded = marks, decoded
        self._stops, self._offered = StopStrings(()), Calls({})  # not for what is in the prompt
        self._header: _Header | None = _Header()  # None: in the content of a message
        self._kind = _Kind.ANSWER  # of that content
        self._begin_answer()
        for token_id in _last_message(prompt_ids, marks):
            self.push(token_id)
        self._begin_answer()
        self._stops, self._offered = stops, offered or Calls({})
        if self._header is not None and not self._header.has_channel:
            self._header = _Header(has_role=True)

    def _begin_answer(self) -> None:
        """Nothing has been said yet."""
        self._decoded.finish()
        self._num_messages = 0
        self._spoken: dict[_Kind, int] = {}  # the last message of each kind that said something
        self._calls: dict[str, bool] = {}  # the tools that were called, whether with any text
        self._tool: str | None = None  # that is spoken to
        self._arguments = ""  # of the call that is being made
        self._damaged: list[str] = []  # functions whose calls were none
        self._is_with_others = False

    @property
    def warnings(self) -> Sequence[str]:
        return [
            f"The model called {tool}, which it was not offered; "
            + ("the call is shown as it is." if is_shown else "the call came without content.")
            for tool, is_shown in self._calls.items()
        ] + [
            f"The model called {function} with what is not a JSON object; it is shown as it is."
            for function in self._damaged
        ]

    @property
    def is_over(self) -> bool:
        has_called = self._offered.are_enough
        return has_called or self._is_with_others or self._stops.matched is not None

    @property
    def stop_string(self) -> str | None:
        return self._stops.matched

    def take_calls(self) -> list[ToolCall]:
        return self._offered.take()

    def trace(self, trace: TextTrace) -> None:
        # What is said is the end of what was decoded, also where it was held back as a header or
        # as a call.
        self._decoded.trace(trace)
        self._stops.follow(self._decoded, trace.told)

    def push(self, token_id: int) -> tuple[str, str]:
        mark = self._marks.get(token_id)
        if mark is None:
            return self._add(self._decoded.push(token_id))
        said = [self._add(self._decoded.finish())]  # half a character stays half
        header = self._header
        if header is not None and header.is_of_others and mark in (Mark.CHANNEL, Mark.MESSAGE):
            self._is_with_others, self._header = True, None
        # <|start|> and the role may have been left out before <|channel|>, or text stands there.
        elif mark in _BREAKS or (
            mark is Mark.CHANNEL and (header is None or header.has_channel or header.unread())
        ):
            said += [self._end_message(), self._end_call()]
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
        said = [self._add(self._decoded.finish()), self._end_message(), self._end_call()]
        return _joined([*said, ("", self._stops.finish())])

    def _begin_message(self, header: _Header) -> None:
        self._kind, self._header, self._tool = header.kind, None, header.tool
        self._num_messages += 1
        if self._tool is not None and not self._is_call:
            self._calls.setdefault(self._tool, False)

    @property
    def _function(self) -> str:
        return (self._tool or "").removeprefix(FUNCTIONS)

    @property
    def _is_call(self) -> bool:
        return self._function in self._offered.offered

    def _end_call(self) -> tuple[str, str]:
        """Takes the call that has been made, if that is so; its text where it is none."""
        if not self._is_call:
            return "", ""
        function, text = self._function, self._arguments
        self._tool, self._arguments = None, ""
        if self._offered.add([(function, text or "{}")]):
            return "", ""
        self._damaged.append(function)
        return self._say(text)

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
        if not text or self.is_over:
            return "", ""
        if self._is_call:
            self._arguments += text
            return "", ""
        if self._tool is not None:
            self._calls[self._tool] = True
        # Messages are paragraphs of one thought, or of one answer.
        is_next = self._spoken.setdefault(self._kind, self._num_messages) != self._num_messages
        self._spoken[self._kind] = self._num_messages
        between = "\n\n" if is_next else ""
        if self._kind is _Kind.THOUGHT:
            self._decoded.take_sources(0)
            return between + text, ""
        if between:
            between = self._stops.put_between(between)
        return "", between + self._stops.push(text)


def _behind_header(text: str, names: Sequence[str]) -> str:
    """What follows a name, a recipient and a format, which may all lack, and the last of which may
    be cut short; the whole text where it does not begin with any."""
    # Tools have names of their own; they are known by the recipient that follows.
    name = rf"(?:{'|'.join(names)})(?=\s|{_TO}|$)|\S+(?=\s+{_TO})" if names else ""
    format = f"(?:{'|'.join(_FORMATS)})(?!\\S)"
    header = re.match(rf"\s*({name})?\s*({_TO}\S*\s*(?:{format})?)?\s*", text)
    assert header is not None
    rest = text[header.end() :]
    expected = _FORMATS if header[2] else (_TO,) if header[1] else (*names, _TO)
    if not rest or any(word.startswith(rest) for word in expected):
        return ""
    return rest if header[0].strip() else text


def _last_message(ids: Sequence[int], marks: Mapping[int, Mark]) -> Sequence[int]:
    """From the last <|start|> on; nothing where there is none."""
    for at in range(len(ids) - 1, -1, -1):
        if marks.get(ids[at]) is Mark.START:
            return ids[at:]
    return ()


def _joined(said: list[tuple[str, str]]) -> tuple[str, str]:
    return "".join(thought for thought, _ in said), "".join(answer for _, answer in said)
