"""What a session says when something is wrong, and that nothing is lost by it."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest
import torch
from sessions_under_test import IDS, LONG, assert_nothing_is_held
from small_llm import keep_in_memory, open_small, open_spilling

from ebbtide import LLM, Budget
from ebbtide.offload.disk.disk import STEP_BYTES, ScratchFile
from ebbtide.offload.errors import (
    ContextOverflow,
    DoesNotFit,
    EbbtideError,
    InputError,
    StorageError,
)
from ebbtide.offload.running import runtime as runtime_module


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


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rewind", lambda session: session.truncate(300)),
        ("fork", lambda session: session.fork()),
        ("rewind", lambda session: session.last_logits()),
        ("rewind", lambda session: session.stream().close()),
    ],
    ids=["truncate", "fork", "last_logits", "stream"],
)
def test_no_other_thread_decodes_while_pages_change(llm, monkeypatch, name, change):
    refused = []

    def intrude(answering):
        with pytest.raises(InputError, match="running in another thread"):
            answering.decode(1)
        refused.append(answering.tokens)

    with llm.session() as session:
        session.append(LONG)
        session.last_logits()
        if name == "fork":  # there is room for one
            answering = llm.session(context=500)
            answering.append(IDS[:10])
        else:
            answering = session.fork()
        held = answering.tokens
        session._logits = None  # what was processed last is processed again where it is wanted
        sequences = session._engine.sequences
        plain = getattr(sequences, name)

        def interrupted(*args):
            thread = threading.Thread(target=intrude, args=(answering,))
            thread.start()
            thread.join()
            return plain(*args)

        with monkeypatch.context() as patch:
            patch.setattr(sequences, name, interrupted)
            change(session)
        assert refused and all(tokens == held for tokens in refused)
        assert answering.decode(1) is not None and answering.tokens == [*held, 1]


@pytest.mark.parametrize(
    "closes", [lambda llm, session: session.close(), lambda llm, _: llm.close()]
)
def test_what_a_hook_closes_is_closed(llm, closes):
    session = llm.session()
    llm.on_progress = lambda progress: closes(llm, session)
    with pytest.raises(InputError, match="the session was closed while it was read"):
        session.append(LONG)
    assert not session.is_open
    assert_nothing_is_held(llm)


def test_what_a_hook_asks_of_a_running_model_is_refused(llm):
    said = []

    def on_progress(progress):
        with pytest.raises(InputError, match="this LLM is running; what it calls") as caught:
            llm.generate([1])
        said.append(caught.value)

    with llm.session() as session:
        llm.on_progress = on_progress
        session.append(LONG)
        assert session.tokens == LONG
    assert said


def test_an_empty_session_has_no_last_logits(llm):
    with llm.session() as session:
        with pytest.raises(InputError, match="the session is empty"):
            session.last_logits()
        session.append(IDS[:5])
        assert session.last_logits() is not None


@pytest.mark.parametrize("context", [-5, 0, True, 1.5, "4096", 2**31, None])
def test_a_sessions_context_is_a_number_of_tokens(llm, context):
    if context is not None:
        with pytest.raises(InputError, match=f"context is {context!r}; allowed is a whole number"):
            llm.session(context=context)
    with pytest.raises(InputError, match=f"context is {context!r}; allowed is a whole number"):
        llm.plan_at(context)


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


def test_kernels_that_are_not_known_are_a_users_mistake(folder, monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", "fast")
    with pytest.raises(InputError, match="known are auto, reference, compiled, triton"):
        LLM.open(folder)


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


def test_the_scratch_file_takes_no_more_than_the_plan_says(folder, tmp_path, monkeypatch):
    files = []

    class Seen(ScratchFile):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            files.append(self)

    monkeypatch.setattr(runtime_module, "ScratchFile", Seen)
    with open_small(folder, tmp_path) as llm:
        keep_in_memory(llm, len(IDS), 0.0)
        llm.logits(IDS)
        assert 0 < files[0].size_bytes <= llm.plan.disk["far planes"] < STEP_BYTES


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("name", ["llama2", "qwen3.5"])
def test_what_check_raises_stops_a_reading_and_costs_one_sweep(checkpoint, tmp_path, name):
    """Between any two layers, of a text that is finished and of one that another takes the place
    of."""
    with open_spilling(checkpoint(name), tmp_path, context=600) as llm:
        with llm.session() as whole:
            whole.append(LONG)
            expected = whole.last_logits()
        sweep_tokens = llm.plan.sweep_cells * llm.geometry.cell_tokens
        num_calls = 0

        def check():
            nonlocal num_calls
            num_calls += 1
            if num_calls % 4 == 0:  # of three layers or four: another one each time
                raise _Stop

        with llm.session() as session:
            session.append(IDS[300:], process=False)
            llm.check = check
            with pytest.raises(_Stop):
                for _ in range(2):
                    session.last_logits()
            session.truncate(0)
            session.append(LONG, process=False)
            num_stops = 0
            while session.num_processed < len(LONG):
                before = session.num_processed
                try:
                    session.last_logits()
                except _Stop:
                    num_stops += 1
                    assert session.num_processed - before <= sweep_tokens
            llm.check = None
            assert num_stops > 2
            assert torch.equal(session.last_logits(), expected)


def test_a_context_may_be_numpys_or_longer_than_any_model(llm):
    """A plan took time by the context: of 2,000 million tokens the better part of a minute."""
    assert llm.plan_at(np.int64(300)) == llm.plan_at(300)
    assert not llm.plan_at(2**31 - 1).fits
    with pytest.raises(ContextOverflow, match="2,147,483,647 tokens are asked for"):
        llm.session(context=2**31 - 1)


@pytest.mark.parametrize("share", ["a half", float("nan"), -0.1, 1.1, True, None])
def test_what_is_kept_in_memory_is_a_share(llm, share):
    with pytest.raises(InputError, match=r"share is .* allowed is a number from 0 to 1"):
        llm.keep_in_memory(share)


def test_a_limit_for_a_device_that_is_not_there_is_said_to_have_no_effect():
    budgets = {"2GiB": True, "auto": False, 0: False}
    for size, is_said in budgets.items():
        with LLM.open(device="cpu", budget=Budget(device_memory=size)) as opened:
            assert any("device_memory is without" in said for said in opened.warnings) == is_said


def test_a_model_is_called_by_its_name_and_not_by_its_folder_in_a_cache(llm):
    with LLM.open() as builtin, pytest.raises(InputError, match="template of ebb-nano knows no"):
        builtin.chat([{"role": "user", "content": "hi"}], tools=[{"function": {"name": "f"}}])
    folder = llm.tokenizer.name
    llm.model_name, llm._tokenizer = "org/model", None
    assert llm.tokenizer.name == "org/model" != folder
    assert repr(llm) == "<LLM 'org/model', open>"
    llm.close()
    assert repr(llm) == "<LLM 'org/model', closed>"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hi", "messages must be a list of {role, content}, not str"),
        ([], "messages is empty"),
        ([1, 2], r"messages\[0\] must be a mapping with role and content, not int"),
        ({"role": "user", "content": "hi"}, "not dict"),
        (None, "not NoneType"),
    ],
)
def test_a_chat_takes_messages_alone(llm, messages, says):
    """A text went to the model raw, without its chat template."""
    with pytest.raises(InputError, match=says):
        llm.chat(messages)


def test_threads_are_a_number_that_torch_takes():
    """A million of them crashed the process at its end."""
    for threads in (0, 4097, 10**6, 1.5, True):
        with pytest.raises(InputError, match=r"threads is .*; allowed is a whole number from 1 to"):
            LLM.open(threads=threads)
