"""What layers with a window let go of, where things go back, apart or wrong: it is what nobody sees
from any place that is left to go on from.
"""

from __future__ import annotations

import pytest
import torch
from interruptions import interrupted_after
from prefixes_under_test import (
    CELL,
    MORE,
    TEXT,
    kept,
    last_logits,
    opened,
    short_texts_count,  # noqa: F401 - a fixture
)
from sessions_under_test import IDS
from small_llm import open_spilling

from ebbtide.offload.disk.spill_dir import prefix_dir
from ebbtide.offload.pages.page_table import Extents, PageTable, Tier
from ebbtide.offload.pages.pager import PageStore
from ebbtide.offload.prefixes.keeper import PrefixKeeper
from ebbtide.offload.running.sequences import Sequences

CONTEXT = 1600
BEGUN = 5 * CELL  # in the middle of a span
NAMES = pytest.mark.parametrize("name", ["mistral", "gemma2"])


def reads_on(session, expected) -> None:
    """The text goes on with MORE, three tokens behind the snapshot at BEGUN."""
    session.truncate(BEGUN + 3)
    session.append(MORE, process=False)
    assert torch.equal(session.last_logits(), expected)
    session._runtime.store.check_integrity(deep=True)


def read_alone(folder, tmp_path) -> torch.Tensor:
    """What `reads_on` expects, by an LLM that keeps nothing for the next time."""
    with opened(folder, tmp_path, cap=None) as llm:
        return last_logits(llm, TEXT[: BEGUN + 3] + MORE)[0]


def with_snapshot(llm):
    """A session that has read BEGUN tokens, from where it may go on; the rest of TEXT waits."""
    session = llm.open_session(2048, sequences=4)
    session.append(TEXT[:BEGUN], process=False)
    session._prefill()
    session.take_snapshot()
    session.append(TEXT[BEGUN:], process=False)
    return session


@NAMES
def test_what_is_restored_is_no_part_of_a_snapshot(checkpoint, tmp_path, name):
    """A span of which a snapshot sees the first cell has others behind it, which nobody sees."""
    folder = checkpoint(name, sliding_window=100)
    expected = read_alone(folder, tmp_path)
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
        with with_snapshot(llm) as session:
            session.find_kept()
            assert session.take_restored() == len(TEXT) - 1 - BEGUN
            reads_on(session, expected)


@NAMES
def test_restoring_that_fails_takes_snapshots_with_it(checkpoint, tmp_path, name):
    """Their pages are gone; what is restored then has others."""
    folder = checkpoint(name, sliding_window=100)
    expected = read_alone(folder, tmp_path)
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
        with with_snapshot(llm) as session:
            names = session._prefixes._names.of_cells(session._sequence.as_computed(), 18)
            last = prefix_dir(tmp_path) / (names[18] + ".end")
            last.write_bytes(last.read_bytes()[:-1] + b"x")
            session.find_kept()
            assert len(TEXT) - 3 * CELL < BEGUN + session.take_restored() < len(TEXT) - 1
            assert not session._sequence.snapshots
            reads_on(session, expected)


@NAMES
def test_window_files_that_are_gone_are_written_again(checkpoint, tmp_path, name):
    """Though the ends that build on them are there."""
    folder = checkpoint(name, sliding_window=300)
    with opened(folder, tmp_path) as llm:
        expected, _ = last_logits(llm, TEXT)
    before = kept(tmp_path)
    for path in prefix_dir(tmp_path).glob("*.window"):
        path.unlink()
    for found in (0, len(TEXT) - 1):
        with opened(folder, tmp_path) as llm:
            logits, restored = last_logits(llm, TEXT)
        assert restored == found and torch.equal(logits, expected)
        assert kept(tmp_path) == before


def test_a_fork_that_waits_holds_what_it_sees(checkpoint, tmp_path):
    """Not what its parent's snapshots saw, in whose place others come meanwhile."""
    folder = checkpoint("mistral", sliding_window=100)
    with open_spilling(folder, tmp_path, context=CONTEXT, share=1.0, draft=False) as llm:
        with llm.session() as session:
            answers = {"temperature": 0, "max_new_tokens": 150}
            for start in range(0, 400, 200):
                session.generate(IDS[start : start + 200], **answers)
            with session.fork() as branch:
                for start in range(400, 430, 10):
                    session.generate(IDS[start : start + 10], **answers)
                assert branch.generate(IDS[:100], **answers).token_ids
                session._runtime.store.check_integrity(deep=True)


def test_an_interruption_of_the_way_back(checkpoint, tmp_path):
    """All is read again then, and sees all that it should."""
    folder, traced = checkpoint("mistral", sliding_window=100), [Sequences.rewind, Sequences.settle]
    with open_spilling(folder, tmp_path, context=CONTEXT, share=1.0) as llm:
        expected, _ = last_logits(llm, IDS)
        is_interrupted, count = True, 0
        while is_interrupted:
            count += 1
            with llm.open_session(CONTEXT, sequences=1) as session:
                session.append(IDS)
                is_interrupted = interrupted_after(count, traced, lambda s=session: s.truncate(99))
                session.truncate(min(99, len(session.tokens)))
                session.append(IDS[99:])
                assert torch.equal(session.last_logits(), expected)
        assert count > 5


@pytest.mark.parametrize("traced", [PrefixKeeper._take_in, Sequences.pass_over])
def test_an_interruption_of_restoring(checkpoint, tmp_path, traced):
    folder = checkpoint("gemma2", sliding_window=100)
    with opened(folder, tmp_path) as llm:
        expected, _ = last_logits(llm, TEXT)
    with opened(folder, tmp_path) as llm:
        is_interrupted, count = True, 0
        while is_interrupted:
            count += 2
            with with_snapshot(llm) as session:
                is_interrupted = interrupted_after(count, [traced], session.find_kept)
                session._prefixes = None
                assert torch.equal(session.last_logits(), expected)
                session._runtime.store.check_integrity(deep=True)
        assert count > 5


def test_an_interruption_while_spans_are_let_go_of_loses_no_frame(checkpoint, tmp_path):
    """Nor anything that a query sees: the text goes on as if nothing had been."""
    folder, start, stop = checkpoint("gemma2", sliding_window=100), 5 * CELL, 9 * CELL
    traced = [Sequences.let_go, PageStore.drop, PageStore._release, PageTable.drop, Extents.release]
    with open_spilling(folder, tmp_path, context=CONTEXT, share=0.3, draft=False) as llm:
        with llm.session() as session:
            session.append(IDS[:start])
            session.take_snapshot()
            store, table = session._runtime.store, session._sequence.table

            def num_free() -> int:
                return sum(store._extents.num_free(tier) for tier in Tier)

            session.append(IDS[start:stop], process=False)
            expected = session.last_logits().clone()
            total, is_interrupted, count = num_free() + sum(1 for _ in table.extents()), True, 0
            while is_interrupted:
                session.truncate(start)
                count += 3
                session.append(IDS[start:stop], process=False)
                is_interrupted = interrupted_after(count, traced, session.last_logits)
                for _ in range(2):
                    store.check_integrity(deep=True)
                    assert num_free() + sum(1 for _ in table.extents()) == total
                    assert torch.equal(session.last_logits(), expected)
            assert count > 50
