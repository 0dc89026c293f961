"""Folders that are the user's alone: mode 0700, no link, nobody else's.

What a user wrote, or what it can be rebuilt from, lies in them. Knows not what that is.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import InputError


def make_private(path: Path, advice: str) -> Path:
    """mkdir -p with mode 0700 for every folder that is missing, whatever the umask.

    The folder itself is made private if it was not. `advice` ends the sentence of an InputError: a
    link, no folder, or somebody else's. Raises OSError where the system refuses.
    """
    _make(path)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path} is a link or no folder; remove it or {advice}")
    if hasattr(os, "geteuid"):
        if found.st_uid != os.geteuid():
            raise InputError(f"{path} belongs to another user; {advice}")
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.chmod(path, 0o700)
    return path


def state_dir(*parts: str) -> Path:
    """The user's state folder for Ebbtide, or a folder in it: sessions, history, journals.

    Made if absent. Raises InputError when it cannot be.
    """
    from platformdirs import user_state_dir

    path = Path(user_state_dir("ebbtide"))
    advice = "choose another place with XDG_STATE_HOME"
    try:
        make_private(path, advice)
        for part in parts:
            path = make_private(path / part, advice)
    except OSError as error:
        raise InputError(
            f"the state folder {path} cannot be used: {error.strerror or error}; {advice}"
        ) from None
    return path


def _make(path: Path) -> None:
    if os.path.lexists(path):
        return
    _make(path.parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:  # another process was quicker
        pass
