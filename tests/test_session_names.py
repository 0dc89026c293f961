"""Sessions that have a name: found again, locked, refused, named when damaged."""

from __future__ import annotations

import errno
import os
import stat
from array import array

import platformdirs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessions_under_test import IDS, LONG, assert_nothing_is_held
from small_llm import open_small

from ebbtide.offload.errors import (
    InputError,
    StorageError,
)
from ebbtide.offload.sessions.session_file import KeptTokens, tokenizer_fingerprint


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
        with pytest.raises(InputError, match="None is not a name"):
            session.keep_as(None)
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
        assert not other.sessions


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
        '{"schema":1,"fingerprint":"x","tokens":[1],"turns":[],"num_processed":0,"decoded":7}',
        '{"schema":1,"fingerprint":"x","tokens":[1],"turns":[],"num_processed":0,"decoded":[[0]]}',
        '{"schema":1,"fingerprint":"x","tokens":[1],"turns":[],"num_processed":0,"decoded":[[0,2]]}',
        '{"schema":1,"fingerprint":"x","tokens":[1],"turns":[],"num_processed":0,"decoded":[[1,1]]}',
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
    with pytest.raises(InputError, match="is not a name"):
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


@given(computed=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40))
def test_what_was_decoded_is_kept_with_the_tokens(computed):
    kept = KeptTokens.of(array("i", computed), [], 0)
    assert kept.tokens == [max(token, ~token) for token in computed]
    assert kept.computed().tolist() == computed
    edges = [edge for pair in kept.decoded for edge in pair]
    assert edges == sorted(set(edges))
