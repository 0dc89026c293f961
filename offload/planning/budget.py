"""What the user allows: one size per tier, and what the machine has when a size is `auto`.

Sizes are bytes, text such as "6GiB", "auto", or 0 to switch a tier off. Imports no torch: the
commands check sizes before anything heavy is loaded.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .memory_at_hand import memory_at_hand

_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_ALLOWED = "allowed are sizes such as 512MiB, 6GiB or 2GB, and auto"
_TIER_ALLOWED = "allowed are sizes such as 512MiB, 6GiB or 2GB, auto, and 0 to switch the tier off"
_CACHE_ALLOWED = "allowed are sizes such as 512MiB, 6GiB or 2GB, auto, and off (or 0) to keep none"
_LIKELY_BYTES = 1 << 20  # as many and more of nothing are bytes, not gibibytes

# What `auto` leaves to the rest of the machine.
_HOST_HEADROOM_BYTES, _HOST_HEADROOM_SHARE = 3 << 29, 0.15
_DEVICE_HEADROOM_BYTES, _DEVICE_HEADROOM_SHARE = 512 << 20, 0.10
_DISK_SHARE, _DISK_KEPT_FREE_BYTES = 0.10, 5 << 30


def parse_size(text: str, allowed: str = _ALLOWED) -> int | str:
    """Bytes, or "auto". A bare number other than 0 is refused: `8` would mean eight bytes. Raises
    ValueError, which ends with what is allowed.
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not a size; {allowed}")
    word = text.strip()
    if word.lower() == "auto":
        return "auto"
    if re.fullmatch(r"0+(\.0+)?\s*[A-Za-z]*", word) and word.lstrip("0. ").upper() in {"", *_UNITS}:
        return 0
    match = _SIZE.fullmatch(word)
    if match is None:
        if re.fullmatch(r"\d+(\.\d+)?", word):
            meant = f"{word}GiB"
            if _LIKELY_BYTES <= float(word) < 2**63:
                meant = f"{word}B, which is {format_size(float(word))}"
            raise ValueError(f"{text!r} has no unit; did you mean {meant}? ({allowed})")
        raise ValueError(f"{text!r} is not a size; {allowed}")
    number, unit = match.groups()
    if unit.upper() not in _UNITS:
        is_short = unit.upper() in set("KMGT")
        hint = f"did you mean {number}{unit.upper()}iB? ({allowed})" if is_short else allowed
        raise ValueError(f"{text!r} has the unknown unit {unit!r}; {hint}")
    num_bytes = float(number) * _UNITS[unit.upper()]
    if not num_bytes < 2**63:  # a string of digits can be longer than a float holds
        raise ValueError(f"{text!r} is more than any machine has; {allowed}")
    return int(num_bytes)


def parse_tier_size(text: str) -> int | str:
    """Bytes, 0 to switch a tier off, or "auto". Raises ValueError."""
    return parse_size(text, _TIER_ALLOWED)


def parse_cache_size(value: int | str) -> int | str:
    """Bytes, 0 for "off", or "auto". Raises ValueError."""
    if isinstance(value, str):
        return 0 if value.strip().lower() == "off" else parse_size(value, _CACHE_ALLOWED)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a size; {_CACHE_ALLOWED}")
    return value


def format_size(num_bytes: float) -> str:
    """A size as people read it: 1536 -> '1.5 KiB'."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


@dataclass(frozen=True)
class Budget:
    """The most memory of each tier that Ebbtide may use: bytes, "6GiB", "auto", or 0 = tier off.

    host_memory covers the whole process, the runtime's own share included. caller_bytes: of it,
    what the calling program will take for itself beside what it has when a model is opened. Raises
    InputError for what is no size.
    """

    device_memory: int | str = "auto"
    host_memory: int | str = "auto"
    disk_memory: int | str = "auto"
    caller_bytes: int = 0

    def __post_init__(self):
        if type(self.caller_bytes) is not int or self.caller_bytes < 0:
            raise InputError(f"caller_bytes is {self.caller_bytes!r}; allowed are bytes, 0 or more")
        for name in ("device_memory", "host_memory", "disk_memory"):
            value = getattr(self, name)
            # Host memory holds the process itself: it is never off.
            allowed = _ALLOWED if name == "host_memory" else _TIER_ALLOWED
            if isinstance(value, str):
                try:
                    value = parse_size(value, allowed)
                except ValueError as error:
                    raise InputError(f"{name}: {error}") from None
                object.__setattr__(self, name, value)
            elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name} is {value!r}; {allowed}")


@dataclass(frozen=True)
class Limits:
    """A budget with every `auto` resolved on this machine, in bytes. device_bytes is None without a
    device tier.

    runtime_bytes: what the process uses before a model is loaded, and what the program that opens
    it will take; part of host_bytes.
    """

    device_bytes: int | None
    host_bytes: int
    disk_bytes: int
    runtime_bytes: int


def resolve(budget: Budget, spill_dir: Path | None, free_device_bytes: int | None) -> Limits:
    """The limits on this machine, now. spill_dir None: no disk tier. free_device_bytes None: no
    device tier.
    """
    import psutil

    runtime = psutil.Process().memory_info().rss
    host = budget.host_memory
    if host == "auto":
        memory = memory_at_hand()
        headroom = max(_HOST_HEADROOM_BYTES, int(memory.total * _HOST_HEADROOM_SHARE))
        # `available` leaves out what this process has taken already; the budget counts it.
        host = max(0, memory.available - headroom) + runtime
    device = None
    if free_device_bytes is not None:
        device = budget.device_memory
        if device == "auto":
            share = int(free_device_bytes * _DEVICE_HEADROOM_SHARE)
            device = max(0, free_device_bytes - max(_DEVICE_HEADROOM_BYTES, share))
        device = int(device)
    disk = 0
    if spill_dir is not None:
        disk = budget.disk_memory
        if disk == "auto":
            disk = auto_disk_bytes(spill_dir)
    return Limits(device, int(host), int(disk), runtime + budget.caller_bytes)


def auto_disk_bytes(spill_dir: Path | str) -> int:
    """What a disk_memory of "auto" comes to now. Raises OSError for a folder that is not there."""
    usage = shutil.disk_usage(spill_dir)
    return max(0, min(int(usage.total * _DISK_SHARE), usage.free - _DISK_KEPT_FREE_BYTES))
