"""What lies in the system's cache is read there, and what does not is read past it."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.offload import past_cache
from ebbtide.offload.errors import StorageError
from ebbtide.offload.past_cache import BLOCK_BYTES, PastCacheReader, whole_blocks
from ebbtide.offload.tier import aligned_bytes

BLOCKS = 3 * 256 + 5  # some of the parts that are asked about, and a piece
CONTENT = np.random.default_rng(3).integers(0, 256, BLOCKS * BLOCK_BYTES, dtype=np.uint8)


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
def test_a_read_that_ends_early_goes_on(descriptor, reader, monkeypatch):
    has_way(reader)
    drop(descriptor)
    read = past_cache.read_at
    most = BLOCK_BYTES + 700  # no whole number of blocks
    monkeypatch.setattr(
        past_cache, "read_at", lambda fd, view, *where: min(most, read(fd, view, *where))
    )
    view = view_of(40 * BLOCK_BYTES)
    reader.read(view, 2 * BLOCK_BYTES)
    assert np.array_equal(view, CONTENT[2 * BLOCK_BYTES : 42 * BLOCK_BYTES])


@needs_way
def test_what_cannot_be_read_past_the_cache_is_read_through_it(descriptor, reader, monkeypatch):
    has_way(reader)
    drop(descriptor)
    read, refused = past_cache.read_at, []

    def refusing(descriptor, view, name, offset):
        if descriptor == reader._direct:
            refused.append(offset)
            raise StorageError("some file systems have it for some places only")
        return read(descriptor, view, name, offset)

    monkeypatch.setattr(past_cache, "read_at", refusing)
    view = view_of(len(CONTENT))
    reader.read(view, 0)
    assert refused and np.array_equal(view, CONTENT)


@pytest.mark.parametrize("way", ["usual", "no way past the cache"])
def test_a_file_that_is_too_short_is_an_error(tmp_path, monkeypatch, way):
    if way != "usual":
        monkeypatch.setattr(past_cache, "_opened_past_cache", lambda _: None)
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * BLOCK_BYTES))
    with path.open("r+b") as file:
        reader = PastCacheReader(file.fileno(), "a file")
        file.truncate(2 * BLOCK_BYTES + 10)
        drop(file.fileno())
        with pytest.raises(StorageError, match="a file is shorter than what was written"):
            reader.read(view_of(4 * BLOCK_BYTES), 0)
        reader.close()


def test_without_a_way_past_the_cache_all_goes_through_it(descriptor, monkeypatch):
    monkeypatch.setattr(past_cache, "_opened_past_cache", lambda _: None)
    reader, view = PastCacheReader(descriptor, "a file"), view_of(len(CONTENT))
    reader.read(view, 0)
    assert np.array_equal(view, CONTENT)
    reader.close()


def test_many_threads_read_at_once(reader):
    views = [view_of(64 * BLOCK_BYTES) for _ in range(12)]

    def read(at: int) -> None:
        reader.read(views[at], at * 64 * BLOCK_BYTES)

    threads = [threading.Thread(target=read, args=(at,)) for at in range(len(views))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, view in enumerate(views):
        assert np.array_equal(view, CONTENT[at * 64 * BLOCK_BYTES :][: len(view)])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux lists open files there")
def test_closing_leaves_nothing_open(descriptor):
    before = len(os.listdir("/proc/self/fd"))
    reader = PastCacheReader(descriptor, "a file")
    reader.read(view_of(BLOCK_BYTES), 0)
    reader.close()
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
