"""A conversation: its messages, and the file in which a named one survives.

The file holds messages; the tokens lie beside it, as a session of the Python API keeps them, and no
pages: resuming one means reading it again. It lies in the user's state folder, for the user alone,
and is replaced whole. Knows nothing of models or terminals.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebbtide import errors

Message = dict[str, str]
_SCHEMA = 1
# The conversation that has no other name, until the next one without a name begins.
LAST = "last"
_LONGEST_NAME = 58


@dataclass(frozen=True)
class Kept:
    """A conversation on disk, as a list shows it. model, num_messages: None where unreadable."""

    name: str
    saved_s: float
    model: str | None
    num_messages: int | None


def sessions_folder() -> Path:
    """Where conversations lie, made if absent. Raises InputError where it cannot be."""
    import ebbtide

    return ebbtide.state_dir("sessions")


def session_path(name: str) -> Path:
    """The file of a named conversation. Raises InputError for a name that could lead elsewhere."""
    if len(name) > _LONGEST_NAME or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise errors.InputError(
            f"{name!r} is not a name for a conversation; "
            f"allowed are up to {_LONGEST_NAME} letters, digits, '.', '_' and '-'."
        )
    return sessions_folder() / f"{name}.json"


def free_name(name: str, end: str) -> str:
    """The name with the end, numbered where there is such a conversation: trip.whole-2."""
    ends = itertools.chain([end], (f"{end}-{number}" for number in itertools.count(2)))
    names = (name[: _LONGEST_NAME - len(end)] + end for end in ends)
    return next(found for found in names if not session_path(found).exists())


def kept_conversations() -> list[Kept]:
    """All that are on disk, the latest first."""
    found = []
    for path in sessions_folder().glob("*.json"):
        try:
            saved_s = path.stat().st_mtime
        except OSError:  # gone in the meantime
            continue
        try:
            conversation = Conversation.load(path.stem)
            model, num_messages = conversation.model, len(conversation.turns)
        except errors.InputError:
            model = num_messages = None
        found.append(Kept(path.stem, saved_s, model, num_messages))
    return sorted(found, key=lambda kept: kept.saved_s, reverse=True)


def latest_name() -> str:
    """The name of the conversation that was saved last. Raises InputError without any."""
    found = kept_conversations()
    if not found:
        raise errors.InputError("There is no conversation to continue; 'ebbtide chat' begins one.")
    return found[0].name


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

    @property
    def session_name(self) -> str | None:
        """Under which the Python API keeps its tokens."""
        return None if self.name is None else f"chat.{self.name}"

    def keep_tokens(self, session: Any) -> None:
        """Has the session keep its tokens under the conversation's name. Raises InputError where
        that is in use or cannot be kept, and StorageError.
        """
        try:
            session.keep_as(self.session_name)
        except errors.InputError as error:
            told = f"session {self.session_name!r}", f"conversation {self.name!r}"
            raise errors.InputError(str(error).replace(*told)) from None

    def save(self) -> None:
        """Replaces the file; does nothing for a conversation without a name.

        Raises StorageError.
        """
        if self.name is None:
            return
        path = session_path(self.name)
        try:
            # mkstemp makes files that only their owner may read.
            number, temporary = tempfile.mkstemp(
                dir=path.parent, prefix=f".{path.name}.", suffix=".part"
            )
            try:
                with os.fdopen(number, "w", encoding="utf-8") as file:
                    fields = {"schema": _SCHEMA, "model": self.model, "messages": self.messages}
                    json.dump(fields, file, ensure_ascii=False, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):  # gone, if the interruption came with renaming
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
