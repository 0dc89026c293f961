"""What is asked: text, token ids or messages, whether a context has room for it, and how much of it
is known already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol, TypeGuard

from ..errors import ContextOverflow, InputError

Messages = Sequence[Mapping[str, Any]]


class Array(Protocol):
    """A tensor or an array of token ids, of one dimension."""

    def tolist(self) -> Any: ...


TokenIds = Sequence[int] | Array
Prompt = str | TokenIds | Messages


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
