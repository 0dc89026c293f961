"""When a file is still the one that its header was read from."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest

from ebbtide.offload.errors import BadCheckpoint
from ebbtide.offload.models import known_file
from ebbtide.offload.models.fingerprint import spread
from ebbtide.offload.models.known_file import KnownFile

SIZE, NUM_BLOCKS = 8 << 20, 256


@pytest.fixture
def file(tmp_path):
    """A day old: a clock that ticks slowly proves nothing."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(SIZE))
    age(path)
    return path


def known_of(path) -> KnownFile:
    known = KnownFile(path)
    known.remember(spread(known.size, NUM_BLOCKS))
    return known


def age(path, days: int = 1) -> None:
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - days * 86_400 * 10**9))


@contextmanager
def opened(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.fixture
def digests(monkeypatch) -> list:
    """Of each time that bytes are looked at."""
    found, original = [], known_file.digest_at

    def counted(*args):
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(known_file, "digest_at", counted)
    return found


def test_bytes_are_looked_at_once_for_each_state(file, digests):
    known = known_of(file)
    with opened(file) as descriptor:
        for num_looks in (1, 2, 3):
            for _ in range(3):
                assert known.is_same(descriptor) and not known.is_replaced()
            assert len(digests) == num_looks
            age(file)


def test_states_are_not_kept_without_end(file):
    known = known_of(file)
    with opened(file) as descriptor:
        for _ in range(50):
            age(file)
            assert known.is_same(descriptor)
    assert len(known._states) == known_file._MOST_STATES


def test_an_open_file_and_its_name_may_be_two_files_of_the_same_bytes(file, digests):
    """As on a mount where inodes' numbers move by themselves."""
    known = known_of(file)
    with opened(file) as descriptor:
        shutil.copy2(file, file.with_name("other"))
        file.with_name("other").replace(file)
        for _ in range(3):
            assert known.is_same(descriptor) and not known.is_replaced()
    assert len(digests) == 3  # losing its name is a change of the first, too


@pytest.mark.parametrize("place", [0, 8, SIZE - 1])
@pytest.mark.parametrize("keeps_time", [False, True])
def test_another_file_of_the_same_size_is_another(file, place, keeps_time):
    known, other = known_of(file), file.with_name("other")
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    other.write_bytes(data)
    if keeps_time:  # as archives give all of theirs one
        shutil.copystat(file, other)
    with opened(file) as descriptor:
        other.replace(file)
        assert known.is_same(descriptor)  # which nobody wrote to
        for _ in range(2):
            assert known.is_replaced()


def test_a_sixteenth_that_is_written_anew_makes_another(file):
    known, part = known_of(file), SIZE // 16
    with opened(file) as descriptor, open(file, "r+b") as out:
        for number in range(16):
            out.seek(number * part)
            before = out.read(part)
            out.seek(number * part)
            out.write(os.urandom(part))
            out.flush()
            age(file)
            assert not known.is_same(descriptor) and known.is_replaced()
            out.seek(number * part)
            out.write(before)
            out.flush()
            assert known.is_same(descriptor) and not known.is_replaced()


def test_another_size_is_another_file_unseen(file, digests):
    known = known_of(file)
    with opened(file) as descriptor:
        os.truncate(file, SIZE - 1)
        assert not known.is_same(descriptor) and known.is_replaced()
    assert len(digests) == 1


def test_a_name_without_a_file_says_nothing(file):
    known = known_of(file)
    file.unlink()
    assert not known.is_replaced()
    with pytest.raises(BadCheckpoint, match="cannot be opened"):
        known_of(file)


def overwrite(path, place: int = 8) -> None:
    """One byte, where it is looked at, and the time as it was."""
    found = path.stat()
    with open(path, "r+b") as out:
        out.seek(place)
        byte = out.read(1)[0]
        out.seek(place)
        out.write(bytes([byte ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_other_bytes_of_the_same_time_are_others(file):
    """As what copies into a file and gives it the time of its source leaves it."""
    known = known_of(file)
    with opened(file) as descriptor:
        assert known.is_same(descriptor)
        overwrite(file)
        assert not known.is_same(descriptor) and known.is_replaced()


@pytest.mark.parametrize("is_seen_first", [False, True])
def test_what_is_written_within_one_tick_of_the_clock_is_seen(file, monkeypatch, is_seen_first):
    """The second time that is written has the time of the first."""
    now_ns = file.stat().st_mtime_ns
    monkeypatch.setattr(known_file.time, "time_ns", lambda: now_ns + 10**6)
    # Of a file system whose clock has not gone on nothing else moves either.
    of = known_file._State.of
    monkeypatch.setattr(known_file._State, "of", lambda file: of(file)._replace(changed_ns=0))
    known = known_of(file)
    with opened(file) as descriptor:
        assert known.is_same(descriptor) or not is_seen_first
        overwrite(file)
        assert not known.is_same(descriptor) and known.is_replaced()


def test_a_time_that_lies_ahead_costs_one_look(file, digests):
    """A clock that was wrong."""
    age(file, days=-400)
    known = known_of(file)
    with opened(file) as descriptor:
        for _ in range(3):
            assert known.is_same(descriptor)
        assert len(digests) == 1
        overwrite(file)
        assert not known.is_same(descriptor)


def test_a_file_that_changes_before_its_bytes_are_remembered_is_refused(file):
    """Its header was read in between, of the file before it or of half of this one."""
    known = KnownFile(file)
    shutil.copy2(file, file.with_name("other"))
    overwrite(file.with_name("other"))
    os.utime(file.with_name("other"))
    file.with_name("other").replace(file)
    with pytest.raises(BadCheckpoint, match="changed while the model was opened"):
        known.remember([(0, 64)])
