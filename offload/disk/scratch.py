"""How a scratch file comes to be, and is found and removed when its process died.

A scratch file holds what a prompt can be rebuilt from: only its owner may read it, it has no name
where the system can do without, and a name that outlived its process is swept by the next one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import stat
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted, which is lock enough
    fcntl = None

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]  # a folder may be shared
_NAME = re.compile(r"ebbtide-([0-9a-f]{8})-(\d+)-[0-9a-f]{16}\.scratch")


def create_unnamed(directory: Path | str, flags: int = 0) -> int:
    """A descriptor, open for reading and writing with `flags`, of a file without a name.

    Raises OSError; EINVAL when the filesystem does not know the flags.
    """
    if hasattr(os, "O_TMPFILE"):
        try:
            fd = os.open(directory, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | flags, 0o600)
        except OSError as error:
            # What filesystems and kernels say that do not know O_TMPFILE; EINVAL may be
            # about the flags, which the plain way below finds out too.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
        else:
            os.fchmod(fd, 0o600)
            return fd
    fd, path = create_named(directory, flags)
    os.unlink(path)
    return fd


def create_named(directory: Path | str, flags: int = 0) -> tuple[int, str]:
    """Such a descriptor and its path, locked against `sweep` for as long as it is open."""
    while True:
        path = os.path.join(directory, _new_name())
        fd = None
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o600)
            if hasattr(os, "fchmod"):
                os.fchmod(fd, 0o600)  # a umask can take rights away from ourselves
            # A sweep that came before the lock may have taken the name away: again, then.
            if _lock(fd) and os.fstat(fd).st_nlink > 0:
                return fd, path
        except BaseException:
            # Linux makes the file before it finds that the flags are unknown (EINVAL).
            _remove(path)
            if fd is not None:
                os.close(fd)
            raise
        os.close(fd)


def _new_name() -> str:
    """A name that no other file has and that `sweep` knows as ours: host, process, random."""
    return f"ebbtide-{_HOST}-{os.getpid()}-{secrets.token_hex(8)}.scratch"


def _remove(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _lock(fd: int) -> bool:
    """Marks an open scratch file as alive, for as long as it is open. False: somebody else has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network filesystems know no locks; there the process id alone tells (`sweep`).
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


def sweep(directory: Path | str) -> int:
    """Deletes scratch files that a dead process of this user and host left; returns how many.

    A live process holds the lock of its file, so that one is never touched, and neither is any
    file that is not named, owned and shaped like ours. What cannot be deleted is left alone.
    """
    swept = 0
    with os.scandir(directory) as entries:
        names = [e.name for e in entries if e.name.startswith("ebbtide-")]
    for name in names:
        match = _NAME.fullmatch(name)
        if match and match[1] == _HOST and _is_left_over(os.path.join(directory, name), match[2]):
            swept += _remove(os.path.join(directory, name))
    return swept


def _is_left_over(path: str, pid: str) -> bool:
    if fcntl is None:
        return True  # unlinking an open file fails there
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True  # process ids come again, in containers at once; the lock does not lie
        except BlockingIOError:
            return False
        except OSError:
            import psutil

            return not psutil.pid_exists(int(pid))
    finally:
        os.close(fd)
