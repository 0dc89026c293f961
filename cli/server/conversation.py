"""A conversation that a client tells in parts, as chat templates take it: in messages.

Some protocols have what is thought, said and called apart where a template has one message. What is
the same conversation here is the same prompt, however it was cut.
"""

from __future__ import annotations

from typing import Any

from .bad_request import BadRequest
from .messages import answer_message, check_count, result_message


class Conversation:
    """Parts are added in their order. field: of the request, that holds them."""

    def __init__(self, field: str):
        self._field = field
        self._messages: list[dict[str, Any]] = []
        self._called: dict[str, str] = {}  # names of functions by the ids of their calls
        # Whose turn it is, and what there is of it.
        self._role: str | None = None
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All of them. Raises BadRequest where there are none, or too many."""
        self._begin(None)
        if not self._messages:
            raise BadRequest(
                f"{self._field!r} has nothing in it that is said; give at least one text.",
                param=self._field,
            )
        check_count(self._messages, self._field)
        return self._messages

    @property
    def ends_with_answer(self) -> bool:
        return self._role == "assistant"

    def say(self, role: str, text: str) -> None:
        """role: system, user or assistant. Many templates want turns, so who goes on speaking says
        one message; and they want one system message, at the beginning, so what is said so later
        is told as the user's."""
        is_later = self._messages or self._role not in (None, "system")
        self._begin("user" if role == "system" and is_later else role)
        self._texts.append(text)

    def think(self, text: str) -> None:
        """What the assistant thought before what it says or calls next."""
        self._begin("assistant")
        self._thoughts.append(text)

    def call(self, id: str, name: str, arguments: str) -> None:
        """The assistant calls a function. arguments: JSON as text."""
        self._begin("assistant")
        function = {"name": name, "arguments": arguments}
        self._calls.append({"id": id, "type": "function", "function": function})
        self._called[id] = name

    def result(self, text: str, call_id: Any, where: str, field: str) -> None:
        """What a call gave. field: of its id. Raises BadRequest where no such call was made."""
        self._begin(None)
        self._messages.append(result_message(text, call_id, self._called, where, field))

    def _begin(self, role: str | None) -> None:
        """Somebody's turn, or nobody's; that of another is over."""
        if role == self._role:
            return
        text, thoughts = "\n\n".join(self._texts), "\n\n".join(self._thoughts)
        if self._role == "assistant":
            self._messages.append(answer_message(text, self._calls, thoughts))
        elif self._role is not None:
            self._messages.append({"role": self._role, "content": text})
        self._role, self._texts, self._thoughts, self._calls = role, [], [], []
