"""What lies in the system's cache is read there, and what does not is read past it."""

import os
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.offload.errors import StorageError
from ebbtide.offload.models import past_cache
from ebbtide.offload.models.past_cache import (
    BLOCK_BYTES,
    BounceBuffers,
    EndsEarly,
    PastCacheReader,
    whole_blocks,
)
from ebbtide.offload.pages.tier import aligned_bytes

BLOCKS = 3 * 256 + 5  # some of the parts that are asked about, and a piece
CONTENT = np.random.default_rng(3).integers(0, 256, BLOCKS * BLOCK_BYTES, dtype=np.uint8)

RAGGED_BYTES = 1234  # that are no whole sectors


@pytest.fixture(scope="module")
def descriptor(tmp_path_factory):
    path = tmp_path_factory.mktemp("past_cache") / "file"
    path.write_bytes(CONTENT.tobytes())
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(scope="module")
def reader(descriptor):
    reader = PastCacheReader(descriptor, "a file")
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A reader of what lies anyhow, of a file that ends within a block, and its descriptor."""
    path = tmp_path_factory.mktemp("past_cache") / "ragged"
    path.write_bytes(CONTENT[:-RAGGED_BYTES].tobytes())
    descriptor = os.open(path, os.O_RDWR)
    bounce = BounceBuffers(len(CONTENT))
    reader = PastCacheReader(descriptor, "a file", bounce)
    yield reader, descriptor
    reader.close()
    bounce.close()
    bounce.close()
    os.close(descriptor)


needs_way = pytest.mark.skipif(
    past_cache._mincore() is None, reason="only Linux says what its cache has"
)


def view_of(num_bytes: int) -> memoryview:
    return memoryview(aligned_bytes(whole_blocks(num_bytes)).numpy())[:num_bytes]


def drop(descriptor: int, first: int = 0, num_blocks: int = 0) -> None:
    """Blocks from the cache; 0: all from the first on."""
    os.fsync(descriptor)
    where = first * BLOCK_BYTES, num_blocks * BLOCK_BYTES
    os.posix_fadvise(descriptor, *where, os.POSIX_FADV_DONTNEED)


def cached(reader: PastCacheReader, first: int = 0, num_blocks: int = BLOCKS) -> int:
    """How many blocks lie in the cache."""
    return sum(reader._is_cached((first + i) * BLOCK_BYTES, BLOCK_BYTES) for i in range(num_blocks))


def has_way(reader: PastCacheReader) -> bool:
    if reader._direct is None:
        pytest.skip("the temporary folder's file system has no reads past the cache")
    return True


@needs_way
@given(
    first=st.integers(0, BLOCKS - 1),
    count=st.integers(1, BLOCKS),
    dropped=st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 300)), max_size=4),
)
def test_the_bytes_are_the_files_wherever_they_lie(descriptor, reader, first, count, dropped):
    os.pread(descriptor, len(CONTENT), 0)
    for start, num_blocks in dropped:
        drop(descriptor, start, num_blocks)
    count = min(count, BLOCKS - first)
    view = view_of(count * BLOCK_BYTES)
    reader.read(view, first * BLOCK_BYTES)
    assert np.array_equal(view, CONTENT[first * BLOCK_BYTES :][: len(view)])


@given(offset=st.integers(0, len(CONTENT) - 1), count=st.integers(0, 3 * BLOCK_BYTES))
def test_other_places_and_lengths_are_read_too(reader, offset, count):
    view = view_of(min(count, len(CONTENT) - offset))
    reader.read(view, offset)
    assert np.array_equal(view, CONTENT[offset : offset + len(view)])


@needs_way
@given(
    offset=st.integers(0, len(CONTENT) - RAGGED_BYTES),
    count=st.integers(0, len(CONTENT)),
    moved=st.integers(0, 70),
    dropped=st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 300)), max_size=4),
)
def test_what_lies_anyhow_is_read_past_the_cache_too(ragged, offset, count, moved, dropped):
    """offset, count: in the file, to its end. moved: from where a page begins, in memory."""
    reader, descriptor = ragged
    os.pread(descriptor, len(CONTENT), 0)
    for start, num_blocks in dropped:
        drop(descriptor, start, num_blocks)
    count = min(count, len(CONTENT) - RAGGED_BYTES - offset)
    around = aligned_bytes(moved + count + 1).numpy()
    around[:] = 7
    reader.read(memoryview(around)[moved : moved + count], offset)
    assert np.array_equal(around[moved:-1], CONTENT[offset : offset + count])
    assert (around[:moved] == 7).all() and around[-1] == 7


@needs_way
def test_what_lies_anyhow_stays_out_of_the_cache(ragged):
    reader, descriptor = ragged
    has_way(reader)
    drop(descriptor)
    view = view_of(len(CONTENT) - RAGGED_BYTES - 5)
    reader.read(view, 5)
    assert np.array_equal(view, CONTENT[5:-RAGGED_BYTES])
    assert cached(reader) == 0


@needs_way
def test_what_is_not_cached_stays_out_of_the_cache(descriptor, reader):
    has_way(reader)
    drop(descriptor)
    assert cached(reader) == 0
    reader.read(view_of(len(CONTENT)), 0)
    assert cached(reader) == 0


@needs_way
def test_what_is_cached_is_not_read_from_the_disk(descriptor, reader, monkeypatch):
    has_way(reader)
    drop(descriptor)
    part = 256 * BLOCK_BYTES
    os.pread(descriptor, part, part)  # the second of the parts that are asked about
    read, by = past_cache.read_at, []

    def noting(descriptor, view, name, offset):
        by.append((descriptor, offset, len(view)))
        return read(descriptor, view, name, offset)

    monkeypatch.setattr(past_cache, "read_at", noting)
    drop(descriptor, 0, 256)
    drop(descriptor, 2 * 256)  # the system may have read ahead
    reader.read(view_of(len(CONTENT)), 0)
    assert by == [
        (reader._direct, 0, part),
        (descriptor, part, part),
        (reader._direct, 2 * part, len(CONTENT) - 2 * part),
    ]


@needs_way
def test_of_another_s_file_nothing_is_taken_for_cached(descriptor, monkeypatch):
    """Linux would say that all of it is."""
    monkeypatch.setattr(os, "geteuid", lambda: os.fstat(descriptor).st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    reader = PastCacheReader(descriptor, "a file")
    has_way(reader)
    os.pread(descriptor, len(CONTENT), 0)
    assert cached(reader) == 0
    view = view_of(len(CONTENT))
    reader.read(view, 0)
    assert np.array_equal(view, CONTENT)
    reader.close()


@needs_way
@pytest.mark.parametrize("offset", [2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 13])
def test_a_read_that_ends_early_goes_on(ragged, monkeypatch, offset):
    reader, descriptor = ragged
    has_way(reader)
    drop(descriptor)
    read = past_cache.read_at
    most = BLOCK_BYTES + 700  # no whole number of blocks
    monkeypatch.setattr(
        past_cache, "read_at", lambda fd, view, *where: min(most, read(fd, view, *where))
    )
    view = view_of(40 * BLOCK_BYTES)
    reader.read(view, offset)
    assert np.array_equal(view, CONTENT[offset:][: len(view)])


@needs_way
@pytest.mark.parametrize("offset", [0, 13])
def test_what_cannot_be_read_past_the_cache_is_read_through_it(ragged, monkeypatch, offset):
    reader, descriptor = ragged
    has_way(reader)
    drop(descriptor)
    read, refused = past_cache.read_at, []

    def refusing(descriptor, view, name, offset):
        if descriptor == reader._direct:
            refused.append(offset)
            raise StorageError("some file systems have it for some places only")
        return read(descriptor, view, name, offset)

    monkeypatch.setattr(past_cache, "read_at", refusing)
    view = view_of(600 * BLOCK_BYTES)
    reader.read(view, offset)
    assert refused and np.array_equal(view, CONTENT[offset:][: len(view)])


@pytest.mark.parametrize("offset", [0, 13])
@pytest.mark.parametrize("way", ["usual", "no way past the cache"])
def test_a_file_that_is_too_short_is_an_error(tmp_path, monkeypatch, way, offset):
    if way != "usual":
        monkeypatch.setattr(past_cache, "_opened_past_cache", lambda _: None)
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * BLOCK_BYTES))
    with path.open("r+b") as file:
        bounce = BounceBuffers(4 * BLOCK_BYTES)
        reader = PastCacheReader(file.fileno(), "a file", bounce)
        file.truncate(2 * BLOCK_BYTES + 10)
        drop(file.fileno())
        with pytest.raises(EndsEarly, match="a file is shorter than what was written"):
            reader.read(view_of(4 * BLOCK_BYTES - offset), offset)
        reader.close()
        bounce.close()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="Linux has a file system in memory")
def test_a_file_in_memory_is_read_wherever_it_lies():
    """Some systems have no reads past the cache there, some have."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(CONTENT[:-RAGGED_BYTES].tobytes())
        file.flush()
        bounce = BounceBuffers(len(CONTENT))
        reader = PastCacheReader(file.fileno(), "a file", bounce)
        for offset in (0, 13):
            view = view_of(len(CONTENT) - RAGGED_BYTES - offset)
            reader.read(view, offset)
            assert np.array_equal(view, CONTENT[offset:-RAGGED_BYTES])
        reader.close()
        bounce.close()


def test_without_a_way_past_the_cache_all_goes_through_it(descriptor, monkeypatch):
    monkeypatch.setattr(past_cache, "_opened_past_cache", lambda _: None)
    reader, view = PastCacheReader(descriptor, "a file"), view_of(len(CONTENT))
    reader.read(view, 0)
    assert np.array_equal(view, CONTENT)
    reader.close()


@pytest.mark.parametrize("within", [0, 13])
def test_many_threads_read_at_once(ragged, within):
    """More than there are buffers."""
    reader, descriptor = ragged
    views = [view_of(63 * BLOCK_BYTES) for _ in range(12)]
    if past_cache._mincore() is not None:
        drop(descriptor)

    def read(at: int) -> None:
        reader.read(views[at], at * 64 * BLOCK_BYTES + within)

    threads = [threading.Thread(target=read, args=(at,)) for at in range(len(views))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, view in enumerate(views):
        assert np.array_equal(view, CONTENT[at * 64 * BLOCK_BYTES + within :][: len(view)])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux lists open files there")
def test_closing_leaves_nothing_open(descriptor):
    before = len(os.listdir("/proc/self/fd"))
    reader = PastCacheReader(descriptor, "a file")
    reader.read(view_of(BLOCK_BYTES), 0)
    reader.close()
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
