"""Logits and log-probabilities of given tokens: nothing is sampled.

Knows an LLM and its sessions; the text is forgotten afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...kernels.matmul import ROW_TILE
from ..errors import InputError
from ..pages.geometry import MOST_CELL_TOKENS
from ..text.prompt import is_messages

_BLOCK_BYTES = 32 << 20  # of logits that are worked on at once


def logits(llm, token_ids, prefill_tokens: int | None, last: int | None) -> torch.Tensor:
    """See LLM.logits."""
    ids = _checked_ids(llm, token_ids)
    _check_count("last", last, len(ids))
    num_rows = len(ids) if last is None else min(len(ids), last)
    made, filled = [], 0

    def keep(index: int, block: torch.Tensor) -> None:
        nonlocal filled
        if not made:  # the plan that admits it was made by now
            with torch.inference_mode(False):  # callers may change it
                made.append(torch.empty(num_rows, llm.config.vocab_size))
        made[0][filled : filled + len(block)] = block
        filled += len(block)

    _each(llm, ids, prefill_tokens, num_rows, keep, output_rows=num_rows)
    return made[0]


def score(llm, token_ids, prefill_tokens: int | None, last: int | None) -> torch.Tensor:
    """See LLM.score."""
    ids = _checked_ids(llm, token_ids)
    if len(ids) < 2:
        raise InputError("score needs at least two tokens")
    _check_count("last", last, len(ids) - 1)
    num_rows = len(ids) if last is None else min(len(ids), last + 1)
    targets, scores = torch.tensor(ids), []

    def add(index: int, block: torch.Tensor) -> None:
        following = targets[index + 1 : index + 1 + len(block)]
        block = block[: len(following)].log_softmax(-1)
        scores.append(block.gather(1, following[: len(block), None])[:, 0])

    _each(llm, ids, prefill_tokens, num_rows, add, output_rows=0)
    return torch.cat(scores)


def _each(
    llm,
    ids: list[int],
    prefill_tokens: int | None,
    num_rows: int,
    use: Callable[[int, torch.Tensor], None],
    *,
    output_rows: int,
) -> None:
    """Calls use(index of the first row, logits block (n, vocab)) in order, for the last rows."""
    _check_count("prefill_tokens", prefill_tokens, len(ids))
    split = len(ids) if prefill_tokens is None else prefill_tokens
    first = len(ids) - num_rows
    per_block = _block_rows(llm.config.vocab_size)
    output = output_bytes(llm.config.vocab_size, output_rows)
    needs = {"text": False, "output_bytes": output, "drafts": False}
    with llm.open_session(llm.context_or(len(ids)), sequences=1, **needs) as session:
        session._admit(len(ids))
        sequence, engine = session._sequence, session._engine
        cells = sequence.cell_tokens

        def on_rows(cell: int, x: torch.Tensor, new: slice) -> None:
            for start in range(new.start // ROW_TILE * ROW_TILE, new.stop, per_block):
                stop = min(start + per_block, len(x))
                low, high = max(new.start, start), min(new.stop, stop)
                low = max(low, first - cell * cells)
                if low < high:
                    block = engine.logits(x[start:stop]).cpu()
                    use(cell * cells + low, block[low - start : high - start])

        sequence.tokens.extend(ids[:split])
        with llm.sessions.running():
            if first < split - 1:
                # The last row goes through the same product as in generate.
                sequence.tokens.pop()
                engine.prefill(sequence, on_rows=on_rows)
                sequence.tokens.append(ids[split - 1])
            row = engine.prefill(sequence)
            if first < split:
                use(split - 1, engine.logits(row).cpu())
            for index in range(split, len(ids)):
                sequence.tokens.append(ids[index])
                row = engine.decode(sequence)
                if index >= first:
                    use(index, engine.logits(row).cpu())
        llm.last_stats = session._runtime.store.stats.snapshot()


def _block_rows(vocab_size: int) -> int:
    """Rows of logits that are worked on at once: whole tiles."""
    return max(1, _BLOCK_BYTES // (4 * vocab_size * ROW_TILE)) * ROW_TILE


def output_bytes(vocab_size: int, num_rows: int) -> int:
    """What a plan must leave for `num_rows` rows of logits: themselves, a block and its copy."""
    return 4 * vocab_size * (num_rows + 2 * min(MOST_CELL_TOKENS, _block_rows(vocab_size)))


def _checked_ids(llm, token_ids) -> list[int]:
    are_some = isinstance(token_ids, list | tuple) or hasattr(token_ids, "tolist")
    if not are_some or is_messages(token_ids):
        raise InputError(f"token_ids is a list of ints, not {type(token_ids).__name__}")
    ids = llm.encode(token_ids)
    if not ids:
        raise InputError("token_ids is empty")
    return ids


def _check_count(name: str, value, most: int) -> None:
    """More rows than there are may be asked for with `last`: it is clear what is meant."""
    good = value is None or (type(value) is int and value >= 1)
    if not good or (name == "prefill_tokens" and value is not None and value > most):
        raise InputError(f"{name} is {value!r}; allowed are 1 to {most}")
