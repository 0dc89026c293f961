"""A file that appears whole or not at all: written beside its place, then renamed onto it.

What was there before stays untouched until then, and nothing lies beside it while the work goes on:
a process that is killed leaves no litter. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from ebbtide import errors


class OutputFile:
    """Opened before the long work, so that a folder that cannot be written is found out at once.

    A context manager. Raises InputError when the place cannot be written.
    """

    def __init__(self, path: str, option: str = "-o"):
        if not path:
            raise errors.InputError(f"'' is not the name of a file; {option} needs one.")
        # Through links, so that the link stays and what it points to is replaced.
        self.path = Path(os.path.realpath(path))
        self._device: Any = None  # an open device or pipe, in place of a file
        if self.path.is_dir():
            raise errors.InputError(f"{path} is a folder; {option} needs the name of a file.")
        try:
            mode = self.path.stat().st_mode
        except OSError:
            mode = None
        self._permissions = None if mode is None else stat.S_IMODE(mode)
        try:
            if mode is not None and not stat.S_ISREG(mode):
                # A device or a pipe: renaming onto it would replace it by a plain file.
                self._device = open(self.path, "w", encoding="utf-8")
            elif mode is not None and not os.access(self.path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            else:
                number, trial = self._begin()
                os.close(number)
                os.unlink(trial)
        except OSError as error:
            raise errors.InputError(
                f"{path} cannot be written: {error.strerror}. Choose another place with {option}."
            ) from None

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._device is not None:
            with contextlib.suppress(OSError):
                self._device.close()

    def commit(self, text: str) -> None:
        """Writes the text and puts the file in its place. Raises StorageError."""
        temporary = None
        try:
            if self._device is not None:
                self._device.write(text)
                self._device.flush()
                return
            number, temporary = self._begin()
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                # Without this a power cut could leave the new name with nothing in it.
                os.fsync(file.fileno())
            os.chmod(temporary, self._wanted_permissions())
            os.replace(temporary, self.path)
            temporary = None
        except OSError as error:
            raise errors.StorageError(f"{self.path} cannot be written: {error.strerror}.") from None
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _begin(self) -> tuple[int, str]:
        """An open file beside the place, and its name."""
        return tempfile.mkstemp(
            prefix=f".{self.path.name[:100]}.", suffix=".part", dir=self.path.parent
        )

    def _wanted_permissions(self) -> int:
        if self._permissions is not None:
            return self._permissions
        mask = os.umask(0o077)
        os.umask(mask)
        return 0o666 & ~mask
