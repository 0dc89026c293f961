"""How much memory this process can have, programs' and the system's cache of files alike: what the
machine has, or, in a container, what its control groups leave of that.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class MemoryAtHand(NamedTuple):
    """In bytes. available: what can be had without swapping; files that are cached can go."""

    total: int
    available: int


class _Names(NamedTuple):
    """Of a control group's files, and of numbers in its statistics."""

    limit: str
    usage: str
    cached: tuple[str, ...]
    mapped: str  # of what is cached: in use, as programs' code is


_NEW = _Names("memory.max", "memory.current", ("inactive_file", "active_file"), "file_mapped")
_OLD = _Names(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    "total_mapped_file",
)


def memory_at_hand() -> MemoryAtHand:
    """Now; takes a fraction of a millisecond."""
    import psutil

    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, free in _control_groups():
        total, available = min(total, limit), min(available, free)
    return MemoryAtHand(total, max(0, available))


def give_back_freed_memory() -> None:
    """To the system, where the C library would keep it for what comes next (glibc's: of a long text
    that became tokens a hundred mebibytes and more). Takes some milliseconds."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim():
    """None where the C library has no such function."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library of all
        return None


def _control_groups() -> Iterator[tuple[int, int]]:
    """Limit, and what is left of it, of each control group that this process is in: Linux's, of
    either version. One that cannot be read says nothing."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            root, names = _GROUPS, _NEW
        elif "memory" in controllers.split(","):
            root, names = _GROUPS / "memory", _OLD
        else:
            continue
        # In a container the path may be the host's, and the group itself the root that is seen.
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            found = _read_group(folder, names)
            if found is not None:
                yield found


def _read_group(folder: Path, names: _Names) -> tuple[int, int] | None:
    """None where there is no such group, or no limit."""
    try:
        limit = int((folder / names.limit).read_text())
        usage = int((folder / names.usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        numbers = {name: int(number) for name, number in (line.split() for line in lines)}
    except (OSError, ValueError):
        return None
    cached = sum(numbers.get(name, 0) for name in names.cached) - numbers.get(names.mapped, 0)
    return limit, limit - usage + max(0, cached)
