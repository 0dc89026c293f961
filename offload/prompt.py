"""What is asked: text, token ids or messages, whether a context has room for it, and how much of it
is known already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol, TypeGuard

from .errors import ContextOverflow, InputError

Messages = Sequence[Mapping[str, Any]]


class Array(Protocol):
    """A tensor or an array of token ids, of one dimension."""

    def tolist(self) -> Any: ...


TokenIds = Sequence[int] | Array
Prompt = str | TokenIds | Messages
_PART_CHARS = 1 << 14
_CUT_TOKENS = 4  # that a part has more than it had in the whole text: a BOS, what was cut in two
_END_OF_THOUGHTS = "</think>"


def check_room(num_tokens: int, context: int, model_context: int) -> None:
    """Raises ContextOverflow when a context cannot hold so many tokens."""
    if num_tokens <= context:
        return
    advice = (
        "Shorten the document or use a model with a longer context."
        if context >= model_context
        else f"Raise --context (the model allows {model_context:,})."
    )
    raise ContextOverflow(
        f"prompt and answer need at least {num_tokens:,} tokens, and the context holds "
        f"{context:,}. {advice}",
        needed_tokens=num_tokens,
        available_tokens=context,
    )


def checked_ids(prompt, vocab_size: int) -> list[int]:
    """A prompt that is neither text nor messages. Raises InputError unless it is token ids."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, list | tuple):
        raise InputError(
            "a prompt is a str, a list of token ids or a list of messages, not "
            f"{type(prompt).__name__}"
        )
    for token in prompt:
        if type(token) is not int and not is_whole(token):
            raise InputError(f"token ids are whole numbers, not {repr(token)[:80]}")
        if not 0 <= int(token) < vocab_size:
            raise InputError(f"token id {token} is outside this model's 0 to {vocab_size - 1}")
    return [*map(int, prompt)]


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, numpy's among them."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def num_common(first: Iterable[int], second: Iterable[int]) -> int:
    """How many token ids two texts begin with alike."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def is_messages(prompt) -> TypeGuard[Messages]:
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


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
