"""The sampler against transformers' logits processors, and its own promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.offload.errors import ModelError
from ebbtide.offload.running.sampler import Sampler
from ebbtide.offload.sessions.generation import GenerationConfig

VOCAB, PROMPT = 211, 4


def make_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale  # (vocab,)


def oracle(config: GenerationConfig, logits, history):
    """Probabilities after transformers' own processors, in its own order."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores, ids = logits[None].clone(), torch.tensor([history], dtype=torch.int64)
    chain = []
    if config.logit_bias:
        bias = {(token,): value for token, value in config.logit_bias.items()}
        chain.append(processors.SequenceBiasLogitsProcessor(bias))
    if config.repetition_penalty != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        chain.append(processors.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        words = [*map(list, config.bad_words_ids)]
        chain.append(processors.NoBadWordsLogitsProcessor(words))
    if config.min_new_tokens:
        least, ends = config.min_new_tokens, list(config.eos_token_ids)
        chain.append(processors.MinNewTokensLengthLogitsProcessor(PROMPT, least, ends))
    if config.suppress_tokens:
        chain.append(processors.SuppressTokensLogitsProcessor(list(config.suppress_tokens)))
    chain.append(processors.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        chain.append(processors.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        chain.append(processors.TopPLogitsWarper(config.top_p))
    if config.min_p:
        chain.append(processors.MinPLogitsWarper(config.min_p))
    if config.typical_p < 1:
        chain.append(processors.TypicalLogitsWarper(config.typical_p))
    for processor in chain:
        scores = processor(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.9},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.8, "top_k": 40},
        {"temperature": 0.8, "top_k": VOCAB + 5},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.3, "top_p": 0.05},
        {"temperature": 1.3, "top_p": 0.0},
        {"temperature": 0.6, "min_p": 0.1},
        {"temperature": 0.6, "min_p": 1.0},
        *({"temperature": 1.3, "typical_p": mass} for mass in (0.02, 0.2, 0.5, 0.95)),
        {"temperature": 0.7, "typical_p": 0.3, "top_k": 30},
        {"temperature": 1.5, "typical_p": 0.6, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 0.7},
        {"logit_bias": {3: 5.5, 200: -100, 77: 0.25}, "repetition_penalty": 1.4},
        *({"no_repeat_ngram_size": size} for size in (1, 2, 3, 4, 9)),
        {"bad_words_ids": [[9], [200, 3, 8], [3, 200, 3, 8], [5, 7], [1, 2]]},
        {"suppress_tokens": [0, 210]},
        *({"min_new_tokens": least, "eos_token_ids": [4, 6]} for least in (3, 4, 5)),
        {
            **{"temperature": 0.9, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
            **{"repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "suppress_tokens": [2]},
            **{"logit_bias": {7: 3.0}, "bad_words_ids": [[7]]},
        },
    ],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()),
)
def test_equals_transformers(settings, seed):
    config = GenerationConfig().resolve(**{"temperature": 1.0, **settings})
    logits, history = make_logits(seed), [3, 5, 3, 200, seed, 200, 3]
    ours = Sampler(config, answer_start=PROMPT).probabilities(logits, history)
    expected = oracle(config, logits, history)
    assert torch.equal(ours > 0, expected > 0)
    # The same float32 operations in the same order.
    assert torch.equal(ours, expected)


def test_top_p_keeps_the_lowest_ids_of_equals():
    logits = torch.zeros(10)
    kept = Sampler(GenerationConfig(do_sample=True, top_p=0.35)).probabilities(logits, [])
    assert kept.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_top_k_keeps_all_equals_as_transformers_does():
    config = GenerationConfig(do_sample=True, top_k=2)
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0])
    ours = Sampler(config).probabilities(logits, [])
    assert torch.equal(ours, oracle(config, logits, []))
    assert ours.count_nonzero() == 3


@pytest.mark.parametrize("tied", [[0, 1], [5, 77, 210], list(range(VOCAB))])
def test_greedy_takes_the_lowest_id_of_equals(tied):
    logits = make_logits(0)
    logits[tied] = 99.0
    assert Sampler(GenerationConfig()).choose(logits, []) == min(tied)


def test_greedy_obeys_the_repetition_penalty():
    logits = torch.tensor([2.0, 1.9, -5.0])
    assert Sampler(GenerationConfig()).choose(logits, [0]) == 0
    assert Sampler(GenerationConfig(repetition_penalty=1.2)).choose(logits, [0]) == 1


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0), (0, 0.75), (-2, 0.1), (0.3, -2)])
@pytest.mark.parametrize("repetition", [1.0, 1.3])
def test_presence_and_frequency_are_of_the_answer_alone(presence, frequency, repetition):
    logits, prompt, answer = make_logits(4), [5, 7, 7, 7], [9, 5, 9, 210, 9]
    config = GenerationConfig(
        do_sample=True,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    repeated = GenerationConfig(do_sample=True, repetition_penalty=repetition)
    expected = oracle(repeated, logits, [*prompt, *answer]).double().log()
    for token, count in ((9, 3), (5, 1), (210, 1)):
        expected[token] -= presence + count * frequency
    sampler = Sampler(config, answer_start=len(prompt))
    found = sampler.probabilities(logits, [*prompt, *answer])
    # Of float32, through a logarithm and back.
    torch.testing.assert_close(found.double(), expected.softmax(-1), rtol=1e-5, atol=1e-9)
    assert torch.equal(
        sampler.probabilities(logits, prompt), Sampler(repeated).probabilities(logits, prompt)
    )


def test_greedy_obeys_presence_and_frequency():
    logits = torch.tensor([2.0, 1.7, 1.5])
    for penalties, answer, expected in (
        ({"presence_penalty": 0.2}, [0, 0, 0], 0),
        ({"presence_penalty": 0.4}, [0], 1),
        ({"frequency_penalty": 0.2}, [0, 0], 1),
        ({"frequency_penalty": 0.2}, [0, 0, 0, 1, 1], 2),
        ({"presence_penalty": -1}, [2], 2),
    ):
        sampler = Sampler(GenerationConfig(**penalties), answer_start=1)
        assert sampler.choose(logits, [1, *answer]) == expected


def run(seed, num_tokens=40, **settings):
    sampler = Sampler(GenerationConfig().resolve(temperature=1.0, seed=seed, **settings))
    history = [1]
    for step in range(num_tokens):
        history.append(sampler.choose(make_logits(step), history))
    return sampler, history


def test_a_seed_repeats_an_answer():
    assert run(7)[1] == run(7)[1]
    assert run(7)[1] != run(8)[1]
    assert run(2**64 - 1)[0].seed == 2**64 - 1


def test_an_open_seed_is_told_and_repeats():
    sampler, history = run(None)
    assert run(sampler.seed)[1] == history
    assert run(None)[0].seed != sampler.seed


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    sampler = Sampler(GenerationConfig(do_sample=True, seed=0))
    draws = [sampler.choose(probabilities.log(), []) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=5) / 4000
    # Four standard deviations of a share of one half over 4000 draws.
    assert (shares - probabilities).abs().max() < 0.032
    assert shares[1] == 0


def test_history_may_be_a_tensor_and_choose_changes_nothing():
    logits = make_logits(1)
    before = logits.clone()
    config = GenerationConfig().resolve(temperature=0.9, repetition_penalty=1.5, seed=1)
    chosen = Sampler(config).choose(logits, [1, 2, 3])
    assert Sampler(config).choose(logits, torch.tensor([1, 2, 3])) == chosen
    assert torch.equal(logits, before)


def test_half_precision_logits_are_taken():
    assert Sampler(GenerationConfig()).choose(make_logits(3).bfloat16(), []) == int(
        make_logits(3).bfloat16().argmax()
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(do_sample=True)])
def test_logits_that_are_no_numbers_are_an_error(bad, config):
    logits = make_logits(0)
    logits[17] = bad
    with pytest.raises(ModelError, match="not numbers"):
        Sampler(config).choose(logits, [])
    with pytest.raises(ModelError):
        Sampler(config).choose(torch.full((4,), -torch.inf), [])


@settings(max_examples=150)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    st.floats(0, 1e300),
    st.integers(0, 40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0.01, 100),
)
def test_any_setting_yields_a_token_that_was_possible(
    values, temperature, top_k, top_p, min_p, penalty
):
    config = GenerationConfig().resolve(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        seed=0,
    )
    logits = torch.tensor(values)
    sampler = Sampler(config)
    chosen = sampler.choose(logits, [0])
    assert 0 <= chosen < len(values)
    if not config.greedy:
        assert sampler.probabilities(logits, [0])[chosen] > 0
