"""The tokenizer of a GGUF file, made of its vocabulary.

    gpt2     byte-level BPE: merges, and a name for how text is cut before they are made
    llama    SentencePiece's BPE: tokens with scores
    gemma4   the same by merges, of text whose spaces are pieces

Ids are those of the original tokenizer. What a name of a pre-tokenizer stands for is known here;
one that is not is refused. Knows no special tokens' meanings but those that end answers.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..errors import BadCheckpoint, UnsupportedModel
from ..text.tokenizer_files import TokenizerFiles
from ..text.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    QWEN_PATTERN,
    SPACE,
    UNUSED,
    USER_DEFINED,
    Piece,
    PieceRules,
    from_pieces,
)
from .file import GgufHeader, Strings

_MOST_TOKENS = 1 << 22
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(after: str, digits: str, upper: str = _UPPER, lower: str = _LOWER) -> str:
    """Words of capitals and small letters. after: what may follow one."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{upper}*{lower}+{after}|{start}{upper}+{lower}*{after}|{digits}"


_GPT4O = _cased(_CONTRACTIONS + "?", r"\p{N}{1,3}") + _WITH_SLASH
_TEKKEN = _cased("", r"\p{N}") + _WITH_SLASH
# As the model's own tokenizer has it; llama.cpp's does not cut a word before a capital.
_NO_HAN = (f"[{letters[1:-1]}&&[^\\p{{Han}}]]" for letters in (_UPPER, _LOWER))
_KIMI = (
    r"\p{Han}+|"
    + _cased(_CONTRACTIONS + "?", r"\p{N}{1,3}", *_NO_HAN)
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GPT2 = ()  # ByteLevel's own
_DIGITS = (r"\p{N}",)
# How text is cut, by the names that llama.cpp gives it: patterns, one after another; and whether a
# word that is a token is one whatever the merges say. Where no pattern is for words, GPT-2's is.
_CUTS: dict[str, tuple[tuple[str, ...], bool]] = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        ((_LLAMA3,), True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), ((_LLAMA3,), False)),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "kormo"),
        ((QWEN_PATTERN,), False),
    ),
    "qwen35": ((_QWEN35,), False),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), ((_GPT4O,), False)),
    "kimi-k2": ((_KIMI,), False),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), ((_LING,), False)),
    "tekken": ((_TEKKEN,), True),
    "seed-coder": ((_SEED,), False),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), (_DEEPSEEK3, False)),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4", "modern-bert", "trillion"),
        (_GPT2, False),
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (_DIGITS, False),
    ),
}
# Whose tokenizers compose characters first.
_COMPOSED = ("qwen2", "qwen35")
# That put a BOS first where the file does not say.
_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "tekken", "lfm2")
# Control tokens at which an answer ends, whoever trained the model.
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<|return|>", "<|call|>"),
    *("<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "[EOT]", "<|eot|>", "[|endofturn|]"),
    "<turn|>",
)
# Of Phi-3's tokens in a SentencePiece vocabulary, those that leave the white space behind them.
_LEAVE_SPACE = ("<unk>", "<s>", "<|endoftext|>")
_NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


_Kind = TypeVar("_Kind")


class _Vocabulary:
    """What a file says about its tokens. tokens: their texts; kinds: NORMAL, CONTROL, ..."""

    def __init__(self, header: GgufHeader):
        self.path, self._said = header.path, header.metadata
        self.model, self.pre = self.get("model", str), self.get("pre", str)
        self.architecture = header.metadata.get("general.architecture")
        tokens = self.get("tokens", Strings)
        if tokens is None or not 0 < len(tokens) <= _MOST_TOKENS:
            raise BadCheckpoint(f"{self.path} holds no tokenizer.")
        self.tokens = list(tokens)
        kinds = self.get("token_type", np.ndarray)
        self.kinds = [NORMAL] * len(self.tokens) if kinds is None else kinds.tolist()
        if len(self.kinds) != len(self.tokens):
            raise self.damaged(f"has {len(self.kinds)} types of {len(self.tokens)} tokens")
        self._tell_apart()

    def _tell_apart(self) -> None:
        """Texts of their own for tokens that nothing is ever cut into: unused and empty ones."""
        kept: set[str] = set()
        idle = []
        for at, (text, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            if kind == UNUSED or not text:
                idle.append(at)
            elif text in kept:
                raise self.damaged("has two tokens of the same text")
            else:
                kept.add(text)
        for at in idle:
            text = self.tokens[at]
            while text in kept:  # with spaces, which no token has, there is no such text
                text = f" {text} {at} "
            if text != self.tokens[at]:
                self.tokens[at], self.kinds[at] = text, UNUSED
            kept.add(text)

    def get(self, key: str, kind: type[_Kind]) -> _Kind | None:
        """A value of that kind; None where there is none."""
        value = self._said.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        raise self.damaged(f"has a {type(value).__name__} as tokenizer.ggml.{key}")

    def damaged(self, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.path} {what}. It is damaged; download it again.")

    def id(self, key: str) -> int | None:
        """Of the token that is named so."""
        number = self.get(f"{key}_token_id", int)
        return number if number is not None and 0 <= number < len(self.tokens) else None

    def token(self, key: str) -> str | None:
        """The text of the token that is named so."""
        number = self.id(key)
        return None if number is None else self.tokens[number]

    def added(self) -> dict[str, int]:
        """Tokens that are found in text before it is cut: their kinds, by their texts."""
        pairs = zip(self.tokens, self.kinds, strict=True)
        return {text: kind for text, kind in pairs if kind in (CONTROL, USER_DEFINED) and text}

    def merged(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """The vocabulary of a BPE, and its merges."""
        pairs = []
        for merge in self.get("merges", Strings) or ():
            left, _, right = merge[1:].partition(" ")
            pairs.append((merge[:1] + left, right))
        return {text: at for at, text in enumerate(self.tokens)}, pairs

    @property
    def template(self) -> str | None:
        template = self._said.get("tokenizer.chat_template")
        return template if isinstance(template, str) and template else None

    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        named = [self.id(name) for name in ("eos", "eot", "eom")]
        control = {
            text: at
            for at, (text, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED) and text in _ENDS
        }
        if "<|return|>" in control and "<|call|>" in control:
            control.pop("<|end|>", None)  # that ends a channel, and not the answer
        found = [*named, *control.values()]
        return list(dict.fromkeys(i for i in found if i is not None))


def read_gguf_tokenizer(header: GgufHeader, name: str) -> TokenizerFiles:
    """A file's tokenizer. Raises BadCheckpoint, UnsupportedModel."""
    found = _Vocabulary(header)
    makers = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _of_merges}
    make = None if found.model is None else makers.get(found.model)
    if make is None:
        raise UnsupportedModel(
            f"{header.path}: a tokenizer of the kind {found.model!r} is not supported. Supported: "
            f"{', '.join(makers)}."
        )
    try:
        backend = make(found)
    except (BadCheckpoint, UnsupportedModel):
        raise
    except Exception as error:  # the library raises plain Exception
        raise BadCheckpoint(
            f"{header.path}: its tokenizer cannot be used: {error}. Download the file again."
        ) from None
    named = {ours: text for ours, key in _NAMED.items() if (text := found.token(key)) is not None}
    add_bos = found.get("add_bos_token", bool)
    if add_bos is None:
        add_bos = found.model in ("llama", "gemma4") or found.pre in _WITH_BOS
    return TokenizerFiles(
        name=name,
        backend=backend,
        named_tokens=named,
        special_tokens=[text for text, kind in found.added().items() if kind == CONTROL],
        add_bos=add_bos,
        template_source=found.template,
    )


def end_ids(header: GgufHeader) -> list[int]:
    """The tokens that end an answer; none in a file without a tokenizer."""
    if "tokenizer.ggml.tokens" not in header.metadata:
        return []
    return _Vocabulary(header).ends()


def tokens_digest(header: GgufHeader) -> str:
    """Equal for files whose tokens are the same."""
    digest = hashlib.sha256()
    for key, value in sorted(header.metadata.items()):
        if key.startswith("tokenizer."):
            data = value.data if isinstance(value, Strings) else repr_bytes(value)
            digest.update(f"{key} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def repr_bytes(value: object) -> bytes:
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()


def _byte_level(found: _Vocabulary) -> Backend:
    if found.pre is None or found.pre not in _CUTS:
        raise UnsupportedModel(
            f"{found.path}: it is not known how the pre-tokenizer {found.pre or 'default'!r} cuts "
            "text, so that tokens would be wrong ones. Known: "
            f"{', '.join(sorted(_CUTS))}. A newer file of the model may name it, or use the "
            "original model."
        )
    patterns, whole_words = _CUTS[found.pre]
    backend = Backend(models.BPE(*found.merged(), ignore_merges=whole_words))
    if found.pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(p), behavior="isolated") for p in patterns
    ]
    gpt2 = patterns in (_GPT2, _DIGITS)
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind == CONTROL)
            for text, kind in found.added().items()
        ]
    )
    return backend


def _of_merges(found: _Vocabulary) -> Backend:
    backend = Backend(
        models.BPE(
            *found.merged(),
            unk_token=found.token("unknown"),
            fuse_unk=True,
            byte_fallback=BYTE in found.kinds,
        )
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_tokens(
        [
            # What users defined is found among spaces that are pieces already.
            AddedToken(text, normalized=kind == USER_DEFINED, special=kind == CONTROL)
            for text, kind in found.added().items()
        ]
    )
    return backend


def _sentencepiece(found: _Vocabulary) -> Backend:
    scores = found.get("scores", np.ndarray)
    if scores is None or len(scores) != len(found.tokens):
        raise found.damaged("has no score for each token")
    pieces = list(map(Piece, found.tokens, scores.tolist(), found.kinds))
    prefix = found.get("add_space_prefix", bool)
    unknown = found.get("unknown_token_id", int)
    trimming = frozenset()
    if found.architecture == "phi3":
        trimming = frozenset(found.added()).difference(_LEAVE_SPACE)
    rules = PieceRules(
        is_unigram=False,
        unk_id=0 if unknown is None else unknown,
        byte_fallback=BYTE in found.kinds,
        add_dummy_prefix=prefix is not False,
        remove_extra_whitespaces=found.get("remove_extra_whitespaces", bool) is True,
        trimming=trimming,
    )
    return from_pieces(pieces, rules)
