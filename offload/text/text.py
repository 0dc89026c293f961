"""Text to token ids and back: one model's tokenizer, with its chat template.

User text is text: a control string such as <|im_start|> in a prompt, a document or a message is
encoded as the characters it is made of, and control tokens come from the chat template alone
(`encoder.py`). Within those bounds the ids are those of transformers.

Which files describe a tokenizer is `tokenizer_files.py`'s business. Knows no model, no tensors, no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ..answers.call_reader import CallReader
from ..answers.harmony import GENERATION_PROMPT, LAST, NEEDED, WITHOUT_THOUGHTS, HarmonyReader, Mark
from ..answers.reader import AnswerReader, MarkedReader
from ..answers.stop_strings import StopStrings
from ..answers.thinking import Thoughts, is_open, marks_of
from ..answers.tool_formats import format_of, with_calls_written
from ..answers.tools import Calls
from ..errors import InputError, UnsupportedModel
from .control_text import ControlToken, check_text
from .detokenizer import TextStream
from .encoder import Encoder
from .prompt import num_common
from .template import (
    FALLBACK_SOURCE,
    ChatTemplate,
    check_messages,
    plain_data,
    with_joined_parts,
)
from .tokenizer_files import TokenizerFiles, read_tokenizer_files

__all__ = ["StopStrings", "TextStream", "Tokenizer"]

Think = bool | str | None  # off or on, a level, or as the template does by itself
THINK_VARIABLES = ("enable_thinking", "thinking")
LEVEL_VARIABLE = "reasoning_effort"


class Tokenizer:
    """Made by `load`. Not for several threads at once.

    num_ids: the ids are 0 ... num_ids - 1. special_ids: the tokens that `decode` leaves out.
    bos_token_id, eos_token_id: or None. prefix_ids: what `encode` puts first by default, the BOS
    token or nothing. now: the moment that templates which print a date are told; it stays what it
    was at loading, so that a chat over midnight keeps its beginning. warnings: what the user
    should know, in whole sentences. encoder: for whoever writes what an assistant writes.
    """

    def __init__(self, files: TokenizerFiles):
        self.name, self.named_tokens = files.name, files.named_tokens
        self.now = datetime.now()
        self.warnings: list[str] = []
        self.template_source = files.template_source or FALLBACK_SOURCE
        if files.template_source is None:
            self.warnings.append(
                f"{self.name} has no chat template: chats are written as plain text (User: ..., "
                "Assistant: ...), which a model that was not trained for chat may not follow."
            )
        self.encoder = encoder = Encoder(files, self.template_source)
        self._backend, self._control = encoder.backend, encoder.control
        self._detokenizer = encoder.detokenizer
        self.num_ids, self.special_ids = encoder.num_ids, encoder.special_ids
        self.bos_token_id, self.eos_token_id = encoder.bos_token_id, encoder.eos_token_id
        self.prefix_ids = encoder.prefix_ids

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a model's folder. BadCheckpoint says which file is missing or damaged;
        UnsupportedModel which feature is unknown."""
        return cls(read_tokenizer_files(folder))

    @cached_property
    def template(self) -> ChatTemplate:
        """Compiled when a chat first asks for it: a broken template leaves plain prompts alone."""
        return ChatTemplate(self.template_source, self.name)

    @cached_property
    def knows_thinking(self) -> bool:
        """Whether `think` makes a difference to chats."""
        return bool(self.harmony_marks) or self._has_switch

    @property
    def _has_switch(self) -> bool:
        return self.template.knows(*THINK_VARIABLES)

    def _warn_once(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The ids of plain text. add_bos: whether a BOS token comes first; None: as the model's
        files say. A control string in `text` is text. InputError where `text` is not Unicode."""
        return self.encoder.encode(text, add_bos)

    # Chats

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        think: Think = None,
        **template_vars: Any,
    ) -> list[int]:
        """The ids of a conversation, through the chat template. think: True or False for templates
        that know enable_thinking or thinking, and for answers in channels; "low", "medium" or
        "high" for those that know reasoning_effort. InputError where the template refuses."""
        rendered, guard = self._render(messages, add_generation_prompt, think, template_vars)
        return self.encoder.ids_of_rendered(rendered, guard)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """What `chat_ids` encodes, to be looked at. Takes the same options."""
        prompt = options.pop("add_generation_prompt", True)
        rendered, guard = self._render(messages, prompt, options.pop("think", None), options)
        return rendered.replace(guard, "")

    def continue_chat(
        self,
        session_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        think: Think = None,
        **template_vars: Any,
    ) -> tuple[list[int], int]:
        """The ids of a conversation whose beginning may have been processed: (ids, num_common), the
        first num_common of which equal session_ids.

        Sampled tokens are often not the ones that encoding their text gives. Where the rendered
        conversation begins with the session's text, the session's ids stay as they are and the rest
        is encoded behind them. Where a template has changed earlier turns (trimmed an answer,
        dropped its thoughts, printed another date), they stay up to the last control token before
        the change, or up to one that it has put in place of another.
        """
        rendered, guard = self._render(messages, add_generation_prompt, think, template_vars)
        text = self._control.with_aliases(rendered, guard)
        session = list(session_ids)
        num_kept, num_chars = self.encoder.agreement(session, text)
        while num_kept:
            rest = self.encoder.encode_after(session[:num_kept], text[num_chars:])
            if rest is not None:
                ids = [*session[:num_kept], *rest]
                break
            num_kept, num_chars = self.encoder.agreement(session, text, at_control_token=True)
        else:
            ids = self.encoder.ids_of_rendered(rendered, guard)
        return ids, num_common(ids, session)

    def num_answered(
        self, ids: list[int], messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> int:
        """How many ids of a conversation stand before what was said since its last answer; 0 where
        the template does not tell. options: see `chat_ids`."""
        answers = [i for i, m in enumerate(messages[:-1]) if m["role"] == "assistant"]
        if not answers:
            return 0
        before = messages[: answers[-1] + 1]
        try:
            return self.continue_chat(ids, before, add_generation_prompt=False, **options)[1]
        except InputError:
            return 0

    def _render(
        self, messages: Any, prompt: bool, think: Think, variables: Mapping[str, Any]
    ) -> tuple[str, str]:
        """(rendered, guard): the template's text of guarded messages."""
        checked = check_messages(messages)
        if any(isinstance(m["content"], list) for m in checked) and not self._reads_parts:
            checked = with_joined_parts(checked)
        variables = {key: plain_data(value, key) for key, value in variables.items()}
        guard = self._control.guard_for([checked, variables])
        guarded = self._control.break_up_all([checked, variables], guard)
        thinking = self._think_variables(think)
        rendered = self.template.render(
            with_calls_written(self, guarded[0]),
            add_generation_prompt=prompt,
            now=self.now,
            **{
                **self._own_variables,
                **thinking,
                "xml_tools": guarded[1].get("tools"),  # SmolLM3's name for them
                **guarded[1],
            },
        )
        if prompt and think is False and self.harmony_marks and not variables.get("tools"):
            # Such templates have no switch; an answer that has begun is not thought about.
            if rendered.endswith(GENERATION_PROMPT):
                rendered += WITHOUT_THOUGHTS
            elif not self._has_switch:
                self._warn_once(
                    f"{self.name}'s chat template always leaves room for thoughts: no effect."
                )
        check_text(rendered, f"what the chat template of {self.name} makes")
        return rendered, guard

    @property
    def _own_variables(self) -> dict[str, Any]:
        return {**self.named_tokens, "adds_bos": bool(self.prefix_ids)}

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the chat template reads a content that is a list of parts."""
        return self.template.reads_parts(now=self.now, **self._own_variables)

    def _think_variables(self, think: Think) -> dict[str, Any]:
        if think is None:
            return {}
        is_level = isinstance(think, str)
        if is_level and not self.template.knows(LEVEL_VARIABLE):
            effect = "it is on" if self._has_switch else "no effect"
            self._warn_once(f"{self.name}'s chat template has no levels of thinking: {effect}.")
        elif not is_level and not self.knows_thinking:
            self._warn_once(f"{self.name}'s chat template has no switch for thinking: no effect.")
        variables: dict[str, Any] = dict.fromkeys(THINK_VARIABLES, think is not False)
        return {**variables, LEVEL_VARIABLE: think} if is_level else variables

    # Decoding

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; U+FFFD for bytes that are no UTF-8, nothing for unknown ids."""
        stream = self.stream(skip_special)
        return "".join([*map(stream.push, ids), stream.finish()])

    def token_bytes(self, num_ids: int) -> list[bytes]:
        """What each of the first num_ids tokens adds to a text; b"" where that is nothing. Raises
        UnsupportedModel for a tokenizer that puts blanks between all tokens."""
        if self._detokenizer.separator:
            raise UnsupportedModel(f"the tokenizer of {self.name} puts blanks between all tokens")
        return [*map(self.bytes_of, range(num_ids))]

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text, blanks between all tokens aside."""
        return self._detokenizer.piece(token_id, keep=False)

    @property
    def drops_first_blank(self) -> bool:
        """Whether a blank at the beginning of a text is none of its characters."""
        return bool(self._detokenizer.num_stripped or self._detokenizer.first_without_spaces)

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for ids that come one by one; the pieces joined equal `decode`."""
        return TextStream(self._detokenizer, self.special_ids if skip_special else frozenset())

    # Answers

    @cached_property
    def thought_marks(self) -> tuple[str, str] | None:
        """What stands around a thought in an answer to a chat, or None."""
        return marks_of(self.template_source)

    @cached_property
    def harmony_marks(self) -> dict[int, Mark]:
        """What the control tokens of answers in channels do; empty for a model that has none."""
        source, found = self.template_source, {}
        if Mark.CHANNEL.value in source and Mark.MESSAGE.value in source:
            ids = ((self._backend.token_to_id(mark.value), mark) for mark in Mark)
            found = {i: mark for i, mark in ids if i in self.special_ids}
        return found if set(NEEDED) <= set(found.values()) else {}

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer by themselves."""
        last = (i for i, mark in self.harmony_marks.items() if mark in LAST)
        ends = (self.eos_token_id, *last)
        return tuple(dict.fromkeys(i for i in ends if i is not None))

    def answer_reader(
        self,
        prompt_ids: Sequence[int] | None,
        stop_strings: Iterable[str] = (),
        calls: Calls | None = None,
    ) -> AnswerReader:
        """What tells thought, answer and calls apart behind a chat's prompt, up to the first stop
        string; None: behind plain text, which knows none. calls: what is offered."""
        stops = StopStrings(stop_strings)
        if prompt_ids is None:
            return MarkedReader(self.stream(), Thoughts(None), stops)
        if self.harmony_marks:
            return HarmonyReader(self.harmony_marks, self.stream(), prompt_ids, stops, calls)
        format = format_of(self) if calls is not None else None
        marks = self.thought_marks
        shown = [*(marks or ()), *(() if format is None else format.marks)]
        return MarkedReader(
            TextStream(self._detokenizer, self._ids_without(shown)),
            Thoughts(marks, self.is_thinking(prompt_ids)),
            stops,
            None if format is None or calls is None else CallReader(format, calls),
        )

    def mark_parts(self, mark: str) -> list[int | str]:
        """A mark of the chat template as a model writes it: special tokens, and text."""
        parts: list[int | str] = []
        for part in self._control.parts(mark):
            if isinstance(part, ControlToken):
                part = part.token_id if part.is_special else part.text
            last = parts[-1] if parts else None
            if isinstance(part, str) and isinstance(last, str):
                parts[-1] = last + part
            else:
                parts.append(part)
        return parts

    def is_thinking(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a chat's prompt ends within a thought."""
        marks = self.thought_marks
        if marks is None:
            return False
        return is_open(self.decode(prompt_ids[-4 * len(marks[0]) :], skip_special=False), marks)

    def _ids_without(self, marks: Sequence[str]) -> frozenset[int]:
        """Special tokens but for those of marks, or what these begin with."""
        texts = map(self._backend.id_to_token, self.special_ids)
        shown = [text for text in texts if text and any(m.startswith(text) for m in marks)]
        return self.special_ids.difference(map(self._backend.token_to_id, shown))
