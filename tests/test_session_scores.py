"""Logits and scores of token ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sessions_under_test import IDS

from ebbtide.offload.errors import (
    ContextOverflow,
    InputError,
)
from ebbtide.offload.running import scoring


@pytest.mark.parametrize("prefill_tokens", [None, 290])
def test_scores_are_the_logits_log_softmax(llm, monkeypatch, prefill_tokens):
    ids = IDS[:300]
    logits = llm.logits(ids, prefill_tokens=prefill_tokens)
    assert logits.shape == (300, 264) and logits.dtype == torch.float32
    expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    # Blocks of one tile of rows: several in every cell.
    monkeypatch.setattr(scoring, "_BLOCK_BYTES", 1)
    assert torch.equal(llm.score(ids, prefill_tokens=prefill_tokens), expected)
    for last in (1, 64, 65, 10**6) if prefill_tokens is None else (11, 100):
        tail = llm.score(ids, prefill_tokens=prefill_tokens, last=last)
        assert torch.equal(tail, expected[-last:]), last
        assert torch.equal(
            llm.logits(ids, prefill_tokens=prefill_tokens, last=last), logits[-last:]
        )


def test_logits_take_what_a_prompt_takes(llm):
    expected = llm.logits([1, 2, 3])
    assert torch.equal(llm.logits((1, 2, 3)), expected)
    answer = llm.generate([1, 2, 3], max_new_tokens=4)
    for like in (torch.tensor([1, 2, 3]), np.array([1, 2, 3]), [*np.array([1, 2, 3])]):
        assert torch.equal(llm.logits(like), expected)
        assert llm.generate(like, max_new_tokens=4).token_ids == answer.token_ids


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (torch.tensor([[1, 2]]), r"whole numbers, not \[1, 2\]"),
        (torch.tensor([0.5]), "whole numbers, not 0.5"),
        (torch.tensor(5), "not int"),
        (np.array(["a"]), "whole numbers, not 'a'"),
        ([True], "whole numbers, not True"),
        (b"text", "not bytes"),
        (range(3), "not range"),
        ([np.int64(-1)], "token id -1 is outside"),
    ],
)
def test_what_is_no_prompt_is_named(llm, prompt, says):
    with pytest.raises(InputError, match=says):
        llm.generate(prompt)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda llm: llm.logits([]), "token_ids is empty"),
        (lambda llm: llm.logits("text"), "list of ints, not str"),
        (lambda llm: llm.logits(5), "list of ints, not int"),
        (lambda llm: llm.logits([1.5]), "whole numbers"),
        (lambda llm: llm.logits([999]), "outside"),
        (lambda llm: llm.logits([1, 2], last=0), "last is 0; allowed are 1 to 2"),
        (lambda llm: llm.logits([1, 2], last=1.0), "last is 1.0"),
        (lambda llm: llm.logits([1, 2], prefill_tokens=0), "prefill_tokens is 0"),
        (lambda llm: llm.logits([1, 2], prefill_tokens=3), "prefill_tokens is 3"),
        (lambda llm: llm.logits([1, 2], prefill_tokens=True), "prefill_tokens is True"),
        (lambda llm: llm.score([1]), "at least two tokens"),
        (lambda llm: llm.score("text"), "list of ints"),
        (lambda llm: llm.score([1, 2], last=-1), "last is -1"),
    ],
)
def test_wrong_arguments_of_logits_and_score_are_named(llm, use, says):
    with pytest.raises(InputError, match=says):
        use(llm)


def test_logits_beyond_the_context_overflow(llm):
    llm._context = 100
    with pytest.raises(ContextOverflow):
        llm.logits(IDS[:101])
    llm._context = None
    with pytest.raises(ContextOverflow):
        llm.score([1] * 8193)
