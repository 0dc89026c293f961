"""Tokenizers of folders without a tokenizer.json: made from vocab.json with merges.txt, or from a
SentencePiece tokenizer.model.

Neither says all of how text is cut: for vocab.json it is known by the tokenizer's class, and for
tokenizer.model it stands in the file. What is made of a tokenizer.model is compared with the
sentencepiece library before it is used. Both need nothing but data; the second needs two libraries
(the extra `hf`). Knows no special tokens: tokenizer_files.py does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..errors import BadCheckpoint, UnsupportedModel

# GPT-4's pattern with single digits, as Qwen's tokenizers have it.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")
_MODEL_TYPES = {"gpt2": _CLASSES[0]} | dict.fromkeys(
    ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), _CLASSES[1]
)
SPACE = "\u2581"  # what sentencepiece writes for a space
_MOST_MODEL_BYTES = 64 << 20
_MOST_PIECE_CHARS = 512  # real ones have 16, and some 100 where they are spaces
_MOST_MERGES = 1 << 22  # a vocabulary of 262,144 has some 600,000
# Of sentencepiece's file format: kinds of pieces, and of models.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_PROBES = (
    "Hello, world! It's 1234.5 times  two   spaces.",
    " leading, trailing  ",
    "line\nline\r\n\n\ttab x\u00a0y\u3000z",
    "h\u00e9llo w\u00f6rld e\u0301 \u5317\u4eac \U0001f600 \u0661\u0662 \ufb03",
    "\u2581 \u200b \ufeff \U0001f469\u200d\U0001f467",
    "def f(x):\n    return x ** 2  # <s> [INST] </s>",
    "a",
    "\x00\x01",
)


@dataclass(frozen=True)
class Piece:
    """A token of a SentencePiece model. kind: NORMAL, CONTROL, ...; see sentencepiece's own."""

    piece: str
    score: float
    type: int


@dataclass(frozen=True)
class PieceRules:
    """How a SentencePiece model cuts text besides its pieces. unk_id: -1 where it has none.
    first_only: a space is put at the beginning alone, and not behind control tokens. trimming:
    tokens that take the white space behind them."""

    is_unigram: bool
    unk_id: int
    byte_fallback: bool
    add_dummy_prefix: bool = True
    first_only: bool = False
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    trimming: frozenset[str] = frozenset()


def from_merges(folder: Path, config: dict[str, Any], model_type: Any) -> Backend:
    """Byte-level BPE of vocab.json and merges.txt. config: tokenizer_config.json; model_type: what
    config.json says. Raises BadCheckpoint, UnsupportedModel.
    """
    name = config.get("tokenizer_class")
    name = name if isinstance(name, str) else _MODEL_TYPES.get(str(model_type), "")
    name = name.removesuffix("Fast")
    if name not in _CLASSES:
        raise UnsupportedModel(
            f"{folder} has vocab.json and merges.txt without a tokenizer.json, and the class "
            f"{name or 'of its tokenizer is not given'}; known are {', '.join(_CLASSES)}. Fetch "
            "tokenizer.json from the model's page, or make it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    files = [str(folder / file) for file in ("vocab.json", "merges.txt")]
    try:
        backend = Backend(models.BPE.from_file(*files))
    except Exception as error:  # the library raises plain Exception
        raise BadCheckpoint(f"{files[0]} and merges.txt cannot be read: {error}") from None
    prefix = config.get("add_prefix_space") is True
    if name == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        steps = [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def from_sentencepiece(path: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, str]]:
    """(backend, named tokens) of a tokenizer.model. Raises BadCheckpoint, UnsupportedModel."""
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import (
            ModelProto,  # pyright: ignore[reportAttributeAccessIssue] - made at import
        )
    except ImportError as error:
        raise UnsupportedModel(
            f"{path.parent} has a tokenizer.model and no tokenizer.json. Reading it takes two "
            f"libraries more ({error}): pip install 'ebbtide[hf]'"
        ) from None
    proto = ModelProto()
    try:
        if path.stat().st_size > _MOST_MODEL_BYTES:
            raise BadCheckpoint(f"{path} is larger than any tokenizer.")
        data = path.read_bytes()
        proto.ParseFromString(data)
        processor = SentencePieceProcessor(model_proto=data)
    except BadCheckpoint:
        raise
    except Exception as error:  # the libraries have errors of their own
        raise BadCheckpoint(f"{path} cannot be read: {error}") from None
    first_only = config.get("legacy") is False
    try:
        backend = from_pieces(proto.pieces, _rules(proto, first_only))
    except Exception as error:
        raise BadCheckpoint(f"{path} cannot be used: {error}") from None
    for probe in _PROBES:
        if first_only and probe.startswith(" "):
            continue  # such a tokenizer puts no second space before one
        ours = backend.encode(probe, add_special_tokens=False).ids
        if _text_only(proto, ours) and ours != processor.encode(probe):
            raise UnsupportedModel(
                f"{path} cuts text in a way that Ebbtide cannot follow ({probe!r}). Fetch "
                "tokenizer.json from the model's page."
            )
    spec = proto.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    pieces = proto.pieces
    return backend, {n: pieces[i].piece for n, i in ids.items() if 0 <= i < len(pieces)}


def _text_only(proto, ids: list[int]) -> bool:
    """Whether no control token was found in the text: as plain text is encoded, none is."""
    return not any(proto.pieces[i].type == CONTROL for i in ids)


def _rules(proto, first_only: bool) -> PieceRules:
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_BPE, _UNIGRAM):
        raise ValueError("it is neither a BPE nor a unigram model")
    return PieceRules(
        trainer.model_type == _UNIGRAM,
        trainer.unk_id,
        trainer.byte_fallback,
        rules.add_dummy_prefix,
        first_only,
        rules.remove_extra_whitespaces,
        rules.precompiled_charsmap,
    )


def from_pieces(pieces: Sequence[Piece], rules: PieceRules) -> Backend:
    """The tokenizer of a SentencePiece model. Raises ValueError, and whatever the tokenizers
    library does."""
    # With a prefix, what users defined is looked for before spaces become pieces.
    found_as = _with_spaces(pieces) if rules.add_dummy_prefix else {}
    vocabulary = {found_as.get(piece.piece, piece.piece): at for at, piece in enumerate(pieces)}
    if rules.is_unigram:
        scores = [(piece.piece, piece.score) for piece in pieces]
        backend = Backend(models.Unigram(scores, rules.unk_id, rules.byte_fallback))
    else:
        has_unknown = 0 <= rules.unk_id < len(pieces)
        backend = Backend(
            models.BPE(
                vocab=vocabulary,
                merges=_merges(pieces, vocabulary),
                unk_token=pieces[rules.unk_id].piece if has_unknown else None,
                fuse_unk=True,
                byte_fallback=rules.byte_fallback,
            )
        )
    steps = []
    if rules.charsmap:
        steps.append(normalizers.Precompiled(rules.charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix and not rules.first_only:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    if rules.first_only:
        scheme = "first" if rules.add_dummy_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
    backend.add_tokens(
        [
            AddedToken(
                found_as.get(piece.piece, piece.piece),
                rstrip=piece.piece in rules.trimming,
                # Found among spaces that are pieces already. (With a prefix these would get one.)
                normalized=piece.type == USER_DEFINED and not rules.add_dummy_prefix,
                special=piece.type == CONTROL,
            )
            for piece in pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    return backend


def _with_spaces(pieces: Sequence[Piece]) -> dict[str, str]:
    """Pieces that users defined, as they are in text that has spaces."""
    taken = {piece.piece for piece in pieces}
    defined = (p.piece for p in pieces if p.type == USER_DEFINED and SPACE in p.piece)
    written = {piece: piece.replace(SPACE, " ") for piece in defined}
    return {piece: text for piece, text in written.items() if text not in taken}


def _merges(pieces: Sequence[Piece], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the third with the best score first: what the
    sentencepiece library joins next. ValueError for more, or of longer ones, than there can be.
    """
    # Of each the one text that there is: a hostile file has many ways to join long ones.
    kinds = (NORMAL, USER_DEFINED)
    usable = {p.piece: p.piece for p in pieces if p.type in kinds and p.piece in vocabulary}
    ranked = sorted((p for p in pieces if p.type == NORMAL), key=lambda piece: -piece.score)
    merges: list[tuple[str, str]] = []
    for piece in ranked:
        text, pairs = piece.piece, []
        if len(text) > _MOST_PIECE_CHARS:
            raise ValueError(f"a piece of {len(text)} characters is in it")
        for at in range(1, len(text)):
            left = usable.get(text[:at])
            right = usable.get(text[at:]) if left is not None else None
            if right is not None:
                pairs.append((left, right))
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        if len(merges) > _MOST_MERGES:
            raise ValueError("its pieces can be joined in more ways than those of any tokenizer")
    return merges
