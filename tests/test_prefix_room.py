"""Room for kept pages: caps, full disks, folders that cannot be used. What has none is not kept,
and no answer suffers.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from types import SimpleNamespace

import pytest
import torch
from prefixes_under_test import (
    CELL,
    MORE,
    TEXT,
    answer,
    kept,
    last_logits,
    opened,
    read_alone,
    read_once,
    short_texts_count,  # noqa: F401 - a fixture
)

from ebbtide import LLM
from ebbtide.offload.disk.spill_dir import prefix_dir
from ebbtide.offload.errors import InputError
from ebbtide.offload.prefixes import file as prefix_file
from ebbtide.offload.prefixes import store as prefix_store
from ebbtide.offload.prefixes.keeper import _Retries
from ebbtide.offload.prefixes.store import PrefixStore


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    return read_alone(folder, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_any_write_may_fail(folder, tmp_path, monkeypatch, error):
    """The n-th write, until none fails: the answer is the same, and nothing half-written stays."""
    with opened(folder, tmp_path, cap=None) as llm:
        tokens = answer(llm, TEXT).token_ids
    real, counts = prefix_file._Whole.write, {"left": 0}

    def fails(self, view):
        counts["left"] -= 1
        if counts["left"] == 0:
            raise OSError(error, os.strerror(error))
        real(self, view)

    monkeypatch.setattr(prefix_file._Whole, "write", fails)
    for n in (1, 2, 3, 7, 20, 60, 100000):
        for name in kept(tmp_path) if prefix_dir(tmp_path).exists() else ():
            (prefix_dir(tmp_path) / name).unlink()
        counts["left"] = n
        with opened(folder, tmp_path) as llm:
            output = answer(llm, TEXT)
        assert output.token_ids == tokens
        failed = counts["left"] <= 0
        assert [("Not all" in w) for w in output.warnings] == [True] * failed
        assert not [name for name in kept(tmp_path) if name.endswith(".part")]
    assert not failed and kept(tmp_path)


def test_what_is_kept_after_a_failure_is_found(folder, tmp_path, expected, monkeypatch):
    real, counts = os.fsync, {"left": 7}

    def fails(descriptor):
        counts["left"] -= 1
        if counts["left"] == 0:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(prefix_file.os, "fsync", fails)
    with opened(folder, tmp_path) as llm:
        assert torch.equal(last_logits(llm, TEXT)[0], expected)
        logits, restored = last_logits(llm, TEXT)
    assert torch.equal(logits, expected) and restored == 9 * CELL


def test_the_cap_holds_and_the_oldest_go(folder, tmp_path):
    texts = [TEXT, [*MORE, *TEXT], [*TEXT[:30], *MORE, *TEXT]]
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
        one = sum(os.path.getsize(prefix_dir(tmp_path) / name) for name in kept(tmp_path))
        llm._prefixes = PrefixStore(prefix_dir(tmp_path), int(2.6 * one))

        def used() -> int:
            return sum(os.path.getsize(prefix_dir(tmp_path) / name) for name in kept(tmp_path))

        last_logits(llm, texts[1])
        assert (
            last_logits(llm, texts[0])[1] == len(TEXT) - 1
        )  # used again: the second is the oldest
        last_logits(llm, texts[2])
        assert used() <= 2.6 * one
        assert last_logits(llm, texts[0])[1] == len(TEXT) - 1
        assert last_logits(llm, texts[2])[1]
        # Of the oldest the last pages went first: what is left of it can be used.
        assert last_logits(llm, texts[1])[1] < len(texts[1]) - 1


def test_a_text_larger_than_the_cap_keeps_its_beginning(folder, tmp_path):
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
        files = [prefix_dir(tmp_path) / name for name in kept(tmp_path)]
        cap = int(0.7 * sum(path.stat().st_size for path in files))
        for path in files:
            path.unlink()
        llm._prefixes = PrefixStore(prefix_dir(tmp_path), cap)
        output = answer(llm, TEXT)
        assert "is kept" in output.warnings[0] and "may take" in output.warnings[0]
        assert sum(p.stat().st_size for p in prefix_dir(tmp_path).iterdir()) <= cap
        assert last_logits(llm, TEXT)[1] == 9 * CELL


def test_what_cannot_help_does_not_go(folder, tmp_path, monkeypatch):
    """A volume that is nearly full, and a cap that the text alone exceeds."""
    with opened(folder, tmp_path) as llm:
        answer(llm, [*MORE, *TEXT])
        before = set(kept(tmp_path))
        llm._prefixes.cap_bytes = 10_000
        assert "may take" in answer(llm, TEXT).warnings[0]
        assert set(kept(tmp_path)) == before
    monkeypatch.setattr(prefix_store, "_KEPT_FREE_BYTES", 1 << 60)
    with opened(folder, tmp_path) as llm:
        assert "stay free" in answer(llm, TEXT).warnings[0]
    assert set(kept(tmp_path)) == before


def test_what_failed_once_is_kept_when_there_is_room(folder, expected, tmp_path, monkeypatch):
    """In a later reading of the same session: what was not written then is written, too."""
    with opened(folder, tmp_path, sequences=4) as llm, llm.session() as session:
        tries, make_room = [], llm._prefixes._make_room

        def full(*args, **kwargs):
            tries.append(args)
            raise OSError(errno.ENOSPC, "no room")

        monkeypatch.setattr(llm._prefixes, "_make_room", full)
        session.append(TEXT[: 12 * CELL])
        assert len(tries) == 1  # not again in each sweep
        session.append(TEXT[12 * CELL : 14 * CELL])
        assert len(tries) == 2 and not kept(tmp_path)
        session.append(TEXT[14 * CELL : 15 * CELL])  # passed over: it failed twice
        assert len(tries) == 2
        monkeypatch.setattr(llm._prefixes, "_make_room", make_room)
        session.append(TEXT[15 * CELL :], process=False)
        assert torch.equal(session.last_logits(), expected)
        assert [warning for warning in llm.warnings if "no room" in warning]
    with opened(folder, tmp_path) as llm:
        logits, restored = last_logits(llm, TEXT)
    assert restored > len(TEXT) - CELL and torch.equal(logits, expected)


def test_what_goes_on_failing_is_tried_seldom():
    retries, tries = _Retries(), []
    for reading in range(1000):
        for _ in range(3):  # sweeps
            if retries.is_due(reading):
                tries.append(reading)
                retries.note_failure()
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert gaps[:7] == [1, 2, 4, 8, 16, 32, 64] and set(gaps[6:]) == {64}
    while not retries.is_due(reading):
        reading += 1
    retries.note_success()
    retries.note_failure()
    assert not retries.is_due(reading) and retries.is_due(reading + 1)


def test_a_smaller_cap_holds_at_once(folder, tmp_path):
    files = read_once(folder, tmp_path)
    total = sum(path.stat().st_size for path in files)
    PrefixStore(prefix_dir(tmp_path), total // 2)
    left = [path for path in files if path.exists()]
    assert left and sum(path.stat().st_size for path in left) <= total // 2
    # The last pages of the text went first: its beginning is found.
    with opened(folder, tmp_path) as llm:
        assert last_logits(llm, TEXT)[1] == 9 * CELL


def test_the_cap_is_one_for_all_processes(tmp_path):
    cap, size = 1_000_000, 30_000
    stores = [PrefixStore(prefix_dir(tmp_path), cap) for _ in range(2)]
    for i in range(80):
        part = torch.zeros(size - 6, dtype=torch.uint8)
        stores[i % 2].write(f"{i:064x}.span", b"h\n", [part], size, set())
        assert sum(path.stat().st_size for path in prefix_dir(tmp_path).iterdir()) <= cap


def _write_one(store, letter, during=lambda: None):
    """A file of 30,000 bytes. during: called when some of them are written."""

    def parts():
        yield torch.zeros(10, dtype=torch.uint8)
        during()
        yield torch.zeros(29_988, dtype=torch.uint8)

    store.write(f"{letter * 64}.span", b"h\n", parts(), 30_000, set())


def test_what_another_process_is_writing_counts_whole(tmp_path):
    mine, other = (PrefixStore(prefix_dir(tmp_path), 31_000) for _ in range(2))

    def has_no_room():
        with pytest.raises(prefix_store.PrefixStoreFull):
            _write_one(mine, "b")

    _write_one(other, "a", has_no_room)
    assert [path.name[0] for path in prefix_dir(tmp_path).iterdir()] == ["a"]


def test_of_two_that_found_the_same_room_the_second_gives_way(tmp_path, monkeypatch):
    mine, other = (PrefixStore(prefix_dir(tmp_path), 31_000) for _ in range(2))
    begin = prefix_store.write_prefix_file

    def after_the_other(*args):
        monkeypatch.setattr(prefix_store, "write_prefix_file", begin)
        _write_one(other, "a")
        return begin(*args)

    monkeypatch.setattr(prefix_store, "write_prefix_file", after_the_other)
    with pytest.raises(prefix_store.PrefixStoreFull, match="all that is kept may take"):
        _write_one(mine, "b")
    assert [path.name[0] for path in prefix_dir(tmp_path).iterdir()] == ["a"]


def test_unfinished_files_of_the_dead_go(folder, tmp_path):
    store = PrefixStore(prefix_dir(tmp_path), 1 << 30)
    old, new = store.path(".a.old.part"), store.path(".a.new.part")
    old.touch()
    new.touch()
    os.utime(old, (0, time.time() - 2 * 24 * 3600))
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
    assert not old.exists() and new.exists()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "else").mkdir()
    prefix_dir(tmp_path).symlink_to(tmp_path / "else")
    with pytest.raises(InputError, match="is a link"):
        PrefixStore(prefix_dir(tmp_path), None)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="folders have no owners there")
def test_a_folder_of_somebody_else(folder, tmp_path, monkeypatch):
    """Who asked for it is told; by default nothing is kept."""
    PrefixStore(prefix_dir(tmp_path), None)
    real = os.lstat

    def lstat(path, *args, **kwargs):
        found = real(path, *args, **kwargs)
        if str(path) == str(prefix_dir(tmp_path)):
            found = SimpleNamespace(st_mode=found.st_mode, st_uid=found.st_uid + 1)
        return found

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(InputError, match="another user"):
        LLM.open(folder, spill_dir=tmp_path, prefix_cache="1GiB")
    with LLM.open(folder, spill_dir=tmp_path, prefix_cache="auto") as llm:
        assert [w for w in llm.warnings if "another user" in w and "is not kept" in w]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="prefix-cache off"):
        PrefixStore(tmp_path / "file" / "prefixes", None)
