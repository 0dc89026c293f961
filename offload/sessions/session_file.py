"""A named session's tokens on disk: what it held, to be found again after a restart.

Tokens only; keys and values are computed again from them, and counted. One process at a time has a
name (a lock that the system drops when the process ends). Files are the user's alone, and are
replaced whole. Knows no model: whether tokens mean the same is told by a fingerprint.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from array import array
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ..disk.private_dir import state_dir
from ..errors import InputError, StorageError

_SCHEMA = 1
_SUFFIX = ".tokens"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
)


@dataclass
class KeptTokens:
    """tokens: ids; turns: where each answer's prompt began; num_processed: of the first tokens,
    how many had been processed when this was written; decoded: [first, stop) of those that were
    decoded, not prefilled.
    """

    tokens: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    num_processed: int = 0
    decoded: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, computed: array, turns: list[int], num_processed: int) -> KeptTokens:
        """computed: tokens as `Sequence.processed` has them."""
        ids = np.frombuffer(computed, dtype=np.intc)
        edges = np.flatnonzero(np.diff(ids < 0, prepend=False, append=False)).tolist()
        decoded = [list(pair) for pair in zip(edges[::2], edges[1::2], strict=True)]
        return cls(np.where(ids < 0, ~ids, ids).tolist(), turns, num_processed, decoded)

    def computed(self) -> array:
        """The inverse."""
        ids = array("i", self.tokens)
        for first, stop in self.decoded:
            for index in range(first, stop):
                ids[index] = ~ids[index]
        return ids


class SessionFile:
    """Holds the name until `close`. fingerprint: of the tokenizer, for tokens mean nothing
    without it.

    Raises InputError for a name that is not allowed, is in use, or belongs to other tokens, and
    for a state folder that cannot be written.
    """

    def __init__(self, name: str, fingerprint: str):
        from filelock import FileLock, Timeout

        self.name, self._fingerprint = check_name(name), fingerprint
        self._held = KeptTokens()
        folder = state_dir("sessions")
        self.path = folder / f"{name}{_SUFFIX}"
        self._lock = FileLock(folder / f".{name}.lock", mode=0o600)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"the session {name!r} is in use; close it there or choose another name"
            ) from None
        except OSError as error:
            raise InputError(
                f"the session {name!r} cannot be kept in {folder}: {error.strerror or error}"
            ) from None

    def load(self) -> KeptTokens:
        """What was kept; nothing for a name that is new."""
        try:
            found = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return KeptTokens()
        except (OSError, ValueError) as error:
            raise InputError(f"the session {self.path} cannot be read: {error}") from None
        try:
            fingerprint, kept = _checked(found)
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{self.path} is not a session that this version can read; remove or rename it"
            ) from None
        if fingerprint != self._fingerprint:
            raise InputError(
                f"the session {self.name!r} was made with another model, whose tokens mean other "
                "texts; open that model or choose another name"
            )
        self._held = kept
        return kept

    def save(self, kept: KeptTokens) -> None:
        """Replaces the file. Raises StorageError; what was kept before is whole then."""
        fields = {"schema": _SCHEMA, "fingerprint": self._fingerprint, **asdict(kept)}
        try:
            # mkstemp makes files that only their owner may read.
            number, temporary = tempfile.mkstemp(
                dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part"
            )
            try:
                with os.fdopen(number, "w", encoding="ascii") as file:
                    json.dump(fields, file, separators=(",", ":"))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            except BaseException:
                with suppress(OSError):  # gone, if the interruption came with the renaming
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise StorageError(
                f"the session {self.path} cannot be saved: {error.strerror or error}"
            ) from None
        self._held = kept

    def holds(self, kept: KeptTokens) -> bool:
        """Whether that is what was loaded or saved last."""
        return kept == self._held

    def close(self) -> None:
        """Give the name back. May be called again."""
        self._lock.release()


def check_name(name: str) -> str:
    """The name, or InputError for one that could lead elsewhere."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name):
        raise InputError(
            f"{name!r} is not a name for a session; "
            "allowed are up to 64 letters, digits, '.', '_' and '-'"
        )
    return name


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 of the files that say which token is which text."""
    import hashlib

    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _checked(found: dict) -> tuple[str, KeptTokens]:
    """Raises KeyError, TypeError or ValueError for what `save` did not write."""
    if found["schema"] != _SCHEMA:
        raise ValueError
    tokens, turns, num_processed = found["tokens"], found["turns"], found["num_processed"]
    for value in (*tokens, *turns, num_processed):
        if type(value) is not int or value < 0:
            raise TypeError
    if num_processed > len(tokens) or any(turn > len(tokens) for turn in turns):
        raise ValueError
    decoded, reached = found.get("decoded", []), 0  # earlier versions did not write it
    for first, stop in decoded:
        if type(first) is not int or type(stop) is not int:
            raise TypeError
        if not reached <= first < stop <= len(tokens):
            raise ValueError
        reached = stop
    return found["fingerprint"], KeptTokens(tokens, turns, num_processed, decoded)
