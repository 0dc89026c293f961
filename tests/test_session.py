"""Answers, streams and sessions: what is kept, what is freed, what is processed again, what is said
when something is wrong.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import stat
import threading

import platformdirs
import pytest
import torch
from random_checkpoints import make
from small_llm import CELL_TOKENS, keep_in_memory, open_small

from ebbtide import LLM, Budget
from ebbtide.offload import runtime as runtime_module
from ebbtide.offload import scoring
from ebbtide.offload.disk import ScratchFile
from ebbtide.offload.errors import (
    ContextOverflow,
    DoesNotFit,
    EbbtideError,
    InputError,
    StorageError,
)
from ebbtide.offload.session_file import tokenizer_fingerprint

EOS = 257  # the tokenizer's, and what config.json says
IDS = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(2)).tolist()
LONG = IDS[:400]  # several sealed cells


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("llama2")


@pytest.fixture
def llm(folder, tmp_path):
    with open_small(folder, tmp_path) as opened:
        opened._context = 2048
        yield opened


def assert_nothing_is_held(llm):
    assert llm._sessions == []


# ---- answers -----------------------------------------------------------------------------------

_OUTPUT = {
    "usage": {
        "prompt_tokens": int,
        "completion_tokens": int,
        "total_tokens": int,
        "prompt_tokens_details": {"cached_tokens": int},
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
        "recomputed_tokens": 0,
    }
    assert output.kv["pages"] > 0 and output.kv["bytes_written"]["host"] > 0
    assert len(output.token_ids) == 5 and output.finish_reason == "length"
    assert all(type(token) is int for token in output.token_ids)
    json.dumps(output.plan)


def test_pieces_joined_are_the_text(llm):
    with llm.stream(LONG, max_new_tokens=30) as stream:
        pieces = list(stream)
    output = stream.output
    assert "".join(p.text for p in pieces) == output.text
    assert [t for p in pieces for t in p.token_ids] == output.token_ids
    assert [p.finish_reason for p in pieces] == [None] * 29 + ["length"]
    assert output.text == llm.tokenizer.decode(output.token_ids)
    assert_nothing_is_held(llm)
    assert llm.generate(LONG, max_new_tokens=30).token_ids == output.token_ids


def test_closing_a_stream_frees_its_pages(llm):
    stream = llm.stream(LONG, max_new_tokens=30)
    first = next(stream)
    store = stream._session._runtime.store
    store.check_integrity(deep=True)
    assert sum(u.used_bytes for u in store.usage().values()) > 0
    stream.close()
    stream.close()
    assert_nothing_is_held(llm)
    assert sum(u.used_bytes for u in store.usage().values()) == 0
    assert stream.output.finish_reason == "cancelled"
    assert stream.output.token_ids == first.token_ids
    assert list(stream) == []


def test_a_stream_that_is_closed_before_it_began(llm):
    stream = llm.stream(LONG)
    stream.close()
    assert_nothing_is_held(llm)
    assert (stream.output.text, stream.output.finish_reason) == ("", "cancelled")


def test_what_a_cancelled_session_showed_stays_in_it(llm):
    with llm.session() as session:
        stream = session.stream(LONG, max_new_tokens=30)
        shown = [next(stream).token_ids[0] for _ in range(3)]
        stream.close()
        assert session.tokens == LONG + shown == LONG + stream.output.token_ids
        session._runtime.store.check_integrity(deep=True)
        again = llm_tokens = session.generate(max_new_tokens=4).token_ids
        assert session.tokens == LONG + shown + llm_tokens
    whole = llm.generate(LONG, max_new_tokens=7).token_ids
    assert shown + again == whole


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


# ---- conversations -----------------------------------------------------------------------------

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


# ---- what is refused ---------------------------------------------------------------------------


def test_a_closed_session_says_so(llm):
    session = llm.session()
    session.append(LONG[:10])
    session.close()
    session.close()
    for use in (
        lambda: session.append([1]),
        lambda: session.generate([1]),
        lambda: session.stream([1]),
        lambda: session.truncate(0),
        lambda: session.undo(),
        lambda: session.fork(),
        lambda: session.last_logits(),
    ):
        with pytest.raises(InputError, match="session is closed"):
            use()


def test_a_closed_llm_says_so(folder, tmp_path):
    llm = open_small(folder, tmp_path)
    llm._context = 2048
    llm.generate([1, 2], max_new_tokens=1)
    session = llm.session()
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate([1, 2]),
        lambda: llm.session(),
        lambda: llm.logits([1, 2]),
        lambda: llm.score([1, 2]),
    ):
        with pytest.raises(InputError, match="LLM is closed"):
            use()
    with pytest.raises(InputError, match="session is closed"):
        session.append([1])


def test_an_overflow_adds_nothing(llm):
    llm._context = 100
    with llm.session() as session:
        session.append(IDS[:60])
        for use in (
            lambda: session.append(IDS[:41]),
            lambda: session.generate(IDS[:40]),
            lambda: session.generate(IDS[:41], max_new_tokens=1),
        ):
            with pytest.raises(ContextOverflow) as caught:
                use()
            assert (caught.value.needed_tokens, caught.value.available_tokens) == (101, 100) or (
                caught.value.needed_tokens == 102
            )
            assert session.tokens == IDS[:60]
        output = session.generate(IDS[60:90], max_new_tokens=50)
        assert len(output.token_ids) == 10 and output.finish_reason == "length"
        assert any("room for 10 of the 50" in w for w in output.warnings)
    with pytest.raises(ContextOverflow):
        llm.generate(IDS[:100])
    assert len(llm.generate(IDS[:99]).token_ids) == 1
    llm._context = None
    with pytest.raises(ContextOverflow, match="Shorten the document"):
        llm.generate([1] * 8192)
    assert_nothing_is_held(llm)


def test_one_thread_at_a_time(llm):
    errors = []

    def intrude():
        for use in (lambda: llm.generate([1]), lambda: session.append([1]), session.fork):
            try:
                use()
            except EbbtideError as error:
                errors.append(error)

    def on_progress(progress):
        if progress.phase == "prefill" and not errors:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    with llm.session() as session:
        llm.on_progress = on_progress
        session.append(LONG)
        assert session.tokens == LONG
    assert [type(e) for e in errors] == [InputError] * 3
    assert all("another thread" in str(e) for e in errors)


def test_a_second_session_has_what_the_first_leaves(folder, tmp_path):
    with open_small(folder, tmp_path) as llm:
        keep_in_memory(llm, 2048, 0.5, sequences=4, text=True)
        llm._context = 2048
        with llm.session() as first:
            first.append(LONG)
            with pytest.raises(DoesNotFit) as caught:
                llm.generate(LONG)
            assert caught.value.tier in ("host", "disk")
            assert first.generate(max_new_tokens=2).token_ids
        assert llm.generate(LONG, max_new_tokens=2).token_ids


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": 7}, "model"),
        ({"revision": 7}, "revision"),
        ({"device": "tpu"}, "allowed are auto, cpu, cuda and mps"),
        ({"device": None}, "allowed are auto"),
        ({"dtype": "int8"}, "allowed is auto, float32"),
        ({"budget": {}}, "allowed is a Budget"),
        ({"budget": "6GiB"}, "allowed is a Budget"),
        ({"mode": "bounded", "kv_bits": "full"}, "Use --mode exact, or --kv-bits 8, 6, 4"),
        ({"mode": "quick"}, "allowed is exact, bounded, deadline"),
        ({"epsilon": float("nan")}, "between 0 and 1"),
        ({"kv_bits": 5}, "allowed are auto, full, 8, 6, 4"),
        ({"weight_bits": 5}, "allowed are auto, full, 8 and 4"),
        ({"context": 0}, "whole number from 1"),
        ({"context": "4096"}, "whole number from 1"),
        ({"threads": True}, "whole number from 1"),
        ({"spill_dir": 5}, "allowed is a folder"),
        ({"spill_dir": "/no/such/folder"}, "is not a folder"),
    ],
)
def test_wrong_options_are_named(folder, tmp_path, wrong, says):
    options = {"model": folder, "spill_dir": tmp_path, **wrong}
    with pytest.raises(InputError, match=says):
        LLM.open(options.pop("model"), **options)


@pytest.mark.parametrize(
    ("prompt", "generation", "says"),
    [
        (None, {}, "a str, a list of token ids or a list of messages"),
        (b"bytes", {}, "not bytes"),
        (7, {}, "not int"),
        ([], {}, "prompt is empty"),
        ([1, "a"], {}, "token ids are whole numbers"),
        ([True], {}, "token ids are whole numbers"),
        ([-1], {}, "outside this model's 0 to 263"),
        ([264], {}, "outside this model's 0 to 263"),
        ([{"role": "user"}], {}, "content"),
        ([1], {"max_tokens": 5}, "max_new_tokens"),
        ([1], {"temperature": "hot"}, "temperature must be"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be"),
    ],
)
def test_wrong_prompts_and_settings_are_named(llm, prompt, generation, says):
    with pytest.raises(InputError, match=says):
        llm.generate(prompt, **generation)
    assert_nothing_is_held(llm)


# ---- interruptions and failures ----------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_prefill_goes_on_where_it_stopped(llm, after):
    with llm.session() as session:
        session.append(LONG)
        expected = session.last_logits()
    seen = []

    def interrupt(progress):
        if progress.phase == "prefill":
            seen.append(progress.done_tokens)
            if len(seen) == after:
                raise KeyboardInterrupt

    with llm.session() as session:
        llm.on_progress = interrupt
        with pytest.raises(KeyboardInterrupt):
            session.append(LONG)
        llm.on_progress = None
        assert session.num_processed == seen[-1] < len(LONG)
        session._runtime.store.check_integrity(deep=True)
        assert session.tokens == LONG
        assert torch.equal(session.last_logits(), expected)
        assert session.generate(max_new_tokens=3).usage["recomputed_tokens"] == 0


def test_an_interrupted_load_is_begun_again(folder, tmp_path):
    with open_small(folder, tmp_path) as llm:

        def interrupt(progress):
            raise KeyboardInterrupt

        llm.on_progress = interrupt
        with pytest.raises(KeyboardInterrupt):
            llm.generate([1, 2], max_new_tokens=1)
        assert_nothing_is_held(llm)
        llm.on_progress = None
        assert llm.generate([1, 2], max_new_tokens=1).token_ids


class Failing(ScratchFile):
    """A scratch file whose reads or writes fail."""

    kind, code = "read", errno.EIO

    def _fail(self, kind):
        if kind == Failing.kind:
            raise OSError(Failing.code, os.strerror(Failing.code))

    def _read_some(self, view, offset):
        self._fail("read")
        return super()._read_some(view, offset)

    def _write_some(self, view, offset):
        self._fail("write")
        return super()._write_some(view, offset)


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [("read", errno.EIO, "Input/output error"), ("write", errno.ENOSPC, "No space left")],
)
def test_a_failing_disk_is_a_clear_error(folder, tmp_path, monkeypatch, kind, code, says):
    monkeypatch.setattr(runtime_module, "ScratchFile", Failing)
    monkeypatch.setattr(Failing, "kind", kind)
    monkeypatch.setattr(Failing, "code", code)
    with open_small(folder, tmp_path) as llm:
        keep_in_memory(llm, len(IDS), 0.0)
        with pytest.raises(StorageError, match=says) as caught:
            llm.logits(IDS)
        assert caught.value.exit_code == 4
        assert_nothing_is_held(llm)
        monkeypatch.setattr(Failing, "kind", "none")
        assert llm.logits(IDS[:300], last=1).shape == (1, 264)


# ---- logits and scores -------------------------------------------------------------------------


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
    assert torch.equal(llm.logits(torch.tensor([1, 2, 3])), expected)


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


def test_a_budget_object_and_text_are_all_it_takes(folder, tmp_path):
    budget = Budget(host_memory="4GiB", disk_memory=0)
    with LLM.open(folder, budget=budget, spill_dir=tmp_path, threads=1) as llm:
        assert llm.generate("hello", max_new_tokens=2).usage["prompt_tokens"] == 5
        assert llm.count_tokens("hello") == 5


# ---- one answer at a time ----------------------------------------------------------------------


def test_a_session_answers_once_at_a_time(llm):
    with llm.session() as session:
        stream = session.stream(LONG, max_new_tokens=5)
        for use in (
            lambda: session.stream([1]),
            lambda: session.generate([1]),
            lambda: session.append([1]),
            lambda: session.prepare([{"role": "user", "content": "x"}]),
            lambda: session.truncate(0),
            lambda: session.undo(),
            lambda: session.fork(),
        ):
            with pytest.raises(InputError, match="still answering"):
                use()
        assert session.tokens == LONG
        shown = [next(stream).token_ids[0] for _ in range(2)]
        with pytest.raises(InputError, match="still answering"):
            session.stream([1])
        assert [t for piece in stream for t in piece.token_ids] == stream.output.token_ids[2:]
        assert session.tokens == LONG + stream.output.token_ids
        assert stream.output.token_ids[:2] == shown
        assert session.generate([1, 2], max_new_tokens=2).token_ids


def test_a_stream_of_a_closed_session_says_so(llm):
    session = llm.session()
    stream = session.stream(LONG, max_new_tokens=5)
    next(stream)
    session.close()
    assert list(stream) == [] and stream.output.finish_reason == "cancelled"


def test_a_stream_that_is_dropped_frees_its_pages(llm):
    stream = llm.stream(LONG, max_new_tokens=30)
    next(stream)
    store = stream._session._runtime.store
    assert sum(u.used_bytes for u in store.usage().values()) > 0
    del stream
    gc.collect()
    assert_nothing_is_held(llm)
    assert sum(u.used_bytes for u in store.usage().values()) == 0
    with llm.session() as session:
        first = next(session.stream(LONG, max_new_tokens=30))
        gc.collect()
        assert session.tokens == LONG + first.token_ids
        assert session.generate(max_new_tokens=2).token_ids


def test_a_stream_dropped_while_the_model_runs_is_freed_after(llm):
    stream = llm.stream(LONG, max_new_tokens=30)
    next(stream)
    with llm.running():
        del stream
        gc.collect()
        assert len(llm._sessions) == 1
    llm.generate([1], max_new_tokens=1)
    assert_nothing_is_held(llm)


# ---- names -------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda name: str(folder))
    return folder / "sessions"


def test_a_named_session_is_found_again(folder, tmp_path, state):
    with open_small(folder, tmp_path) as llm:
        llm._context = 2048
        with llm.session("book") as session:
            assert session.name == "book"
            session.append(LONG)
            first = session.generate(IDS[400:410], max_new_tokens=6)
            held = session.tokens
            expected = session.generate(IDS[410:420], max_new_tokens=6)
            session.undo()
    assert stat.S_IMODE((state / "book.tokens").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    with open_small(folder, tmp_path) as llm:
        llm._context = 2048
        with llm.session("book") as session:
            assert session.tokens == held == LONG + IDS[400:410] + first.token_ids
            output = session.generate(IDS[410:420], max_new_tokens=6)
            assert output.usage["recomputed_tokens"] == len(held)
            assert output.usage["prompt_tokens_details"]["cached_tokens"] == 0
            # Generated tokens were decoded then and are prefilled now: close, not equal to the bit.
            assert len(output.token_ids) == len(expected.token_ids)
            session.undo()
            session.undo()
            assert session.tokens == LONG


def test_a_session_can_get_its_name_late(llm, state):
    with llm.session() as session:
        assert session.name is None
        with pytest.raises(InputError, match="has no name"):
            session.save()
        session.append(LONG)
        session.keep_as("one")
        session.keep_as("two")
        session.append([1])
    with llm.session("one") as session:
        assert session.tokens == LONG
    with llm.session("two") as session:
        assert session.tokens == [*LONG, 1]


def test_a_name_is_used_once_at_a_time(folder, tmp_path, state):
    with open_small(folder, tmp_path) as llm, open_small(folder, tmp_path) as other:
        llm._context = other._context = 512
        with llm.session("book"):
            for use in (lambda: llm.session("book"), lambda: other.session("book")):
                with pytest.raises(InputError, match="in use"):
                    use()
            with other.session() as unnamed, pytest.raises(InputError, match="in use"):
                unnamed.keep_as("book")
        with other.session("book") as session:
            assert session.tokens == []
        assert other._sessions == []


def test_tokens_of_another_tokenizer_are_refused(folder, tmp_path, state):
    with open_small(folder, tmp_path) as llm:
        llm._context = 512
        with llm.session("book") as session:
            session.append([1, 2, 3])
        llm.tokens_fingerprint = "of another"
        with pytest.raises(InputError, match="made with another model"):
            llm.session("book")
        assert_nothing_is_held(llm)
        del llm.tokens_fingerprint
        llm.session("book").close()


def test_a_tokenizer_is_known_by_its_files(tmp_path):
    seen = set()
    for name, text in [("vocab.json", "a"), ("merges.txt", "b"), ("tokenizer.json", "c")]:
        (tmp_path / name).write_text(text)
        seen.add(tokenizer_fingerprint(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("a template says nothing about tokens")
    assert tokenizer_fingerprint(tmp_path) in seen
    (tmp_path / "vocab.json").write_text("d")
    assert len({*seen, tokenizer_fingerprint(tmp_path)}) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema":2}',
        '{"schema":1,"fingerprint":"x","tokens":[true],"turns":[],"num_processed":0}',
        '{"schema":1,"fingerprint":"x","tokens":[1],"turns":[],"num_processed":2}',
        '{"schema":1,"fingerprint":"x","tokens":[1],"turns":[5],"num_processed":0}',
        '{"schema":1,"fingerprint":"x","tokens":7,"turns":[],"num_processed":0}',
    ],
)
def test_a_damaged_session_is_named(llm, state, text):
    state.mkdir(parents=True, mode=0o700)
    (state / "book.tokens").write_text(text)
    with pytest.raises(InputError, match=r"book\.tokens"):
        llm.session("book")
    assert_nothing_is_held(llm)
    assert (state / "book.tokens").read_text() == text


@pytest.mark.parametrize("name", ["", "..", "a/b", ".a", "a b", "x" * 65, 7])
def test_names_that_could_lead_elsewhere(llm, state, name):
    with pytest.raises(InputError, match="is no name"):
        llm.session(name)


def test_a_session_that_cannot_be_saved(llm, state, monkeypatch):
    session = llm.session("book")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    output = session.generate(LONG[:10], max_new_tokens=2)
    # The answer is not lost with it.
    assert output.token_ids and any("No space left" in w for w in output.warnings)
    with pytest.raises(StorageError, match="No space left"):
        session.close()
    assert_nothing_is_held(llm)
    assert [p.name for p in state.iterdir() if not p.name.endswith(".lock")] == []
    monkeypatch.undo()


def test_a_state_folder_that_cannot_be(llm, tmp_path, state):
    state.parent.write_text("a file where the folder should be")
    with pytest.raises(InputError, match="state"):
        llm.session("book")


# ---- looking on --------------------------------------------------------------------------------


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
