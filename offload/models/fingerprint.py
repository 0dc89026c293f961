"""Whether two models are the same, without reading all of their weights."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import BadCheckpoint
from .open_file import read_at

_TEXT_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    *("special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("hf_quant_config.json", "model.safetensors.index.json", "chat_template.json"),
)
_TEXT_SUFFIXES = (".jinja", ".model")
_EDGE_BYTES = 64 * 2**10
_BLOCK_BYTES = 4096
# Of all files together, a megabyte: where archives give all files one time, training that changed
# some layers alone is noticed. A byte or two that changed are not.
_BLOCKS, _FEWEST_BLOCKS = 256, 16


def model_fingerprint(folder: Path) -> str:
    """A hash of the files that say what the model is, and of what `files_digest` takes of its
    weight files (safetensors begin with a header that names every tensor).
    """
    digest = hashlib.sha256()
    for path in text_files(folder):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update(files_digest(sorted(Path(folder).glob("*.safetensors"))))
    return digest.hexdigest()


def text_files(folder: Path) -> list[Path]:
    """Those of a model's folder that say what the model is. Raises BadCheckpoint for a folder that
    cannot be listed."""
    try:
        found = [
            p for p in Path(folder).iterdir() if p.name in _TEXT_FILES or p.suffix in _TEXT_SUFFIXES
        ]
        return sorted(path for path in found if path.is_file())
    except OSError as error:
        raise BadCheckpoint(
            f"{folder} cannot be listed: {error.strerror}. Ebbtide must be allowed to read the "
            "model's folder."
        ) from error


def files_digest(paths: Sequence[Path]) -> bytes:
    """A hash of each weight file's name, size, time and edges, and of blocks between them."""
    digest = hashlib.sha256()
    for path in paths:
        found = path.stat()
        digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
        with open(path, "rb", buffering=0) as file:
            places = spread(found.st_size, blocks_of_each(len(paths)))
            digest.update(digest_at(file.fileno(), path, places))
    return digest.digest()


def blocks_of_each(num_files: int) -> int:
    """How many blocks are read of each of some files."""
    return max(_FEWEST_BLOCKS, _BLOCKS // max(1, num_files))


def digest_at(descriptor: int, path: Path, places: Iterable[tuple[int, int]]) -> bytes:
    """A hash of an open file's bytes at some places, (offset, bytes), as far as it has them. path:
    for messages."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_EDGE_BYTES))
    for start, num_bytes in places:
        place, stop = start, start + num_bytes
        while count := read_at(descriptor, buffer[: stop - place], path, place):
            digest.update(buffer[:count])
            place += count
    return digest.digest()


def spread(size: int, num_blocks: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes): both edges, and a block somewhere in each of num_blocks equal parts."""
    yield 0, _EDGE_BYTES
    chance, part = random.Random(size), size / num_blocks
    for index in range(num_blocks):
        place = int((index + chance.random()) * part)
        yield place - place % _BLOCK_BYTES, _BLOCK_BYTES
    yield max(0, size - _EDGE_BYTES), _EDGE_BYTES
