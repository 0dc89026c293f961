"""What a tokenizer alone answers: tokens of a text, the text of tokens, messages as a prompt.

For clients that count before they ask. Names are those of llama.cpp's server, or vLLM's. Not a
method of the routes, for the tokenizer belongs to the thread that answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .bad_request import BadRequest
from .fields import check_neutral, tools_of, typed
from .messages import messages_of
from .request import Request

# What vLLM's clients send and may only ask for what is done anyway: in all queries, and of chats.
_NEUTRAL = {"return_token_strs": (False, None)}
_NEUTRAL_IN_CHATS = {
    **_NEUTRAL,
    "add_generation_prompt": (True, None),
    "continue_final_message": (False, None),
    "add_special_tokens": (False, None),
}


@dataclass(frozen=True)
class TextQuery:
    """prompt: what is encoded or decoded, as Request has it. answer: from an LLM, and the settings
    of answers that say nothing else, what is told."""

    prompt: Any
    answer: Callable[[Any, dict[str, Any]], dict[str, Any]]
    tools: list[Any] = field(default_factory=list)
    model: str | None = None
    stream: bool = False


def tokenize_query(body: dict[str, Any], context: int | None = None) -> TextQuery:
    """{"content": text, "add_special": whether a BOS comes first} -> {"tokens": [...]}. As vLLM has
    it: {"prompt": text, "add_special_tokens": whether it does} or {"messages": [...]} ->
    {"tokens": [...], "count": how many, "max_model_len": context}"""
    if "content" in body:
        _check_names(body, "content", "add_special")
        text = _text(body, "content")
        begins = typed(body, "add_special", bool, False)
        return TextQuery(text, lambda llm, _: {"tokens": llm.encode(text, begins=begins)})

    def told(ids: list[int]) -> dict[str, Any]:
        return {"tokens": ids, "count": len(ids), "max_model_len": context}

    model = typed(body, "model", str)
    if "messages" in body:
        _check_names(body, "model", "messages", "tools", **_NEUTRAL_IN_CHATS)
        messages, found = messages_of(body["messages"]), tools_of(body)

        def rendered(llm: Any, defaults: dict[str, Any]) -> dict[str, Any]:
            return told(llm.encode(messages, **_chat_options(llm, defaults, found)))

        return TextQuery(messages, rendered, found.get("tools", []), model)
    _check_names(body, "model", "prompt", "add_special_tokens", **_NEUTRAL)
    prompt = _text(body, "prompt")
    adds = typed(body, "add_special_tokens", bool, True)
    return TextQuery(prompt, lambda llm, _: told(llm.encode(prompt, begins=adds)), model=model)


def detokenize_query(body: dict[str, Any]) -> TextQuery:
    """{"tokens": [...]} -> {"content": text, "prompt": the same, as vLLM has it}"""
    _check_names(body, "model", "tokens")
    ids = body.get("tokens")
    if not isinstance(ids, list) or any(type(item) is not int for item in ids):
        raise BadRequest("'tokens' must be a list of token ids.", param="tokens")

    def text(llm: Any, defaults: dict[str, Any]) -> dict[str, Any]:
        found = llm.tokenizer.decode(llm.encode(ids) if ids else [])
        return {"content": found, "prompt": found}

    return TextQuery(ids, text, model=typed(body, "model", str))


def template_query(body: dict[str, Any]) -> TextQuery:
    """{"messages": [...], "tools": [...]} -> {"prompt": what the chat template makes of them}"""
    _check_names(body, "model", "messages", "tools")
    messages, found = messages_of(body.get("messages")), tools_of(body)

    def text(llm: Any, defaults: dict[str, Any]) -> dict[str, Any]:
        options = _chat_options(llm, defaults, found)
        return {"prompt": llm.tokenizer.chat_text(messages, **options)}

    return TextQuery(messages, text, found.get("tools", []), typed(body, "model", str))


def count_query(request: Request, **more: Any) -> TextQuery:
    """How many tokens a chat's prompt has. more: what is told besides."""

    def count(llm: Any, defaults: dict[str, Any]) -> dict[str, Any]:
        options = _chat_options(llm, defaults, request.generation)
        return {**more, "input_tokens": len(llm.encode(request.prompt, **options))}

    return TextQuery(request.prompt, count, request.tools, request.model)


def _chat_options(llm: Any, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What the chat template would be told if this were to be answered."""
    return llm.generation.resolve(**{**defaults, **given}).chat_options


def _text(body: dict[str, Any], name: str) -> str:
    """One that must be there."""
    text = typed(body, name, str)
    if text is None:
        raise BadRequest(f"{name!r} is missing: the text to be encoded.", param=name)
    return text


def _check_names(body: dict[str, Any], *known: str, **neutral: tuple[Any, ...]) -> None:
    """neutral: names whose values may only be these."""
    for name, value in body.items():
        if name in neutral:
            check_neutral(
                name, value, neutral[name], "told are the ids of a prompt as it would be answered"
            )
        elif name not in known:
            raise BadRequest(f"{name!r} is unknown here; allowed: {', '.join(known)}.", param=name)
