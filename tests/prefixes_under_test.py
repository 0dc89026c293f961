"""What the tests of kept pages share: a small model that keeps what it reads, and texts for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from sessions_under_test import IDS
from small_llm import keep_in_memory, open_small

from ebbtide.offload.disk.spill_dir import prefix_dir
from ebbtide.offload.prefixes import keeper as prefix_keeper
from ebbtide.offload.prefixes.store import PrefixStore

CELL = 64
TEXT = IDS * 2  # 1,200 tokens: 18 cells of 64
MORE = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(autouse=True)
def short_texts_count(monkeypatch):
    """What is worth keeping is a matter of thousands of tokens; tests read hundreds."""
    monkeypatch.setattr(prefix_keeper, "_LEAST_TOKENS", 4 * CELL)
    monkeypatch.setattr(prefix_keeper, "_END_TOKENS", 8 * CELL)
    monkeypatch.setattr(prefix_keeper, "_NEAR_TOKENS", 2 * CELL)
    monkeypatch.setattr("ebbtide.offload.prefixes.store._KEPT_FREE_BYTES", 0)


def opened(
    folder, place, cap: int | None = 1 << 30, share: float = 1.0, sequences: int = 1, **options
):
    """A small LLM that keeps what it reads. share: of the far planes in memory, for a request of so
    many sequences."""
    llm = open_small(folder, place, **options)
    llm._context = 2048
    keep_in_memory(llm, 2048, share, sequences=sequences, text=True)
    if cap is not None:
        llm._prefixes = PrefixStore(prefix_dir(place), cap)
    return llm


def answer(llm, ids, **generation):
    return llm.generate(ids, **{"max_new_tokens": 12, **generation})


def cached(output) -> int:
    return output.usage["prompt_tokens_details"]["cached_tokens"]


def last_logits(llm, ids) -> torch.Tensor:
    """Of the last token, through a session's own path; and how many tokens were restored."""
    with llm.open_session(2048, sequences=1) as session:
        session.append(ids, process=False)
        session.find_kept()
        restored = session.take_restored()
        return session.last_logits().clone(), restored


def kept(place) -> list[str]:
    return sorted(os.listdir(prefix_dir(place)))


def replayed(llm, computed: list[int]) -> torch.Tensor:
    """The last token's logits, where each token was prefilled or (its complement) decoded."""
    with llm.open_session(2048, sequences=1) as session:
        sequence, engine, at, residual = session._sequence, session._engine, 0, None
        while at < len(computed):
            if computed[at] < 0:
                sequence.tokens.append(~computed[at])
                residual, at = engine.decode(sequence), at + 1
            else:
                stop = next((i for i in range(at, len(computed)) if computed[i] < 0), len(computed))
                sequence.tokens.extend(computed[at:stop])
                residual, at = engine.prefill(sequence), stop
        assert sequence.processed.tolist() == computed
        return engine.logits(residual)[0].clone()


def assert_goes_on(session, alone) -> None:
    """What the session says comes of the tokens it has, computed as it says they were. alone: an
    LLM that keeps nothing."""
    sequence = session._sequence
    if not len(sequence.tokens):
        return
    if session._logits is None:
        session.make_pending()
        session.find_kept()
    logits = session.last_logits()
    computed = sequence.processed.tolist()
    assert [max(token, ~token) for token in computed] == session.tokens
    assert torch.equal(logits, replayed(alone, computed))
    session._runtime.store.check_integrity(deep=True)


def read_alone(folder, place) -> torch.Tensor:
    """The last logits (vocab,) of TEXT, where nothing is kept."""
    with opened(folder, place, cap=None) as llm:
        return last_logits(llm, TEXT)[0]


def read_once(folder, place) -> list[Path]:
    """The files of TEXT, after it was read."""
    with opened(folder, place) as llm:
        last_logits(llm, TEXT)
    return [prefix_dir(place) / name for name in kept(place)]
