"""Answers as Anthropic's Messages API has them: blocks, and events of their beginnings and ends."""

from __future__ import annotations

import json
from typing import Any

from ebbtide import Output

from .answer import KEEP_ALIVE, typed_event
from .error_object import ANTHROPIC_PATH, error_object
from .job import Started
from .request import Request
from .runs import Run, RunAnswer, RunKind

# Thoughts are told as they are, and taken back unsigned; some clients send back signed ones alone.
_SIGNATURE = "ebbtide"
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class AnthropicAnswer(RunAnswer):
    def __init__(self, request: Request, model: str):
        super().__init__(request, model, "msg_")

    def whole(self, output: Output) -> dict[str, Any]:
        return {
            **self._message(_usage_of(output)),
            "content": [_block(run) for run in self._runs],
            **_end_of(output),
        }

    def started(self, started: Started) -> bytes:
        message = self._message(_usage(started.prompt_tokens, started.cached_tokens, 0))
        return typed_event({"type": "message_start", "message": message}) + _PING

    def alive(self, started: Started | None) -> bytes:
        # Clients count pings as signs of life; before the message they expect none.
        return KEEP_ALIVE if started is None else _PING

    def failed(self, error: BaseException) -> bytes:
        return typed_event(error_object(error, ANTHROPIC_PATH)[1])

    def _close(self, output: Output) -> bytes:
        end = {"delta": _end_of(output), "usage": _usage_of(output)}
        return typed_event({"type": "message_delta", **end}) + typed_event({"type": "message_stop"})

    def _begin(self, run: Run) -> bytes:
        return _event(run, "content_block_start", content_block=_block(run, is_empty=True))

    def _more(self, run: Run, text: str) -> bytes:
        kind, field = {
            RunKind.THOUGHT: ("thinking_delta", "thinking"),
            RunKind.TEXT: ("text_delta", "text"),
            RunKind.CALL: ("input_json_delta", "partial_json"),
        }[run.kind]
        return _event(run, "content_block_delta", delta={"type": kind, field: text})

    def _end(self, run: Run, is_cut: bool) -> bytes:
        found = b""
        if run.kind is RunKind.THOUGHT:
            signed = {"type": "signature_delta", "signature": _SIGNATURE}
            found = _event(run, "content_block_delta", delta=signed)
        return found + _event(run, "content_block_stop")

    def _message(self, usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


_PING = typed_event({"type": "ping"})


def _event(run: Run, kind: str, **fields: Any) -> bytes:
    return typed_event({"type": kind, "index": run.index, **fields})


def _usage(prompt: int, cached: int, written: int) -> dict[str, int]:
    """Tokens: of the prompt, of those that were not read again, and of the answer."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": written,
    }


def _usage_of(output: Output) -> dict[str, int]:
    usage = output.usage
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return _usage(usage["prompt_tokens"], cached, usage["completion_tokens"])


def _end_of(output: Output) -> dict[str, Any]:
    if output.stop_string is not None and not output.tool_calls:
        return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_string}
    reason = _REASONS.get(output.finish_reason, "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _block(run: Run, is_empty: bool = False) -> dict[str, Any]:
    """is_empty: as it begins in a stream."""
    text = "" if is_empty else run.text
    if run.call is not None:
        own = {"id": run.call.id, "name": run.call.name, "input": json.loads(text or "{}")}
        return {"type": "tool_use", **own}
    if run.kind is RunKind.THOUGHT:
        signature = "" if is_empty else _SIGNATURE
        return {"type": "thinking", "thinking": text, "signature": signature}
    return {"type": "text", "text": text}
