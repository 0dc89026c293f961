"""Many reads at once, by C++ threads and by Python's: the same bytes, the same errors, the same
order of service.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from ebbtide.kernels import dispatch
from ebbtide.offload.disk import reads as reads_module
from ebbtide.offload.disk.disk import ALIGNMENT_BYTES, ScratchFile, Way
from ebbtide.offload.disk.extent_file import ExtentFile, crcs_of
from ebbtide.offload.disk.reads import NativeReads, State, ThreadReads, Urgency
from ebbtide.offload.errors import StorageError
from ebbtide.offload.pages.page_table import Extents, Tier
from ebbtide.offload.pages.tier import aligned_bytes

RECORD, S, NUM_FRAMES = 2 * ALIGNMENT_BYTES, 4, 64
compiled = pytest.mark.skipif(dispatch.compiled_for() is None, reason="no compiled kernels here")
WAYS = pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)


class Gated(ScratchFile):
    """A disk whose reads wait until they are let through; remembers which frames they touched."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reads, self.may_read = [], threading.Event()

    def _read_some(self, view, offset):
        self.reads.append(offset // RECORD)
        assert self.may_read.wait(20)
        return super()._read_some(view, offset)


class Disk:
    """A file of NUM_FRAMES records, a reader of it, and a place in memory for each tag."""

    def __init__(self, kind, directory, way=None, scratch=ScratchFile, num_threads=3, **options):
        self.extents = Extents({Tier.DISK: NUM_FRAMES}, S)
        for span in range(NUM_FRAMES // S):
            self.extents.allocate(Tier.DISK, 0, span)
        crcs = self.extents.crcs[Tier.DISK]
        self.scratch = scratch(directory, way)
        self.file = ExtentFile(
            self.scratch, RECORD, crcs, lambda frame: self.extents.owner(Tier.DISK, frame)
        )
        data = random.Random(1).randbytes(NUM_FRAMES * RECORD)
        self.data = np.frombuffer(data, dtype=np.uint8).reshape(NUM_FRAMES, RECORD)
        buffer = aligned_bytes(len(data))
        buffer.numpy()[:] = self.data.reshape(-1)
        self.file.write(0, memoryview(buffer.numpy()).cast("B"))
        self.memory = aligned_bytes(NUM_FRAMES * S * RECORD).view(NUM_FRAMES, S, RECORD).numpy()
        if kind == "threads":
            self.reads = ThreadReads(self.file, NUM_FRAMES, num_threads)
        else:
            self.reads = NativeReads(self.file, NUM_FRAMES, num_threads, self.memory, **options)

    def submit(self, tags, frames, counts=None, urgency=Urgency.DEMAND):
        tags = np.array(tags, dtype=np.int64)
        counts = np.array(counts if counts is not None else [1] * len(tags), dtype=np.int64)
        places = self.memory.ctypes.data + tags * S * RECORD
        self.reads.submit(tags, np.array(frames, dtype=np.int64), counts, places, urgency)
        return tags

    def wait(self, tags):
        """Until none of the tags is under way, or one failed."""
        deadline = time.monotonic() + 20
        self.reads.expect(tags)
        while True:
            seen = self.reads.happened()
            if self.reads.failure() or not np.isin(self.reads.states[tags], (1, 2)).any():
                return
            assert time.monotonic() < deadline
            self.reads.wait(seen, 1)

    def check(self, tags, frames, counts):
        for tag, frame, count in zip(tags, frames, counts, strict=True):
            assert self.reads.states[tag] == State.READY
            assert (self.memory[tag, :count] == self.data[frame : frame + count]).all()


@pytest.fixture(params=["native", "threads"])
def disk(request, tmp_path):
    """Makes disks, and closes them."""
    if request.param == "native" and dispatch.compiled_for() is None:
        pytest.skip("no compiled kernels here")
    made = []

    def make(**options):
        made.append(Disk(request.param, tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        if hasattr(each.scratch, "may_read"):
            each.scratch.may_read.set()
        assert each.reads.close(10)
        each.scratch.close()


@WAYS
def test_what_is_read_is_what_was_written(way, disk):
    d, chance = disk(way=way), random.Random(2)
    for _ in range(30):
        tags = chance.sample(range(NUM_FRAMES), chance.randint(1, NUM_FRAMES))
        counts = [chance.randint(1, S) for _ in tags]
        frames = [chance.randint(0, NUM_FRAMES - count) for count in counts]
        d.memory[:] = 0
        submitted = d.submit(tags, frames, counts, chance.choice(list(Urgency)))
        d.reads.promote(submitted[::2])
        d.wait(submitted)
        d.check(tags, frames, counts)
        d.reads.states[submitted] = State.NONE
    assert d.reads.failure() is None
    assert d.reads.bytes_read() == d.scratch.snapshot().bytes_read > 0


@compiled
def test_neighbours_are_read_in_one_go_and_not_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(reads_module, "MOST_BYTES", 8 * RECORD)
    d = Disk("native", tmp_path, num_threads=1)
    tags = d.submit(range(20), [*range(12), *range(40, 56, 2)])
    d.wait(tags)
    d.check(tags, [*range(12), *range(40, 56, 2)], [1] * 20)
    d.reads.bytes_read()
    assert d.scratch.snapshot().num_reads == 2 + 8
    assert d.reads.close(10)
    d.scratch.close()


@compiled
@pytest.mark.parametrize("most", [100 + ALIGNMENT_BYTES, 3 * ALIGNMENT_BYTES, 5 * RECORD])
def test_what_a_system_reads_short_is_continued(most, tmp_path):
    d = Disk("native", tmp_path, way=Way.NOCACHE, most_at_once=most)
    counts = [3, 4, 1, 2, 4]
    frames = [0, 3, 7, 20, 22]  # all neighbours, but for the fourth
    d.wait(d.submit(range(5), frames, counts))
    d.check(range(5), frames, counts)
    assert d.reads.close(10)
    d.scratch.close()


def test_a_record_that_changed_is_an_error_that_names_it(disk):
    d = disk()
    d.file.crcs[13] ^= 1
    tags = d.submit([3, 5], [12, 40], [2, 1])
    d.wait(tags)
    found = zlib.crc32(d.data[13].tobytes())
    with pytest.raises(StorageError, match=rf"layer 0, span 3: record 1 .*CRC {found:08x}"):
        raise d.reads.failure()
    assert d.reads.states[3] == State.FAILED
    d.submit([7], [1])  # nothing begins after a failure
    assert d.reads.states[7] == State.NONE


@WAYS
@pytest.mark.parametrize("rest_bytes", [0, 100, RECORD + 100])
def test_a_file_that_is_too_short_is_an_error_and_not_a_loop(way, rest_bytes, disk):
    d = disk(way=way)
    d.scratch._file.truncate(9 * RECORD + rest_bytes)
    d.wait(d.submit([0], [9], [2]))
    with pytest.raises(StorageError, match=r"could not read 16\.0 KiB .*shorter than it should be"):
        raise d.reads.failure()


def test_what_the_system_says_is_told(disk, tmp_path, monkeypatch):
    """A directory, opened like a file, refuses to be read."""
    fd = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(ScratchFile, "descriptor", fd)

    def refuse(self, view, offset):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))

    d = disk()
    if isinstance(d.reads, ThreadReads):
        monkeypatch.setattr(ScratchFile, "_read_some", refuse)
    d.wait(d.submit([0, 1], [9, 20]))
    failure = d.reads.failure()
    os.close(fd)
    with pytest.raises(StorageError, match=f"could not read .*{os.strerror(errno.EISDIR)}"):
        raise failure
    assert failure.__cause__.errno == errno.EISDIR


def until(is_so):
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_urgent_reads_go_first_and_cancelled_ones_never(disk):
    d = disk(scratch=Gated, num_threads=1)
    d.submit([0], [0], urgency=Urgency.RECORD_WISH)
    until(lambda: d.scratch.reads == [0])
    d.submit([1, 2, 3], [10, 20, 30], urgency=Urgency.RECORD_WISH)
    d.submit([4], [40], urgency=Urgency.SPAN_WISH)
    d.submit([5], [50])
    d.reads.promote(np.array([3]))
    d.reads.cancel(np.array([0, 2]))  # the first is being read already
    assert d.reads.states[:6].tolist() == [2, 1, 0, 1, 1, 1]
    d.scratch.may_read.set()
    d.wait(np.array([0, 1, 3, 4, 5]))
    assert d.scratch.reads == [0, 50, 30, 40, 10]
    assert d.reads.states[:6].tolist() == [3, 3, 0, 3, 3, 3]


def test_a_failure_takes_back_what_is_queued(disk):
    d = disk(scratch=Gated, num_threads=1)
    d.submit([0], [0])
    until(lambda: d.scratch.reads == [0])
    d.submit([1, 2], [10, 20])
    d.file.crcs[0] ^= 1
    d.scratch.may_read.set()
    d.wait(np.array([0]))
    assert d.reads.failure() is not None and d.reads.states[:3].tolist() == [4, 0, 0]


def test_waiting_ends_by_time_by_a_kick_and_by_what_was_expected(disk):
    d = disk(scratch=Gated, num_threads=2)
    seen = d.reads.happened()
    assert not d.reads.wait(seen, 0.01)
    timer = threading.Timer(0.02, d.reads.kick)
    timer.start()
    assert d.reads.wait(seen, 20) and d.reads.happened() != seen
    timer.join()
    tags = d.submit([0, 1], [0, 10])
    d.reads.expect(tags)
    seen = d.reads.happened()
    d.scratch.may_read.set()
    assert d.reads.wait(seen, 20)
    assert (d.reads.states[:2] == State.READY).all(), "both, before anybody is woken"


def test_a_disk_that_hangs_is_not_waited_for_for_ever(disk):
    d = disk(scratch=Gated)
    d.submit([0, 1], [0, 10])
    until(lambda: len(d.scratch.reads) == 2)
    assert not d.reads.close(0.01)
    d.scratch.may_read.set()
    assert d.reads.close(10)


def test_without_threads_a_read_is_done_when_it_was_submitted(tmp_path):
    d = Disk("threads", tmp_path, num_threads=0)
    d.submit([3], [5], [2])
    d.check([3], [5], [2])
    assert d.reads.close(0)
    d.scratch.close()


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("num_bytes", [1, 7, 15, 16, 63, 64, 65, 127, 128, 191, 1000, 4096, 61440])
def test_checksums_are_zlibs(choice, num_bytes, monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", choice)
    chance = random.Random(num_bytes)
    kinds = [bytes(num_bytes), b"\xff" * num_bytes, b"\x80" + bytes(num_bytes - 1)]
    kinds += [chance.randbytes(num_bytes) for _ in range(3)]
    found = crcs_of(memoryview(bytearray(b"".join(kinds))), num_bytes)
    assert found.tolist() == [zlib.crc32(data) for data in kinds]


# A thread's stack takes as much address space as the limit on stacks says, so that a limit on the
# address space is one on threads.
_STACK_BYTES = 1 << 30
_FEW_THREADS = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_reads as under
import torch
from ebbtide.kernels import dispatch

def allow(num_threads):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    room = int((num_threads + 0.5) * under._STACK_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))

torch.set_num_threads(1)
allow(2)
disk = under.Disk("native", Path({place!r}), num_threads=6)
tags = disk.submit(range(16), range(16))
disk.wait(tags)
disk.check(tags, tags, [1] * 16)
assert disk.reads.close(10)
allow(2)
x = torch.rand(1 << 20)
out = torch.empty_like(x)
for _ in range(2):
    dispatch.compiled().add_scaled(
        x.data_ptr(), x.data_ptr(), 1.0, out.data_ptr(), x.numel(), 6
    )
    assert torch.equal(out, 2 * x)
allow(0)
try:
    under.Disk("native", Path({place!r}), num_threads=6)
except RuntimeError as error:
    print(error)
"""


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux enforces them")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="its threads take more")
def test_threads_that_the_process_may_not_have(tmp_path):
    """Fewer do the same; without any it is said as Python says it."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    program = _FEW_THREADS.format(tests=str(Path(__file__).parent), place=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, most)),
    )
    assert (done.returncode, done.stdout) == (0, "can't start new thread\n"), done.stderr
