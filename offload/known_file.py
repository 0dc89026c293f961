"""A model's file as it was when its header was read, told from another one that has come in its
place, and from what somebody has written into it since.

Asked after each read, so that it may cost a microsecond: what the system says of a file (inode,
size, time) is compared, and some of its bytes where that is another. A file that was touched, or
came again as a copy, is still the same; on some network file systems inodes' numbers move by
themselves. Does not know what the bytes mean.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import BadCheckpoint
from .fingerprint import blocks_digest
from .open_file import open_descriptor

_MOST_STATES = 8  # in which it was seen with these bytes: touched again and again it has many


class KnownFile:
    """num_blocks: how many of its blocks are compared. Raises BadCheckpoint for a file that cannot
    be opened."""

    def __init__(self, path: Path, num_blocks: int):
        self.path, self._num_blocks = path, num_blocks
        descriptor = open_descriptor(path)
        try:
            self._states = (_state(descriptor),)
            self._digest = self._digest_of(descriptor)
        finally:
            os.close(descriptor)

    def is_same(self, descriptor: int) -> bool:
        """Whether an open file has the bytes of this one, as far as can be told."""
        state = _state(descriptor)
        if state in self._states:
            return True
        if state[1] != self._states[0][1] or self._digest_of(descriptor) != self._digest:
            return False
        self._states = (*self._states[1 - _MOST_STATES :], state)
        return True

    def is_replaced(self) -> bool:
        """Whether its name belongs to another file by now; not where it belongs to none."""
        try:
            if _state(self.path) in self._states:
                return False
            descriptor = open_descriptor(self.path)
        except (OSError, BadCheckpoint):
            return False
        try:
            return not self.is_same(descriptor)
        finally:
            os.close(descriptor)

    def _digest_of(self, descriptor: int) -> bytes:
        size = os.fstat(descriptor).st_size
        return blocks_digest(descriptor, self.path, size, self._num_blocks)


def _state(file: Path | int) -> tuple[int, ...]:
    """What the system says of it; of an open one in a microsecond."""
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns
