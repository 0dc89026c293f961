"""Kept pages when things go wrong: damage, full disks, kills, other processes. It costs reading the
text again, and never an answer.
"""

from __future__ import annotations

import builtins
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from fault_counts import TIMES
from prefixes_under_test import (
    CELL,
    TEXT,
    answer,
    cached,
    kept,
    last_logits,
    opened,
    read_alone,
    read_once,
    short_texts_count,  # noqa: F401 - a fixture
)

from ebbtide.offload.disk.spill_dir import PREFIX_SUFFIXES, prefix_dir


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    return read_alone(folder, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("seed", range(12 * TIMES))
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
    module = {
        "open": "ebbtide.offload.prefixes.keeper",
        "readinto": "ebbtide.offload.prefixes.file",
    }
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


# ---- kills ---------------------------------------------------------------------------------------

# Reads TEXT once for each number, in a child that dies at that event, and says how it ended. The
# parent imports, and runs nothing that would be lost in a child.
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import pathlib
import prefixes_under_test as under
from ebbtide.offload.prefixes import file as prefix_file
from ebbtide.offload.prefixes import keeper as prefix_keeper
from ebbtide.offload.prefixes import store as prefix_store

prefix_keeper._LEAST_TOKENS, prefix_keeper._END_TOKENS = 4 * under.CELL, 8 * under.CELL
prefix_keeper._NEAR_TOKENS = 2 * under.CELL
prefix_store._KEPT_FREE_BYTES = 0
left = 0

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
for left in {numbers}:
    if os.fork() == 0:
        with under.opened(pathlib.Path({folder!r}), pathlib.Path({place!r})) as llm:
            under.last_logits(llm, under.TEXT)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
@pytest.mark.parametrize("seed", range(TIMES))
def test_kills_while_files_are_written(folder, tmp_path, expected, seed):
    """Each run dies a little further on, among writes, fsyncs and renames, but for the last."""
    numbers = [1, 9, 11, 30, 66]
    if seed:
        numbers = sorted(random.Random(seed).choices(range(1, 80), k=len(numbers)))
    program = KILLED.format(
        tests=str(Path(__file__).parent),
        folder=str(folder),
        place=str(tmp_path),
        numbers=[*numbers, 1000],
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    *died, last = map(int, done.stdout.split())
    assert len(died) == len(numbers) and last == 0, done.stderr.decode()
    assert set(died) <= {-signal.SIGKILL, 0}, done.stderr.decode()
    assert died[0] == -signal.SIGKILL
    with opened(folder, tmp_path) as llm:
        logits, restored = last_logits(llm, TEXT)
    # The end itself is not kept where a run has died behind a place close to it.
    assert torch.equal(logits, expected)
    assert restored == len(TEXT) - 1 or (seed and restored >= len(TEXT) - 2 * CELL)
