"""Disks that fail, lie or do not answer, and interruptions: an error, never wrong bytes or a hung
thread."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from interruptions import functions_of, interrupted_after
from page_stores import (
    DEVICE,
    DISK,
    HOST,
    NEAR,
    RECORD,
    Gated,
    S,
    check,
    io_threads,
    later,
    opened,
    rows,
    threads,
    until,
    write,
)

from ebbtide.offload.disk.disk import ScratchFile
from ebbtide.offload.disk.io_threads import IoThreads
from ebbtide.offload.disk.transfer import Transfers
from ebbtide.offload.errors import StorageError
from ebbtide.offload.pages.page_table import Extent, Extents, PageTable, Tier
from ebbtide.offload.pages.pager import PageStore
from ebbtide.offload.pages.planes import Planes
from ebbtide.offload.pages.tier import aligned_bytes


class FailsAt(ScratchFile):
    """Fails the n-th request of a kind, and works before and after."""

    kind, at, code = "read", 0, errno.EIO

    def _fail(self, kind):
        if kind == self.kind:
            self.at -= 1
            if self.at == 0:
                raise OSError(self.code, os.strerror(self.code))

    def _read_some(self, view, offset):
        self._fail("read")
        return super()._read_some(view, offset)

    def _write_some(self, view, offset):
        self._fail("write")
        return super()._write_some(view, offset)


@threads
@pytest.mark.parametrize(("kind", "code"), [("read", errno.EIO), ("write", errno.ENOSPC)])
def test_whichever_request_fails_the_first_failure_stays(kind, code, options, tmp_path):
    """Fails the n-th read or write for n = 1, 2, ... until a run gets through untouched."""
    for n in range(1, 99):
        with opened(tmp_path, layers=2, file=FailsAt, **options) as store:
            store.file.kind, store.file.at, store.file.code = kind, n, code
            table = store.open_table()
            try:
                for layer in range(2):
                    write(store, table, layer, range(2 * S + 1))
                    store.spans.prefetch(table, layer)
                other = store.fork(table)
                write(store, other, 0, [9])
                for layer in range(2):
                    check(store, table, layer, range(2 * S + 1))
                check(store, other, 0, [*range(2 * S + 1), 9])
            except StorageError as error:
                first = str(error)
            else:
                assert store.file.at > 0, "a failure went unseen"
                break
            assert os.strerror(code) in first
            calls = [(store.spans.fetch, 0, 0), (store.spans.prefetch, 0, [0]), (store.fork,)]
            calls += [(store.truncate, 0), (store.write, 1, table.num_records(1), *rows([1]))]
            for call, *args in calls:
                with pytest.raises(StorageError) as caught:
                    call(table, *args)
                assert str(caught.value) == first and caught.value.__cause__ is not None
            store.check_integrity()
            store.close_table(table)
    assert 3 < n < 98


def test_of_two_failures_the_first_is_told(tmp_path):
    class Worse(ScratchFile):
        num_reads = 0

        def _read_some(self, view, offset):
            self.num_reads += 1
            me = self.num_reads
            until(lambda: self.num_reads == 2, "both reads are under way")
            time.sleep(0.1 * (me - 1))
            raise OSError(errno.EIO, f"failure {me}")

    with opened(tmp_path, file=Worse, io_threads=2) as store:
        table = store.open_table()
        write(store, table, 0, range(3 * S), flush=True)
        store.spans.prefetch(table, 0, [0, 2])  # neighbours would be read in one go
        for wait_s in (0, 0.2):
            time.sleep(wait_s)
            with pytest.raises(StorageError, match="failure 1"):
                store.spans.fetch(table, 0, 0)


@threads
def test_a_flipped_bit_is_never_served(options, tmp_path):
    with opened(tmp_path, layers=2, **options) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, range(2 * S))
        check(store, table, 1, range(2 * S))  # so everything is on disk
        bad = rows([S + 1])[1]
        bad[0, 1234] ^= 1
        frame = table.extent(1, 1).base + 1
        buffer = aligned_bytes(RECORD)
        buffer.copy_(bad[0])
        store.file.write_from(memoryview(buffer.numpy()), frame * RECORD)
        with pytest.raises(StorageError, match=r"layer 1, span 1: record 1 .*other than it was"):
            store.spans.prefetch(table, 1)
            check(store, table, 1, range(2 * S))
        with pytest.raises(StorageError, match="layer 1, span 1"):
            store.spans.fetch(table, 0, 0)


def test_a_disk_that_does_not_answer_is_an_error(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, stall_limit_s=0.1) as store:
        table = store.open_table()
        write(store, table, 0, range(S))
        check(store, table, 0, range(S))
        store.file.may_read.clear()
        with pytest.raises(StorageError, match="not answered"):
            store.spans.fetch(table, 0, 0)
        with pytest.raises(StorageError, match="not answered"):
            store.spans.prefetch(table, 0, [0])
        store.file.may_read.set()


def test_an_hour_in_which_the_process_stood_still_is_not_the_disks(tmp_path, monkeypatch):
    """Ctrl-Z, `fg` an hour later: whoever waits finds its time over before the threads, which stood
    still as well, could say that the disk has answered."""
    with opened(tmp_path, layers=1, file=Gated, stall_limit_s=20.0) as store:
        table = store.open_table()
        write(store, table, 0, range(S), flush=True)
        reads, hour = store.spans._transfers._io.reads, [0.0]
        real = reads.wait

        def stands_still(seen, seconds):
            reads.wait, hour[0] = real, 3600.0
            later(store.file.may_read.set)
            return False

        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + hour[0])
        monkeypatch.setattr("ebbtide.offload.disk.io_threads.time", clock)
        store.file.may_read.clear()
        reads.wait = stands_still
        check(store, table, 0, range(S))
        assert hour[0]


def test_a_disk_that_never_answers_again_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("ebbtide.offload.disk.io_threads.CLOSE_LIMIT_S", 0.1)
    files = []

    def spill():
        files.append(Gated(tmp_path))
        return files[-1]

    store = PageStore(1, RECORD, NEAR, S, {DISK: 4 * S}, spill=spill)
    table = store.open_table()
    write(store, table, 0, range(S))
    check(store, table, 0, range(S))
    files[0].may_read.clear()
    store.spans.prefetch(table, 0, [0])
    until(lambda: len(files[0].reads) == 2, "the read hangs")
    with pytest.raises(StorageError, match="not answered"):
        store.close()
    files[0].may_read.set()
    store.close()
    assert not io_threads()


_STORE_FILES = "pager.py", "span_reader.py"


def is_waiting_in_the_store(thread: int) -> bool:
    """Whether a thread blocks in threading's `wait`, called from one of these files. A signal that
    came any earlier would end the test run in place of the wait."""
    frame = sys._current_frames().get(thread)
    if frame is None or frame.f_code.co_name != "wait":
        return False
    while frame is not None and not frame.f_code.co_filename.endswith(_STORE_FILES):
        frame = frame.f_back
    return frame is not None


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no way to interrupt a wait")
@pytest.mark.parametrize("during", ["fetch", "write"])
def test_ctrl_c_while_waiting_leaves_a_store_that_works(during, tmp_path):
    # A process that was started in the background may have been told to ignore it.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupted_while_waiting(during, tmp_path)
    finally:
        signal.signal(signal.SIGINT, usual)


def interrupted_while_waiting(during, tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=1, write_buffers=1) as store:
        table = store.open_table()
        write(store, table, 0, range(2 * S))
        check(store, table, 0, range(2 * S))
        gate = store.file.may_read if during == "fetch" else store.file.may_write
        gate.clear()
        if during == "write":
            write(store, table, 0, range(S))  # takes the only buffer
        me = threading.main_thread().ident

        def interrupt_the_wait() -> None:
            until(lambda: is_waiting_in_the_store(me), "the store waits")
            signal.pthread_kill(me, signal.SIGINT)

        timer = later(interrupt_the_wait)
        with pytest.raises(KeyboardInterrupt):
            if during == "fetch":
                store.spans.fetch(table, 0, 0)
            else:
                write(store, table, 0, range(S))
        timer.join()
        gate.set()
        expected = [*range(2 * S), *(range(S) if during == "write" else ())]
        check(store, table, 0, expected)
        write(store, table, 0, [77])
        check(store, table, 0, [*expected, 77])
        store.check_integrity(deep=True)


@threads
def test_an_exception_leaves_no_thread_and_no_file(options, tmp_path):
    with pytest.raises(ZeroDivisionError), opened(tmp_path, **options) as store:
        table = store.open_table()
        write(store, table, 0, range(4 * S))
        store.spans.prefetch(table, 0)
        with store.spans.fetch(table, 0, 1):
            1 / 0  # noqa: B018
    store.close()  # again, to no effect
    with pytest.raises(AssertionError, match="closed"):
        store.spans.fetch(table, 0, 0)


def test_a_bug_in_a_thread_is_not_taken_for_a_bad_disk(tmp_path):
    class Buggy(ScratchFile):
        def _read_some(self, view, offset):
            raise TypeError("on purpose")

    with opened(tmp_path, file=Buggy) as store:
        table = store.open_table()
        write(store, table, 0, range(S))
        with pytest.raises(RuntimeError) as caught:
            store.spans.fetch(table, 0, 0)
        assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_records_come_to_a_cuda_device(tmp_path):
    with PageStore(
        1,
        RECORD,
        NEAR,
        S,
        {DEVICE: 2 * S, HOST: 2 * S, DISK: 4 * S},
        "cuda",
        lambda: ScratchFile(tmp_path),
    ) as store:
        table = store.open_table(expected_spans=8)
        near, records = rows(range(8 * S))
        store.write(table, 0, 0, near.cuda(), records.cuda())
        store.spans.prefetch(table, 0)
        for span in range(8):
            with store.spans.fetch(table, 0, span) as pages:
                assert pages.records.device.type == pages.near.device.type == "cuda"
                part = slice(span * S, span * S + S)
                assert torch.equal(pages.records.cpu(), records[part])
                assert torch.equal(pages.near.cpu(), near[part])
        store.check_integrity(deep=True)


def _truncate(store, table):
    store.truncate(table, [S + 1, 1])


def _drop(store, table):
    store.drop(table, 0, [range(2, 9)])


def _skip(store, table):
    store.truncate(table, S)
    store.skip(table, 0, S + 1)


def _write(store, table):
    write(store, table, 0, range(2 * S + 2, 5 * S))


def _fork(store, table):
    store.close_table(store.fork(table))


@pytest.mark.parametrize("mix", [dict(disk=0, host=14), dict(disk=8, host=6)], ids=["host", "disk"])
@pytest.mark.parametrize("change", [_truncate, _drop, _skip, _write, _fork])
def test_ctrl_c_at_any_instruction_loses_no_frame(change, mix, tmp_path):
    """Whatever was under way, what no table shows is free at the next call, and what one shows is
    what was written."""
    traced = [*functions_of(PageStore, PageTable, Extents, Extent), Planes.put, Planes.forget]
    texts = [range(1, 2 * S + 2), range(1, S + 3)]  # by layer
    with opened(tmp_path, **mix, overlap=False) as store:

        def num_free() -> int:
            return sum(store._extents.num_free(tier) for tier in Tier)

        total, count, is_interrupted = num_free(), 0, True
        while is_interrupted:
            count += 1
            table = store.open_table()
            for layer, tags in enumerate(texts):
                write(store, table, layer, tags)
            other = store.fork(table)
            is_interrupted = interrupted_after(
                count, traced, lambda t=table: change(store, t), instructions=True
            )
            for layer, tags in enumerate(texts):
                check(store, other, layer, tags)
                check(store, table, layer, range(1, table.num_records(layer) + 1))
            shown = {extent for of in store._tables for extent in of.extents()}
            assert num_free() == total - len(shown)
            store.check_integrity(deep=True)
            for each in list(store._tables):  # perhaps a fork that nobody was given
                store.close_table(each)
            assert num_free() == total
        assert count > 100


@threads
def test_ctrl_c_while_records_are_sent_to_the_disk_holds_nobody_up(options, tmp_path):
    """Whatever of them is on its way then is written before its frames are others'."""
    traced = [*functions_of(IoThreads), Transfers.write, Planes.put, Planes.forget]
    with opened(tmp_path, disk=8, host=0, stall_limit_s=3, **options) as store:
        total, count, is_interrupted = store._extents.num_free(Tier.DISK), 0, True
        while is_interrupted:
            count += 1
            table = store.open_table()
            write(store, table, 0, range(S + 1))
            is_interrupted = interrupted_after(
                count,
                traced,
                lambda t=table: write(store, t, 0, range(S + 1, 3 * S)),
                instructions=True,
            )
            store.flush()
            check(store, table, 0, range(table.num_records(0)))
            store.check_integrity(deep=True)
            store.close_table(table)
            assert store._extents.num_free(Tier.DISK) == total
        assert count > 100


def test_ctrl_c_while_a_table_is_closed_loses_no_frame(tmp_path):
    """It may be closed again, and what was done is not done twice."""
    with opened(tmp_path, disk=0, host=14) as store:
        total, count, is_interrupted = store._extents.num_free(Tier.HOST), 0, True
        while is_interrupted:
            count += 1
            table = store.open_table()
            write(store, table, 0, range(2 * S + 1))
            other = store.fork(table)
            traced = functions_of(PageStore, PageTable, Extents)
            is_interrupted = interrupted_after(
                count, traced, lambda t=table: store.close_table(t), instructions=True
            )
            store.close_table(table)
            check(store, other, 0, range(2 * S + 1))
            store.check_integrity(deep=True)
            store.close_table(other)
            assert store._extents.num_free(Tier.HOST) == total
        assert count > 100
