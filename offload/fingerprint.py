"""Whether two models are the same, without reading all of their weights."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

_TEXT_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    "hf_quant_config.json",
)
_EDGE_BYTES = 64 * 2**10
_BLOCK_BYTES = 4096
# Of all files together, a megabyte: where archives give all files one time, training that changed
# some layers alone is noticed. A byte or two that changed are not.
_BLOCKS, _FEWEST_BLOCKS = 256, 16


def model_fingerprint(folder: Path) -> str:
    """A hash of the files that say what the model is, and of what `files_digest` takes of its
    weight files (safetensors begin with a header that names every tensor).
    """
    digest, weights = hashlib.sha256(), []
    for path in sorted(Path(folder).iterdir()):
        if path.name in _TEXT_FILES or path.suffix in (".jinja", ".model"):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        elif path.suffix == ".safetensors":
            weights.append(path)
    digest.update(files_digest(weights))
    return digest.hexdigest()


def files_digest(paths: Sequence[Path]) -> bytes:
    """A hash of each weight file's name, size, time and edges, and of blocks between them."""
    digest = hashlib.sha256()
    num_blocks = max(_FEWEST_BLOCKS, _BLOCKS // max(1, len(paths)))
    for path in paths:
        found = path.stat()
        digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
        with open(path, "rb", buffering=0) as file:
            for place, num_bytes in _places(found.st_size, num_blocks):
                file.seek(place)
                digest.update(file.read(num_bytes))
    return digest.digest()


def _places(size: int, num_blocks: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes): both edges, and a block somewhere in each of num_blocks equal parts."""
    yield 0, _EDGE_BYTES
    chance, part = random.Random(size), size / num_blocks
    for index in range(num_blocks):
        place = int((index + chance.random()) * part)
        yield place - place % _BLOCK_BYTES, _BLOCK_BYTES
    yield max(0, size - _EDGE_BYTES), _EDGE_BYTES
