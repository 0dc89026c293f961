"""Whether two model folders hold the same model, without reading all of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

_TEXT_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    "hf_quant_config.json",
)
_EDGE_BYTES = 64 * 2**10


def model_fingerprint(folder: Path) -> str:
    """A hash of the files that say what the model is, and of each weight file's name, size, time
    and edges (safetensors begin with a header that names every tensor).
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name in _TEXT_FILES or path.suffix in (".jinja", ".model"):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        elif path.suffix == ".safetensors":
            for part in _name_and_edges(path):
                digest.update(part)
    return digest.hexdigest()


def file_digest(path: Path) -> bytes:
    """A hash of a weight file's name, size, time and edges."""
    digest = hashlib.sha256()
    for part in _name_and_edges(path):
        digest.update(part)
    return digest.digest()


def _name_and_edges(path: Path) -> list[bytes]:
    found = path.stat()
    said = f"{path.name} {found.st_size} {found.st_mtime_ns}".encode()
    with open(path, "rb") as file:
        first = file.read(_EDGE_BYTES)
        file.seek(max(0, found.st_size - _EDGE_BYTES))
        return [said, first, file.read(_EDGE_BYTES)]
