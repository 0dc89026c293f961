"""The scratch file, all three ways: what comes back, who can see it, and what a bad disk does."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from ebbtide.offload.disk import disk, scratch
from ebbtide.offload.disk.disk import (
    ALIGNMENT_BYTES,
    ScratchFile,
    Way,
    check_space,
)
from ebbtide.offload.errors import DoesNotFit, InputError, StorageError
from ebbtide.offload.pages.tier import MemoryTier, aligned_bytes
from ebbtide.offload.planning import bandwidth, budget
from ebbtide.offload.planning.bandwidth import measure_disk, measure_memory

BLOCK = ALIGNMENT_BYTES
WAYS = pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions and processes")


def view_of(num_bytes: int) -> memoryview:
    return memoryview(aligned_bytes(num_bytes).numpy()).cast("B")


def filled(num_bytes: int, seed: int) -> memoryview:
    view = view_of(num_bytes)
    view[:] = random.Random(seed).randbytes(num_bytes)
    return view


# ---- what comes back -------------------------------------------------------------------------


@WAYS
def test_what_is_read_is_what_was_written_last(way, tmp_path):
    sizes = [1, 2, 5, 16]
    with_offsets = [(7, sizes[0]), (0, sizes[1]), (30, sizes[2]), (9, sizes[3]), (8, sizes[1])]
    file, model = ScratchFile(tmp_path, way, step_bytes=4 * BLOCK), bytearray(40 * BLOCK)
    try:
        for seed, (block, count) in enumerate(with_offsets):
            data = filled(count * BLOCK, seed)
            file.write_from(data, block * BLOCK)
            model[block * BLOCK : (block + count) * BLOCK] = data
        for block, count in [(0, 1), (3, 9), (0, 35), (34, 1)]:
            view = view_of(count * BLOCK)
            file.read_into(view, block * BLOCK)
            assert view == model[block * BLOCK : (block + count) * BLOCK]
        c = file.snapshot()
        assert (c.num_writes, c.num_reads) == (5, 4)
        assert (c.bytes_written, c.bytes_read) == (26 * BLOCK, 46 * BLOCK)
        assert c.read_s > 0 and c.write_s > 0
    finally:
        file.close()


@WAYS
def test_several_threads_read_and_write_at_once(way, tmp_path):
    file, wrong = ScratchFile(tmp_path, way), []

    def work(seed: int) -> None:
        data, view = filled(3 * BLOCK, seed), view_of(3 * BLOCK)
        for turn in range(20):
            offset = (seed * 20 + turn) * 3 * BLOCK
            file.write_from(data, offset)
            file.read_into(view, offset)
            if view != data:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert not wrong and file.counters.num_reads == 80


@WAYS
def test_the_file_grows_in_steps_and_its_room_is_reserved(way, tmp_path):
    file = ScratchFile(tmp_path, way, step_bytes=8 * BLOCK)
    file.write_from(filled(BLOCK, 0), 0)
    assert file.size_bytes == 8 * BLOCK
    file.write_from(filled(BLOCK, 1), 8 * BLOCK)
    assert file.size_bytes == 16 * BLOCK
    file.write_from(filled(20 * BLOCK, 2), 16 * BLOCK)  # more than a step
    assert file.size_bytes == 36 * BLOCK
    assert os.fstat(file._fd).st_size == file.size_bytes
    file.close()


@WAYS
def test_steps_end_at_what_the_file_may_take(way, tmp_path):
    file = ScratchFile(tmp_path, way, step_bytes=8 * BLOCK, most_bytes=12 * BLOCK)
    file.write_from(filled(BLOCK, 0), 0)
    file.write_from(filled(BLOCK, 1), 8 * BLOCK)
    assert file.size_bytes == 12 * BLOCK == os.fstat(file._fd).st_size
    file.write_from(filled(BLOCK, 2), 12 * BLOCK)
    assert file.size_bytes == 13 * BLOCK
    file.close()


@WAYS
def test_reading_past_the_end_is_an_error_and_not_a_loop(way, tmp_path):
    file = ScratchFile(tmp_path, way)
    with pytest.raises(StorageError, match="shorter than it should be"):
        file.read_into(view_of(2 * BLOCK), 1 << 30)
    file.close()


@pytest.mark.parametrize(("offset", "length"), [(1, BLOCK), (0, BLOCK - 512)])
def test_unaligned_requests_are_bugs_in_every_way(offset, length, tmp_path):
    for way in Way:
        file = ScratchFile(tmp_path, way)
        with pytest.raises(AssertionError):
            file.read_into(view_of(length), offset)
        file.close()


class Stutters(ScratchFile):
    """Moves less than asked, at odd lengths, and is interrupted now and then."""

    turn = 0

    def _some(self, move, view, offset):
        self.turn += 1
        if self.turn % 3 == 0:
            raise InterruptedError
        moved = move(view[: max(BLOCK, len(view) // 2 // BLOCK * BLOCK)], offset)
        # What a signal in the middle of a block leaves: the rest has to start on its boundary.
        return moved - 100 if self.turn % 3 == 1 and moved > BLOCK else moved

    def _read_some(self, view, offset):
        return self._some(super()._read_some, view, offset)

    def _write_some(self, view, offset):
        return self._some(super()._write_some, view, offset)


@WAYS
def test_short_and_interrupted_requests_are_continued(way, tmp_path):
    file = Stutters(tmp_path, way)
    data, view = filled(13 * BLOCK, 1), view_of(13 * BLOCK)
    file.write_from(data, 5 * BLOCK)
    file.read_into(view, 5 * BLOCK)
    assert view == data and file.turn > 6
    file.close()


@WAYS
def test_direct_io_is_direct_or_says_what_it_became(way, tmp_path):
    file = ScratchFile(tmp_path, way)
    flags = getattr(os, "O_DIRECT", 0)
    if file.way is Way.DIRECT and flags:
        import fcntl

        assert fcntl.fcntl(file._fd, fcntl.F_GETFL) & flags
    assert file.way is way or (way, file.way) == (Way.DIRECT, Way.NOCACHE)
    file.close()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT on this system")
@pytest.mark.parametrize("when", ["open", "first block"])
def test_a_filesystem_without_direct_io_is_read_through_the_cache(when, tmp_path, monkeypatch):
    real_open = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            if flags & os.O_CREAT:  # Linux makes the file first and refuses then
                os.close(real_open(path, flags & ~os.O_DIRECT, *args, **kwargs))
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_open(path, flags, *args, **kwargs)

    if when == "open":
        monkeypatch.setattr(scratch.os, "open", refuse)
    else:
        monkeypatch.setattr(disk, "_direct_works", lambda fd: False)
    file = ScratchFile(tmp_path, Way.DIRECT)
    assert file.way is Way.NOCACHE and not os.listdir(tmp_path)
    data, view = filled(BLOCK, 3), view_of(BLOCK)
    file.write_from(data, 0)
    file.read_into(view, 0)
    assert view == data
    file.close()


def test_the_fastest_way_is_the_default(tmp_path):
    file = ScratchFile(tmp_path)
    expected = Way.DIRECT if hasattr(os, "O_DIRECT") else Way.NOCACHE
    assert file.way is expected or file.way is Way.NOCACHE or not hasattr(os, "preadv")
    file.close()
    with pytest.raises(ValueError):
        ScratchFile(tmp_path, "mmap")


def test_aligned_memory_is_aligned_zeroed_and_given_out_as_it_is_touched():
    import psutil

    before = psutil.Process().memory_info().rss
    arena = MemoryTier(1 << 16, 4 * BLOCK)  # 1 GiB
    assert arena.frames.data_ptr() % ALIGNMENT_BYTES == 0
    assert int(arena.records(5, 2).sum()) == 0
    # A hundredth of the arena, so that huge pages and other threads' memory do not matter.
    assert psutil.Process().memory_info().rss - before < arena.num_bytes // 100
    view = arena.raw(3, 2)
    view[:4] = b"abcd"
    assert bytes(arena.frames[3, :4].tolist()) == b"abcd" and len(view) == 8 * BLOCK
    arena.close()
    assert MemoryTier(0, BLOCK).frames.shape == (0, BLOCK)
    assert MemoryTier(4, 0).records(1, 2).shape == (2, 0)


def test_speeds_are_measured_once_and_quickly(tmp_path):
    started = time.perf_counter()
    disk_speed, memory_speed = measure_disk(tmp_path), measure_memory(2, 1 << 22)
    assert min(disk_speed.write_bytes_per_s, disk_speed.random_bytes_per_s) > 0
    assert disk_speed.sequential_bytes_per_s > 0 and memory_speed.num_threads == 2
    # 0.25 s are asked for; a slow disk must still write two extents and read some.
    assert time.perf_counter() - started < 10
    assert measure_disk(tmp_path) is disk_speed and measure_memory(2, 1 << 22) is memory_speed
    assert not os.listdir(tmp_path)
    with pytest.raises(InputError):
        measure_disk(tmp_path / "missing")


@WAYS
@pytest.mark.parametrize("allowed", [1 << 20, (3 << 20) + 4096, 200 << 20])
def test_no_more_is_written_to_measure_a_disk_than_it_may_hold(tmp_path, monkeypatch, way, allowed):
    sizes = []

    class Watched(ScratchFile):
        def close(self):
            sizes.append((os.fstat(self.descriptor).st_size, self.counters.bytes_written))
            super().close()

    monkeypatch.setattr(bandwidth, "ScratchFile", Watched)
    speed = measure_disk(tmp_path, way, seconds=0.05, disk_memory=allowed)
    [(size, written)] = sizes
    assert max(size, written) <= allowed and written >= 1 << 20
    assert ("less certain" in speed.caveat) == (allowed < 64 << 20)
    assert speed.bytes_per_s > 0


@pytest.mark.parametrize("allowed", [0, (1 << 20) - 1])
def test_a_disk_that_holds_too_little_is_not_measured(monkeypatch, allowed):
    monkeypatch.setattr(bandwidth, "default_spill_dir", lambda: pytest.fail("a folder was made"))
    with pytest.raises(DoesNotFit, match=r"not measured.*--disk-memory allows") as caught:
        measure_disk(disk_memory=allowed)
    assert caught.value.available_bytes == allowed < caught.value.needed_bytes


def test_what_auto_leaves_of_a_disk_holds_for_its_measure(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=1 << 40, free=(5 << 30) + 100)
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda where: usage)
    with pytest.raises(DoesNotFit) as caught:
        measure_disk(tmp_path)
    assert caught.value.available_bytes == 100


# ---- who can see it --------------------------------------------------------------------------


@posix
@WAYS
@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_the_file_is_the_users_alone_whatever_the_umask(way, umask, tmp_path):
    old = os.umask(umask)
    try:
        file = ScratchFile(tmp_path, way)
    finally:
        os.umask(old)
    found = os.fstat(file._fd)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert len(os.listdir(tmp_path)) == found.st_nlink == (1 if way is Way.PORTABLE else 0)
    file.close()
    file.close()
    assert not os.listdir(tmp_path)


@posix
@WAYS
def test_without_o_tmpfile_the_file_has_no_name_either(way, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    file = ScratchFile(tmp_path, way)
    assert len(os.listdir(tmp_path)) == (1 if way is Way.PORTABLE else 0)
    file.close()
    assert not os.listdir(tmp_path)


CHILD = """
import mmap, sys, time
from ebbtide.offload.disk.disk import ScratchFile
file = ScratchFile(sys.argv[1], sys.argv[2])
file.write_from(memoryview(mmap.mmap(-1, 1 << 20)), 0)
print("ready", flush=True)
if sys.argv[3] == "wait":
    time.sleep(60)
if sys.argv[3] == "raise":
    raise RuntimeError("on purpose")
"""


def child(directory, way: Way, end: str) -> subprocess.Popen:
    args = [sys.executable, "-c", CHILD, str(directory), way.value, end]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    return process


@posix
@WAYS
def test_nothing_is_left_after_sigkill(way, tmp_path):
    process = child(tmp_path, way, "wait")
    if way is Way.PORTABLE:
        # A live process's file is never swept ...
        assert scratch.sweep(tmp_path) == 0 and len(os.listdir(tmp_path)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert len(os.listdir(tmp_path)) == (1 if way is Way.PORTABLE else 0)
    # ... and a dead one's is, by whoever comes next.
    file = ScratchFile(tmp_path)
    assert file.num_swept == (1 if way is Way.PORTABLE else 0) and not os.listdir(tmp_path)
    file.close()


@WAYS
@pytest.mark.parametrize("end", ["return", "raise"])
def test_nothing_is_left_when_a_process_ends_without_closing(way, end, tmp_path):
    process = child(tmp_path, way, end)
    assert process.wait(20) == (1 if end == "raise" else 0)
    process.stdout.close()
    assert not os.listdir(tmp_path)


@posix
def test_the_sweep_touches_nothing_that_is_not_ours(tmp_path):
    mine = f"ebbtide-{scratch._HOST}-1-{'0' * 16}.scratch"
    others = [
        f"ebbtide-{'f' * 8}-1-{'0' * 16}.scratch",  # another host's, in a shared folder
        f"ebbtide-{scratch._HOST}-1-{'0' * 16}.scratch.bak",
        "thesis.pdf",
    ]
    for name in [mine, *others]:
        (tmp_path / name).write_bytes(b"x")
    link = tmp_path / f"ebbtide-{scratch._HOST}-1-{'1' * 16}.scratch"
    link.symlink_to(tmp_path / "thesis.pdf")
    (tmp_path / f"ebbtide-{scratch._HOST}-1-{'2' * 16}.scratch").mkdir()
    assert scratch.sweep(tmp_path) == 1
    assert not (tmp_path / mine).exists() and len(os.listdir(tmp_path)) == 5


@posix
def test_where_there_are_no_locks_the_process_id_decides(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(scratch.fcntl, "flock", refuse)
    file = ScratchFile(tmp_path, Way.PORTABLE)
    assert scratch.sweep(tmp_path) == 0  # ours, and we live
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"ebbtide-{scratch._HOST}-{dead.pid}-{'0' * 16}.scratch").write_bytes(b"x")
    assert scratch.sweep(tmp_path) == 1
    file.close()


@posix
def test_a_name_that_a_sweep_took_in_the_making_is_made_again(tmp_path, monkeypatch):
    lock, taken = scratch._lock, []

    def swept_once(fd):
        if not taken:
            taken.extend(os.listdir(tmp_path))
            os.unlink(tmp_path / taken[0])
        return lock(fd)

    monkeypatch.setattr(scratch, "_lock", swept_once)
    file = ScratchFile(tmp_path, Way.PORTABLE)
    assert len(os.listdir(tmp_path)) == 1 and os.listdir(tmp_path) != taken
    file.close()


# ---- room ------------------------------------------------------------------------------------


class Full(ScratchFile):
    """A disk that has room for `room` bytes; `code` is what it says then."""

    room, code = 8 * BLOCK, errno.ENOSPC

    def _allocate(self, offset, num_bytes):
        if offset + num_bytes > self.room:
            raise OSError(self.code, os.strerror(self.code))
        super()._allocate(offset, num_bytes)


@WAYS
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_how_much_where_and_what_to_do(way, code, tmp_path):
    file = Full(tmp_path, way, step_bytes=6 * BLOCK)
    file.code = code
    file.write_from(filled(BLOCK, 0), 0)
    # The next whole step has no room, but what is needed has.
    file.write_from(filled(BLOCK, 1), 7 * BLOCK)
    assert file.size_bytes == 8 * BLOCK
    with pytest.raises(StorageError) as caught:
        file.write_from(filled(2 * BLOCK, 2), 8 * BLOCK)
    text = str(caught.value)
    assert os.strerror(code) in text and str(tmp_path) in text and "--spill-dir" in text
    assert "8.0 KiB" in text and "free" in text
    assert caught.value.exit_code == 4
    view = view_of(BLOCK)
    file.read_into(view, 0)  # what is there stays readable
    assert view == filled(BLOCK, 0)
    file.close()


@WAYS
def test_a_failing_disk_is_told_from_a_full_one(way, tmp_path, monkeypatch):
    file = ScratchFile(tmp_path, way)
    file.write_from(filled(BLOCK, 0), 0)

    def fail(view, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file, "_read_some", fail)
    with pytest.raises(StorageError, match=r"could not read 4\.0 KiB .*Input/output error; check"):
        file.read_into(view_of(BLOCK), 0)
    file.close()


ON_TMPFS = """
import mmap, os, sys
from ebbtide.offload.disk.disk import ScratchFile, volume_warnings
from ebbtide.offload.errors import StorageError
folder, way = sys.argv[1:]
assert "memory, not a disk" in volume_warnings(folder)[0]
file = ScratchFile(folder, way, step_bytes=1 << 18)
view = memoryview(mmap.mmap(-1, 1 << 16))
written = 0
try:
    for offset in range(0, 1 << 24, 1 << 16):
        view[:1] = bytes([offset >> 16 & 255])
        file.write_from(view, offset)
        written += 1
    sys.exit("no error")
except StorageError as error:
    assert "No space left" in str(error) and folder in str(error), error
assert written >= 12, written
for i in range(written):
    file.read_into(view, i << 16)
    assert view[0] == i, i
file.close()
assert os.listdir(folder) == [] and os.statvfs(folder).f_bavail > 240
"""


@WAYS
def test_a_small_tmpfs_fills_up_and_what_is_there_stays(way, tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("no unshare: cannot mount a small tmpfs")
    script = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1" "$4"'
    args = ["unshare", "-Urm", "sh", "-c", script, "sh", str(tmp_path)]
    result = subprocess.run(
        [*args, sys.executable, ON_TMPFS, way.value], capture_output=True, text=True, timeout=60
    )
    if result.returncode and ("unshare" in result.stderr or "mount" in result.stderr[:60]):
        pytest.skip(f"not permitted to mount a tmpfs: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr


def test_the_space_check_leaves_what_is_to_be_left(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert 0 < check_space(tmp_path, BLOCK) <= free + (1 << 30)  # others write meanwhile
    with pytest.raises(DoesNotFit) as caught:
        check_space(tmp_path, BLOCK, keep_free_bytes=1 << 60)
    error = caught.value
    assert (error.tier, error.needed_bytes, error.available_bytes) == ("disk", BLOCK, 0)
    with pytest.raises(DoesNotFit, match=r"1048576\.0 TiB are needed"):
        check_space(tmp_path, 1 << 60)
    with pytest.raises(InputError):
        check_space(tmp_path / "missing", BLOCK)
