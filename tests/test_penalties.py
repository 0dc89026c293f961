"""Presence and frequency penalties in whole answers: of each answer's own tokens."""

from __future__ import annotations

from collections import Counter

import pytest

from ebbtide import LLM

PROMPT = "The mill stands by the river, and the miller"
WAY = {"temperature": 0, "presence_penalty": 0.6, "frequency_penalty": 0.9, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def llm():
    with LLM.open(None, context=400) as llm:
        yield llm


def test_each_token_is_the_best_of_the_lowered_logits(llm):
    prompt = llm.encode(PROMPT)
    answer = llm.generate(prompt, **WAY).token_ids
    rows = llm.logits([*prompt, *answer[:-1]], prefill_tokens=len(prompt), last=len(answer))
    counts: Counter[int] = Counter()
    for row, token in zip(rows, answer, strict=True):
        for seen, count in counts.items():
            row[seen] -= 0.6 + 0.9 * count
        assert int(row.argmax()) == token
        counts[token] += 1
    assert answer != llm.generate(prompt, temperature=0, max_new_tokens=24).token_ids


def test_an_answer_that_goes_on_counts_what_it_adds(llm):
    """What stands before it is its prompt, be it an answer too."""
    with llm.session() as session:
        session.generate(PROMPT, temperature=0, max_new_tokens=12)
        so_far = session.tokens
        went_on = session.generate(None, **WAY).token_ids
    assert went_on == llm.generate(so_far, **WAY).token_ids
