"""What a summary has finished so far, kept on disk until the command ends well.

A job is a folder in the user's state folder, named by a hash of everything that decides its
results: the text, the model, the options. Each answer in it is a file that is there whole or not at
all. Knows neither documents nor models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from ebbtide import errors

from .terminal import Terminal

# A job that nobody came back to. Its text is the user's, and does not lie about for ever.
_FORGOTTEN_AFTER_S = 7 * 24 * 3600


def jobs_folder() -> Path:
    """Private; made if absent. Raises InputError when it cannot be."""
    import ebbtide

    return ebbtide.state_dir("jobs")


def job_key(parts: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


class Job:
    """load and save answers by name; `finish` when they are not needed any more.

    keeps: False reads what an earlier run kept, and keeps nothing. What cannot be kept (a full
    disk, a home that may not be written) is told once, and costs a second reading after an
    interruption, no more.
    """

    def __init__(self, key: str, terminal: Terminal, *, keeps: bool = True):
        self._terminal, self._keeps = terminal, keeps
        self.folder: Path | None = None
        try:
            root = jobs_folder()
            _sweep(root, keep=key)
            self.folder = root / key
        except (OSError, errors.EbbtideError) as error:
            self._cannot_keep(error)

    @property
    def is_kept(self) -> bool:
        """Whether all that was saved is there for a second try."""
        return self._keeps and self.folder is not None

    def load(self, name: str) -> dict[str, Any] | None:
        """What was saved under a name; None when nothing was, or it is damaged."""
        if self.folder is None:
            return None
        try:
            found = json.loads((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def save(self, name: str, value: dict[str, Any]) -> None:
        """Whole and on the disk when this returns."""
        if self.folder is None or not self._keeps:
            return
        temporary = None
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            number, temporary = tempfile.mkstemp(suffix=".part", dir=self.folder)
            with open(number, "w", encoding="ascii") as file:
                json.dump(value, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{name}.json")
            _sync_folder(self.folder)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            self._cannot_keep(error)

    def finish(self) -> None:
        """Its results are where they belong: nothing is kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _cannot_keep(self, error: Exception) -> None:
        self.folder = None
        reason = getattr(error, "strerror", None) or error
        self._terminal.warn(f"Finished parts cannot be kept for a second try: {reason}")


def _sweep(root: Path, keep: str) -> None:
    """Forgotten jobs go."""
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if folder.name != keep and time.time() - folder.stat().st_mtime > _FORGOTTEN_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """The new name itself outlives a power cut; Windows has no call for that, and needs none."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
