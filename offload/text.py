"""Text to token ids and back: one model's tokenizer, with its chat template.

Wraps the tokenizers library. User text is text: a control string such as <|im_start|> in a prompt,
a document or a message is encoded as the characters it is made of, and control tokens come from the
chat template alone (`control_text.py`). Within those bounds the ids are those of transformers.

Which files describe a tokenizer is `tokenizer_files.py`'s business. Knows no model, no tensors, no
torch.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from .answers.call_reader import CallReader
from .answers.harmony import GENERATION_PROMPT, LAST, NEEDED, WITHOUT_THOUGHTS, HarmonyReader, Mark
from .answers.reader import AnswerReader, MarkedReader
from .answers.stop_strings import StopStrings
from .answers.thinking import Thoughts, is_open, marks_of
from .answers.tool_formats import format_of, with_calls_written
from .answers.tools import Calls
from .control_text import ControlText, ControlToken, check_text
from .detokenizer import Detokenizer, TextStream
from .errors import InputError, UnsupportedModel
from .prompt import num_common
from .template import FALLBACK_SOURCE, ChatTemplate, check_messages, plain_data
from .tokenizer_files import TokenizerFiles, read_tokenizer_files

__all__ = ["StopStrings", "TextStream", "Tokenizer"]

Think = bool | str | None  # off or on, a level, or as the template does by itself
THINK_VARIABLES = ("enable_thinking", "thinking")
LEVEL_VARIABLE = "reasoning_effort"
_SIDES = ("lstrip", "rstrip")


class Tokenizer:
    """Made by `load`. Not for several threads at once.

    num_ids: the ids are 0 ... num_ids - 1. special_ids: the tokens that `decode` leaves out.
    bos_token_id, eos_token_id: or None. prefix_ids: what `encode` puts first by default, the BOS
    token or nothing. now: the moment that templates which print a date are told; it stays what it
    was at loading, so that a chat over midnight keeps its beginning. warnings: what the user
    should know, in whole sentences.
    """

    def __init__(self, files: TokenizerFiles):
        name, backend = files.name, files.backend
        self.name = name
        self.now = datetime.now()
        self.warnings: list[str] = []
        self.named_tokens = files.named_tokens
        self._backend = backend
        # What a file may have left switched on would drop text, pad it, or vary it.
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        specials = {*self.named_tokens.values(), *files.special_tokens}
        said = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        for text in sorted(specials):
            token_id = backend.token_to_id(text)
            if token_id is None:
                continue
            # Some files name an ordinary token ("!") for padding: it stays ordinary.
            if text in said or token_id not in self._plain_ids(text):
                flags = {side: getattr(said.get(text), side, False) for side in _SIDES}
                backend.add_special_tokens([AddedToken(text, special=True, **flags)])
        added = {
            token_id: token
            for token_id, token in backend.get_added_tokens_decoder().items()
            # A single character that the model finds by itself cannot be told from text.
            if len(token.content) > 1 or self._plain_ids(token.content) != [token_id]
        }
        self.special_ids = frozenset(
            [i for i, token in added.items() if token.special or token.content in specials]
        )
        self.num_ids = 1 + max([backend.get_vocab_size() - 1, *backend.get_added_tokens_decoder()])
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.prefix_ids = self._prefix(files.add_bos)
        self.template_source = files.template_source or FALLBACK_SOURCE
        if files.template_source is None:
            self.warnings.append(
                f"{name} has no chat template: chats are written as plain text (User: ..., "
                "Assistant: ...), which a model that was not trained for chat may not follow."
            )
        self._control = self._control_text(added)
        self._detokenizer = Detokenizer(self._decoder_spec(), backend.id_to_token, self.num_ids)
        self._space_at_start = self._puts_space_before("x", "x")
        self._space_after_control = self._puts_space_before(self._control.cut + "x", "x")

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

    def _id_of(self, name: str) -> int | None:
        text = self.named_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _plain_ids(self, text: str) -> list[int]:
        """The ids of a text in which added tokens are not looked for."""
        self._backend.encode_special_tokens = True
        return self._backend.encode(text, add_special_tokens=False).ids

    def _prefix(self, add_bos: bool | None) -> list[int]:
        """The configuration's word counts before the post-processor's, as in transformers."""
        if add_bos is None:
            bare = self._backend.encode("x", add_special_tokens=False).ids
            full = self._backend.encode("x", add_special_tokens=True).ids
            for at in range(len(full)):
                if full[at : at + len(bare)] == bare:
                    return full[:at]
            return []
        return [self.bos_token_id] if add_bos and self.bos_token_id is not None else []

    def _control_text(self, added: Mapping[int, AddedToken]) -> ControlText:
        """Finds the control tokens, and teaches the backend their aliases. From here on the backend
        reads the tokens' own spelling as text."""
        tokens = []
        for token_id, token in added.items():
            is_special = token_id in self.special_ids
            if token.content and (is_special or self._is_marker(token.content)):
                tokens.append(
                    ControlToken(token_id, token.content, is_special, token.lstrip, token.rstrip)
                )
        control = ControlText(tokens)
        backend = self._backend
        backend.add_special_tokens([AddedToken(t.text, special=True) for t in tokens])
        backend.encode_special_tokens = True
        aliases = [*control.aliases.values(), control.cut]
        backend.add_tokens([AddedToken(text, normalized=False) for text in aliases])
        self._real_ids = {
            backend.token_to_id(control.aliases[token.text]): token.token_id for token in tokens
        }
        self._alias_of = {token.token_id: control.aliases[token.text] for token in tokens}
        self._cut_id = backend.token_to_id(control.cut)
        # A token for what the vocabulary lacks comes from text rightly.
        unknown = getattr(backend.model, "unk_token", None) or self.named_tokens.get("unk_token")
        from_text = {backend.token_to_id(unknown)} if unknown else set()
        self._never_from_text = frozenset(self._alias_of) - from_text
        return control

    def _is_marker(self, text: str) -> bool:
        """Whether an added token that is not special is one of the template's marks (<think>), and
        not a run of white space or a word."""
        edges = unicodedata.category(text[0])[0] + unicodedata.category(text[-1])[0]
        return len(text) >= 3 and set(edges) <= {"P", "S"} and text in self.template_source

    def _decoder_spec(self) -> dict[str, Any] | None:
        decoder = self._backend.decoder
        return None if decoder is None else json.loads(decoder.__getstate__())

    def _puts_space_before(self, text: str, end: str) -> bool:
        ids = [i for i in self._backend_ids(text) if i != self._cut_id]
        return self._raw_text(ids) == " " + end

    # Encoding

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The ids of plain text. add_bos: whether a BOS token comes first; None: as the model's
        files say. A control string in `text` is text. InputError where `text` is not Unicode."""
        check_text(text, "the text")
        ids = self._backend_ids(text)
        if not self._never_from_text.isdisjoint(ids):
            ids = self._backend_ids(self._control.break_up(text, self._control.cut))
            ids = self._checked([i for i in ids if i != self._cut_id])
        if add_bos is None:
            return [*self.prefix_ids, *ids]
        if not add_bos:
            return ids
        if self.bos_token_id is None:
            raise InputError(f"{self.name} has no BOS token to add")
        return [self.bos_token_id, *ids]

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
        return self._ids_of_rendered(rendered, guard)

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
        num_kept, num_chars = self._agreement(session, text)
        while num_kept:
            rest = self._encode_after(session[:num_kept], text[num_chars:])
            if rest is not None:
                ids = [*session[:num_kept], *rest]
                break
            num_kept, num_chars = self._agreement(session, text, at_control_token=True)
        else:
            ids = self._ids_of_rendered(rendered, guard)
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
        variables = {key: plain_data(value, key) for key, value in variables.items()}
        guard = self._control.guard_for([checked, variables])
        guarded = self._control.break_up_all([checked, variables], guard)
        thinking = self._think_variables(think)
        rendered = self.template.render(
            with_calls_written(self, guarded[0]),
            add_generation_prompt=prompt,
            now=self.now,
            **{
                **self.named_tokens,
                "adds_bos": bool(self.prefix_ids),
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

    def _ids_of_rendered(self, rendered: str, guard: str) -> list[int]:
        ids = self._backend_ids(self._control.with_aliases(rendered, guard))
        if not self._never_from_text.isdisjoint(ids):
            cut = self._control.cut
            ids = self._backend_ids(self._control.with_aliases(rendered, guard, cut))
        return self._real(ids)

    def _backend_ids(self, text: str) -> list[int]:
        # The fast variant keeps no offsets: half the time and memory on a long book.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _real(self, ids: list[int]) -> list[int]:
        """Aliases become the tokens they stand for. The text between them must not hold any."""
        self._checked(ids)
        real = self._real_ids
        return [real.get(i, i) for i in ids if i != self._cut_id]

    def _checked(self, ids: list[int]) -> list[int]:
        if not self._never_from_text.isdisjoint(ids):
            bad = self._never_from_text.intersection(ids)
            texts = ", ".join(sorted(filter(None, map(self._backend.id_to_token, bad))))
            raise InputError(f"the text holds {texts}, which {self.name} cannot spell as text")
        return ids

    def encode_inside(self, text: str) -> list[int] | None:
        """The ids of what an assistant writes in the middle of a text, marks that are not special
        among it. None where that cannot be spelled without a space before it."""
        try:
            return self._encode_after([-1], self._control.as_written(text))
        except InputError:
            return None

    def mark_parts(self, mark: str) -> list[int | str]:
        """A mark of the chat template as a model writes it: special tokens, and text."""
        parts: list[int | str] = []
        for part in self._control.parts(mark):
            if isinstance(part, ControlToken):
                part = part.token_id if part.is_special else part.text
            if parts and isinstance(part, str) and isinstance(parts[-1], str):
                part = parts.pop() + part
            parts.append(part)
        return parts

    # Continuing

    def _agreement(
        self, session: list[int], text: str, at_control_token: bool = False
    ) -> tuple[int, int]:
        """(num_tokens, num_chars): how much of the session `text`, a rendering with aliases, begins
        with. All of it; or else, or where at_control_token is set, up to a control token: behind
        the last that both have, or before the first that is another."""
        num_chars, best, start = 0, (0, 0), 0
        while start < len(session):
            end = start
            while end < len(session) and session[end] not in self._alias_of:
                end += 1
            piece = self._raw_text(session[start:end])
            spaced = self._space_after_control if start else self._space_at_start
            if spaced and piece.startswith(" "):
                piece = piece[1:]
            if not text.startswith(piece, num_chars):
                return best
            num_chars += len(piece)
            if end == len(session):
                break
            alias = self._alias_of[session[end]]
            if not text.startswith(alias, num_chars):
                # An answer stays when the template ends it otherwise than the model did.
                if text.startswith(tuple(self._alias_of.values()), num_chars):
                    best = (end, num_chars)
                return best
            num_chars += len(alias)
            start = end + 1
            best = (start, num_chars)
        return best if at_control_token else (len(session), num_chars)

    def _encode_after(self, kept: list[int], rest: str) -> list[int] | None:
        """The ids of `rest`, a text with aliases that follows `kept`. None where the tokenizer
        would not join the two without a space."""
        if not rest:
            return []
        splits = kept[-1] in self._alias_of or rest.startswith(tuple(self._alias_of.values()))
        for anchor in [self._control.cut] if splits else ["a", "\n", "."]:
            before = self._backend_ids(anchor)
            together = self._backend_ids(anchor + rest)
            ids = together[len(before) :]
            if splits or (together[: len(before)] == before and self._spells(ids, rest)):
                return self._real(ids)
        return None

    def _spells(self, ids: list[int], text: str) -> bool:
        """Whether `ids`, up to the first alias, are the beginning of `text` with no space added."""
        num_plain = next((at for at, i in enumerate(ids) if i in self._real_ids), len(ids))
        start = self._raw_text(ids[:num_plain])
        if num_plain == len(ids):
            return start == text
        return text.startswith(start + self._alias_of[self._real_ids[ids[num_plain]]])

    def _raw_text(self, ids: Iterable[int]) -> str:
        """The text of tokens in the middle of a text: no leading space is dropped."""
        piece = self._detokenizer.piece
        return b"".join(map(piece, ids)).decode("utf-8", "replace")

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
            None if format is None else CallReader(format, calls),
        )

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

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for ids that come one by one; the pieces joined equal `decode`."""
        return TextStream(self._detokenizer, self.special_ids if skip_special else frozenset())
