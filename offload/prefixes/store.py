"""The folder of kept pages: files by name, a cap on all of them, and the oldest go first.

Files are never changed, and each is useful with those before it alone, so there is no index that
could be wrong: what is there is what is kept. Several processes may share the folder; a file that
another one removed is not there, and that is all. Knows no pages and no tokens.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import torch

from ..disk.private_dir import make_private
from ..disk.spill_dir import PREFIX_SUFFIXES, UNFINISHED_SUFFIX
from ..errors import InputError
from ..planning.budget import format_size
from .file import write_prefix_file

_AUTO_SHARE, _AUTO_MOST_BYTES = 0.05, 16 << 30
_KEPT_FREE_BYTES = 5 << 30  # of the volume, whatever the cap
_SPARE_SHARE = 0.1  # of the cap, so that not every file removes another
_ABANDONED_AFTER_S = 24 * 3600  # an unfinished file that old belongs to no process that goes on
_ADVICE = "choose another folder with --spill-dir, or --prefix-cache off"


class PrefixStoreFull(Exception):
    """There is no room for a file, though everything that may go has gone."""


def open_prefix_store(
    folder: Path | None, cap: int | str, warn: Callable[[str], None]
) -> PrefixStore | None:
    """cap: bytes or "auto", as `LLM.open(prefix_cache=...)` has it. None for 0, and where the disk
    may not be used (folder: None). A folder that cannot be used is an InputError for who asked for
    a size, else a warning."""
    if cap == 0:
        return None
    if folder is None:
        if cap != "auto":
            warn("Nothing is kept for the next time (prefix_cache): the disk is off.")
        return None
    try:
        return PrefixStore(folder, None if isinstance(cap, str) else cap)
    except InputError as error:
        if cap != "auto":
            raise
        warn(f"What is read is not kept for the next time: {error}")
        return None


class PrefixStore:
    """folder: made private if absent. cap_bytes: the most that all files together may take; None: a
    twentieth of the volume, at most 16 GiB. Five GiB of the volume stay free.

    Raises InputError for a folder that cannot be used.
    """

    def __init__(self, folder: Path, cap_bytes: int | None):
        try:
            self.folder = make_private(folder, _ADVICE)
            total = shutil.disk_usage(folder).total
        except OSError as error:
            raise InputError(
                f"pages cannot be kept in {folder}: {error.strerror or error}; {_ADVICE}"
            ) from None
        if cap_bytes is None:
            cap_bytes = min(_AUTO_MOST_BYTES, int(total * _AUTO_SHARE))
        self.cap_bytes = cap_bytes
        with contextlib.suppress(PrefixStoreFull, OSError):  # the cap may have been larger
            self._make_room(0, (), keeps_free=False)

    def path(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        return os.path.exists(self.path(name))  # False, too, where the system does not say

    def write(
        self,
        name: str,
        head: bytes,
        parts: Iterable[torch.Tensor],
        num_bytes: int,
        needed: Collection[str],
    ) -> None:
        """Keep a file of num_bytes, at the cost of the oldest that are not `needed` (names).

        Raises OSError, and PrefixStoreFull where there is no room for it: before anything goes, as
        far as that can be known.
        """
        self._make_room(num_bytes, needed)
        try:
            self._write(name, head, parts, num_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PrefixStoreFull(f"the volume of {self.folder} is full") from error

    def _write(self, name: str, head: bytes, parts: Iterable[torch.Tensor], num_bytes: int) -> None:
        with write_prefix_file(self.path(name), head, num_bytes) as file:
            # Another process may have found the same room; whoever comes second sees both files.
            if sum(size for _, size, _ in self._files()) > self.cap_bytes:
                raise self._too_much()
            for part in parts:
                file.add(part)

    def touch(self, names: Sequence[str]) -> None:
        """They were used. The first are to go last."""
        now = time.time_ns()
        for index, name in enumerate(names):
            stamp = now - index * 1_000_000  # a millisecond apart: some systems round times
            with contextlib.suppress(OSError):
                os.utime(self.path(name), ns=(stamp, stamp))

    def remove(self, name: str) -> bool:
        """Whether the system let it go."""
        try:
            self.path(name).unlink()
        except OSError:
            return False
        return True

    def _make_room(
        self, num_bytes: int, needed: Collection[str], *, keeps_free: bool = True
    ) -> None:
        """Removes the oldest files that are not needed, if that helps. Other processes write too,
        so what there is is looked up each time."""
        files = self._files()
        over = sum(size for _, size, _ in files) + num_bytes - self.cap_bytes
        short = num_bytes + _KEPT_FREE_BYTES - shutil.disk_usage(self.folder).free
        short *= keeps_free
        may_go = [
            file
            for file in sorted(files, key=lambda file: file[2])
            if file[0].name not in needed and file[0].suffix != UNFINISHED_SUFFIX
        ]
        room = sum(size for _, size, _ in may_go)
        if over > room:
            raise self._too_much()
        if short > room:
            raise PrefixStoreFull(f"less than 5 GiB would stay free on the volume of {self.folder}")
        if over > 0:
            over += int(self.cap_bytes * _SPARE_SHARE)
        to_go = max(over, short)
        for path, size, _ in may_go:
            if to_go <= 0:
                return
            with contextlib.suppress(OSError):
                path.unlink()
                to_go -= size

    def _too_much(self) -> PrefixStoreFull:
        return PrefixStoreFull(f"all that is kept may take {format_size(self.cap_bytes)}")

    def _files(self) -> list[tuple[Path, int, int]]:
        """Path, bytes and time of each; unfinished ones of dead processes go."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                stat = entry.stat(follow_symlinks=False)
                if entry.name.endswith(UNFINISHED_SUFFIX):
                    if time.time() - stat.st_mtime > _ABANDONED_AFTER_S:
                        os.unlink(entry.path)
                        continue
                elif not entry.name.endswith(PREFIX_SUFFIXES):
                    continue
                found.append((Path(entry.path), stat.st_size, stat.st_mtime_ns))
        return found
