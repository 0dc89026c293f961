"""Texts far longer than a context are refused, and cut into parts, in little memory: a plan has
room for the tokens of its context alone."""

from __future__ import annotations

import tracemalloc

import pytest

from ebbtide import LLM, Budget
from ebbtide.offload import builtin
from ebbtide.offload.errors import ContextOverflow, DoesNotFit
from ebbtide.offload.text.long_texts import least_tokens, texts_of

STORY = open(builtin.demo_material()["story"], encoding="utf-8").read()
LONG = STORY * 20  # 940,000 characters, 259,000 tokens: their ids alone take 10 MB
MESSAGES = [{"role": "user", "content": LONG}]
# A text, its parts, and what encoding one of them takes; the library's own memory is not seen.
MOST_BYTES = 2 * len(LONG) + (2 << 20)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    budget = Budget(host_memory="2GiB", disk_memory=0)
    with LLM.open(budget=budget, spill_dir=tmp_path_factory.mktemp("spill")) as llm:
        llm.count_tokens(STORY)
        yield llm


def refusing_bytes(work):
    tracemalloc.start()
    try:
        with pytest.raises(ContextOverflow):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("prompt", [LONG, MESSAGES], ids=["text", "messages"])
def test_what_no_context_holds_is_refused_before_it_is_encoded(llm, prompt):
    assert refusing_bytes(lambda: llm.generate(prompt)) < MOST_BYTES


@pytest.mark.parametrize("way", ["append", "prepare", "stream"])
def test_sessions_refuse_it_too(llm, way):
    with llm.session(context=2048) as session:
        work = {
            "append": lambda: session.append(LONG),
            "prepare": lambda: session.prepare(MESSAGES),
            "stream": lambda: session.stream(MESSAGES),
        }[way]
        assert refusing_bytes(work) < MOST_BYTES
        assert session.tokens == []


def test_what_memory_has_no_room_for_is_refused_before_it_is_encoded(tmp_path):
    budget = Budget(host_memory="64MiB", disk_memory=0)  # less than the program takes
    with LLM.open(budget=budget, spill_dir=tmp_path) as llm:
        with pytest.raises(DoesNotFit) as caught:
            llm.refuse_too_long(STORY * 2 + STORY[:12_000])  # which the model's context holds
        assert caught.value.tier == "host"


@pytest.mark.parametrize("text", ["", "x", STORY, "字" * 50_000, " \n" * 40_000, "\u0301" * 40_000])
def test_the_least_is_nearly_all(llm, text):
    """Whatever a text is made of, and where its parts end in the middle of a token."""
    num_tokens, least = llm.count_tokens(text), llm.least_tokens(text)
    assert num_tokens - 6 * (1 + len(text) // (1 << 14)) <= least <= num_tokens


def test_what_templates_may_leave_out_is_not_counted():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>long</think>b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image"}]},
        {"role": "assistant", "tool_calls": []},
    ]
    assert texts_of(messages) == ["a", "b", "c"]
    assert texts_of("a") == ["a"] and texts_of([1, 2]) == []
    assert least_tokens("a" * 40_000, len) == 40_000 - 3 * 4
