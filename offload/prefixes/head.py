"""The head of a file of kept pages, and the names that follow from what it says: one line of JSON,
and the token ids as int32, little-endian. Knows no pages and no model, and imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from pathlib import Path
from typing import Any

_SCHEMA = 2  # part of names, so that heads of another are not even looked at
_MOST_LINE_BYTES = 4096
_FIELDS = {"fingerprint": str, "num_cells": int, "cell_tokens": int, "decoded_by": str}


def head_of(fields: dict, tokens: array) -> bytes:
    """The head of a file. fields: what tells it from others; tokens: whose keys and values it has,
    of type "i"."""
    line = json.dumps({"schema": _SCHEMA, **fields}, sort_keys=True, separators=(",", ":"))
    return f"{line}\n".encode("ascii") + token_bytes(tokens)


def read_fields(path: Path) -> dict[str, Any] | None:
    """What the line of a file's head says; None where there is no such file, or it is none of
    today's. (Who takes pages from it compares the whole head.)"""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with open(path, "rb") as file:
            fields = json.loads(file.readline(_MOST_LINE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = (
        isinstance(fields, dict)
        and fields.get("schema") == _SCHEMA
        and all(type(fields.get(name)) is kind for name, kind in _FIELDS.items())
        and min(fields["num_cells"], fields["cell_tokens"]) > 0
    )
    return fields if is_ours else None


def read_tokens(path: Path, fields: dict[str, Any]) -> array:
    """The head's tokens, of type "i". Raises OSError, ValueError for a file that has fewer."""
    num_bytes = 4 * fields["num_cells"] * fields["cell_tokens"]
    with open(path, "rb") as file:
        if num_bytes > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} has fewer tokens than its head says")
        file.readline(_MOST_LINE_BYTES)
        tokens = array("i", file.read(num_bytes))
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def token_bytes(tokens: array) -> bytes:
    """Token ids as int32, little-endian."""
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens.tobytes()


def cell_names(
    fingerprint: str, tokens: array, num_cells: int, cell_tokens: int, mode: str
) -> list[str]:
    """What files are called that end at each cell's end within the tokens, and at their beginning.
    A cell of which some tokens were decoded (complements) has the mode that decoded them in it."""
    name = hashlib.sha256(f"ebbtide prefix {_SCHEMA} {fingerprint}".encode()).digest()
    names = [name.hex()]
    for cell in range(num_cells):
        part = tokens[cell * cell_tokens : (cell + 1) * cell_tokens]
        decoded_by = mode.encode() if min(part, default=0) < 0 else b""
        name = hashlib.sha256(name + token_bytes(part) + decoded_by).digest()
        names.append(name.hex())
    return names
