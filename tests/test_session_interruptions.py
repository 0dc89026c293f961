"""Ctrl-C while a session is closed: wherever it comes, what is opened next finds nothing held."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from interruptions import interrupted_after
from sessions_under_test import LONG, assert_nothing_is_held
from small_llm import keep_in_memory, open_spilling

from ebbtide.offload.disk.io_threads import IoThreads
from ebbtide.offload.pages.pager import PageStore
from ebbtide.offload.running.runtime import Runtime
from ebbtide.offload.running.sequences import Sequences
from ebbtide.offload.sessions import open_sessions
from ebbtide.offload.sessions.session import Session
from ebbtide.offload.sessions.stream import Stream

CLOSING = [
    *(Session.close, Runtime.release, Sequences.close, Stream._end, Stream.close),
    *(Runtime.close, PageStore.close_table, PageStore.close, IoThreads.close),
]


def open_files() -> set[str]:
    links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return {str(link.readlink()) for link in links}


def scratch_files(folder: Path) -> list[str]:
    return [name for name in open_files() if name.startswith(str(folder))]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are not told here")
@pytest.mark.parametrize("answers", [False, True], ids=["a session", "an answer alone"])
def test_no_store_stays_open_wherever_closing_is_interrupted(checkpoint, tmp_path, answers):
    with open_spilling(checkpoint("llama2"), tmp_path, context=600) as llm:
        if answers:
            keep_in_memory(llm, 600, 0.3, text=True)
        llm.generate(LONG[:20], max_new_tokens=1)  # weights are there
        before, threads = open_files(), set(threading.enumerate())
        count, is_interrupted = 0, True
        while is_interrupted:
            count += 1
            if answers:
                stream = llm.stream(LONG[:40], max_new_tokens=9)
                next(stream)
                session, close = stream._session, stream.close
            else:
                session = llm.session()
                session.append(LONG[:40])
                session.fork()
                session.keep_as("interrupted")
                close = session.close
            runtime = session._runtime
            assert set(threading.enumerate()) - threads and scratch_files(tmp_path)
            is_interrupted = interrupted_after(count, CLOSING, close, instructions=True)
            if answers:
                del stream, close
            elif session.is_open:  # closing has not come to where nothing else may be done
                session.close()
            for other in llm.sessions:
                if other is not session:
                    other.close()
            del session
            llm.generate(LONG[:3], max_new_tokens=1)
            assert_nothing_is_held(llm)
            assert not runtime.is_open
            # what other tests left behind may go meanwhile
            assert set(threading.enumerate()) <= threads and open_files() <= before
        assert count > 100


@pytest.mark.parametrize("change", ["truncate", "fork", "decode"])
def test_a_model_answers_wherever_it_was_interrupted_as_it_began_to_run(
    checkpoint, tmp_path, monkeypatch, change
):
    """Nobody has the lock then, and nobody is waited for."""
    monkeypatch.setattr(open_sessions, "_PATIENCE_S", 0.01)
    changes = {
        "truncate": lambda session: session.truncate(30),
        "fork": lambda session: session.fork(),
        "decode": lambda session: session.decode(1),
    }
    with open_spilling(checkpoint("llama2"), tmp_path, context=600) as llm:
        count, is_interrupted = 0, True
        while is_interrupted:
            count += 1
            with llm.session() as session:
                session.append(LONG[:40])
                expected = session.last_logits()
                is_interrupted = interrupted_after(
                    count,
                    [open_sessions.OpenSessions._take],
                    lambda: changes[change](session),
                    instructions=True,
                )
                session.truncate(40 if len(session.tokens) >= 40 else 30)
                if len(session.tokens) == 40:
                    assert torch.equal(session.last_logits(), expected)
                session.generate(LONG[40:45], max_new_tokens=1)
                for fork in llm.sessions:
                    fork.close()
        assert count > 30
        assert_nothing_is_held(llm)
