"""A model's file as it was before its header was read, told from another one that has come in its
place, and from what somebody has written into it since.

Asked after each read, so that it may cost a microsecond: what the system says of a file (device,
inode, size, times) is compared, and some of its bytes where that is another. A file that was
touched, or came again as a copy, is still the same; on some network file systems inodes' numbers
move by themselves. Does not know what the bytes mean.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import BadCheckpoint
from .fingerprint import digest_at
from .open_file import open_descriptor

_MOST_STATES = 8  # in which it was seen with these bytes: touched again and again it has many
# What is written twice within a tick of the file system's clock has one time: of two seconds at
# most (FAT). Until then its bytes are compared each time.
_TICK_NS = 2 * 10**9


class _State(NamedTuple):
    """What the system says of a file. changed_ns moves whatever time a program gives it."""

    device: int
    inode: int
    size: int
    written_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path | int) -> _State:
        """Of an open one in a microsecond."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_settled(self) -> bool:
        """Whether bytes that were written from now on would have another time."""
        return abs(time.time_ns() - self.written_ns) > _TICK_NS


class KnownFile:
    """Made before anything of the file is read that shall belong to what is read later; `remember`
    then says which bytes tell it from others. Raises BadCheckpoint for a file that is not there."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._first = _State.of(path)
        except OSError as error:
            raise BadCheckpoint(f"{path} cannot be opened: {error.strerror}.") from error
        self._states: tuple[_State, ...] = ()
        self._places: tuple[tuple[int, int], ...] = ()
        self._digest = b""

    @property
    def size(self) -> int:
        """In bytes."""
        return self._first.size

    def remember(self, places: Iterable[tuple[int, int]]) -> None:
        """Compare its bytes at these places, (offset, bytes), from now on. Raises BadCheckpoint
        where it changed since this was made: its header may be another one's."""
        self._places = tuple(places)
        descriptor = open_descriptor(self.path)
        try:
            is_settled = self._first.is_settled()
            self._digest = digest_at(descriptor, self.path, self._places)
            if _State.of(descriptor)[2:] != self._first[2:]:
                raise BadCheckpoint(
                    f"{self.path} changed while the model was opened. Open it again once its files "
                    "are whole."
                )
            if is_settled:
                self._states = (_State.of(descriptor),)
        finally:
            os.close(descriptor)

    def is_same(self, descriptor: int) -> bool:
        """Whether an open file has the bytes of this one, as far as can be told."""
        state = _State.of(descriptor)
        if state in self._states:
            return True
        is_settled = state.is_settled()
        if state.size != self.size or self._digest != digest_at(
            descriptor, self.path, self._places
        ):
            return False
        if is_settled:
            self._states = (*self._states[1 - _MOST_STATES :], state)
        return True

    def is_replaced(self) -> bool:
        """Whether its name belongs to another file by now; not where it belongs to none."""
        try:
            if _State.of(self.path) in self._states:
                return False
            descriptor = open_descriptor(self.path)
        except (OSError, BadCheckpoint):
            return False
        try:
            return not self.is_same(descriptor)
        finally:
            os.close(descriptor)


def changed_error(path: Path) -> BadCheckpoint:
    """For whoever finds it out while the model is open."""
    return BadCheckpoint(
        f"{path} changed while it was open: what was read before and what is read now may be of "
        "two models. The model must be loaded anew: give the command again, or in Python close "
        "sessions and call unload()."
    )
