"""Kept pages of sessions: what was decoded goes on to the bit, and is nobody else's text."""

from __future__ import annotations

import errno
import gc
import random

import platformdirs
import pytest
import torch
from prefixes_under_test import (  # short_texts_count: a fixture
    CELL,
    MORE,
    TEXT,
    answer,
    assert_goes_on,
    cached,
    kept,
    last_logits,
    opened,
    short_texts_count,  # noqa: F401
)

from ebbtide.offload.disk.spill_dir import prefix_dir
from ebbtide.offload.errors import StorageError
from ebbtide.offload.layers.states import States
from ebbtide.offload.mode import Mode
from ebbtide.offload.pages.span_reader import SpanReader
from ebbtide.offload.prefixes import keeper as prefix_keeper
from ebbtide.offload.prefixes import store as prefix_store

BOUNDED = Mode("bounded", selector_options={"epsilon": 0.1})


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen2")  # key biases: the most that sealed pages leave out


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda name: str(tmp_path / "state"))


def test_a_named_session_goes_on_where_it_was(folder, tmp_path, state):
    """Its answers were decoded: their pages are found too, and go on to the bit."""
    with opened(folder, tmp_path) as llm, llm.session("book") as session:
        session.generate(TEXT, max_new_tokens=100)
        session.generate(MORE[:20], max_new_tokens=30)
        held, before = session.tokens, len(session.tokens)
        with session.fork() as branch:
            expected = branch.generate(MORE[:30], max_new_tokens=12).token_ids
    for processed_before, share in ((before - 1, 1.0), (before, 0.3)):
        with opened(folder, tmp_path, share=share) as llm, llm.session("book") as session:
            assert session.tokens == held
            with session.fork() as branch:  # knows no name, and reads all again
                other = branch.generate(MORE[:30], max_new_tokens=12)
            assert cached(other) == 0
            output = session.generate(MORE[:30], max_new_tokens=12)
            # The last token of an answer is shown, and processed with what comes next.
            assert cached(output) == before - 1
            assert output.usage["recomputed_tokens"] == processed_before - cached(output)
            assert output.token_ids == expected
            session.undo()


def test_a_session_may_go_back_to_what_it_decoded(folder, tmp_path, state):
    with opened(folder, tmp_path) as llm, llm.session("book") as session:
        session.generate(TEXT[:500], max_new_tokens=150)
        session.generate(MORE, max_new_tokens=200)
        at = len(session.tokens) - 190  # the cells beside it are sealed, and no snapshot is there
        session.truncate(at)
        output = session.generate(MORE[:20], max_new_tokens=4)
        assert 650 < cached(output) <= at
        assert output.usage["recomputed_tokens"] == at - cached(output)


def test_a_text_that_repeats_an_answer_is_a_text(folder, tmp_path, state):
    with opened(folder, tmp_path) as llm, llm.session("book") as session:
        session.generate(TEXT[:500], max_new_tokens=150)
        session.generate(MORE, max_new_tokens=200)
        held = session.tokens
        session.truncate(510)
        session.append(held[510:], process=False)
        wanted = session._sequence.as_computed()
        assert max(wanted[500:510]) < 0 <= min(wanted[510:])


@pytest.mark.parametrize("mode", [BOUNDED, Mode("bounded", selector_options={"epsilon": 0.3})])
def test_what_another_mode_decoded_is_read_again(folder, tmp_path, state, mode):
    with opened(folder, tmp_path, mode=BOUNDED) as llm, llm.session("book") as session:
        session.generate(TEXT, max_new_tokens=100)
        held = len(session.tokens)
    before = set(kept(tmp_path))
    with opened(folder, tmp_path, mode=mode) as llm, llm.session("book") as session:
        found = cached(session.generate(MORE[:20], max_new_tokens=4))
        assert found == (held - 1 if mode is BOUNDED else len(TEXT))
    assert before <= set(kept(tmp_path))
    if mode is BOUNDED:  # else all has been read by now
        with opened(folder, tmp_path) as llm, llm.session("book") as session:
            assert cached(session.generate(MORE[:20], max_new_tokens=4)) == len(TEXT)


def test_what_deadline_mode_decoded_is_not_kept(folder, tmp_path, state):
    mode = Mode("deadline", selector_options={"epsilon": 0.1})
    for found in (0, len(TEXT)):
        with opened(folder, tmp_path, mode=mode) as llm, llm.session("book") as session:
            assert cached(session.generate(None if found else TEXT, max_new_tokens=100)) == found


def test_a_session_that_is_only_opened_forgets_nothing(folder, tmp_path, state):
    with opened(folder, tmp_path) as llm:
        with llm.session("book") as session:
            session.generate(TEXT, max_new_tokens=100)
            held = len(session.tokens)
        for _ in range(2):
            with llm.session("book") as session:
                session.save()
        with llm.session("book") as session:
            assert cached(session.generate(MORE[:20], max_new_tokens=4)) == held - 1


def test_what_was_decoded_is_nobody_elses(folder, tmp_path, state):
    """Its bits are not those that reading the same tokens gives."""
    for name in (None, "book"):
        place = tmp_path / str(name)
        place.mkdir()
        with opened(folder, place) as llm, llm.session(name) as session:
            first = session.generate(TEXT[:500], max_new_tokens=70)
            before = kept(place)
            session.generate(MORE, max_new_tokens=2)
            # Without a name nobody will know what was decoded.
            assert (kept(place) == before) == (name is None) and before
            held = session.tokens
        with opened(folder, place, cap=None) as llm:
            expected, _ = last_logits(llm, held)
        with opened(folder, place) as llm:
            logits, restored = last_logits(llm, held)
        assert restored <= 500 and len(first.token_ids) == 70
        assert torch.equal(logits, expected)


# ---- any order of things -------------------------------------------------------------------------


ORDERS = [
    *(("qwen2", range(10)), ("youtu", range(3))),
    *(("qwen3.5", range(6)), ("granite4-h", range(3)), ("lfm2", range(3))),
    *(("gemma2", range(6)), ("gemma3n", range(2)), ("gemma4", range(3)), ("mistral", range(3))),
]
WITH_WINDOWS = ("gemma2", "gemma3n", "gemma4", "mistral")
WINDOWS = [50, 100, 200, 450]  # the first within the raw cells


@pytest.mark.parametrize(("name", "seed"), [(name, s) for name, seeds in ORDERS for s in seeds])
@pytest.mark.timeout(240)
def test_any_order_of_things(checkpoint, tmp_path, state, monkeypatch, name, seed):
    """Sessions with a name and without, closed and opened again, in turn with other texts."""
    monkeypatch.setattr(prefix_keeper, "_NEAR_ROWS", CELL // 4)
    chance = random.Random(seed)
    windows = {"sliding_window": chance.choice(WINDOWS)} if name in WITH_WINDOWS else {}
    folder = checkpoint(name, **windows)
    geometry = {"span_tokens": chance.choice([64, 128, 256])}
    texts = [TEXT, MORE * 3, [*TEXT[:500], *MORE]]
    with opened(folder, tmp_path, cap=None, draft=False, **geometry) as alone:
        for _ in range(3):
            options = {"share": chance.choice([0.3, 1.0]), "draft": chance.random() < 0.5}
            with opened(folder, tmp_path, sequences=4, **options, **geometry) as llm:
                with llm.session(chance.choice(["book", "book", None])) as session:
                    for _ in range(6):
                        act(session, chance, texts)
                    assert_goes_on(session, alone)
                with llm.open_session(2048, sequences=1) as session:
                    text = chance.choice(texts)[: chance.choice([700, 1100, 1200])]
                    session.append(text, process=False)
                    assert_goes_on(session, alone)
    assert kept(tmp_path)


def act(session, chance: random.Random, texts: list[list[int]]) -> None:
    """Something that a session can do."""
    length = len(session.tokens)
    text = chance.choice(texts)
    first = chance.choice([0, 0, 1, length % len(text)])
    ids = text[first : first + chance.choice([5, 64, 70, 300])]
    if not length:
        ids = chance.choice(texts)[: chance.choice([300, 700, 1152, 1200])]
    deed = chance.choice(
        ["append", "answer", "answer", "give up", "truncate", "edge", "undo", "fork"]
    )
    if length + len(ids) > 1850:
        deed = "truncate"
    if deed == "append":
        session.append(ids, process=chance.random() < 0.5)
    elif deed == "answer":
        session.generate(ids, max_new_tokens=chance.choice([1, 4, 40, 100]))
    elif deed == "give up":
        with session.stream(ids, max_new_tokens=60) as stream:
            for _ in range(chance.choice([0, 1, 20])):
                next(stream)
    elif deed == "truncate":
        session.truncate(chance.randrange(length + 1))
    elif deed == "edge":
        session.truncate(chance.randrange(length // CELL + 1) * CELL)
    elif deed == "undo" and session._turns:
        session.undo()
    elif deed == "fork" and length:
        with session.fork() as branch:
            branch.generate(MORE[:3], max_new_tokens=2)


# ---- what is in the ring, and what is not --------------------------------------------------------


def test_an_end_whose_cell_was_written_over_is_not_kept(folder, tmp_path, state):
    """Back to the end of a cell: another one lies in the ring where that cell was."""
    for place, at, num_new in ((tmp_path / "a", 20 * CELL, 120), (tmp_path / "b", 18 * CELL, 0)):
        place.mkdir()
        with opened(folder, place) as llm, llm.session(place.name) as session:
            keeper = session._prefixes
            keeper.keep = lambda *args, **kwargs: None  # nothing was kept before
            if num_new:
                session.generate(TEXT, max_new_tokens=num_new)
            else:
                session.append(TEXT, process=False)
                session.last_logits()
            session.truncate(at)
            assert session._sequence.oldest_raw_cell > at // CELL - 2
            del keeper.keep
        assert not [name for name in kept(place) if not name.endswith(".span")]


@pytest.mark.parametrize("name", ["bounded", "deadline"])
def test_rows_that_another_mode_decoded(folder, tmp_path, state, monkeypatch, name):
    """They are in the cell in which the text ended: as far as it was read, they are used."""
    monkeypatch.setattr(prefix_keeper, "_NEAR_ROWS", CELL // 4)
    mode = Mode(name, selector_options={"epsilon": 0.3})
    text = TEXT[: 17 * CELL + 4]
    with opened(folder, tmp_path, mode=mode) as llm, llm.session("book") as session:
        session.generate(text, max_new_tokens=20)
        for name in kept(tmp_path):  # somebody made room
            (prefix_dir(tmp_path) / name).unlink()
        session.generate(MORE[:10], max_new_tokens=20)
    for other in (Mode(), Mode("deadline", selector_options={"epsilon": 0.3})):
        with opened(folder, tmp_path, mode=other) as llm, llm.session("book") as session:
            session.append(MORE[:10], process=False)
            session.find_kept()
            assert session.take_restored() in (0, len(text))
            assert min(session._sequence.processed, default=0) >= 0
            session.truncate(len(session.tokens) - 10)


def test_ends_with_states_are_as_far_apart_as_these_are_heavy(checkpoint, tmp_path, monkeypatch):
    """All states within a text take no more than half of what its pages do."""
    monkeypatch.setattr(prefix_keeper, "_END_TOKENS", CELL)
    with opened(checkpoint("qwen3.5"), tmp_path) as llm:
        last_logits(llm, TEXT)
        state_bytes, layout = States.num_bytes(llm.config.recurrent), llm.geometry.layout
        record_bytes = layout.near_record_bytes + layout.record_bytes
        page_bytes = len(TEXT) * record_bytes / layout.record_tokens * len(llm.config.kv_layers)
        num_ends = len([name for name in kept(tmp_path) if name.endswith(".end")]) - 2
        assert 0 < num_ends * state_bytes <= page_bytes / 2 < (num_ends + 2) * state_bytes
        logits, found = last_logits(llm, [*TEXT[: 17 * CELL + 9], *MORE])
        assert found == 17 * CELL  # one of the last two, which are kept in any case
    with opened(checkpoint("qwen3.5"), tmp_path, cap=None) as llm:
        assert torch.equal(last_logits(llm, [*TEXT[: 17 * CELL + 9], *MORE])[0], logits)


# ---- what else may happen ------------------------------------------------------------------------


def test_damage_to_the_newest_falls_back_to_what_is_older(folder, tmp_path):
    with opened(folder, tmp_path) as llm:
        answer(llm, TEXT)
    with opened(folder, tmp_path) as llm, llm.session() as session:
        session.generate(TEXT[: 10 * CELL], max_new_tokens=2)
        session.truncate(10 * CELL)
        ends = sorted(prefix_dir(tmp_path).glob("*.end"), key=lambda path: path.stat().st_mtime_ns)
        for path in ends:
            if path.stat().st_size == max(end.stat().st_size for end in ends):
                path.write_bytes(path.read_bytes()[:-1] + b"x")
        output = session.generate(TEXT[10 * CELL :], max_new_tokens=2)
        assert 9 * CELL <= cached(output) < len(TEXT) - 1
        assert output.usage["recomputed_tokens"] <= CELL


def test_a_stream_that_never_began_ends_no_other(folder, tmp_path):
    with opened(folder, tmp_path) as llm:
        answer(llm, TEXT)
    with opened(folder, tmp_path) as llm, llm.session() as session:

        def stop(report):
            if report.phase == "restore":
                raise KeyboardInterrupt

        llm.on_progress = stop
        with pytest.raises(KeyboardInterrupt) as interruption:
            session.stream(TEXT, max_new_tokens=8)
        llm.on_progress = None
        second = session.stream(MORE[:5], max_new_tokens=8)
        next(second)
        del interruption  # with it goes what was made of the first
        gc.collect()
        assert session._unfinished() is second
        assert sum(len(piece.token_ids) for piece in second) == 7


def test_warnings_reach_who_asks_forks(folder, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prefix_store, "write_prefix_file", fails)
    with opened(folder, tmp_path) as llm, llm.open_session(2048, sequences=4) as root:
        root.append(TEXT)
        with root.fork() as branch:
            output = branch.generate(MORE[:5], max_new_tokens=3)
    assert [w for w in output.warnings if "Not all of what was read is kept" in w]


def test_closing_survives_scratch_that_cannot_be_read(folder, tmp_path, state, monkeypatch):
    def fails(*args, **kwargs):
        raise StorageError("scratch: Input/output error")

    with opened(folder, tmp_path) as llm:
        with llm.session("book") as session:
            session.generate(TEXT, max_new_tokens=200)
            held = session.tokens
            monkeypatch.setattr(SpanReader, "look_at", fails)
        assert [w for w in llm.warnings if "scratch: Input/output error" in w]
        with llm.session("book") as session:
            assert session.tokens == held
