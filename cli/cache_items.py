"""What lies on disk, by kind: found, measured and removed. Knows folders, and no model.

Removal never follows a link out of the folders it knows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebbtide import errors

# kind -> what it is
KINDS = {
    "conversations": "of chats",
    "sessions": "of the Python API",
    "jobs": "parts of unfinished summaries",
    "history": "lines that were typed",
    "speeds": "what estimates of time are made from",
    "prefixes": "pages of what was read, for the next time",
    "scratch": "pages of runs, including those under way",
    "models": "of the Hugging Face hub",
}
_NO_TEXT = "unreadable"  # the name of pages' files that are no text's
_SUFFIX = ".tokens"
_CHAT = "chat."
_UNFINISHED = ".part"
_UNFINISHED_AFTER_S = 24 * 3600  # one that old belongs to no process that goes on


@dataclass(frozen=True)
class Item:
    """One thing that is kept. label: KIND/NAME, or KIND where there is one alone."""

    kind: str
    name: str
    num_bytes: int
    changed_s: float
    paths: tuple[Path, ...]
    num_tokens: int | None = None  # of a text whose pages are kept

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.name}" if self.name else self.kind

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "bytes": self.num_bytes,
            "changed_s": self.changed_s,
            "paths": [str(path) for path in self.paths],
            **({} if self.num_tokens is None else {"tokens": self.num_tokens}),
        }


def cache_folders(spill_dir: str | None) -> dict[str, str | None]:
    """Where each kind lies; None where that cannot be said."""
    import ebbtide

    state = ebbtide.state_dir()
    found: dict[str, str | None] = {
        "conversations": str(state / "sessions"),
        "sessions": str(state / "sessions"),
        "jobs": str(state / "jobs"),
        "history": str(state),
        "speeds": str(state),
        "models": str(_hub_folder()),
    }
    found["prefixes"] = str(ebbtide.prefix_dir(spill_dir))
    try:
        found["scratch"] = str(_spill_folder(spill_dir))
    except errors.EbbtideError:
        found["scratch"] = None
    return found


def find_items(spill_dir: str | None) -> list[Item]:
    """All that is kept, by kind, the latest of each kind first. Makes nothing but our own folders.

    Raises InputError where the state folder cannot be used.
    """
    import ebbtide

    state = ebbtide.state_dir()
    found = _sessions(state / "sessions")
    for folder in _inside(state / "jobs"):
        found.append(_item("jobs", folder.name, [folder]))
    for kind, path in (("history", state / "history"), ("speeds", state / "speeds.json")):
        if path.exists():
            found.append(_item(kind, "", [path]))
    found += _prefixes(spill_dir)
    with contextlib.suppress(errors.EbbtideError):
        for path in _inside(_spill_folder(spill_dir)):
            if path.suffix == ".scratch":
                found.append(_item("scratch", path.name, [path]))
    found += _models()
    order = list(KINDS)
    return sorted(found, key=lambda item: (order.index(item.kind), -item.changed_s))


def going_bytes(chosen: list[Item], items: list[Item]) -> int:
    """What `remove_items` would free."""
    return sum(map(_num_bytes, _going(chosen, items)))


def _going(chosen: list[Item], items: list[Item]) -> set[Path]:
    shared = {path for item in items if item not in chosen for path in item.paths}
    return {path for item in chosen for path in item.paths} - shared


def remove_items(chosen: list[Item], items: list[Item]) -> int:
    """Remove some of all items, but for what others share with them. Bytes that went. Raises
    StorageError for what does not go; what is gone already is fine."""
    num_bytes = going_bytes(chosen, items)
    for path in _going(chosen, items):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise errors.StorageError(f"{path} cannot be removed: {error.strerror}.") from None
    return num_bytes


def sweep(spill_dir: str | None) -> tuple[int, int]:
    """Removes what dead processes left. (files, bytes)"""
    import ebbtide

    count = num_bytes = 0
    state = ebbtide.state_dir()
    with contextlib.suppress(errors.EbbtideError):
        folder = _spill_folder(spill_dir)
        before = _sizes(folder)
        count += ebbtide.sweep_scratch(folder)
        gone = before.keys() - _sizes(folder).keys()
        num_bytes += sum(before[path] for path in gone)
    now_s = time.time()
    for path in [
        *state.glob("*.part"),
        *state.glob("sessions/.*.part"),
        *state.glob("jobs/*/*.part"),
        *(path for path in ebbtide.prefix_files(spill_dir) if path.suffix == ".part"),
    ]:
        with contextlib.suppress(OSError):
            found = path.stat()
            if now_s - found.st_mtime > _UNFINISHED_AFTER_S:
                path.unlink()
                count, num_bytes = count + 1, num_bytes + found.st_size
    return count, num_bytes


def _sessions(folder: Path) -> list[Item]:
    """Conversations of chats, with their tokens, and sessions of the Python API."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for path in _inside(folder):
        whole = _finished(path)
        if whole.name.startswith("."):
            continue
        if whole.suffix == ".json":
            groups.setdefault(("conversations", whole.stem), []).append(path)
        elif whole.suffix == _SUFFIX and whole.name.startswith(_CHAT):
            name = whole.stem.removeprefix(_CHAT)
            groups.setdefault(("conversations", name), []).append(path)
        elif whole.suffix == _SUFFIX:
            groups.setdefault(("sessions", whole.stem), []).append(path)
    return [_item(kind, name, paths) for (kind, name), paths in groups.items()]


def _finished(path: Path) -> Path:
    """What a file was to become that a process left unfinished (.NAME.RANDOM.part); others as they
    are. It holds what the user wrote, and goes with that."""
    if path.name.startswith(".") and path.suffix == _UNFINISHED:
        return path.with_name(path.name[1:].rsplit(".", 2)[0])
    return path


def _prefixes(spill_dir: str | None) -> list[Item]:
    """Texts whose pages are kept, each with all files that it takes. One that others share counts
    for the first of them. Damaged and unfinished files, which are no text's, are one item."""
    import ebbtide

    found, counted = [], set()
    for text in ebbtide.kept_texts(spill_dir):
        own = text.paths - counted
        counted |= own
        item = _item("prefixes", text.name, [text.last])
        num_bytes = sum(map(_num_bytes, own))
        found.append(
            replace(
                item,
                num_bytes=num_bytes,
                paths=tuple(sorted(text.paths)),
                num_tokens=len(text.tokens),
            )
        )
    if rest := [path for path in ebbtide.prefix_files(spill_dir) if path not in counted]:
        found.append(_item("prefixes", _NO_TEXT, rest))
    return found


def _models() -> list[Item]:
    """What the hub's cache holds; its own layout: models--ORG--NAME."""
    found = []
    for folder in _inside(_hub_folder()):
        if folder.name.startswith("models--"):
            name = folder.name.removeprefix("models--").replace("--", "/")
            found.append(_item("models", name, [folder]))
    return found


def _hub_folder() -> Path:
    """As huggingface_hub finds it, whose import would take longer than all the rest."""
    home = os.environ.get("HF_HOME")
    if home is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        home = os.path.join(cache, "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


def _spill_folder(spill_dir: str | None) -> Path:
    import ebbtide

    return Path(spill_dir).expanduser() if spill_dir else ebbtide.default_spill_dir()


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _sizes(folder: Path) -> dict[Path, int]:
    return {path: _num_bytes(path) for path in _inside(folder)}


def _item(kind: str, name: str, paths: list[Path]) -> Item:
    changed_s = 0.0
    for path in paths:
        with contextlib.suppress(OSError):
            changed_s = max(changed_s, path.lstat().st_mtime)
    return Item(kind, name, sum(map(_num_bytes, paths)), changed_s, tuple(paths))


def _num_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder; links count as nothing."""
    total = 0
    if path.is_symlink():
        return 0
    inside = [os.path.join(folder, n) for folder, _, names in os.walk(path) for n in names]
    for file in inside or [path]:
        with contextlib.suppress(OSError):
            if not os.path.islink(file) and os.path.isfile(file):
                total += os.stat(file).st_size
    return total
