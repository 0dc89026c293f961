"""Where scratch files and kept pages lie: the default folders, who may use it, room and warnings.

Scratch holds keys and values from which a prompt can be rebuilt, so its folder is the user's own
(never the shared /tmp, which is often RAM besides). Knows nothing of the files: `scratch` makes
them and `disk` reads them.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import DoesNotFit, InputError, StorageError
from .private_dir import make_private

RAM_FILESYSTEMS = {"tmpfs", "ramfs", "devtmpfs"}
NETWORK_FILESYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "9p", "afs", "ceph"),
    *("fuse.sshfs", "fuse.rclone", "fuse.s3fs", "glusterfs", "fuse.glusterfs", "lustre", "davfs"),
}
PREFIX_SUFFIXES = ".span", ".window", ".end", ".rows"  # of the files in it; see prefix_keeper
UNFINISHED_SUFFIX = ".part"
KEPT_FREE_BYTES = 64 << 20  # of a volume that scratch goes to, whatever the budget says
_PREFIX_FOLDER = "ebbtide-prefixes"  # in a folder that the user names, which may hold other things
_ADVICE = "choose another folder with --spill-dir"
# What a user can mend by naming another folder; everything else is the machine's failure.
_USERS_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP}


def format_bytes(num_bytes: float) -> str:
    """12.3 MiB, for messages."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} bytes"
    power = min(4, int(num_bytes).bit_length() // 10)
    power -= num_bytes < 1024**power
    return f"{num_bytes / 1024**power:.1f} {'KMGT'[power - 1]}iB"


# ---- the folder ------------------------------------------------------------------------------


def default_spill_dir() -> Path:
    """The user's cache folder for scratch, made with mode 0700 if absent.

    Raises InputError when it cannot be made, is a link or belongs to somebody else.
    """
    from platformdirs import user_cache_dir

    path = Path(user_cache_dir("ebbtide")) / "spill"
    try:
        return make_private(path, _ADVICE)
    except OSError as error:
        raise dir_error(path, error) from error


def writable_spill_dir(given: str | Path | None) -> Path:
    """The folder that was named, or the default one. Raises InputError for what is no folder, and
    what `dir_error` makes of one that cannot be written: now, not when memory has filled up after
    minutes of reading.
    """
    folder = default_spill_dir() if given is None else Path(given).expanduser()
    if not folder.is_dir():
        raise InputError(f"--spill-dir {folder} is not a folder. Create it or name another one.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise dir_error(folder, error) from error
    return folder


def prefix_dir(spill_dir: str | Path | None = None) -> Path:
    """Where kept pages lie: in the spill folder that was named, else in the user's cache folder. It
    is not made."""
    from platformdirs import user_cache_dir

    if spill_dir is not None:
        return Path(spill_dir).expanduser() / _PREFIX_FOLDER
    return Path(user_cache_dir("ebbtide")) / "prefixes"


def prefix_files(spill_dir: str | Path | None = None) -> list[Path]:
    """Kept pages, and what was never finished of them: our files, in a folder that is no link."""
    folder = prefix_dir(spill_dir)
    if folder.is_symlink() or not folder.is_dir():
        return []
    ours = (*PREFIX_SUFFIXES, UNFINISHED_SUFFIX)
    return [path for path in folder.iterdir() if path.name.endswith(ours) and not path.is_dir()]


def dir_error(path: Path | str, error: OSError) -> InputError | StorageError:
    """The typed error for a spill folder that cannot be used."""
    reason = error.strerror or str(error)
    if error.errno in _USERS_ERRNOS:
        why = f"cannot write scratch files in {path}: {reason}"
        return InputError(f"{why}; {_ADVICE}, or keep off the disk (--disk-memory 0)")
    return StorageError(f"cannot open a scratch file in {path}: {reason}; {_ADVICE}")


def check_space(directory: Path | str, num_bytes: int, keep_free_bytes: int = 0) -> int:
    """Bytes free for scratch; raises DoesNotFit when there are fewer than `num_bytes`.

    keep_free_bytes: what is to be left on the volume. A folder that is not there is an InputError.
    """
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise dir_error(directory, error) from error
    available = max(0, free - keep_free_bytes)
    if num_bytes > available:
        raise DoesNotFit(
            f"{directory} has room for {format_bytes(available)} of scratch "
            f"({format_bytes(free)} free, {format_bytes(keep_free_bytes)} to be left so), "
            f"and {format_bytes(num_bytes)} are needed; free some space or {_ADVICE}",
            tier="disk",
            needed_bytes=num_bytes,
            available_bytes=available,
        )
    return available


# ---- the volume ------------------------------------------------------------------------------


class Mount(NamedTuple):
    """One mounted volume, as psutil names its parts."""

    device: str
    mountpoint: str
    fstype: str
    opts: str


def volume_warnings(
    directory: Path | str, mounts: Iterable[Mount] | None = None, sys_dir: str = "/sys"
) -> list[str]:
    """Sentences about a volume that is a poor home for scratch: RAM, network or removable.

    mounts, sys_dir: for tests; default what the system says. Nothing is printed.
    """
    if mounts is None:
        import psutil

        mounts = [Mount(*part[:4]) for part in psutil.disk_partitions(all=True)]
    mount = _mount_of(os.path.realpath(directory), mounts)
    if mount is None:
        return []
    if mount.fstype in RAM_FILESYSTEMS or mount.device.startswith("/dev/zram"):
        text = f"is memory, not a disk ({mount.fstype}): what spills there still costs RAM"
    elif mount.fstype in NETWORK_FILESYSTEMS or "remote" in mount.opts.split(","):
        text = f"is on the network ({mount.fstype}): expect slow and uneven reads"
    elif _is_removable(mount, sys_dir):
        text = f"is on a removable volume ({mount.device}): do not unplug it, and expect slow reads"
    else:
        return []
    return [f"the spill folder {directory} {text}; {_ADVICE}"]


def _mount_of(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """The volume that holds a path: the longest mount point above it, the latest of equal ones."""
    best = None
    for mount in mounts:
        point = mount.mountpoint.rstrip(os.sep) + os.sep
        if (path + os.sep).startswith(point):
            if best is None or len(mount.mountpoint) >= len(best.mountpoint):
                best = mount
    return best


def _is_removable(mount: Mount, sys_dir: str) -> bool:
    if "removable" in mount.opts.split(","):  # how psutil says it on Windows
        return True
    block = os.path.realpath(os.path.join(sys_dir, "class/block", os.path.basename(mount.device)))
    if "/usb" in block:
        return True
    for folder in (block, os.path.dirname(block)):  # a partition lies inside its disk
        try:
            return Path(folder, "removable").read_text().strip() == "1"
        except OSError:
            continue
    return False
