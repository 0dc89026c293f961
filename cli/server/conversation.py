"""A conversation that a client tells in parts, as chat templates take it: in messages.

Some protocols have what is thought, said and called apart where a template has one message. What is
the same conversation here is the same prompt, however it was cut.
"""

from __future__ import annotations

from typing import Any

from .messages import answer_message, check_count, result_message


class Conversation:
    """Parts are added in their order. field: of the request, that holds them."""

    def __init__(self, field: str):
        self._field = field
        self._messages: list[dict[str, Any]] = []
        self._called: dict[str, str] = {}  # names of functions by the ids of their calls
        self._texts: list[str] = []  # of the answer that is being told
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._is_answer = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All of them. Raises BadRequest where there are too many."""
        self._end_answer()
        check_count(self._messages, self._field)
        return self._messages

    @property
    def ends_with_answer(self) -> bool:
        return self._is_answer

    def say(self, role: str, text: str) -> None:
        """role: system, user or assistant. Whoever goes on speaking says one message: many
        templates want turns, and one system message at the beginning."""
        if role == "assistant":
            self._is_answer = True
            self._texts.append(text)
            return
        self._end_answer()
        if self._messages and self._messages[-1]["role"] == role:
            self._messages[-1]["content"] += f"\n\n{text}"
        else:
            self._messages.append({"role": role, "content": text})

    def think(self, text: str) -> None:
        """What the assistant thought before what it says or calls next."""
        self._is_answer = True
        self._thoughts.append(text)

    def call(self, id: str, name: str, arguments: str) -> None:
        """The assistant calls a function. arguments: JSON as text."""
        self._is_answer = True
        function = {"name": name, "arguments": arguments}
        self._calls.append({"id": id, "type": "function", "function": function})
        self._called[id] = name

    def result(self, text: str, call_id: Any, where: str, field: str) -> None:
        """What a call gave. field: of its id. Raises BadRequest where no such call was made."""
        self._end_answer()
        found = result_message(text, call_id, self._called, where, field)
        self._messages.append(found)

    def _end_answer(self) -> None:
        if self._is_answer:
            texts, thoughts = "\n".join(self._texts), "\n".join(self._thoughts)
            self._messages.append(answer_message(texts, self._calls, thoughts))
            self._texts, self._thoughts, self._calls = [], [], []
            self._is_answer = False
