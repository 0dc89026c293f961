"""What a request would take, told before it is made: its tokens, whether they fit, and how long
reading and writing them takes at the speeds of the answers so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .bad_request import BadRequest
from .request import Request, chat_request, completion_request
from .text_query import TextQuery


def estimate_query(body: dict[str, Any], tell: Callable[[Request], dict[str, Any]]) -> TextQuery:
    """A body as /v1/chat/completions or /v1/completions take it. tell: called in the thread that
    answers. Raises BadRequest for what those would refuse."""
    request = completion_request(body) if "prompt" in body else chat_request(body)
    if request.more_prompts:
        raise BadRequest(
            "'prompt' must be one prompt here; ask for each by itself.", param="prompt"
        )
    # Without its prompt, which is measured by `tell`: one that is too long is an answer here.
    return TextQuery("", lambda llm, _: tell(request), model=request.model)


def token_counts(
    llm: Any, session: Any, request: Request, defaults: Mapping[str, Any]
) -> tuple[int, int, int | None]:
    """(tokens of the prompt, those of them whose pages are there, the most that the answer was
    given). session: None where none is open; defaults: settings that a request may leave out.
    Raises InputError for tokens and tools that the model does not know."""
    config = llm.generation.resolve(**{**defaults, **request.generation})
    llm.rules.check(config, request.is_chat)
    held = [] if session is None else session.tokens
    if request.is_chat:
        ids, common = llm.tokenizer.continue_chat(held, request.prompt, **config.chat_options)
    else:
        ids = llm.encode(request.prompt)
        common = num_common(held, ids[:-1])  # the last one is what is continued
    processed = 0 if session is None else session.num_processed
    return len(ids), min(common, processed), config.max_new_tokens


def times(counts: Mapping[str, float], new_tokens: int) -> dict[str, float | None]:
    """Seconds until the answer begins, and for each token of it; None before the first answer.
    counts: of the worker; new_tokens: to be read."""
    read = counts["prompt_tokens"] - counts["cached_tokens"]
    written = counts["completion_tokens"] - counts["requests_answered"]  # behind the first ones
    read_s, written_s = counts["prefill_seconds"], counts["decode_seconds"]
    return {
        "prefill_s": new_tokens * read_s / read if read > 0 else None,
        "decode_s_per_token": written_s / written if written > 0 else None,
    }


def num_common(held: list[int], ids: list[int]) -> int:
    """How many tokens two texts begin with."""
    pairs = enumerate(zip(held, ids, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(held), len(ids)))
