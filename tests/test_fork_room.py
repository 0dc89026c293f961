"""A session and its fork share the pages that were planned for one context: what has no room is
refused before it begins, and both stay as they were.
"""

from __future__ import annotations

import pytest
import torch
from sessions_under_test import IDS
from small_llm import TINY, open_spilling

from ebbtide import errors

CELL = TINY["cell_tokens"]
CONTEXT = 20 * CELL
TEXT = (IDS * 2)[:CONTEXT]
BEGUN = 4 * CELL
# Layers that keep all, in memory or not; windows among them; a state beside pages; two shapes.
KINDS = [("llama2", 0.3), ("llama2", 1.0), ("gemma3", 0.3), ("qwen3.5", 1.0), ("gemma4", 1.0)]


@pytest.fixture
def opened(checkpoint, tmp_path):
    """Opens an LLM by its checkpoint's name, with a share of the far planes in memory."""
    llms = []

    def open_one(name: str, share: float):
        llms.append(open_spilling(checkpoint(name), tmp_path, context=CONTEXT, share=share))
        return llms[-1]

    yield open_one
    for llm in llms:
        llm.close()


def read(session, text: list[int]) -> torch.Tensor:
    session.append(text)
    logits = session.last_logits().clone()
    session._runtime.store.check_integrity(deep=True)
    return logits


@pytest.mark.parametrize("name, share", KINDS)
def test_what_has_no_room_is_refused_and_nothing_is_lost(opened, name, share):
    with opened(name, share).session() as session:
        expected = read(session, TEXT)
        session.truncate(0)
        session.append(TEXT[:BEGUN])
        with session.fork() as fork:
            read(session, TEXT[BEGUN:-BEGUN])
            with pytest.raises(errors.DoesNotFit, match="Close or truncate one") as refused:
                fork.append(TEXT[BEGUN:])
            assert refused.value.needed_bytes > refused.value.available_bytes
            most = refused.value.largest_context
            assert f"{CONTEXT} tokens are asked for, and this session may reach {most}" in str(
                refused.value
            )
            # What both share counted once, there is room for one context at least.
            assert 2 * BEGUN <= most < CONTEXT
            assert fork.tokens == TEXT[:BEGUN]
            before = read(fork, TEXT[BEGUN:most])
            for use in (lambda: fork.append([1]), lambda: session.generate(TEXT[:CELL])):
                with pytest.raises(errors.DoesNotFit):
                    use()
            assert (session.tokens, fork.tokens) == (TEXT[:-BEGUN], TEXT[:most])
            assert torch.equal(fork.last_logits(), before)
        assert torch.equal(read(session, TEXT[-BEGUN:]), expected)


def test_tokens_that_wait_hold_nothing(opened):
    """A fork may answer in the place of a session that has read nothing yet; when it is the
    session's turn, it is told what there is no room for, and loses nothing."""
    with opened("llama2", 0.3).session() as session:
        session.append(TEXT[:-BEGUN], process=False)
        with session.fork() as fork:
            expected = read(fork, [])
            for use in (session.last_logits, lambda: session.generate(max_new_tokens=1)):
                with pytest.raises(errors.DoesNotFit, match="Close or truncate one"):
                    use()
            assert session.tokens == fork.tokens == TEXT[:-BEGUN]
        assert torch.equal(read(session, []), expected)


def test_going_back_does_not_give_pages_away_that_it_would_take_anew(opened):
    """What a fork shares is not free when the session goes back to before its raw cells."""
    with opened("llama2", 0.3).session() as session:
        expected = read(session, TEXT[:-CELL])
        with session.fork() as fork:
            with pytest.raises(errors.DoesNotFit):
                session.truncate(CONTEXT // 2)
            assert session.tokens == fork.tokens == TEXT[:-CELL]
            session.truncate(CELL)  # there is room to read so much again
            assert torch.equal(fork.last_logits(), expected)
        assert torch.equal(read(session, TEXT[CELL:-CELL]), expected)


@pytest.mark.parametrize("name, share", KINDS)
def test_answers_end_where_the_room_does(opened, name, share):
    """A session and its fork answer by turns, without a limit: each gets what the other left, and
    says why it ended."""
    settings = {"temperature": 0, "eos_token_id": 1 << 20}
    with opened(name, share).session() as session:
        session.append(TEXT[:BEGUN])
        with session.fork() as fork:
            streams = [session.stream(**settings), fork.stream(**settings)]
            while any(stream._finish is None for stream in streams):
                for stream in streams:
                    next(stream, None)
            outputs = [stream.output for stream in streams]
            assert outputs[0].token_ids[:200] == outputs[1].token_ids[:200]
            for output in outputs:
                assert output.finish_reason == "length"
                assert CONTEXT / 2 < output.usage["total_tokens"] < CONTEXT
                assert any("Close one" in warning for warning in output.warnings)
            session._runtime.store.check_integrity(deep=True)
        output = session.generate(**settings)
        assert output.usage["total_tokens"] == CONTEXT and not output.warnings


@pytest.mark.parametrize("name, share", KINDS)
def test_tokens_one_by_one_end_where_the_room_does(opened, name, share):
    with opened(name, share).session() as session:
        session.append(TEXT[:BEGUN])
        with session.fork() as fork:
            read(session, TEXT[BEGUN:-BEGUN])
            for token in IDS[:CONTEXT]:
                try:
                    fork.decode(token)
                except errors.DoesNotFit as error:
                    refused = error
                    break
            assert "Close or truncate one" in str(refused)
            held = fork.tokens
            assert refused.largest_context == len(held) < CONTEXT and len(held) >= 2 * BEGUN
            session._runtime.store.check_integrity(deep=True)
            session.truncate(BEGUN)
            fork.decode(5)  # there is room again
            assert fork.tokens == [*held, 5]


def test_what_is_truncated_after_single_tokens_is_promised_no_more(opened):
    """The others may have its room: no answer of it is under way."""
    with opened("llama2", 1.0).session() as session:
        session.append(TEXT[:BEGUN])
        with session.fork() as fork:
            read(fork, TEXT[BEGUN : -2 * BEGUN])
            fork.decode(5)
            fork.truncate(BEGUN)
            read(session, TEXT[BEGUN:])
            assert session.tokens == TEXT


def test_what_waits_is_read_before_a_single_token(opened):
    llm = opened("llama2", 1.0)
    expected = llm.logits(TEXT[: BEGUN + 6], prefill_tokens=BEGUN + 5)[-1]
    for process in (True, False):
        with llm.session() as session:
            session.append(TEXT[: BEGUN + 5], process=process)
            assert session.num_processed < BEGUN + 5
            assert torch.equal(session.decode(TEXT[BEGUN + 5]), expected)
            assert session.num_processed == BEGUN + 6


@pytest.mark.parametrize("token", [-1, 1 << 20, 1.5, "a", None])
def test_what_is_no_token_is_refused_and_nothing_is_added(opened, token):
    """Rows of the embedding are read from the file by their number."""
    with opened("llama2", 1.0).session() as session:
        session.append(TEXT[:BEGUN])
        expected = session.last_logits()
        with pytest.raises(errors.InputError):
            session.decode(token)
        assert session.tokens == TEXT[:BEGUN] and torch.equal(session.last_logits(), expected)


def test_a_session_alone_ends_at_its_context(opened):
    with opened("llama2", 1.0).session() as session:
        read(session, TEXT[:-1])
        session.decode(5)
        with pytest.raises(errors.ContextOverflow, match=f"context holds {CONTEXT}"):
            session.decode(6)
        assert session.tokens == [*TEXT[:-1], 5]


def test_layers_with_windows_alone_leave_room_for_all(opened):
    with opened("mistral", 0.3).session() as session:
        session.append(TEXT[:BEGUN])
        with session.fork() as fork:
            assert torch.equal(read(session, TEXT[BEGUN:]), read(fork, TEXT[BEGUN:]))
