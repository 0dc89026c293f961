"""Streams: what they yield, what closing, dropping and cancelling leave behind."""

from __future__ import annotations

import gc

import pytest
from sessions_under_test import LONG, assert_nothing_is_held

from ebbtide.offload.errors import (
    InputError,
)


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
    with llm.sessions.running():
        del stream
        gc.collect()
        assert len(llm.sessions) == 1
    llm.generate([1], max_new_tokens=1)
    assert_nothing_is_held(llm)
