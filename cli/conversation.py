"""A conversation: its messages, and the file in which a named one survives.

The file holds messages, not pages: resuming one means reading it again. It lies in the user's state
folder, for the user alone, and is replaced whole. Knows nothing of models or terminals.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from ebbtide import errors

Message = dict[str, str]
_SCHEMA = 1


def sessions_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_state_dir("ebbtide")) / "sessions"


def session_path(name: str) -> Path:
    """The file of a named conversation. Raises InputError for a name that could lead elsewhere."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name):
        raise errors.InputError(
            f"{name!r} is no name for a conversation; "
            "allowed are up to 64 letters, digits, '.', '_' and '-'."
        )
    return sessions_folder() / f"{name}.json"


def latest_name() -> str:
    """The name of the conversation that was saved last. Raises InputError without any."""
    try:
        found = [(path.stat().st_mtime, path.stem) for path in sessions_folder().glob("*.json")]
    except OSError:
        found = []
    if not found:
        raise errors.InputError(
            "There is no saved conversation to continue; "
            "start one with 'ebbtide chat --session NAME'."
        )
    return max(found)[1]


class Conversation:
    """The messages so far: at most one system message first, then user and assistant in turn."""

    def __init__(self, name: str | None = None, model: str | None = None):
        self.name = name
        self.model = model
        self.messages: list[Message] = []

    @classmethod
    def load(cls, name: str) -> Conversation:
        """The named conversation, empty if it is new. Raises InputError for a damaged file."""
        path = session_path(name)
        conversation = cls(name)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return conversation
        except (OSError, ValueError) as error:
            raise errors.InputError(f"The conversation {path} cannot be read: {error}.") from None
        if not _is_sound(found):
            raise errors.InputError(
                f"{path} is not a conversation that this version can read; remove or rename it."
            )
        conversation.model = found.get("model")
        conversation.messages = found["messages"]
        return conversation

    def save(self) -> None:
        """Replaces the file; does nothing for a conversation without a name.

        Raises StorageError.
        """
        if self.name is None:
            return
        path = session_path(self.name)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(path.parent, 0o700)
            # mkstemp makes files that only their owner may read.
            number, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
            try:
                with os.fdopen(number, "w", encoding="utf-8") as file:
                    fields = {"schema": _SCHEMA, "model": self.model, "messages": self.messages}
                    json.dump(fields, file, ensure_ascii=False, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise errors.StorageError(
                f"The conversation {path} cannot be saved: {error.strerror}."
            ) from None

    # --- the system message

    @property
    def system(self) -> str | None:
        return self.messages[0]["content"] if self._has_system() else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[1:] if self._has_system() else self.messages
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    def _has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    # --- turns

    @property
    def turns(self) -> list[Message]:
        """The messages without the system message."""
        return self.messages[1:] if self._has_system() else self.messages

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def pop_answer(self) -> str | None:
        """Takes the last answer away and returns it; None when there is none."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            return self.messages.pop()["content"]
        return None

    def pop_question(self) -> str | None:
        """The same for a question at the end."""
        if self.turns and self.turns[-1]["role"] == "user":
            return self.messages.pop()["content"]
        return None

    def clear(self) -> None:
        """Forgets everything but the system message."""
        self.messages = self.messages[:1] if self._has_system() else []


def _is_sound(found: object) -> bool:
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA:
        return False
    messages = found.get("messages")
    return (
        isinstance(messages, list)
        and isinstance(found.get("model"), str | None)
        and all(
            isinstance(m, dict)
            and set(m) == {"role", "content"}
            and m["role"] in ("system", "user", "assistant")
            and isinstance(m["content"], str)
            for m in messages
        )
    )
