"""The files of a model's folder that describe its tokenizer.

tokenizer.json (through the tokenizers library), or the older files that vocabulary.py makes one of;
tokenizer_config.json, special_tokens_map.json, and the chat template wherever it is kept. Data
only: nothing that a folder holds is run. What the files mean for text is `encoder.py`'s business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ..errors import BadCheckpoint
from .vocabulary import from_merges, from_sentencepiece

NAMED_TOKENS = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()


@dataclass
class TokenizerFiles:
    """What a folder says. named_tokens: {"bos_token": "<s>", ...}, only those that are set;
    special_tokens: further ones; add_bos: None where the post-processor decides."""

    name: str
    backend: Backend
    named_tokens: dict[str, str] = field(default_factory=dict)
    special_tokens: list[str] = field(default_factory=list)
    add_bos: bool | None = None
    template_source: str | None = None


def read_tokenizer_files(folder: str | Path) -> TokenizerFiles:
    """BadCheckpoint says which file is missing or damaged, and what to do."""
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    path, backend, own_names = _read_backend(folder, config)
    named, special = _special_names(config, _read_json(folder / "special_tokens_map.json"))
    named = {**own_names, **named}
    _add_missing_tokens(backend, config, path)
    add_bos = config.get("add_bos_token", path.name == "tokenizer.model" or None)
    return TokenizerFiles(
        name=folder.resolve().name,
        backend=backend,
        named_tokens=named,
        special_tokens=special,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        template_source=_template_source(folder, config),
    )


def _read_backend(folder: Path, config: dict[str, Any]) -> tuple[Path, Backend, dict[str, str]]:
    """(the file it comes from, the backend, tokens that the file itself names)."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return path, Backend.from_file(str(path)), {}
        except Exception as error:  # the library raises plain Exception
            raise BadCheckpoint(f"{path} cannot be read: {error}") from None
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        model_type = _read_json(folder / "config.json").get("model_type")
        return folder / "vocab.json", from_merges(folder, config, model_type), {}
    path = folder / "tokenizer.model"
    if path.is_file():
        return path, *from_sentencepiece(path, config)
    raise BadCheckpoint(_missing_tokenizer(folder))


def _missing_tokenizer(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder"
    others = [
        name
        for name in ("vocab.json", "merges.txt", "vocab.txt", "tekken.json")
        if (folder / name).is_file()
    ]
    has = f" It has {', '.join(others)}." if others else ""
    return (
        f"{folder} has no tokenizer that Ebbtide reads: tokenizer.json, vocab.json with "
        f"merges.txt, or tokenizer.model.{has} "
        "Fetch one from the model's page, or make the first with transformers: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _content(token: Any) -> str | None:
    """A token is written as text, or as an object with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _special_names(*files: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """({name: token}, further special tokens); the first file that names a token counts."""
    named: dict[str, str] = {}
    extra: list[str | None] = []
    for file in files:
        for name in NAMED_TOKENS:
            text = _content(file.get(name))
            if text is not None:
                named.setdefault(name, text)
        for name in ("additional_special_tokens", "extra_special_tokens"):
            more = file.get(name) or []
            extra += map(_content, more.values() if isinstance(more, dict) else more)
        decoder = file.get("added_tokens_decoder") or {}
        extra += [_content(token) for token in decoder.values() if token.get("special")]
    return named, [text for text in extra if text]


def _add_missing_tokens(backend: Backend, config: dict[str, Any], path: Path) -> None:
    """Tokens that tokenizer_config.json alone knows. Their ids must come out as it says."""
    missing = config.get("added_tokens_decoder") or {}
    for text_id, token in sorted(missing.items(), key=lambda item: int(item[0])):
        text = _content(token)
        if text is None or backend.token_to_id(text) is not None:
            continue
        flags = {k: bool(token.get(k)) for k in ("lstrip", "rstrip", "special", "single_word")}
        backend.add_tokens([AddedToken(text, normalized=False, **flags)])
        if backend.token_to_id(text) != int(text_id):
            raise BadCheckpoint(
                f"{path} and tokenizer_config.json do not belong together: {text!r} should have "
                f"id {text_id}, and would get {backend.token_to_id(text)}"
            )


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else what tokenizer_config.json or chat_template.json holds. Of several
    named templates the default one."""
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}") from None
    for source in (
        config.get("chat_template"),
        _read_json(folder / "chat_template.json").get("chat_template"),
    ):
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default") or next(iter(named.values()), None)
        if isinstance(source, str) and source:
            return source
    return None
