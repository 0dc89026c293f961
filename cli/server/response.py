"""Answers to chats and plain texts as OpenAI's completions have them, and models.

What a reasoning model thinks is `reasoning_content` beside the `content`, as other local servers
have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from .answer import Answer, encoded, event
from .job import Started
from .logprobs import AnswerLogprobs
from .request import Request

DONE = b"data: [DONE]\n\n"


def models_object(name: str, context: int, created_s: int) -> dict[str, Any]:
    """A list in OpenAI's shape and Anthropic's."""
    found = {"object": "list", "data": [model_object(name, context, created_s)]}
    return {**found, "has_more": False, "first_id": name, "last_id": name}


def model_object(name: str, context: int, created_s: int) -> dict[str, Any]:
    """In OpenAI's shape and Anthropic's. context_length: the most tokens that prompt and answer may
    reach; clients of vLLM's look for it under the other name."""
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "ebbtide",
        "context_length": context,
        "max_model_len": context,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created_s, UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


def _call(call: Any) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


class CompletionAnswer(Answer):
    """Its objects share an id, a time and the model's name."""

    def __init__(self, request: Request, model: str):
        super().__init__(request, model, "chatcmpl-" if request.is_chat else "cmpl-")
        self._num_calls = 0  # that were told
        self._index = 0  # of the prompt that is being answered
        self._choices: list[dict[str, Any]] = []  # of those before it, where they are told whole
        self._logprobs = AnswerLogprobs(request.is_chat) if request.tells_logprobs else None

    def note(self, piece: Any) -> None:
        if self._logprobs is not None:
            self._logprobs.note(piece)

    def parts(self, output: Any) -> Iterator[bytes]:
        # Log-probabilities are long.
        assert self._logprobs is not None
        body, end = encoded(self.whole(output)), b"null}]}"  # in place of them, which come last
        assert body.endswith(end)
        yield body.removesuffix(end)
        yield from self._logprobs.whole(output.logprobs)
        yield end.removeprefix(b"null")

    def whole(self, output: Any) -> dict[str, Any]:
        if self._request.is_chat:
            # As OpenAI has it, calls alone come with no content.
            content = output.text or (None if output.tool_calls else "")
            message = {"role": "assistant", "content": content, "refusal": None}
            if output.tool_calls:
                message["tool_calls"] = [*map(_call, output.tool_calls)]
            if output.thought:
                message["reasoning_content"] = output.thought
            said = {"message": message}
        else:
            said = {"text": output.text}
        choice = self._choice(said, output.finish_reason)
        return {
            **self._head("chat.completion"),
            "usage": output.usage,
            "choices": [*self._choices, choice],
        }

    def first(self) -> bytes:
        """What opens a stream: who speaks. Nothing for plain text."""
        if not self._request.is_chat:
            return b""
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def piece(self, piece: Any) -> bytes:
        """A bit of the answer, of the thought before it or of its calls; nothing where it holds
        none."""
        found = b""
        told = self._logprobs.of_piece(piece) if self._logprobs is not None else None
        if piece.thought and self._request.is_chat:
            found += self._chunk({"delta": {"reasoning_content": piece.thought}})
        if piece.text:
            is_chat = self._request.is_chat
            said = {"delta": {"content": piece.text}} if is_chat else {"text": piece.text}
            found += self._chunk(said, logprobs=told)
        for call in piece.tool_calls:  # each is whole: clients join pieces by their index
            told = {"index": self._num_calls, **_call(call)}
            self._num_calls += 1
            found += self._chunk({"delta": {"tool_calls": [told]}})
        return found

    def answered(self, output: Any) -> bytes:
        if self._request.stream:
            found = self._chunk(self._nothing, output.finish_reason)
        else:
            found = b""
            self._choices.append(self._choice({"text": output.text}, output.finish_reason))
        self._index += 1
        return found

    def progress(self, started: Started | None, progress: Any) -> bytes:
        """How far reading the prompt is, for who asked for it."""
        if not self._request.return_progress or started is None:
            return self.alive(started)
        told = {
            "total": started.prompt_tokens,
            "cache": started.cached_tokens,
            "processed": started.cached_tokens + progress.done_tokens,
            "time_ms": round(1000 * progress.elapsed_s),
        }
        return self._chunk(self._nothing, prompt_progress=told)

    def last(self, output: Any) -> bytes:
        """Why the answer ended, its usage if that was asked for, and the end of the stream."""
        found = self._chunk(self._nothing, output.finish_reason)
        if self._request.include_usage:
            head = self._head("chat.completion.chunk")
            found += event({**head, "choices": [], "usage": output.usage})
        return found + DONE

    @property
    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}} if self._request.is_chat else {"text": ""}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind if self._request.is_chat else "text_completion",
            "created": self._created_s,
            "model": self._model,
        }

    def _chunk(
        self,
        said: dict[str, Any],
        reason: str | None = None,
        *,
        logprobs: dict[str, Any] | None = None,
        **more: Any,
    ) -> bytes:
        usage = {"usage": None} if self._request.include_usage else {}
        head = self._head("chat.completion.chunk")
        return event({**head, "choices": [self._choice(said, reason, logprobs)], **usage, **more})

    def _choice(
        self, said: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": self._index, **said, "finish_reason": reason, "logprobs": logprobs}
