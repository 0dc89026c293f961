"""Answers as OpenAI's Responses API has them: items, and typed events that are numbered.

Thoughts are items of the type `reasoning`, with their text. What was asked is not repeated: it may
be as long as a body.
"""

from __future__ import annotations

import time
from typing import Any

from ebbtide import Output, ToolCall

from .answer import new_id, typed_event
from .error_object import error_object
from .job import Started
from .responses_request import ResponsesRequest
from .runs import Run, RunAnswer, RunKind

_PREFIXES = {RunKind.THOUGHT: "rs_", RunKind.TEXT: "msg_", RunKind.CALL: "fc_"}
_PARTS = {RunKind.THOUGHT: "reasoning_text", RunKind.TEXT: "output_text"}


class ResponsesAnswer(RunAnswer):
    def __init__(self, request: ResponsesRequest, model: str):
        super().__init__(request, model, "resp_")
        self._namespaces = request.namespaces
        self._settings = request.settings
        self._own = new_id("")  # of the ids of its items
        self._num_events = 0

    def whole(self, output: Output) -> dict[str, Any]:
        is_cut = output.finish_reason == "length"
        usage = output.usage
        return {
            **self._response("incomplete" if is_cut else "completed"),
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [
                self._item(run, is_cut=is_cut and run is self._runs[-1]) for run in self._runs
            ],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {
                    "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]
                },
                "total_tokens": usage["total_tokens"],
            },
        }

    def first(self) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def alive(self, started: Started | None) -> bytes:
        # Some clients give up where no event comes for minutes; comments are none to them.
        return self._event("response.in_progress", response=self._response("in_progress"))

    def failed(self, error: BaseException) -> bytes:
        # The codes of this protocol, and the one by which agents know that they must shorten.
        status, body = error_object(error)
        code = body["error"]["code"]
        if code != "context_length_exceeded":
            code = "server_error" if status >= 500 else "invalid_prompt"
        told = {"code": code, "message": body["error"]["message"]}
        response = {**self._response("failed"), "error": told}
        return self._event("response.failed", response=response)

    def _close(self, output: Output) -> bytes:
        response = self.whole(output)
        return self._event(f"response.{response['status']}", response=response)

    def _begin(self, run: Run) -> bytes:
        item = self._item(run, status="in_progress", text="")
        found = self._event("response.output_item.added", output_index=run.index, item=item)
        if run.kind is not RunKind.CALL:
            found += self._of_part(run, "response.content_part.added", part=_part(run, ""))
        return found

    def _more(self, run: Run, text: str) -> bytes:
        if run.kind is RunKind.CALL:
            return self._of_item(run, "response.function_call_arguments.delta", delta=text)
        more = {"logprobs": []} if run.kind is RunKind.TEXT else {}
        return self._of_part(run, f"response.{_PARTS[run.kind]}.delta", delta=text, **more)

    def _end(self, run: Run, is_cut: bool) -> bytes:
        if run.call is not None:
            own = {"name": self._name_of(run.call)["name"], "arguments": run.text}
            found = self._of_item(run, "response.function_call_arguments.done", **own)
        else:
            more = {"logprobs": []} if run.kind is RunKind.TEXT else {}
            found = self._of_part(run, f"response.{_PARTS[run.kind]}.done", text=run.text, **more)
            found += self._of_part(run, "response.content_part.done", part=_part(run, run.text))
        item = self._item(run, is_cut=is_cut)
        return found + self._event("response.output_item.done", output_index=run.index, item=item)

    def _item(
        self, run: Run, *, is_cut: bool = False, status: str = "", text: str | None = None
    ) -> dict[str, Any]:
        """status, text: while it is being told; else as it is at the end."""
        is_cut = is_cut and run.kind is not RunKind.CALL  # those are told when they are whole
        status = status or ("incomplete" if is_cut else "completed")
        text = run.text if text is None else text
        head = {"id": self._id_of(run), "status": status}
        if run.call is not None:
            own = {"call_id": run.call.id, **self._name_of(run.call), "arguments": text}
            return {**head, "type": "function_call", **own}
        content = [_part(run, text)] if text else []
        if run.kind is RunKind.THOUGHT:
            return {**head, "type": "reasoning", "summary": [], "content": content}
        return {**head, "type": "message", "role": "assistant", "content": content}

    def _name_of(self, call: ToolCall) -> dict[str, str]:
        if call.name not in self._namespaces:
            return {"name": call.name}
        namespace, name = self._namespaces[call.name]
        return {"name": name, "namespace": namespace}

    def _id_of(self, run: Run) -> str:
        return f"{_PREFIXES[run.kind]}{self._own}{run.index}"

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "model": self._model,
            "output": [],
            "previous_response_id": None,
            "store": False,
            "tools": [],
            "truncation": "disabled",
            "usage": None,
            "metadata": {},
            **self._settings,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return typed_event({"type": kind, "sequence_number": number, **fields})

    def _of_item(self, run: Run, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._id_of(run), output_index=run.index, **fields)

    def _of_part(self, run: Run, kind: str, **fields: Any) -> bytes:
        return self._of_item(run, kind, content_index=0, **fields)


def _part(run: Run, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"type": _PARTS[run.kind], "text": text}
    return found | ({"annotations": [], "logprobs": []} if run.kind is RunKind.TEXT else {})
