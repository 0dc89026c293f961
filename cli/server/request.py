"""What a client asks for: the JSON of a request, checked, in Ebbtide's own words.

Pure functions from a decoded body to a Request. A field that would change the answer and is not
known is refused by name; one that changes nothing is passed over, as clients send many of those.
Knows no model: how long a prompt is, and what a chat template makes of it, is found out later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .bad_request import BadRequest
from .fields import Fields, check_settings, effort_of, schema_of, tools_of, typed
from .messages import messages_of


@dataclass(frozen=True)
class Request:
    """prompt: messages, text or token ids. generation: names and values for `Session.stream`.
    model: the name that was given. return_progress: whether a stream tells how far reading is.
    only_reads: whether nothing is to be answered, so that the next one finds the prompt.
    more_prompts: texts or token ids that are answered after it, each by itself."""

    prompt: Any
    generation: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    return_progress: bool = False
    only_reads: bool = False
    more_prompts: tuple[Any, ...] = ()

    @property
    def prompts(self) -> list[Any]:
        """All of them, in the order in which they are answered."""
        return [self.prompt, *self.more_prompts]

    @property
    def tools(self) -> list[Any]:
        """What the model is told of."""
        is_told = self.generation.get("tool_choice") != "none"
        return self.generation.get("tools", []) if is_told else []

    @property
    def tells_logprobs(self) -> bool:
        return "logprobs" in self.generation

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], dict)


_ONLY_TEXT = "Ebbtide answers with text alone"
MOST_PROMPTS = 128  # of one request: it keeps others waiting for as long as they take
_SWITCHES = ("enable_thinking", "thinking")  # of chat templates
# What clients of llama.cpp's and vLLM's servers say of themselves.
_OF_OTHER_SERVERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "ignore_eos": ((False,), "logit_bias keeps tokens from coming"),
    "stop_token_ids": (([],), "'stop' takes texts"),
    "include_stop_str_in_output": ((False,), "an answer ends before them"),
    "skip_special_tokens": ((True,), "control tokens are never told"),
    "spaces_between_special_tokens": ((True,), "control tokens are never told"),
    "add_generation_prompt": ((True,), "the model answers after the last message"),
    "continue_final_message": ((False,), "the model answers after the last message"),
    "use_beam_search": ((False,), "tokens are chosen one by one"),
    "length_penalty": ((1,), "tokens are chosen one by one"),
    "early_stopping": ((False,), "tokens are chosen one by one"),
}
_COMMON = ("model", "stream", "stream_options", "return_progress", "response_format")


def _fields(*own: str) -> Fields:
    return Fields(
        own=(*_COMMON, *own),
        settings={
            "max_tokens": "max_new_tokens",
            "max_completion_tokens": "max_new_tokens",
            "max_new_tokens": "max_new_tokens",
            "min_tokens": "min_new_tokens",
            "stop": "stop_strings",
            "stop_strings": "stop_strings",
        },
        neutral={
            "n": ((1,), "there is one answer to a request"),
            "best_of": ((1,), "there is one answer to a request"),
            "functions": (
                ([],),
                'offer them as \'tools\', [{"type": "function", "function": {...}}]; calls come as '
                "'tool_calls'",
            ),
            "function_call": (("none", "auto"), "use 'tools' and 'tool_choice'"),
            "modalities": ((["text"],), _ONLY_TEXT),
            "echo": ((False,), "the prompt is not repeated"),
            "suffix": (("",), "text is continued at its end only"),
            **_OF_OTHER_SERVERS,
        },
        ignored=(
            *("user", "metadata", "store", "service_tier", "safety_identifier"),
            *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "prediction"),
            *("cache_prompt", "priority", "verbosity"),
        ),
    )


_FIELDS = {
    "messages": _fields(
        *("messages", "reasoning_effort", "chat_template_kwargs"),
        *("tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs"),
    ),
    "prompt": _fields("prompt", "logprobs"),
}


def chat_request(body: dict[str, Any]) -> Request:
    """For /v1/chat/completions. Raises BadRequest."""
    return _request(body, "messages")


def completion_request(body: dict[str, Any]) -> Request:
    """For /v1/completions. Raises BadRequest."""
    return _request(body, "prompt")


def _request(body: dict[str, Any], asks: str) -> Request:
    """asks: the field that holds what is asked, "messages" or "prompt"."""
    fields = _FIELDS[asks]
    given = fields.given(body)
    if asks not in given:
        raise BadRequest(f"{asks!r} is missing.", param=asks)
    options = typed(given, "stream_options", dict, {})
    # Ebbtide's own names count first.
    generation = _thinking(given) | fields.generation(given) | _logprobs(given, asks)
    is_stream = typed(given, "stream", bool, False)
    is_chat = asks == "messages"
    prompt, *more = [messages_of(given[asks])] if is_chat else _prompts_of(given[asks])
    if more and "logprobs" in generation and not is_stream:
        # Those of one answer would be kept where the next prompt is encoded.
        raise BadRequest(
            "'logprobs' for several prompts need 'stream': true; or send the prompts one by one.",
            param="logprobs",
        )
    return Request(
        prompt=prompt,
        more_prompts=tuple(more),
        generation=generation | _format(given) | tools_of(given),
        model=typed(given, "model", str),
        stream=is_stream,
        include_usage=typed(options, "include_usage", bool, False),
        return_progress=typed(given, "return_progress", bool, False),
    )


def _thinking(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "reasoning_effort" in given:
        found["think"] = effort_of(given["reasoning_effort"], "reasoning_effort")
    for name, value in typed(given, "chat_template_kwargs", dict, {}).items():
        if name not in _SWITCHES or not isinstance(value, bool):
            raise BadRequest(
                f"'chat_template_kwargs' may hold {' or '.join(_SWITCHES)}, true or false; "
                f"not {name!r}: {value!r}.",
                param="chat_template_kwargs",
            )
        found.setdefault("think", value)
    return found


def _logprobs(given: dict[str, Any], asks: str) -> dict[str, Any]:
    """A chat asks for them by a switch, and for others' by a number; a plain text by a number."""
    name, num_top = "logprobs", given.get("logprobs", False)
    if asks == "messages":
        is_on, name = typed(given, "logprobs", bool, False), "top_logprobs"
        num_top = given.get(name, 0)
        if not is_on and num_top != 0:
            raise BadRequest("'top_logprobs' needs 'logprobs': true.", param=name)
        num_top = is_on and num_top
    if num_top is False:
        return {}
    check_settings(name, "logprobs", {"logprobs": num_top})
    return {"logprobs": num_top}


def _format(given: dict[str, Any]) -> dict[str, Any]:
    """The schema of a response_format; nothing where any text will do."""
    format, where = typed(given, "response_format", dict, {}), "response_format"
    kind = format.get("type", "text")
    if kind == "text":
        return {}
    if kind == "json_object":
        schema = format.get("schema") or {"type": "object"}
    elif kind == "json_schema":
        # strict is what they are always kept to, and the name is for the client.
        schema = typed(format, "json_schema", dict, {}).get("schema")
        where = f"{where}.json_schema"
    else:
        raise BadRequest(
            f"'{where}' must have the type text, json_object or json_schema, not {kind!r}.",
            param=where,
        )
    return {"json_schema": schema_of(schema, f"{where}.schema")}


def _prompts_of(value: Any) -> list[Any]:
    """Texts, or lists of token ids: one, or as many as are in a list of them."""
    are_several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    prompts = value if are_several else [value]
    if len(prompts) > MOST_PROMPTS:
        raise BadRequest(
            f"'prompt' may hold {MOST_PROMPTS} prompts at most, not {len(prompts):,}; send the "
            "others in another request.",
            param="prompt",
        )
    for at, prompt in enumerate(prompts):
        are_ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
        if not prompt or not (isinstance(prompt, str) or are_ids):
            where = f"prompt[{at}]" if are_several else "prompt"
            allowed = "a text or a list of token ids"
            if not are_several:
                allowed += ", or a list of several of these"
            raise BadRequest(f"'{where}' must be {allowed}, and not empty.", param=where)
    return prompts
