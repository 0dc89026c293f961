"""A file that is open: bytes of it are read by several threads, and the system's cache lets go of
it. Descriptors, for what stays open as long as a model is. Knows no tensors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path

from ..errors import BadCheckpoint, StorageError

_seeking = threading.Lock()


def open_descriptor(path: Path) -> int:
    """Of one of a model's files, to be read. Raises BadCheckpoint where it cannot be opened,
    StorageError where the process has too many open files, or the disk fails."""
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        check_system(path, error)
        raise BadCheckpoint(f"{path} cannot be opened: {error.strerror}.") from error


def check_system(path: Path, error: OSError) -> None:
    """Raises StorageError where one of a model's files could not be opened or read for what ails
    the process or the disk, and not the file."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise StorageError(
            f"{path} cannot be opened: {error.strerror}. A model keeps each of its files open; "
            "allow this process more (ulimit -n)."
        ) from error
    if error.errno == errno.EIO:
        raise StorageError(f"{path} could not be read: {error.strerror}.") from error


def forget(descriptor: int) -> bool:
    """Have the system's cache let go of a file; whether the system can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with contextlib.suppress(OSError):  # of a system that is read only
        os.fsync(descriptor)  # what is not on the disk yet would stay
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def read_at(descriptor: int, view: memoryview, path: Path | str, offset: int) -> int:
    """Fill `view` from a byte of a file on, as far as one call gets; the bytes read. path: for
    messages. Several threads may read."""
    try:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [view], offset)
        with _seeking:  # Windows
            os.lseek(descriptor, offset, os.SEEK_SET)
            chunk = os.read(descriptor, len(view))
        view[: len(chunk)] = chunk
        return len(chunk)
    except OSError as error:
        raise StorageError(f"{path} could not be read: {error.strerror}.") from error
