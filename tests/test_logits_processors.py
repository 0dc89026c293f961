"""What settings and a caller's functions make of logits: one by one, and in whole answers, with
guesses and without.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sessions_under_test import IDS, LONG
from small_llm import open_spilling

from ebbtide import LLM
from ebbtide.kernels import dispatch
from ebbtide.offload.errors import InputError
from ebbtide.offload.running import drafts
from ebbtide.offload.running.logits_processors import run_all, run_ends, word_ends
from ebbtide.offload.running.sampler import Sampler
from ebbtide.offload.sessions.generation import GenerationConfig

PROMPT = "The mill stands by the river, and the miller stands by the mill."
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def llm():
    with LLM.open(None, context=400) as llm:
        yield llm


# --- one by one


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 6))
def test_the_ends_of_runs_are_those_that_would_repeat_one(ids, size):
    runs = {tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)}
    expected = [end for end in range(4) if size and (*ids, end)[-size:] in runs]
    assert sorted({*map(int, run_ends(ids, size))}) == (expected if len(ids) >= size else [])


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=4),
)
def test_the_ends_of_words_are_those_that_would_complete_one(ids, words):
    expected = [w[-1] for w in words if len(w) <= len(ids) + 1 and [*ids, w[-1]][-len(w) :] == w]
    assert word_ends(ids, words) == expected


def test_nothing_left_is_an_error():
    logits = torch.zeros(4)
    for greedy in (True, False):
        config = GenerationConfig(do_sample=not greedy, suppress_tokens=(0, 1, 2, 3))
        with pytest.raises(InputError, match=r"no token is left to choose.*suppress_tokens"):
            Sampler(config).choose(logits, [0])


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        (lambda ids, logits: None, r"must give logits \(1, 4\), and gave NoneType"),
        (lambda ids, logits: logits[0], r"must give logits \(1, 4\), and gave \(4,\)"),
        (lambda ids, logits: logits > 0, r"must give logits of floats, and gave torch\.bool"),
        (lambda ids, logits: logits * math.nan, "infinite or no numbers"),
        (lambda ids, logits: logits + math.inf, "infinite or no numbers"),
    ],
)
def test_what_a_processor_may_give(processor, says):
    with pytest.raises(InputError, match=f"logits_processors: <lambda> .*{says}"):
        run_all([processor], torch.zeros(4), [0])


def test_processors_get_copies_and_follow_one_another():
    seen = []

    def first(ids, logits):
        seen.append((ids.tolist(), ids.dtype, logits.dtype))
        return logits.fill_(5.0)

    logits = torch.zeros(4)
    assert run_all([first, lambda ids, logits: logits * 2], logits, [7, 8]).tolist() == [10.0] * 4
    assert logits.tolist() == [0.0] * 4
    assert seen == [([[7, 8]], torch.int64, torch.float32)]


# --- whole answers


def test_bias_decides_what_comes(llm):
    free = llm.generate(PROMPT, max_new_tokens=8, **GREEDY).token_ids
    other = llm.generate(PROMPT, max_new_tokens=8, logit_bias={free[0]: -100}, **GREEDY).token_ids
    assert other[0] != free[0]
    always = llm.generate(PROMPT, max_new_tokens=8, logit_bias={free[0]: 100}, **GREEDY).token_ids
    assert always == [free[0]] * 8


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("way", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_no_run_comes_twice(llm, size, way):
    prompt = llm.encode(PROMPT)
    answer = llm.generate(prompt, max_new_tokens=60, no_repeat_ngram_size=size, **way).token_ids
    text = prompt + answer
    for at in range(len(prompt), len(text)):
        run = text[at + 1 - size : at + 1]
        assert run not in [text[i : i + size] for i in range(at + 1 - size)]


def test_an_answer_has_the_tokens_it_must_and_none_that_it_must_not(llm):
    ends = llm.generation.eos_token_ids
    bias = dict.fromkeys(ends, 100)
    assert llm.generate(PROMPT, logit_bias=bias, **GREEDY).finish_reason == "stop"
    output = llm.generate(PROMPT, logit_bias=bias, min_new_tokens=7, max_new_tokens=20, **GREEDY)
    assert len(output.token_ids) == 8 and output.finish_reason == "stop"
    assert not set(ends) & set(output.token_ids[:7])
    free = llm.generate(PROMPT, max_new_tokens=30, **GREEDY).token_ids
    words = [free[:3], free[9:11]]
    found = llm.generate(PROMPT, max_new_tokens=30, bad_words_ids=words, **GREEDY).token_ids
    assert found[:2] == free[:2] and found[2] != free[2]
    for word in words:
        assert word not in [found[i : i + len(word)] for i in range(len(found))]
    found = llm.generate(PROMPT, max_new_tokens=30, suppress_tokens=[free[1]], **GREEDY).token_ids
    assert found[0] == free[0] and free[1] not in found


def test_tokens_that_the_model_has_not_are_refused_before_anything_is_read(llm):
    size = llm.config.vocab_size
    for settings in (
        {"logit_bias": {size: 1}},
        {"suppress_tokens": [size]},
        {"bad_words_ids": [[1, size]]},
    ):
        with pytest.raises(InputError, match=f"there is no token {size}; the model has {size:,}"):
            llm.generate(PROMPT, **settings)


def test_transformers_processors_serve_as_they_are(llm):
    processors = pytest.importorskip("transformers.generation.logits_process")
    chain = processors.LogitsProcessorList(
        [
            processors.NoRepeatNGramLogitsProcessor(2),
            processors.SuppressTokensLogitsProcessor([5, 6]),
        ]
    )
    for way in (GREEDY, SAMPLED):
        ours = llm.generate(
            PROMPT, max_new_tokens=40, no_repeat_ngram_size=2, suppress_tokens=[5, 6], **way
        )
        theirs = llm.generate(PROMPT, max_new_tokens=40, logits_processor=chain, **way)
        assert theirs.token_ids == ours.token_ids


def test_what_a_processor_raises_ends_the_answer(llm):
    def third(ids, logits):
        if len(ids[0]) == len(prompt) + 2:
            raise ZeroDivisionError("mine")
        return logits

    prompt = llm.encode(PROMPT)
    stream = llm.stream(prompt, logits_processors=third, max_new_tokens=9)
    with pytest.raises(ZeroDivisionError, match="mine"):
        list(stream)
    assert stream.output.finish_reason == "cancelled" and len(stream.output.token_ids) == 2
    assert llm.generate(prompt, max_new_tokens=3).finish_reason == "length"


def test_a_schema_is_kept_to_or_the_answer_ends(llm):
    pytest.importorskip("llguidance")
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 5, "maxItems": 5}
    (one,) = llm.encode("1", begins=False)
    banned = llm.generate(PROMPT, json_schema=schema, suppress_tokens=[one], **GREEDY)
    assert banned.text == "[2, 2, 2, 2, 2]"
    stream = llm.stream(PROMPT, json_schema=schema, no_repeat_ngram_size=1, **GREEDY)
    with pytest.raises(InputError, match="no token that the JSON schema allows is left"):
        list(stream)
    assert stream.output.finish_reason == "cancelled"


def test_log_probabilities_stay_the_models_own(llm):
    free = llm.generate(PROMPT, max_new_tokens=1, logprobs=3, **GREEDY).logprobs[0]
    banned = {"suppress_tokens": [free.token_id]}
    other = llm.generate(PROMPT, max_new_tokens=1, logprobs=3, **banned, **GREEDY).logprobs[0]
    assert other.token_id != free.token_id and other.top == free.top


# --- with guesses


class Rotating:
    """One that counts its calls, and lowers another token each time: whoever asks it for a guess
    too, or out of turn, gets another answer."""

    def __init__(self):
        self.lengths = []

    def __call__(self, ids, logits):
        self.lengths.append(ids.shape[1])
        logits[0, :: 2 + len(self.lengths) % 3] -= 1.0
        return logits


def test_a_processor_that_runs_out_is_no_end_of_the_answer(llm):
    biases = iter([1.0, 2.0])
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        llm.generate(
            PROMPT, max_new_tokens=5, logits_processors=lambda ids, logits: logits + next(biases)
        )
    assert not llm.sessions


@pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")
@pytest.mark.usefixtures("few_pages")
@pytest.mark.parametrize("way", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_guesses_change_no_token(checkpoint, tmp_path, monkeypatch, way, share):
    monkeypatch.setattr(drafts._Way, "is_quicker_than", lambda self, *others: True)
    settings = (
        {"no_repeat_ngram_size": 4, "logit_bias": {7: 2.0, 11: -3.0}, "min_new_tokens": 20},
        {"suppress_tokens": [3, 4], "bad_words_ids": [[5], [6, 8]]},
        {},
    )

    def answers(llm):
        found, guesses, rotating = [], 0, Rotating()
        with llm.session() as session:
            for prompt, more in zip((LONG, IDS[400:430], IDS[430:440]), settings, strict=True):
                more = more or {"logits_processors": rotating}
                output = session.generate(list(prompt), max_new_tokens=50, **more, **way)
                found.append(output.token_ids)
                guesses += sum(output.usage["completion_tokens_details"].values())
            last = len(session.tokens)
        # Asked once for each token, in their order.
        assert rotating.lengths == [*range(last - len(found[-1]), last)]
        return found, guesses

    folder = checkpoint("llama2")
    with open_spilling(folder, tmp_path, context=600, draft=False) as llm:
        expected, none = answers(llm)
        assert none == 0
    with open_spilling(folder, tmp_path, context=600, share=share) as llm:
        found, guesses = answers(llm)
    assert found == expected
    # What is drawn repeats too little for a look at what followed before.
    assert guesses > 0 or (share == 1.0 and way is SAMPLED)
