"""Kept pages when things go wrong: damage, full disks, kills, other processes. It costs reading the
text again, and never an answer.
"""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefixes_under_test import (
    CELL,
    MORE,
    TEXT,
    answer,
    cached,
    kept,
    last_logits,
    opened,
    short_texts_count,  # noqa: F401 - a fixture
)

from ebbtide import LLM
from ebbtide.offload import prefix_file, prefix_store
from ebbtide.offload.errors import InputError
from ebbtide.offload.prefix_file import (
    BadPrefixFile,
    head_of,
    read_prefix_file,
    write_prefix_file,
)
from ebbtide.offload.prefix_keeper import _Retries
from ebbtide.offload.prefix_store import PrefixStore
from ebbtide.offload.spill_dir import PREFIX_SUFFIXES, prefix_dir


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    with opened(folder, tmp_path_factory.mktemp("alone"), cap=None) as llm:
        return last_logits(llm, TEXT)[0]


def read_once(folder, place) -> list[Path]:
    """The files of TEXT, after it was read."""
    with opened(folder, place) as llm:
        last_logits(llm, TEXT)
    return [prefix_dir(place) / name for name in kept(place)]


# ---- one file ------------------------------------------------------------------------------------

PARTS = [torch.arange(100, dtype=torch.uint8), torch.full((3, 5), 7.5), torch.tensor([1, 2])]
SIZES = [100, 60, 16]
HEAD = head_of({"kind": "test"}, array("i", [1, 2, 70000]))


def written(path: Path) -> bytes:
    with write_prefix_file(path, HEAD) as file:
        for part in PARTS:
            file.add(part)
    return path.read_bytes()


def read(path: Path, head: bytes = HEAD, sizes=SIZES) -> list[bytes]:
    room = torch.empty(max(sizes), dtype=torch.uint8)
    with read_prefix_file(path, head, sizes) as file:
        return [file.take(room).numpy().tobytes() for _ in sizes]


def test_parts_come_back(tmp_path):
    written(tmp_path / "a")
    assert read(tmp_path / "a") == [part.numpy().tobytes() for part in PARTS]
    assert os.listdir(tmp_path) == ["a"]


def test_what_was_written_for_something_else_is_refused(tmp_path):
    written(tmp_path / "a")
    other = head_of({"kind": "test"}, array("i", [1, 2, 70001]))
    assert len(other) == len(HEAD)
    with pytest.raises(BadPrefixFile, match="other tokens"):
        read(tmp_path / "a", other)
    with pytest.raises(BadPrefixFile, match="were written"):
        read(tmp_path / "a", sizes=[100, 60, 15])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_a_file_goes_unseen(tmp_path, data):
    good = written(tmp_path / "a")
    place = data.draw(st.integers(0, len(good) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    bad = {
        "flip": good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]),
        "cut": good[:place],
        "insert": good[:place] + b"x" + good[place:],
        "remove": good[:place] + good[place + 1 :],
    }[kind]
    if kind == "flip":
        bad += good[place + 1 :]
    (tmp_path / "a").write_bytes(bad)
    with pytest.raises(BadPrefixFile):
        read(tmp_path / "a")


def test_a_block_that_raises_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with write_prefix_file(tmp_path / "a", HEAD) as file:
            file.add(PARTS[0])
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_reads_and_writes_may_be_short(tmp_path, monkeypatch):
    real = os.fdopen

    def dribbling(number, mode, buffering):
        file = real(number, mode, buffering=0)

        class Dribble:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, view):
                return file.write(view[:7])

            def fileno(self):
                return file.fileno()

        return Dribble()

    monkeypatch.setattr(prefix_file.os, "fdopen", dribbling)
    written(tmp_path / "a")
    monkeypatch.undo()
    assert read(tmp_path / "a") == [part.numpy().tobytes() for part in PARTS]


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_costs_reading(folder, tmp_path, expected, seed):
    chance = random.Random(seed)
    files = read_once(folder, tmp_path)
    path = chance.choice(files)
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    with opened(folder, tmp_path) as llm:
        logits, restored = last_logits(llm, TEXT)
        assert torch.equal(logits, expected)
        # What was not used was removed. Of the last two ends one is enough.
        again, restored = last_logits(llm, TEXT)
        assert torch.equal(again, expected) and restored >= 17 * CELL
    assert len(files) - 1 <= len(kept(tmp_path)) <= len(files)


def test_damage_is_said(folder, tmp_path):
    files = read_once(folder, tmp_path)
    span = max((p for p in files if p.suffix == ".span"), key=lambda p: p.stat().st_mtime_ns)
    span.write_bytes(span.read_bytes()[:-1])
    with opened(folder, tmp_path) as llm:
        output = answer(llm, TEXT)
    assert cached(output) == 0 and "read again" in output.warnings[0]
    assert str(span) in output.warnings[0]


def test_missing_files_are_nothing_kept(folder, tmp_path, expected):
    for path in read_once(folder, tmp_path):
        path.unlink()
        with opened(folder, tmp_path) as llm:
            output_logits, _ = last_logits(llm, TEXT)
            assert torch.equal(output_logits, expected)
            assert last_logits(llm, TEXT)[1] >= 17 * CELL


@pytest.mark.parametrize("what", ["open", "readinto"])
def test_a_disk_that_cannot_be_read(folder, tmp_path, expected, monkeypatch, what):
    read_once(folder, tmp_path)

    def fails(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    name = {"open": "read_prefix_file", "readinto": "_fill"}[what]
    module = {"open": "ebbtide.offload.prefix_keeper", "readinto": "ebbtide.offload.prefix_file"}
    with opened(folder, tmp_path) as llm:
        monkeypatch.setattr(f"{module[what]}.{name}", fails)
        logits, restored = last_logits(llm, TEXT)
        assert torch.equal(logits, expected) and restored == 0


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_system_that_does_not_say(folder, tmp_path, expected, monkeypatch, error):
    """What may pass loses no file; a file that cannot be read is written anew."""
    files = read_once(folder, tmp_path)

    def fails(real):
        def call(path, *args, **kwargs):
            if str(path).endswith(PREFIX_SUFFIXES):
                raise OSError(error, os.strerror(error))
            return real(path, *args, **kwargs)

        return call

    for module, name in ((os, "stat"), (builtins, "open")):
        with monkeypatch.context() as patch, opened(folder, tmp_path) as llm:
            patch.setattr(module, name, fails(getattr(module, name)))
            logits, restored = last_logits(llm, TEXT)
            assert torch.equal(logits, expected) and restored == 0
        if error == errno.EMFILE:
            assert {path.name for path in files} == set(kept(tmp_path))
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
        assert last_logits(llm, TEXT)[1] >= 17 * CELL


def test_what_is_no_file_stands_in_nobodys_way(folder, tmp_path, expected):
    files = read_once(folder, tmp_path)
    newest = sorted((p for p in files if p.suffix == ".span"), key=lambda p: p.stat().st_mtime_ns)
    newest[0].unlink()
    newest[0].mkdir()
    with opened(folder, tmp_path) as llm:
        logits, restored = last_logits(llm, TEXT)
        assert torch.equal(logits, expected) and restored == 9 * CELL
        assert [w for w in llm.warnings if str(newest[0]) in w]


def test_files_that_vanish_while_they_are_read(folder, tmp_path, expected):
    """Another process makes room, at any time."""
    read_once(folder, tmp_path)
    stop = threading.Event()
    chance = random.Random(4)

    def remove():
        while not stop.wait(0.002):
            names = kept(tmp_path)
            if names:
                (prefix_dir(tmp_path) / chance.choice(names)).unlink(missing_ok=True)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        with opened(folder, tmp_path) as llm:
            for _ in range(6):
                assert torch.equal(last_logits(llm, TEXT)[0], expected)
    finally:
        stop.set()
        thread.join()


def test_an_interruption_leaves_a_session_that_goes_on(folder, tmp_path, expected):
    read_once(folder, tmp_path)
    for after in range(1, 6):
        with opened(folder, tmp_path) as llm, llm.open_session(2048, sequences=4) as session:
            session.append(TEXT[: 2 * CELL], process=False)
            session._prefill()
            session.append(TEXT[2 * CELL :], process=False)
            reports = []

            def stop(report, reports=reports, after=after):
                reports.append(report)
                if len(reports) == after:
                    raise KeyboardInterrupt

            llm.on_progress = stop
            with pytest.raises(KeyboardInterrupt):
                session.find_kept()
            llm.on_progress = None
            session._runtime.store.check_integrity(deep=True)
            assert session.num_processed == 0
            assert torch.equal(session.last_logits(), expected)
            assert session.take_recomputed() == 2 * CELL


# ---- room ----------------------------------------------------------------------------------------


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


# ---- kills ---------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import pathlib
import prefixes_under_test as under
from ebbtide.offload import prefix_file, prefix_keeper, prefix_store

prefix_keeper._LEAST_TOKENS, prefix_keeper._END_TOKENS = 4 * under.CELL, 8 * under.CELL
prefix_keeper._NEAR_TOKENS = 2 * under.CELL
prefix_store._KEPT_FREE_BYTES = 0
left = {number}

def dies(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

prefix_file._Whole.write = dies(prefix_file._Whole.write)
prefix_file.os.replace = dies(os.replace)
prefix_file.os.fsync = dies(os.fsync)
with under.opened(pathlib.Path({folder!r}), pathlib.Path({place!r})) as llm:
    under.last_logits(llm, under.TEXT)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_kills_while_files_are_written(folder, tmp_path, expected):
    """Each run dies a little further on, among writes, fsyncs and renames."""
    tests = str(Path(__file__).parent)
    done = None
    for number in (1, 9, 11, 30, 66, 1000):
        program = KILLED.format(tests=tests, folder=str(folder), place=str(tmp_path), number=number)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr.decode()
    assert done is not None and done.returncode == 0
    with opened(folder, tmp_path) as llm:
        logits, restored = last_logits(llm, TEXT)
    assert torch.equal(logits, expected) and restored == len(TEXT) - 1
