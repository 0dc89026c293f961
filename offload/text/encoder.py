"""Text to token ids, and ids that stay while a text grows behind them.

Wraps the tokenizers library. Control tokens have aliases there (`control_text.py`) and are found by
these alone: their own spelling is text. Knows no messages and no template but for its marks.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken

from ..errors import InputError
from ..planning.memory_at_hand import give_back_freed_memory
from .control_text import ControlText, ControlToken, check_text
from .detokenizer import Detokenizer
from .tokenizer_files import TokenizerFiles

_SIDES = ("lstrip", "rstrip")
_PIECE_CHARS = 1 << 17
# What begins behind a word where a long text may be cut: a space and a letter, or one of the marks
# of scripts that put no spaces between words.
_WORD_ENDS = {" ": r" [^\W\d_]", "，": "，", "。": "。", "、": "、"}
_ENDS_WITH_LETTER = re.compile("(?:[^\\W\\d_]|\ufffd)\\Z")  # or with its last bytes alone


class Encoder:
    """Of one model's tokenizer. template_source: the chat template, of which some added tokens are
    marks.

    backend, control, detokenizer: what it is made of. num_ids, special_ids, bos_token_id,
    eos_token_id, prefix_ids: see Tokenizer.
    """

    def __init__(self, files: TokenizerFiles, template_source: str):
        name, backend = files.name, files.backend
        self._name, self._named_tokens = name, files.named_tokens
        self._template_source = template_source
        self.backend = backend
        # What a file may have left switched on would drop text, pad it, or vary it.
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        specials = {*self._named_tokens.values(), *files.special_tokens}
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
        self.control = self._control_text(added)
        self.detokenizer = Detokenizer(self._decoder_spec(), backend.id_to_token, self.num_ids)
        self._space_at_start = self._puts_space_before("x", "x")
        self._space_after_control = self._puts_space_before(self.control.cut + "x", "x")

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """See Tokenizer.encode."""
        check_text(text, "the text")
        ids = self._backend_ids(text)
        if not self._never_from_text.isdisjoint(ids):
            ids = self._backend_ids(self.control.break_up(text, self.control.cut))
            ids = self._checked([i for i in ids if i != self._cut_id])
        if add_bos is None:
            return [*self.prefix_ids, *ids]
        if not add_bos:
            return ids
        if self.bos_token_id is None:
            raise InputError(f"{self._name} has no BOS token to add")
        return [self.bos_token_id, *ids]

    def ids_of_rendered(self, rendered: str, guard: str) -> list[int]:
        """The ids of what a template made of messages that were broken up with `guard`."""
        ids = self._backend_ids(self.control.with_aliases(rendered, guard))
        if not self._never_from_text.isdisjoint(ids):
            cut = self.control.cut
            ids = self._backend_ids(self.control.with_aliases(rendered, guard, cut))
        return self._real(ids)

    def encode_after(self, kept: list[int], rest: str) -> list[int] | None:
        """The ids of `rest`, a text with aliases that follows `kept`. None where the tokenizer
        would not join the two without a space."""
        if not rest:
            return []
        splits = kept[-1] in self._alias_of or rest.startswith(tuple(self._alias_of.values()))
        for anchor in [self.control.cut] if splits else ["a", "\n", "."]:
            before = self._backend_ids(anchor)
            together = self._backend_ids(anchor + rest)
            ids = together[len(before) :]
            if splits or (together[: len(before)] == before and self._spells(ids, rest)):
                return self._real(ids)
        return None

    def encode_inside(self, text: str) -> list[int] | None:
        """The ids of what an assistant writes in the middle of a text, marks that are not special
        among it. None where that cannot be spelled without a space before it."""
        try:
            return self.encode_after([-1], self.control.as_written(text))
        except InputError:
            return None

    def agreement(
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

    # Inside

    def _id_of(self, name: str) -> int | None:
        text = self._named_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def _plain_ids(self, text: str) -> list[int]:
        """The ids of a text in which added tokens are not looked for."""
        self.backend.encode_special_tokens = True
        return self.backend.encode(text, add_special_tokens=False).ids

    def _prefix(self, add_bos: bool | None) -> list[int]:
        """The configuration's word counts before the post-processor's, as in transformers."""
        if add_bos is None:
            bare = self.backend.encode("x", add_special_tokens=False).ids
            full = self.backend.encode("x", add_special_tokens=True).ids
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
        backend = self.backend
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
        unknown = getattr(backend.model, "unk_token", None) or self._named_tokens.get("unk_token")
        from_text = {backend.token_to_id(unknown)} if unknown else set()
        self._never_from_text = frozenset(self._alias_of) - from_text
        return control

    def _is_marker(self, text: str) -> bool:
        """Whether an added token that is not special is one of the template's marks (<think>), and
        not a run of white space or a word."""
        edges = unicodedata.category(text[0])[0] + unicodedata.category(text[-1])[0]
        return len(text) >= 3 and set(edges) <= {"P", "S"} and text in self._template_source

    def _decoder_spec(self) -> dict[str, Any] | None:
        decoder = self.backend.decoder
        return None if decoder is None else json.loads(decoder.__getstate__())

    def _puts_space_before(self, text: str, end: str) -> bool:
        ids = [i for i in self._backend_ids(text) if i != self._cut_id]
        return self._raw_text(ids) == " " + end

    def _backend_ids(self, text: str) -> list[int]:
        if len(text) < 2 * _PIECE_CHARS:
            return self._ids_at_once(text)
        ids = self._ids_by_pieces(text) if self._word_ends else None
        if ids is None:
            ids = self._ids_at_once(text)
        give_back_freed_memory()
        return ids

    def _ids_at_once(self, text: str) -> list[int]:
        # The library takes some 500 bytes a token. The fast variant keeps no offsets: half the
        # time and memory on a long book.
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @cached_property
    def _word_ends(self) -> frozenset[str]:
        """Those of `_WORD_ENDS` into which no token reaches from a word's last letter. Then none
        does in any text, whatever merges there are, and what is before and behind such a place can
        be encoded by itself."""
        pieces = [self.detokenizer.piece(i, keep=False) for i in range(self.num_ids)]
        return frozenset(end for end in _WORD_ENDS if not any(map(_reaches_into(end), pieces)))

    def _ids_by_pieces(self, text: str) -> list[int] | None:
        """The ids of `text`, cut between words. None where a piece does not begin as it would in
        the middle of a text."""
        ends = "|".join(_WORD_ENDS[end] for end in self._word_ends)
        between_words = re.compile(rf"[^\W\d_](?={ends})")
        ids: list[int] = []
        start = 0
        while start < len(text):
            found = between_words.search(text, start + _PIECE_CHARS)
            end = found.end() if found else len(text)
            # With a letter before it a piece is no beginning of a text, which may be another.
            before = self._ids_at_once(text[start - 1 : start]) if start else []
            piece = self._ids_at_once(text[max(0, start - 1) : end])
            kept = piece[len(before) :]
            if start:
                first = self.detokenizer.piece(kept[0]) if kept else b""
                behind = text[start].encode()[: max(1, len(first))]
                if piece[: len(before)] != before or not first.startswith(behind):
                    return None
            ids += kept
            start = end
        return ids

    def _real(self, ids: list[int]) -> list[int]:
        """Aliases become the tokens they stand for. The text between them must not hold any."""
        self._checked(ids)
        real = self._real_ids
        return [real.get(i, i) for i in ids if i != self._cut_id]

    def _checked(self, ids: list[int]) -> list[int]:
        if not self._never_from_text.isdisjoint(ids):
            bad = self._never_from_text.intersection(ids)
            texts = ", ".join(sorted(filter(None, map(self.backend.id_to_token, bad))))
            raise InputError(f"the text holds {texts}, which {self._name} cannot spell as text")
        return ids

    def _spells(self, ids: list[int], text: str) -> bool:
        """Whether `ids`, up to the first alias, are the beginning of `text` with no space added."""
        num_plain = next((at for at, i in enumerate(ids) if i in self._real_ids), len(ids))
        start = self._raw_text(ids[:num_plain])
        if num_plain == len(ids):
            return start == text
        return text.startswith(start + self._alias_of[self._real_ids[ids[num_plain]]])

    def _raw_text(self, ids: Iterable[int]) -> str:
        """The text of tokens in the middle of a text: no leading space is dropped."""
        piece = self.detokenizer.piece
        return b"".join(map(piece, ids)).decode("utf-8", "replace")


def _reaches_into(end: str) -> Callable[[bytes], bool]:
    """Says of the bytes of a token whether a letter in them has `end` behind it, or what of it the
    token still holds."""
    encoded = end.encode()

    def reaches(piece: bytes) -> bool:
        *before, _ = piece.split(encoded)
        for length in range(1, len(encoded)):
            if piece.endswith(encoded[:length]):
                before.append(piece[:-length])
        return any(_ENDS_WITH_LETTER.search(part.decode("utf-8", "replace")) for part in before)

    return reaches
