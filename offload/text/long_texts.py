"""Texts that are far longer than a context: counted in parts, before one is encoded whole, which
takes memory by the token, of which a plan has as much as its context needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .prompt import Prompt, check_room

if TYPE_CHECKING:
    from ..llm import LLM

_PART_CHARS = 1 << 14
_CUT_TOKENS = 4  # that a part has more than it had in the whole text: a BOS, what was cut in two
_END_OF_THOUGHTS = "</think>"
# A text of more characters for each token of the context is counted before it is encoded. In what
# has room for few tokens that is not worth looking.
_MOST_CHARS, _FEW_TOKENS = 6, 1 << 14


def refuse_too_long(llm: LLM, prompt: Prompt, context: int | None) -> None:
    """For LLM.refuse_too_long."""
    texts, limit = texts_of(prompt), llm.config.max_positions
    most = min(llm.context_or(limit), max(llm.plan.largest_context, _FEW_TOKENS))
    if sum(map(len, texts)) <= _MOST_CHARS * (context or most):
        return
    num_tokens = 1 + sum(map(llm.least_tokens, texts))
    check_room(num_tokens, context or llm.context_or(limit), limit)
    if context is None:
        llm.plan_at(num_tokens).raise_if_unfit()


def texts_of(prompt: Prompt) -> list[str]:
    """What is said in a prompt, checked or not; token ids say nothing. Of answers without the
    thoughts that they begin with, which templates leave out."""
    if isinstance(prompt, str):
        return [prompt]
    texts: list[str] = []
    for message in prompt if isinstance(prompt, list | tuple) else ():
        if not isinstance(message, Mapping):
            continue
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else [{"text": content}]
        said = [part.get("text") for part in parts if isinstance(part, Mapping)]
        said = [text for text in said if isinstance(text, str)]
        if message.get("role") == "assistant":
            said = [text.rpartition(_END_OF_THOUGHTS)[2] for text in said]
        texts += said
    return texts


def least_tokens(text: str, count: Callable[[str], int]) -> int:
    """No more tokens than a text has, and nearly as many, counted part by part. count: the tokens
    of a text."""
    parts = (text[start : start + _PART_CHARS] for start in range(0, len(text), _PART_CHARS))
    return sum(max(0, count(part) - _CUT_TOKENS) for part in parts)
