"""One file of the prefix store: a head that says whose bytes follow, the bytes, and their CRCs.

    head     one line of JSON, and the token ids as int32: see prefixes/head.py
    parts    bytes, whose number and sizes follow from the model
    CRCs     CRC-32 of each part, uint32

All numbers are little-endian. A file is written under another name and renamed when it is whole, so
what has the right name was finished once; what a crash or a disk did to it since, size and CRCs
tell. Its head is compared byte by byte with the one that is expected: a file of other tokens, of
another model or another version is never taken for what it is not. Knows no pages and no model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from ..disk.extent_file import crcs_of
from ..disk.spill_dir import UNFINISHED_SUFFIX


class BadPrefixFile(Exception):
    """The file is not what was written, or was written for something else. Its message says why."""


def file_bytes(head: bytes, sizes: Sequence[int]) -> int:
    """How long a file is whose parts have these sizes."""
    return len(head) + sum(sizes) + 4 * len(sizes)


class _Writer:
    def __init__(self, file):
        self._file = file
        self.crcs: list[int] = []

    def add(self, part: torch.Tensor) -> None:
        """Appends a part: the bytes of a tensor, from whichever device."""
        data = part.detach().to("cpu").contiguous().view(torch.uint8).reshape(-1)
        view = data.numpy().data
        self.crcs.append(_crc(view))
        self._file.write(view)


@contextmanager
def write_prefix_file(path: Path, head: bytes, num_bytes: int = 0) -> Iterator[_Writer]:
    """For a `with` block that adds the parts. At its end the file is on disk, whole; if the block
    raises, there is none. num_bytes: how long it will be, which is its size from the beginning,
    for others to see. Raises OSError."""
    # mkstemp makes files that only their owner may read, and follows no link.
    number, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name[:16]}.", suffix=UNFINISHED_SUFFIX
    )
    try:
        with os.fdopen(number, "wb", buffering=0) as raw:
            os.truncate(raw.fileno(), num_bytes)
            file = _Whole(raw)
            file.write(memoryview(head))
            writer = _Writer(file)
            yield writer
            file.write(memoryview(np.array(writer.crcs, dtype="<u4").tobytes()))
            os.fsync(raw.fileno())
            _let_go(raw.fileno())
        os.replace(temporary, path)
    except BaseException:
        # Gone, if the interruption came with the renaming. On some systems it cannot go yet.
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def read_prefix_file(path: Path, head: bytes, sizes: Sequence[int]) -> Iterator[_Reader]:
    """For a `with` block that takes the parts in turn. sizes: their bytes.

    Raises OSError, BadPrefixFile for a file that is not whole or has another head, and in the block
    for a part that came back other than it was written.
    """
    with open(path, "rb", buffering=0) as file:
        crcs_bytes, expected = 4 * len(sizes), file_bytes(head, sizes)
        found = os.fstat(file.fileno()).st_size
        if found != expected:
            raise BadPrefixFile(f"it has {found} bytes, and {expected} were written")
        trailer = bytearray(crcs_bytes)
        file.seek(expected - crcs_bytes)
        _fill(file, memoryview(trailer))
        file.seek(0)
        start = bytearray(len(head))
        _fill(file, memoryview(start))
        if start != head:
            raise BadPrefixFile("it was written for other tokens, or by another version")
        yield _Reader(file, sizes, np.frombuffer(trailer, dtype="<u4"))


class _Reader:
    def __init__(self, file, sizes: Sequence[int], crcs: np.ndarray):
        self._file, self._sizes, self._crcs, self._next = file, sizes, crcs, 0

    def take(self, room: torch.Tensor) -> torch.Tensor:
        """The next part, read into the beginning of `room`, a flat uint8 tensor on the CPU."""
        index, self._next = self._next, self._next + 1
        part = room[: self._sizes[index]]
        view = part.numpy().data
        _fill(self._file, view)
        if _crc(view) != self._crcs[index]:
            raise BadPrefixFile(f"part {index} came back other than it was written")
        return part


class _Whole:
    """Writes all of what it is given: a raw file may take less."""

    def __init__(self, file):
        self._file = file

    def write(self, view: memoryview) -> None:
        while len(view):
            view = view[self._file.write(view) :]


def _fill(file, view: memoryview) -> None:
    while len(view):
        count = file.readinto(view)
        if not count:
            raise BadPrefixFile("it ends too early")
        view = view[count:]


def _crc(view: memoryview) -> int:
    return int(crcs_of(view, len(view))[0]) if len(view) else 0


def _let_go(descriptor: int) -> None:
    """What was written is not needed soon: memory is for pages that are."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
