"""Kept pages of sessions that were interrupted: what is half done is neither kept nor used."""

from __future__ import annotations

from dataclasses import replace

import platformdirs
import pytest
import torch
from prefixes_under_test import (  # short_texts_count: a fixture
    CELL,
    MORE,
    TEXT,
    answer,
    assert_goes_on,
    kept,
    last_logits,
    opened,
    short_texts_count,  # noqa: F401
)

from ebbtide.offload.disk.spill_dir import prefix_dir
from ebbtide.offload.running.sequence import RawPages
from ebbtide.offload.running.sweep import Sweeper


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen2")  # key biases: the most that sealed pages leave out


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda name: str(tmp_path / "state"))


class Interrupted:
    """KeyboardInterrupt in the middle of a sweep, once."""

    def __init__(self, monkeypatch):
        real = Sweeper.run_layer

        def sweep(sweeper, sequence, layer, *args, **kwargs):
            real(sweeper, sequence, layer, *args, **kwargs)
            if self.at is not None and sequence.length >= self.at and layer == 1:
                self.at = None
                raise KeyboardInterrupt

        self.at: int | None = None
        monkeypatch.setattr(Sweeper, "run_layer", sweep)

    def run(self, at: int, what) -> None:
        self.at = at
        with pytest.raises(KeyboardInterrupt):
            what()


def with_sweeps(llm, cells: int):
    plan = llm.admission.plan
    llm.admission.plan = lambda *a, **k: replace(plan(*a, **k), sweep_cells=cells)
    return llm


@pytest.mark.parametrize("cells", [1, 4])
def test_an_interrupted_sweep_poisons_nothing(folder, tmp_path, state, monkeypatch, cells):
    """It may have sealed pages of tokens that are others by the time the session goes on."""
    interrupted = Interrupted(monkeypatch)
    others = [*MORE, *TEXT]
    with opened(folder, tmp_path, cap=None) as llm:
        expected = {name: last_logits(llm, text)[0] for name, text in (("a", TEXT), ("b", others))}
        answers = llm.generate(TEXT[: 8 * CELL], max_new_tokens=150).token_ids
    with opened(folder, tmp_path) as llm:
        last_logits(llm, others)

    # Other tokens are read, with what is kept of them and without.
    for cap in (1 << 30, None):
        with with_sweeps(opened(folder, tmp_path, cap=cap), cells) as llm:
            with llm.open_session(2048, sequences=1) as session:
                interrupted.run(0, lambda s=session: s.append(TEXT))
                session.truncate(0)
                session.append(others, process=False)
                session.find_kept()
                assert torch.equal(session.last_logits(), expected["b"])

    # An answer is made again from a snapshot, without reading.
    with with_sweeps(opened(folder, tmp_path, cap=None, draft=False), cells) as llm:
        with llm.session() as session:
            session.generate(TEXT[: 8 * CELL], max_new_tokens=1)
            session.truncate(8 * CELL)
            interrupted.run(8 * CELL, lambda s=session: s.generate(MORE, max_new_tokens=1))
            session.truncate(8 * CELL)
            assert session.generate(None, max_new_tokens=150).token_ids == answers

    # A session with a name is closed.
    with pytest.raises(KeyboardInterrupt):
        with with_sweeps(opened(folder, tmp_path), cells) as llm, llm.session("book") as session:
            interrupted.at = 12 * CELL
            session.generate(TEXT, max_new_tokens=4)
    with opened(folder, tmp_path) as llm:
        logits, restored = last_logits(llm, TEXT)
        assert restored and torch.equal(logits, expected["a"])


def test_an_interruption_while_a_snapshot_is_restored(folder, tmp_path, state, monkeypatch):
    real = RawPages.copy_from
    with opened(folder, tmp_path) as llm, llm.session("book") as session:
        session.generate(TEXT[:500], max_new_tokens=1)
        session.generate(TEXT[500:1100], max_new_tokens=150)
        held = session.tokens

        def copy_from(self, other):
            real(self, other)
            raise KeyboardInterrupt

        monkeypatch.setattr(RawPages, "copy_from", copy_from)
        with pytest.raises(KeyboardInterrupt):
            session.truncate(500)
        monkeypatch.setattr(RawPages, "copy_from", real)
    with opened(folder, tmp_path, cap=None) as alone:
        with opened(folder, tmp_path) as llm, llm.session("book") as session:
            assert session.tokens == held
            assert_goes_on(session, alone)


@pytest.mark.parametrize("name", ["qwen2", "qwen3.5"])
def test_what_was_taken_before_an_interrupted_way_back_is_not_used(
    checkpoint, tmp_path, monkeypatch, name
):
    """Tokens that were decoded are prefilled after it: raw cells of before have other bits."""
    real, folder = RawPages.copy_from, checkpoint(name)
    with opened(folder, tmp_path, cap=None, sequences=4, draft=False) as llm:
        with llm.session() as session:
            session.generate(TEXT[:500], max_new_tokens=100)
            session.generate(MORE[:20], max_new_tokens=150)

            def copy_from(self, other):
                real(self, other)
                raise KeyboardInterrupt

            monkeypatch.setattr(RawPages, "copy_from", copy_from)
            with pytest.raises(KeyboardInterrupt):
                session.truncate(620)
            monkeypatch.setattr(RawPages, "copy_from", real)
            session.truncate(620)
            session.append(MORE, process=False)
            session.last_logits()
            session.truncate(620)
            assert_goes_on(session, llm)


@pytest.mark.parametrize("begun", [3, 4])
def test_an_interruption_of_the_way_back(folder, tmp_path, begun):
    """A file is damaged, and what was taken in is to be dropped, when somebody loses patience."""
    with opened(folder, tmp_path, cap=None) as llm:
        expected, _ = last_logits(llm, TEXT[: begun * CELL] + MORE)
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
    for path in prefix_dir(tmp_path).glob("*.end"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with opened(folder, tmp_path) as llm, llm.open_session(2048, sequences=1) as session:
        session.append(TEXT[: begun * CELL], process=False)
        session._prefill()
        session.append(TEXT[begun * CELL :], process=False)
        real = session._engine.sequences.rewind

        def interrupted(*args):
            raise KeyboardInterrupt

        session._engine.sequences.rewind = interrupted
        with pytest.raises(KeyboardInterrupt):
            session.find_kept()
        session._engine.sequences.rewind = real
        session.truncate(begun * CELL)
        session.append(MORE, process=False)
        assert torch.equal(session.last_logits(), expected)


def test_an_interruption_in_a_system_call_comes_through(folder, tmp_path, monkeypatch):
    from ebbtide.offload.prefixes import file as prefix_file

    real = prefix_file.os.replace

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(prefix_file.os, "replace", interrupted)
    with opened(folder, tmp_path) as llm, pytest.raises(KeyboardInterrupt):
        answer(llm, TEXT)
    monkeypatch.undo()
    assert not [name for name in kept(tmp_path) if name.endswith(".part")]
