"""Answers and sessions: what is kept, what is processed again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_checkpoints import make
from sessions_under_test import EOS, IDS, LONG, assert_nothing_is_held
from small_llm import CELL_TOKENS, open_small

from ebbtide import LLM, Budget
from ebbtide.offload.errors import (
    DoesNotFit,
    InputError,
)

_OUTPUT = {
    "usage": {
        "prompt_tokens": int,
        "completion_tokens": int,
        "total_tokens": int,
        "prompt_tokens_details": {"cached_tokens": int},
        "completion_tokens_details": {
            "reasoning_tokens": int,
            "accepted_prediction_tokens": int,
            "rejected_prediction_tokens": int,
        },
        "recomputed_tokens": int,
    },
    "timings": {
        "load_s": float,
        "prefill_s": float,
        "ttft_s": float,
        "decode_s": float,
        "prefill_tokens_per_s": float,
        "decode_tokens_per_s": float,
    },
    "memory": {
        "device": None,
        "host": {"budget_bytes": int, "peak_bytes": int},
        "disk": {"budget_bytes": int, "peak_bytes": int},
        "peak_rss_bytes": int,
    },
    "kv": {
        "bits_per_element": float,
        "pages": int,
        "resident_bytes_per_token": float,
        "bytes_read": {"device": int, "host": int, "disk": int},
        "bytes_written": {"device": int, "host": int, "disk": int},
        "bytes_kept": int,
        "hit_rate": float,
        "stall_s": float,
        "missed_mass": {"mean": float, "max": float},
    },
}


def shape_of(value):
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    return None if value is None else type(value)


def test_an_output_has_the_fields_that_are_promised(llm):
    output = llm.generate(LONG, max_new_tokens=5)
    for name, expected in _OUTPUT.items():
        assert shape_of(getattr(output, name)) == expected, name
    assert output.usage == {
        "prompt_tokens": 400,
        "completion_tokens": 5,
        "total_tokens": 405,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "recomputed_tokens": 0,
    }
    assert output.kv["pages"] > 0 and output.kv["bytes_written"]["host"] > 0
    assert len(output.token_ids) == 5 and output.finish_reason == "length"
    assert all(type(token) is int for token in output.token_ids)
    json.dumps(output.plan)


def test_an_answer_ends_at_every_eos(llm, folder, tmp_path):
    greedy = llm.generate(LONG, max_new_tokens=8)
    wanted = greedy.token_ids[3]
    first = greedy.token_ids.index(wanted)
    output = llm.generate(LONG, max_new_tokens=8, eos_token_id=wanted)
    assert output.finish_reason == "stop"
    assert output.token_ids == greedy.token_ids[: first + 1]
    assert output.text == llm.tokenizer.decode(greedy.token_ids[:first])


def test_the_tokenizers_eos_ends_an_answer_too(tmp_path):
    folder = make("llama2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    with open_small(folder, tmp_path) as llm:
        assert llm.generation.eos_token_ids == (9, EOS)


def test_what_a_models_files_wish_wrongly_is_told_once(tmp_path):
    folder = make("llama2", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"typical_p": 3}))
    with open_small(folder, tmp_path) as llm:
        [warning] = llm.generate(LONG, max_new_tokens=2).warnings
    assert "generation_config.json: typical_p must be a number from 0 to 1, not 3" in warning


def test_stop_strings_end_the_text_before_them(llm):
    text = llm.generate(LONG, max_new_tokens=40).text
    at = next(i for i in range(3, len(text) - 2) if text.find(text[i : i + 2]) == i)
    output = llm.generate(LONG, max_new_tokens=40, stop=text[at : at + 2])
    assert output.finish_reason == "stop" and output.text == text[:at]


def test_a_seed_makes_samples_the_same(llm):
    def sampled(seed):
        return llm.generate(LONG, max_new_tokens=12, temperature=1.0, seed=seed).token_ids

    assert sampled(1) == sampled(1) != sampled(2)


def test_warnings_that_come_late_are_told(llm):
    before = llm.generate(LONG, max_new_tokens=1).warnings
    output = llm.chat([{"role": "user", "content": "hi"}], max_new_tokens=1, think=True)
    assert [w for w in output.warnings if w not in before and "thinking" in w]


DOCUMENT = bytes(range(97, 123)).decode() * 16  # about 420 tokens


def test_a_chat_of_several_turns_processes_nothing_twice(llm):
    messages = [{"role": "user", "content": DOCUMENT}]
    with llm.session() as session:
        cached = -1
        for turn in range(3):
            held = len(session.tokens)
            output = session.generate(messages, max_new_tokens=10, temperature=1.0, seed=turn)
            usage = output.usage
            assert usage["recomputed_tokens"] == 0
            now = usage["prompt_tokens_details"]["cached_tokens"]
            assert now > cached and now >= held - 1
            cached = now
            assert session.tokens[usage["prompt_tokens"] :] == output.token_ids
            session._runtime.store.check_integrity()
            before = session.tokens
            # The text of sampled bytes may not encode to the same tokens; they stay as they are.
            messages.append({"role": "assistant", "content": output.text})
            messages.append({"role": "user", "content": f"question {turn}"})
            if "\ufffd" in output.text or output.finish_reason == "stop":
                return
            assert session.tokens[: len(before)] == before


def chat(session, messages, **more):
    return session.generate(messages, max_new_tokens=100, **more)


def test_an_answer_made_again_reads_no_document_again(llm):
    messages = [{"role": "user", "content": DOCUMENT}]
    with llm.session() as session:
        first = chat(session, messages)
        again = chat(session, messages)
        assert again.token_ids == first.token_ids
        assert again.usage["recomputed_tokens"] <= 1
        assert again.usage["prompt_tokens_details"]["cached_tokens"] >= len(DOCUMENT) - 1
        session.undo()
        assert session.tokens == []


def test_undo_of_an_answer_without_a_question_keeps_the_document(llm):
    with llm.session() as session:
        session.append(LONG)
        answer = session.generate(max_new_tokens=3).token_ids
        session.undo()
        assert session.tokens == LONG
        assert session.generate(max_new_tokens=3).token_ids == answer


def test_undo_passes_over_answers_that_came_to_nothing(llm):
    def fails(ids, logits):
        raise RuntimeError("mine")

    with llm.session() as session:
        session.append(LONG)
        session.generate(IDS[400:420], max_new_tokens=3)
        with pytest.raises(RuntimeError, match="mine"):
            session.generate(logits_processors=[fails])
        session.stream().close()
        session.undo()
        assert session.tokens == LONG
        with pytest.raises(InputError, match="nothing to undo"):
            session.undo()


@pytest.mark.parametrize("answer", [1, 5, 3 * CELL_TOKENS])
def test_undo_leaves_the_document_processed(llm, answer):
    with llm.session() as session:
        session.append(LONG)
        one = session.generate(IDS[400:420], max_new_tokens=answer)
        session.undo()
        assert session.tokens == LONG
        two = session.generate(IDS[400:420], max_new_tokens=answer)
        assert two.token_ids == one.token_ids
        # Within the raw cells nothing is done twice. Further back there is no snapshot that is old
        # enough: the nearest was taken after the question.
        if answer < CELL_TOKENS:
            assert two.usage["recomputed_tokens"] <= 1
        session.undo()
        with pytest.raises(InputError, match="nothing to undo"):
            session.undo()


def test_going_back_far_is_counted_exactly(llm):
    with llm.session() as session:
        session.append(IDS)
        session.last_logits()
        session.truncate(500)
        session.truncate(100)
        output = session.generate(IDS[100:120], max_new_tokens=1)
        cached = output.usage["prompt_tokens_details"]["cached_tokens"]
        assert output.usage["recomputed_tokens"] == 100 - cached == 100
        session.truncate(110)
        output = session.generate(max_new_tokens=1)
        assert output.usage["recomputed_tokens"] == 1
        assert output.usage["prompt_tokens_details"]["cached_tokens"] == 109


def test_truncate_takes_whole_numbers_within(llm):
    with llm.session() as session:
        session.append(IDS[:10])
        for wrong in (-1, 11, 1.0, True, None):
            with pytest.raises(InputError, match="cannot truncate 10 tokens"):
                session.truncate(wrong)
        session.truncate(np.int64(4))
        assert session.tokens == IDS[:4]


def test_forks_go_their_own_ways(llm):
    with llm.session() as session:
        session.append(LONG)
        with session.fork() as other:
            answer = other.generate(IDS[400:410], max_new_tokens=6).token_ids
            with pytest.raises(DoesNotFit, match="close one first"):
                session.fork()
        assert session.tokens == LONG
        assert session.generate(IDS[400:410], max_new_tokens=6).token_ids == answer
        store = session._runtime.store
        store.check_integrity(deep=True)
    assert sum(u.used_bytes for u in store.usage().values()) == 0
    assert_nothing_is_held(llm)


def test_a_budget_object_and_text_are_all_it_takes(folder, tmp_path):
    budget = Budget(host_memory="4GiB", disk_memory=0)
    with LLM.open(folder, budget=budget, spill_dir=tmp_path, threads=1) as llm:
        assert llm.generate("hello", max_new_tokens=2).usage["prompt_tokens"] == 5
        assert llm.count_tokens("hello") == 5


def test_messages_are_prepared_before_the_question_is_known(llm):
    document = {"role": "user", "content": DOCUMENT}
    asked = {"role": "user", "content": f"{DOCUMENT}\n\nwhat?"}
    expected = llm.generate([asked], max_new_tokens=6)
    with llm.session() as session:
        session.prepare([document])
        processed = session.num_processed
        assert processed >= len(DOCUMENT) // CELL_TOKENS * CELL_TOKENS - CELL_TOKENS
        output = session.generate([asked], max_new_tokens=6)
        assert output.token_ids == expected.token_ids
        assert output.usage["prompt_tokens_details"]["cached_tokens"] >= processed - CELL_TOKENS
        assert output.usage["recomputed_tokens"] <= CELL_TOKENS


def test_tiers_say_where_the_pages_are(llm):
    with llm.session() as session:
        assert all(tier["pages"] == tier["used_bytes"] == 0 for tier in session.tiers().values())
        output = session.generate(LONG, max_new_tokens=2)
        tiers = session.tiers()
        assert sum(tier["pages"] for tier in tiers.values()) == output.kv["pages"] > 0
        assert 0 < tiers["host"]["used_bytes"] <= tiers["host"]["peak_bytes"]
        assert tiers["host"]["peak_bytes"] <= tiers["host"]["capacity_bytes"]
