"""The page store against a model of it: the same bytes whatever tiers, threads, wishes and faults.

Records are told apart by a tag that fills them, so content checks need no codec.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ebbtide.offload.disk import ScratchFile, Way
from ebbtide.offload.errors import DoesNotFit, StorageError
from ebbtide.offload.page_table import Tier
from ebbtide.offload.pager import PageStore
from ebbtide.offload.tier import aligned_bytes

RECORD, NEAR = 4096, 16  # bytes of a record's far and near plane
S = 3  # records per span
DEVICE, HOST, DISK = Tier


def rows(tags, near=NEAR) -> tuple[torch.Tensor, torch.Tensor]:
    """Near planes (n, near) and records (n, RECORD) that hold nothing but their tags."""
    tag = torch.tensor(list(tags), dtype=torch.int64).view(torch.uint8).view(-1, 8)
    return tag.repeat(1, near // 8), tag.repeat(1, RECORD // 8)


def rows_of(store, layer, tags) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with near planes as large as the layer's."""
    return rows(tags, store.near_record_bytes[layer])


def write(store, table, layer, tags, flush=False) -> None:
    near, records = rows_of(store, layer, tags)
    store.write(table, layer, table.num_records(layer), near, records)
    near.fill_(255)  # the caller may use its buffers again
    records.fill_(255)
    if flush:
        store.flush()


def check(store, table, layer, tags) -> None:
    """Every span of the layer holds these tags."""
    tags = list(tags)
    assert table.num_records(layer) == len(tags)
    for span in range(table.num_spans(layer)):
        near, records = rows_of(store, layer, tags[span * S : (span + 1) * S])
        with store.fetch(table, layer, span) as pages:
            assert torch.equal(pages.near, near) and torch.equal(pages.records, records)


def check_runs(store, table, layer, tags) -> None:
    """The same, by the addresses of as many spans at a time as the store gives."""
    span, stop, tags = 0, table.num_spans(layer), list(tags)
    while span < stop:
        run = store.fetch_run(table, layer, span, stop)
        if run is None:  # records are copied before they are read
            assert store._planes.must_copy
            return
        with run:
            assert run.first == span < run.stop <= stop
            near, records = rows_of(store, layer, tags[span * S : run.stop * S])
            for plane, addresses in ((near, run.near_at), (records, run.record_at)):
                found = [ctypes.string_at(at, plane.shape[1]) for at in addresses.tolist()]
                assert found == [row.numpy().tobytes() for row in plane]
        span = run.stop


def fetched(store, table, layer, records) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Near planes and records of a selection, in its order, and that it came in that order."""
    parts = []
    for selected in store.records.fetch(table, layer, records):
        with selected:
            got = torch.zeros(len(selected.near_rows), RECORD, dtype=torch.uint8)
            places = torch.cat([source.positions for source in selected.sources])
            assert sorted(places.tolist()) == list(range(len(got))), "each record once"
            for frames, rows, positions in selected.sources:
                got[positions] = frames[rows]
            parts.append((selected.near[selected.near_rows], got))
    return parts


def check_records(store, table, layer, tags, records) -> None:
    """The selected records hold their tags."""
    parts = fetched(store, table, layer, records)
    near, whole = rows_of(store, layer, [tags[record] for record in records])
    if records:
        assert torch.equal(torch.cat([part[0] for part in parts]), near)
        assert torch.equal(torch.cat([part[1] for part in parts]), whole)
    else:
        assert not parts


def io_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("ebbtide-io-")]


@contextmanager
def opened(
    directory,
    disk=40,
    host=0,
    device=0,
    layers=2,
    near=NEAR,
    file=ScratchFile,
    way=None,
    in_python=False,
    **options,
):
    """A store with that many spans per tier; leaves no thread and no file behind. in_python: the
    reader's reference, whatever was compiled."""
    files = []

    def spill():
        files.append(file(directory, way, step_bytes=1 << 20))
        return files[-1]

    frames = {DEVICE: device * S, HOST: host * S, DISK: disk * S}
    choice = {"EBBTIDE_KERNELS": "reference"} if in_python else {}
    with mock.patch.dict(os.environ, choice):
        store = PageStore(layers, RECORD, near, S, frames, "cpu", spill, **options)
    try:
        with store:
            store.file = files[0] if files else None
            yield store
    finally:
        assert not io_threads()
        assert not os.listdir(directory)


def until(is_so, what: str) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.001)


MIXES = {
    "host": dict(disk=0, host=40),
    "disk": dict(disk=40),
    "host and disk": dict(disk=30, host=10),
    "three tiers": dict(disk=20, host=12, device=8),
    "copied to the device": dict(disk=20, host=12, device=8, copy_to_compute=True),
    "near planes of two sizes": dict(disk=30, host=10, near=(NEAR, 3 * NEAR)),
}
THREADS = {
    "plain": dict(overlap=False),
    "one thread": dict(io_threads=1, staging_slots=2, write_buffers=1),
    "four threads": dict(io_threads=4, staging_slots=8),
    "threads in Python": dict(io_threads=3, staging_slots=4, in_python=True),
}
# Frames for single records: fewer than a selection asks for, and more.
HOT = {
    name: {**options, "hot_records": n}
    for (name, options), n in zip(THREADS.items(), (2, 3, 12, 6), strict=True)
}
hot_threads = pytest.mark.parametrize("options", HOT.values(), ids=HOT)
mixes = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
threads = pytest.mark.parametrize("options", THREADS.values(), ids=THREADS)


# ---- the same bytes --------------------------------------------------------------------------


@mixes
@threads
def test_what_is_fetched_is_what_was_written(mix, options, tmp_path):
    with opened(tmp_path, **mix, **options) as store:
        table, model = store.open_table(expected_spans=10), {0: [], 1: []}
        for count in (1, 2, S, 2 * S + 1, S - 1, 5):
            for layer in model:
                tags = [len(model[layer]) * 2 + layer + i * 1000 for i in range(count)]
                write(store, table, layer, tags)
                model[layer] += tags
                store.check_integrity(deep=True)
        for _ in range(2):
            for layer, tags in model.items():
                store.prefetch(table, 1 - layer)
                check(store, table, layer, tags)
                check_runs(store, table, layer, tags)
        store.flush()
        store.check_integrity(deep=True)
        assert store.stats.write_amplification == 1.0
        used = sum(usage.used_bytes for usage in store.usage().values())
        assert used == 2 * table.num_spans(0) * S * RECORD


@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
def test_every_way_to_the_disk_carries_the_same_bytes(way, tmp_path):
    files = []

    def spill():
        files.append(ScratchFile(tmp_path, way))
        return files[-1]

    with PageStore(1, RECORD, NEAR, S, {DISK: 8 * S}, spill=spill) as store:
        table = store.open_table()
        write(store, table, 0, range(8 * S))
        store.prefetch(table, 0)
        check(store, table, 0, range(8 * S))
        assert files[0].snapshot().bytes_written == 8 * S * RECORD
    assert not os.listdir(tmp_path)


def test_a_part_of_a_span_can_be_fetched_and_no_more_than_is_there(tmp_path):
    with opened(tmp_path) as store:
        table = store.open_table()
        write(store, table, 0, range(S + 2))
        for count in (1, 2):
            with store.fetch(table, 0, 1, count) as pages:
                assert torch.equal(pages.records, rows(range(S, S + count))[1])
                assert pages.near.shape == (count, NEAR)
        with pytest.raises(AssertionError):
            store.fetch(table, 0, 1, 3)


def test_near_planes_may_have_no_bytes(tmp_path):
    with PageStore(1, RECORD, 0, S, {HOST: S}) as store:
        table = store.open_table()
        store.write(table, 0, 0, torch.empty(2, 0, dtype=torch.uint8), rows([1, 2])[1])
        with store.fetch(table, 0, 0) as pages:
            assert pages.near.shape == (2, 0) and pages.records[1, 0] == 2


@pytest.mark.parametrize("copies", [0, 4])
def test_reserved_bytes_are_all_that_the_store_takes(copies, tmp_path):
    options = dict(staging_slots=4, write_buffers=3, copy_to_compute=copies > 0)
    with opened(tmp_path, disk=5, host=2, **options) as store:
        span = S * RECORD
        assert store.reserved_bytes() == {
            DEVICE: 0,
            HOST: (2 + 4 + 3 + copies) * span + (5 + 2) * S * NEAR,
            DISK: 5 * span,
        }


def test_memory_tiers_are_seen_and_not_copied(tmp_path):
    with opened(tmp_path, disk=0, host=2) as store:
        table = store.open_table()
        write(store, table, 0, range(S))
        places = set()
        for _ in range(2):
            with store.fetch(table, 0, 0) as pages:
                places.add(pages.records.data_ptr())
        assert len(places) == 1 and store.stats.resident == 2
        assert store.stats.bytes_read["host"] == 2 * S * RECORD


def test_several_spans_may_be_held_at_once(tmp_path):
    with opened(tmp_path, staging_slots=4) as store:
        table = store.open_table()
        write(store, table, 0, range(6 * S))
        held = [store.fetch(table, 0, span) for span in (2, 5, 2)]  # the same one twice, too
        check(store, table, 0, range(6 * S))  # the other slots are enough for all the rest
        for pages, span in zip(held, (2, 5, 2), strict=True):
            assert torch.equal(pages.records, rows(range(span * S, span * S + S))[1])
            pages.close()
            pages.close()
        store.check_integrity()


def test_holding_every_slot_and_asking_for_more_is_a_bug_and_no_deadlock(tmp_path):
    with opened(tmp_path, staging_slots=2) as store:
        table = store.open_table()
        write(store, table, 0, range(3 * S))
        with store.fetch(table, 0, 0), store.fetch(table, 0, 1):
            with pytest.raises(AssertionError, match="held by the caller"):
                store.fetch(table, 0, 2)
        check(store, table, 0, range(3 * S))


# ---- fork, truncate, close -------------------------------------------------------------------


@mixes
@threads
def test_a_fork_shares_until_somebody_appends(mix, options, tmp_path):
    with opened(tmp_path, **mix, **options) as store:
        base = store.open_table()
        write(store, base, 0, range(2 * S + 1))
        store.flush()
        before = store.stats.snapshot()
        left, right = store.fork(base), store.fork(base)
        assert store.stats == before  # nothing moved
        write(store, left, 0, [100])
        write(store, right, 0, [200, 201, 202])
        store.flush()
        store.check_integrity(deep=True)
        copied = (store.stats - before).bytes_written
        # One record copied for each fork, four appended: full spans are never copied.
        assert sum(copied.values()) == (2 + 4) * RECORD
        check(store, base, 0, range(2 * S + 1))
        check(store, left, 0, [*range(2 * S + 1), 100])
        check(store, right, 0, [*range(2 * S + 1), 200, 201, 202])
        for table in (base, right, left):
            store.close_table(table)
            store.check_integrity(deep=True)
        store.close_table(left)
        assert sum(usage.used_bytes for usage in store.usage().values()) == 0


@mixes
@threads
@pytest.mark.parametrize("keep", [0, 1, S, S + 2, 99])
def test_truncated_records_are_gone_and_replaced(mix, options, keep, tmp_path):
    with opened(tmp_path, **mix, **options) as store:
        table = store.open_table()
        for layer in (0, 1):
            write(store, table, layer, range(2 * S + 1))
            store.prefetch(table, layer)  # what is on its way must not come back as it was
        store.truncate(table, keep)
        store.check_integrity(deep=True)
        kept = list(range(2 * S + 1))[:keep]
        for layer in (0, 1):
            check(store, table, layer, kept)
            store.prefetch(table, layer)
            write(store, table, layer, [50, 51, 52, 53])
            check(store, table, layer, [*kept, 50, 51, 52, 53])
        store.check_integrity(deep=True)


def test_a_prefetched_span_that_grew_is_read_again(tmp_path):
    with opened(tmp_path) as store:
        table = store.open_table()
        write(store, table, 0, [1])
        store.prefetch(table, 0, [0])
        until(lambda: store.is_ready(table, 0, 0), "the first record is read")
        write(store, table, 0, [2])
        assert not store.is_ready(table, 0, 0)
        check(store, table, 0, [1, 2])
        assert store.stats.wasted == 1


def test_when_there_is_no_room_nothing_is_written(tmp_path):
    with opened(tmp_path, disk=2, host=1, layers=1) as store:
        table = store.open_table()
        write(store, table, 0, range(2 * S + 1), flush=True)
        before = store.stats.snapshot()
        with pytest.raises(DoesNotFit) as caught:
            write(store, table, 0, range(S))
        error = caught.value
        assert (error.tier, error.needed_bytes, error.available_bytes) == ("disk", S * RECORD, 0)
        assert store.stats.bytes_written == before.bytes_written
        other = store.fork(table)
        with pytest.raises(DoesNotFit):
            write(store, other, 0, [7])  # needs a copy of the shared span
        store.check_integrity()
        store.close_table(table)
        write(store, other, 0, [7])  # alone now, it appends in place
        check(store, other, 0, [*range(2 * S + 1), 7])


def test_layers_of_one_near_size_share_an_arena(tmp_path):
    sizes = (3 * NEAR, NEAR, 3 * NEAR, NEAR, NEAR)
    with opened(tmp_path, disk=6, host=4, layers=5, near=sizes) as store:
        arenas = [store.records._planes.near_frames(layer) for layer in range(5)]
        assert [len(arena) for arena in arenas] == [4 * S, 6 * S, 4 * S, 6 * S, 6 * S]
        assert len({arena.data_ptr() for arena in arenas}) == 2
        near_bytes = 4 * S * 3 * NEAR + 6 * S * NEAR
        assert store._planes.overhead_bytes() == {HOST: near_bytes}, "no byte for what others have"
        table = store.open_table()
        for layer in range(5):
            write(store, table, layer, range(layer, layer + S + 1))
        for layer in range(5):
            check(store, table, layer, range(layer, layer + S + 1))
        store.check_integrity(deep=True)


def test_without_room_for_near_planes_nothing_is_written(tmp_path):
    """Layers that have had more than their share, which layers in step never do."""
    with opened(tmp_path, disk=0, host=4, near=(NEAR, 3 * NEAR)) as store:
        table = store.open_table()
        write(store, table, 1, range(2 * S))
        with pytest.raises(DoesNotFit) as caught:
            write(store, table, 1, [9])
        assert caught.value.available_bytes == 0
        write(store, table, 0, range(2 * S))
        store.check_integrity(deep=True)
        check(store, table, 1, range(2 * S))


def test_a_closed_table_and_records_out_of_order_are_bugs(tmp_path):
    with opened(tmp_path) as store:
        table = store.open_table()
        with pytest.raises(AssertionError, match="in order"):
            store.write(table, 0, 1, *rows([1]))
        store.close_table(table)
        calls = [(store.fork,), (store.prefetch, 0, []), (store.fetch, 0, 0), (store.truncate, 0)]
        for call, *args in calls:
            with pytest.raises(AssertionError, match="closed"):
                call(table, *args)


class StoreMachine(RuleBasedStateMachine):
    """Any order of calls gives what a dict of lists gives, with every invariant after each."""

    mix = MIXES["three tiers"]
    options = THREADS["one thread"]

    def __init__(self):
        super().__init__()
        self.directory = self.make_directory()
        self.context = opened(self.directory, **self.mix, **self.options)
        self.store = self.context.__enter__()
        self.model = {}  # table -> tags per layer
        self.next_tag = 1

    def any_table(self, pick: int):
        return list(self.model)[pick % len(self.model)]

    has_tables = precondition(lambda self: self.model)
    may_open = precondition(lambda self: len(self.model) < 4)

    @may_open
    @rule()
    def open(self):
        self.model[self.store.open_table(expected_spans=4)] = [[], []]

    @has_tables
    @rule(pick=st.integers(0, 9), layer=st.integers(0, 1), count=st.integers(1, 2 * S + 1))
    def write(self, pick, layer, count):
        table = self.any_table(pick)
        tags = range(self.next_tag, self.next_tag + count)
        self.next_tag += count
        try:
            write(self.store, table, layer, tags)
            self.model[table][layer] += tags
        except DoesNotFit:
            assert sum(u.used_bytes for u in self.store.usage().values()) > 0

    @has_tables
    @may_open
    @rule(pick=st.integers(0, 9))
    def fork(self, pick):
        table = self.any_table(pick)
        self.model[self.store.fork(table)] = [list(tags) for tags in self.model[table]]

    @has_tables
    @rule(pick=st.integers(0, 9), keep=st.integers(0, 4 * S))
    def truncate(self, pick, keep):
        table = self.any_table(pick)
        self.store.truncate(table, keep)
        self.model[table] = [tags[:keep] for tags in self.model[table]]

    @has_tables
    @rule(pick=st.integers(0, 9))
    def close(self, pick):
        table = self.any_table(pick)
        self.store.close_table(table)
        del self.model[table]

    @has_tables
    @rule(pick=st.integers(0, 9), layer=st.integers(0, 1), spans=st.lists(st.integers(0, 5)))
    def prefetch(self, pick, layer, spans):
        self.store.prefetch(self.any_table(pick), layer, spans)

    @has_tables
    @rule(pick=st.integers(0, 9), layer=st.integers(0, 1))
    def fetch(self, pick, layer):
        table = self.any_table(pick)
        check(self.store, table, layer, self.model[table][layer])

    @has_tables
    @rule(pick=st.integers(0, 9), layer=st.integers(0, 1))
    def fetch_runs(self, pick, layer):
        table = self.any_table(pick)
        check_runs(self.store, table, layer, self.model[table][layer])

    @has_tables
    @rule(pick=st.integers(0, 9), layer=st.integers(0, 1), records=st.lists(st.integers(-2, 4 * S)))
    def prefetch_records(self, pick, layer, records):
        self.store.records.prefetch(self.any_table(pick), layer, records)

    @has_tables
    @rule(pick=st.integers(0, 9), layer=st.integers(0, 1), records=st.sets(st.integers(0, 4 * S)))
    def fetch_records(self, pick, layer, records):
        table = self.any_table(pick)
        tags = self.model[table][layer]
        there = sorted(record for record in records if record < len(tags))
        self.store.records.is_ready(table, layer, there)
        check_records(self.store, table, layer, tags, there)

    @invariant()
    def is_sound(self):
        self.store.check_integrity(deep=True)

    def teardown(self):
        for table, layers in self.model.items():
            for layer, tags in enumerate(layers):
                check(self.store, table, layer, tags)
        for table in self.model:
            self.store.close_table(table)
        self.store.check_integrity()
        assert sum(u.used_bytes for u in self.store.usage().values()) == 0
        self.context.__exit__(None, None, None)


@mixes
@hot_threads
def test_any_order_of_calls(mix, options, tmp_path):
    class Machine(StoreMachine):
        count = 0

        def make_directory(self):
            type(self).count += 1
            directory = tmp_path / str(self.count)
            directory.mkdir()
            return directory

    # Small tiers, so that running out of frames is part of the story.
    Machine.mix = {k: v // 2 if isinstance(v, int) and v > 1 else v for k, v in mix.items()}
    Machine.options = options
    case = Machine.TestCase
    case.settings = settings(settings.default, max_examples=12, stateful_step_count=25)
    case().runTest()


# ---- wishes ----------------------------------------------------------------------------------


class Gated(ScratchFile):
    """A disk whose requests wait until they are let through; remembers which spans they touched."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reads, self.writes = [], []
        self.may_read, self.may_write = threading.Event(), threading.Event()
        self.may_read.set()
        self.may_write.set()

    def _read_some(self, view, offset):
        self.reads.append(offset // (S * RECORD))
        assert self.may_read.wait(20)
        return super()._read_some(view, offset)

    def _write_some(self, view, offset):
        self.writes.append((offset // (S * RECORD), len(self.reads)))  # after how many reads
        assert self.may_write.wait(20)
        return super()._write_some(view, offset)


def later(action, seconds=0.05) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_wishes_are_read_in_order_ahead_of_the_need(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=1, staging_slots=4) as store:
        table = store.open_table()
        write(store, table, 0, range(8 * S), flush=True)
        store.prefetch(table, 0, [6, 2, 6, 4, 0, 3])  # no neighbours: they would go together
        until(lambda: store.is_ready(table, 0, 0), "all slots are filled")
        assert store.file.reads == [6, 2, 4, 0]  # as many as there are slots
        for span in (6, 2, 4, 0):
            with store.fetch(table, 0, span) as pages:
                assert torch.equal(pages.records, rows(range(span * S, span * S + S))[1])
        until(lambda: store.is_ready(table, 0, 3), "the freed slots are used")
        assert (store.stats.hits, store.stats.late, store.stats.misses) == (4, 0, 0)
        assert store.stats.stall_s == 0


def test_hits_late_and_misses_are_told_apart(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=1, staging_slots=4) as store:
        table = store.open_table()
        write(store, table, 0, range(5 * S), flush=True)
        store.prefetch(table, 0, [0])
        until(lambda: store.is_ready(table, 0, 0), "the wish is there")
        store.file.may_read.clear()
        store.prefetch(table, 0, [1, 2])
        until(lambda: store.file.reads == [0, 1], "the second wish is under way")
        timer = later(store.file.may_read.set)
        for span in (0, 1, 2, 3):  # ready, under way, wished for, never heard of
            store.fetch(table, 0, span).close()
        timer.join()
        stats = store.stats
        # The third wish may or may not be there once the second has been waited for.
        assert (stats.misses, stats.hits + stats.late) == (1, 3) and stats.late >= 1
        assert stats.stall_s > 0.01 and stats.wasted == 0
        assert 0.25 <= stats.hit_rate <= 0.5


def test_a_demand_goes_before_wishes_and_takes_the_slot_needed_last(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=1, staging_slots=2) as store:
        table = store.open_table()
        write(store, table, 0, range(6 * S), flush=True)
        store.prefetch(table, 0, [0, 1, 2, 3])
        until(lambda: store.is_ready(table, 0, 1), "both slots are filled")
        store.fetch(table, 0, 5).close()  # nobody wished for it
        assert store.file.reads[:3] == [0, 1, 5]
        assert store.is_ready(table, 0, 0)  # what is needed first is still there
        assert (store.stats.misses, store.stats.wasted) == (1, 1)


def test_wrong_wishes_are_dropped_when_their_layer_is_over(tmp_path):
    with opened(tmp_path, layers=3, file=Gated, io_threads=1, staging_slots=4) as store:
        table = store.open_table()
        for layer in range(3):
            write(store, table, layer, range(4 * S), flush=True)
        store.prefetch(table, 0, [0, 1, 2])
        until(lambda: store.is_ready(table, 0, 2), "three slots are filled")
        store.fetch(table, 0, 0).close()
        store.prefetch(table, 1, [0, 1, 2, 3])  # room for two while layer 0's wishes are kept
        store.fetch(table, 1, 0).close()  # layer 0 is over
        assert store.stats.wasted == 2
        until(lambda: store.is_ready(table, 1, 3), "their slots serve layer 1")


def test_a_wish_for_the_next_pass_survives_the_end_of_this_one(tmp_path):
    with opened(tmp_path, layers=2, staging_slots=4) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, range(S), flush=True)
        store.fetch(table, 0, 0).close()
        store.prefetch(table, 0, [0])  # early, for the next token
        until(lambda: store.is_ready(table, 0, 0), "the wish is there")
        store.fetch(table, 1, 0).close()
        assert store.is_ready(table, 0, 0) and store.stats.wasted == 0


def test_a_wish_made_again_is_as_good_as_new(tmp_path):
    with opened(tmp_path, layers=2, staging_slots=4) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, range(2 * S), flush=True)
        store.prefetch(table, 0, [1])
        until(lambda: store.is_ready(table, 0, 1), "the wish is there")
        store.fetch(table, 0, 0).close()
        store.prefetch(table, 0, [1])  # still wanted after this pass
        store.fetch(table, 1, 0).close()
        assert store.is_ready(table, 0, 1) and store.stats.wasted == 0


def test_with_one_layer_a_pass_ends_when_a_span_comes_again(tmp_path):
    with opened(tmp_path, layers=1, staging_slots=4, predictor="history") as store:
        table = store.open_table()
        write(store, table, 0, range(4 * S), flush=True)
        store.fetch(table, 0, 2).close()
        store.prefetch(table, 0, [2, 0])
        until(lambda: store.is_ready(table, 0, 0), "the next pass is there")
        store.fetch(table, 0, 1).close()
        store.fetch(table, 0, 2).close()  # the next pass
        assert store.is_ready(table, 0, 0) and store.stats.wasted == 0
        assert store._predictor.predict(0, 4) == [2, 1, 3]


class LayerZeroOnDisk:
    """A policy of one's own: an object with one method."""

    def choose(self, layer, span, free, num_layers, expected_spans):
        return DISK if layer == 0 else HOST


@pytest.mark.parametrize("wanted", [False, True])
def test_a_read_that_nobody_waits_for_any_more_frees_its_slot(wanted, tmp_path):
    with opened(
        tmp_path, layers=2, host=9, file=Gated, policy=LayerZeroOnDisk(), staging_slots=2
    ) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, range(2 * S), flush=True)
        store.prefetch(table, 0, [0])
        until(lambda: store.is_ready(table, 0, 0), "the first wish is there")
        store.file.may_read.clear()
        store.prefetch(table, 0, [1])
        until(lambda: len(store.file.reads) == 2, "the second is under way")
        store.fetch(table, 0, 0).close()
        store.fetch(table, 1, 0).close()  # layer 0 is over, and the read still under way
        timer = later(store.file.may_read.set)
        if wanted:
            store.fetch(table, 0, 1).close()  # not over, after all: the same read serves
            assert (store.stats.late, store.stats.wasted) == (1, 0)
        timer.join()

        def is_free() -> bool:
            store.check_integrity()  # like any call, it takes over what the threads did
            return store.stats.wasted == (not wanted)

        until(is_free, "the slot is free")
        assert len(store.file.reads) == 2


def test_wishes_for_memory_or_for_nothing_cost_nothing(tmp_path):
    with opened(tmp_path, host=2, disk=2, layers=1, policy="fastest_first") as store:
        table = store.open_table()
        write(store, table, 0, range(4 * S), flush=True)
        store.prefetch(table, 0, [0, 1, -1, 4, 99])
        check(store, table, 0, range(4 * S))
        assert store.stats.misses == 2 and store.stats.hits == 0
        assert store.is_ready(table, 0, 0) and not store.is_ready(table, 0, 3)


def test_the_plain_twin_ignores_wishes_and_reads_the_same(tmp_path):
    with opened(tmp_path, layers=1, overlap=False) as store:
        assert not io_threads()
        table = store.open_table()
        write(store, table, 0, range(4 * S), flush=True)
        store.prefetch(table, 0)
        check(store, table, 0, range(4 * S))
        assert (store.stats.misses, store.stats.hits, store.stats.late) == (4, 0, 0)


def test_the_predictor_learns_from_fetches(tmp_path):
    with opened(
        tmp_path, layers=2, file=Gated, predictor="history", io_threads=1, staging_slots=2
    ) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, range(5 * S), flush=True)
        for span in (3, 1):
            store.fetch(table, 0, span).close()
        store.fetch(table, 1, 0).close()
        store.file.reads.clear()
        store.prefetch(table, 0)
        until(lambda: store.is_ready(table, 0, 1), "what was used last time is there")
        assert store.file.reads == [3, 1]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.integers(2, 5),
    num_threads=st.integers(1, 3),
    passes=st.lists(
        st.tuples(st.lists(st.integers(0, 7), max_size=12), st.permutations(range(8))),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 9),
)
def test_no_wish_can_stop_or_change_anything(slots, num_threads, passes, seed, tmp_path):
    """Wrong, reversed, repeated or missing wishes, few slots, one thread: the same bytes, soon."""
    chance = random.Random(seed)
    options = dict(staging_slots=slots, io_threads=num_threads, stall_limit_s=20)
    delay = lambda: chance.choice([0, 0, 0.0005])  # noqa: E731
    with opened(tmp_path, layers=2, read_delay=delay, **options) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, range(layer, layer + 8 * S), flush=True)
        for turn, (wishes, order) in enumerate(passes):
            layer = turn % 2
            store.prefetch(table, layer, wishes)
            store.prefetch(table, 1 - layer, list(reversed(wishes)))
            for span in order:
                with store.fetch(table, layer, span) as pages:
                    first = layer + span * S
                    assert torch.equal(pages.records, rows(range(first, first + S))[1])
        store.check_integrity()
        stats = store.stats
        assert stats.hits + stats.late + stats.misses == 8 * len(passes)
        # Every read served a fetch or was wasted, or still waits in a slot.
        num_read = stats.bytes_read["disk"] // (S * RECORD)
        unused = num_read - 8 * len(passes) - stats.wasted
        assert 0 <= unused <= slots


def test_reading_ahead_hides_the_reads_behind_the_computing(tmp_path):
    """The plain twin waits for every read; with wishes the wait is nearly gone."""
    delay_s, spans, stalls = 0.01, 12, {}
    for overlap in (True, False):
        with opened(
            tmp_path, layers=1, read_delay=lambda: delay_s, overlap=overlap, staging_slots=4
        ) as store:
            table = store.open_table()
            write(store, table, 0, range(spans * S), flush=True)
            store.prefetch(table, 0)
            for span in range(spans):
                with store.fetch(table, 0, span):
                    time.sleep(delay_s)  # computing
            stalls[overlap] = store.stats.stall_s
    assert stalls[False] >= spans * delay_s
    # Only the first read is not hidden; half of the twin's wait leaves room for a loaded machine.
    assert stalls[True] < stalls[False] / 2


# ---- writing behind --------------------------------------------------------------------------


def test_a_record_that_is_not_on_disk_yet_is_waited_for(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=2, staging_slots=2) as store:
        table = store.open_table()
        store.file.may_write.clear()
        write(store, table, 0, range(S))  # returns although the disk stands still
        store.prefetch(table, 0, [0])
        assert not store.is_ready(table, 0, 0)
        timer = later(store.file.may_write.set)
        check(store, table, 0, range(S))
        timer.join()
        assert store.stats.late == 1 and store.stats.stall_s > 0.01


def test_writing_waits_only_when_the_buffers_are_full(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, write_buffers=2) as store:
        table = store.open_table()
        store.file.may_write.clear()
        write(store, table, 0, range(2 * S))
        assert store.stats.write_stall_s == 0
        timer = later(store.file.may_write.set)
        write(store, table, 0, range(S))
        timer.join()
        assert store.stats.write_stall_s > 0.01
        check(store, table, 0, [*range(2 * S), *range(S)])


def test_a_write_goes_before_wishes_when_the_buffers_are_full(tmp_path):
    """Otherwise the caller would wait for every wish before it can go on."""
    with opened(tmp_path, layers=1, file=Gated, io_threads=1, write_buffers=1) as store:
        table = store.open_table()
        write(store, table, 0, range(4 * S), flush=True)
        store.file.may_read.clear()
        store.prefetch(table, 0)
        until(lambda: store.file.reads == [0], "the first wish is under way")
        write(store, table, 0, range(S))  # takes the buffer
        store.file.may_read.set()
        until(lambda: len(store.file.reads) == 4, "all wishes are read")
        until(lambda: len(store.file.writes) == 5, "all writes are done")
        assert store.file.writes[-1] == (4, 1)


def test_closing_does_not_wait_for_writes_that_have_not_begun(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=1, write_buffers=4) as store:
        table = store.open_table()
        store.file.may_write.clear()
        write(store, table, 0, range(4 * S))
        later(store.file.may_write.set).join()
    assert store.file.counters.num_writes <= 4


# ---- bad disks -------------------------------------------------------------------------------


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
                    store.prefetch(table, layer)
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
            calls = [(store.fetch, 0, 0), (store.prefetch, 0, [0]), (store.fork,)]
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
        store.prefetch(table, 0, [0, 2])  # neighbours would be read in one go
        for wait_s in (0, 0.2):
            time.sleep(wait_s)
            with pytest.raises(StorageError, match="failure 1"):
                store.fetch(table, 0, 0)


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
            store.prefetch(table, 1)
            check(store, table, 1, range(2 * S))
        with pytest.raises(StorageError, match="layer 1, span 1"):
            store.fetch(table, 0, 0)


def test_a_disk_that_does_not_answer_is_an_error(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, stall_limit_s=0.1) as store:
        table = store.open_table()
        write(store, table, 0, range(S))
        check(store, table, 0, range(S))
        store.file.may_read.clear()
        with pytest.raises(StorageError, match="not answered"):
            store.fetch(table, 0, 0)
        with pytest.raises(StorageError, match="not answered"):
            store.prefetch(table, 0, [0])
        store.file.may_read.set()


def test_a_disk_that_never_answers_again_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("ebbtide.offload.io_threads.CLOSE_LIMIT_S", 0.1)
    files = []

    def spill():
        files.append(Gated(tmp_path))
        return files[-1]

    store = PageStore(1, RECORD, NEAR, S, {DISK: 4 * S}, spill=spill)
    table = store.open_table()
    write(store, table, 0, range(S))
    check(store, table, 0, range(S))
    files[0].may_read.clear()
    store.prefetch(table, 0, [0])
    until(lambda: len(files[0].reads) == 2, "the read hangs")
    with pytest.raises(StorageError, match="not answered"):
        store.close()
    files[0].may_read.set()
    store.close()
    assert not io_threads()


def is_waiting_in_the_store(thread: int) -> bool:
    """Whether a thread blocks in threading's `wait`, called from pager.py. A signal that came any
    earlier would end the test run in place of the wait."""
    frame = sys._current_frames().get(thread)
    if frame is None or frame.f_code.co_name != "wait":
        return False
    while frame is not None and not frame.f_code.co_filename.endswith("pager.py"):
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.endswith("test_pager.py")


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
                store.fetch(table, 0, 0)
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
        store.prefetch(table, 0)
        with store.fetch(table, 0, 1):
            1 / 0  # noqa: B018
    store.close()  # again, to no effect
    with pytest.raises(AssertionError, match="closed"):
        store.fetch(table, 0, 0)


def test_a_bug_in_a_thread_is_not_taken_for_a_bad_disk(tmp_path):
    class Buggy(ScratchFile):
        def _read_some(self, view, offset):
            raise TypeError("on purpose")

    with opened(tmp_path, file=Buggy) as store:
        table = store.open_table()
        write(store, table, 0, range(S))
        with pytest.raises(RuntimeError) as caught:
            store.fetch(table, 0, 0)
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
        store.prefetch(table, 0)
        for span in range(8):
            with store.fetch(table, 0, span) as pages:
                assert pages.records.device.type == pages.near.device.type == "cuda"
                part = slice(span * S, span * S + S)
                assert torch.equal(pages.records.cpu(), records[part])
                assert torch.equal(pages.near.cpu(), near[part])
        store.check_integrity(deep=True)
