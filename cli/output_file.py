"""A file that appears whole or not at all: written beside its place, then renamed onto it.

What was there before stays untouched until then. Knows nothing of what is written.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from ebbtide import errors


class OutputFile:
    """Opened before the long work, so that a folder that cannot be written is found out at once.

    A context manager: leaving without `commit` removes the temporary file. Raises InputError when
    the place cannot be written and StorageError when the disk is full.
    """

    def __init__(self, path: str):
        # Through links, so that the link stays and what it points to is replaced.
        self.path = Path(os.path.realpath(path))
        self._temporary: str | None = None
        if self.path.is_dir():
            raise errors.InputError(f"{path} is a folder; -o needs the name of a file.")
        try:
            mode = self.path.stat().st_mode
        except OSError:
            mode = None
        self._permissions = None if mode is None else stat.S_IMODE(mode)
        try:
            if mode is not None and not stat.S_ISREG(mode):
                # A device or a pipe: renaming onto it would replace it by a plain file.
                self._file = open(self.path, "w", encoding="utf-8")
            elif mode is not None and not os.access(self.path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            else:
                number, self._temporary = tempfile.mkstemp(
                    prefix=f".{self.path.name[:100]}.", suffix=".part", dir=self.path.parent
                )
                self._file = os.fdopen(number, "w", encoding="utf-8")
        except OSError as error:
            raise errors.InputError(
                f"{path} cannot be written: {error.strerror}. Choose another place with -o."
            ) from None

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._file.close()
        except OSError:
            pass
        if self._temporary is not None:
            os.unlink(self._temporary)
            self._temporary = None

    def commit(self, text: str) -> None:
        """Writes the text and puts the file in its place."""
        try:
            self._file.write(text)
            self._file.flush()
            if self._temporary is None:
                return
            # Without this a power cut could leave the new name with nothing in it.
            os.fsync(self._file.fileno())
            self._file.close()
            os.chmod(self._temporary, self._wanted_permissions())
            os.replace(self._temporary, self.path)
            self._temporary = None
        except OSError as error:
            raise errors.StorageError(f"{self.path} cannot be written: {error.strerror}.") from None

    def _wanted_permissions(self) -> int:
        if self._permissions is not None:
            return self._permissions
        mask = os.umask(0o077)
        os.umask(mask)
        return 0o666 & ~mask
