"""What GGUF files say of a tokenizer, made from its files in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from ebbtide.offload.gguf.file import GgufHeader, read_header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def tokens_of(folder: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """The keys, without what says where answers begin and end. pre: of byte-level BPE."""
    if (folder / "tokenizer.model").is_file():
        return _of_model(folder / "tokenizer.model")
    config = _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        files = _json(folder / "tokenizer.json")
        vocabulary, merges = files["model"]["vocab"], files["model"]["merges"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
        added = {t["id"]: t for t in files["added_tokens"]}
        if files["model"].get("byte_fallback"):
            return _of_fallback(vocabulary, merges)
    else:
        vocabulary = _json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        added = {}
    added |= {int(i): t for i, t in (config.get("added_tokens_decoder") or {}).items()}
    by_id = {i: text for text, i in vocabulary.items()} | {
        i: token["content"] for i, token in added.items()
    }
    kinds = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    size = max(by_id) + 1
    named = {i: by_id.get(i, f"[PAD{i}]") for i in range(size)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(named.values()),
        "tokenizer.ggml.token_type": [
            kinds.get(i, NORMAL if i in by_id else UNUSED) for i in named
        ],
        "tokenizer.ggml.merges": merges,
    }


def _of_model(path: Path) -> dict[str, Any]:
    """Of a SentencePiece model, as it is."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    proto.ParseFromString(path.read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.bos_token_id": proto.trainer_spec.bos_id,
        "tokenizer.ggml.eos_token_id": proto.trainer_spec.eos_id,
        "tokenizer.ggml.unknown_token_id": proto.trainer_spec.unk_id,
    }


def _of_fallback(vocabulary: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """Of Llama 2's vocabulary: a token's score is the place of the first merge that makes it."""
    texts = sorted(vocabulary, key=vocabulary.get)
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        places.setdefault(merge.replace(" ", ""), place)
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [-float(places.get(text, len(merges))) for text in texts],
        "tokenizer.ggml.token_type": [*kinds, *[NORMAL] * (len(texts) - len(kinds))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_keys(path: Path, said: dict[str, Any], architecture: str = "llama") -> GgufHeader:
    """A file without tensors that says this; and what is read of it."""
    writer = gguf.GGUFWriter(None, architecture)
    for name, value in said.items():
        add_key(writer, name, value)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return read_header(path)


def add_key(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
