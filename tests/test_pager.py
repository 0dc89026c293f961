"""The page store against a model of it: the same bytes whatever tiers, threads and calls."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from page_stores import (
    DEVICE,
    DISK,
    HOST,
    MIXES,
    NEAR,
    RECORD,
    THREADS,
    S,
    check,
    check_records,
    check_runs,
    hot_threads,
    mixes,
    opened,
    rows,
    spans_there,
    threads,
    until,
    write,
)

from ebbtide.offload.disk.disk import ScratchFile, Way
from ebbtide.offload.errors import DoesNotFit
from ebbtide.offload.pages.pager import PageStore


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
                store.spans.prefetch(table, 1 - layer)
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
        store.spans.prefetch(table, 0)
        check(store, table, 0, range(8 * S))
        assert files[0].snapshot().bytes_written == 8 * S * RECORD
    assert not os.listdir(tmp_path)


def test_a_part_of_a_span_can_be_fetched_and_no_more_than_is_there(tmp_path):
    with opened(tmp_path) as store:
        table = store.open_table()
        write(store, table, 0, range(S + 2))
        for count in (1, 2):
            with store.spans.fetch(table, 0, 1, count) as pages:
                assert torch.equal(pages.records, rows(range(S, S + count))[1])
                assert pages.near.shape == (count, NEAR)
        with pytest.raises(AssertionError):
            store.spans.fetch(table, 0, 1, 3)


def test_near_planes_may_have_no_bytes(tmp_path):
    with PageStore(1, RECORD, 0, S, {HOST: S}) as store:
        table = store.open_table()
        store.write(table, 0, 0, torch.empty(2, 0, dtype=torch.uint8), rows([1, 2])[1])
        with store.spans.fetch(table, 0, 0) as pages:
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
            with store.spans.fetch(table, 0, 0) as pages:
                places.add(pages.records.data_ptr())
        assert len(places) == 1 and store.stats.resident == 2
        assert store.stats.bytes_read["host"] == 2 * S * RECORD


def test_several_spans_may_be_held_at_once(tmp_path):
    with opened(tmp_path, staging_slots=4) as store:
        table = store.open_table()
        write(store, table, 0, range(6 * S))
        held = [store.spans.fetch(table, 0, span) for span in (2, 5, 2)]  # the same one twice, too
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
        with store.spans.fetch(table, 0, 0), store.spans.fetch(table, 0, 1):
            with pytest.raises(AssertionError, match="held by the caller"):
                store.spans.fetch(table, 0, 2)
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
            store.spans.prefetch(table, layer)  # what is on its way must not come back as it was
        store.truncate(table, keep)
        store.check_integrity(deep=True)
        kept = list(range(2 * S + 1))[:keep]
        for layer in (0, 1):
            check(store, table, layer, kept)
            store.spans.prefetch(table, layer)
            write(store, table, layer, [50, 51, 52, 53])
            check(store, table, layer, [*kept, 50, 51, 52, 53])
        store.check_integrity(deep=True)


def test_a_prefetched_span_that_grew_is_read_again(tmp_path):
    with opened(tmp_path) as store:
        table = store.open_table()
        write(store, table, 0, [1])
        store.spans.prefetch(table, 0, [0])
        until(lambda: store.spans.is_ready(table, 0, 0), "the first record is read")
        write(store, table, 0, [2])
        assert not store.spans.is_ready(table, 0, 0)
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
        calls = [
            (store.fork,),
            (store.spans.prefetch, 0, []),
            (store.spans.fetch, 0, 0),
            (store.truncate, 0),
        ]
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
        left = -len(self.model[table][layer]) % S
        if left and table.entries(layer)[-1] is None:  # nothing is written to what was dropped
            self.store.skip(table, layer, left)
            self.model[table][layer] += [0] * left
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
    @rule(pick=st.integers(0, 9), layer=st.integers(0, 1), first=st.integers(0, 4))
    def drop(self, pick, layer, first):
        table = self.any_table(pick)
        self.store.drop(table, layer, [range(first, first + 2), range(4, 9)])
        there = spans_there(table, layer)
        assert all(first <= span < first + 2 or span >= 4 for span in there)

    @has_tables
    @rule(pick=st.integers(0, 9), layer=st.integers(0, 1), count=st.integers(1, 2 * S))
    def skip(self, pick, layer, count):
        table = self.any_table(pick)
        if not table.ends_in_extent(layer):
            self.store.skip(table, layer, count)
            self.model[table][layer] += [0] * count

    @has_tables
    @rule(pick=st.integers(0, 9))
    def close(self, pick):
        table = self.any_table(pick)
        self.store.close_table(table)
        del self.model[table]

    @has_tables
    @rule(pick=st.integers(0, 9), layer=st.integers(0, 1), spans=st.lists(st.integers(0, 5)))
    def prefetch(self, pick, layer, spans):
        self.store.spans.prefetch(self.any_table(pick), layer, spans)

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
    @rule(
        pick=st.integers(0, 9),
        layer=st.integers(0, 1),
        records=st.sets(st.integers(0, 4 * S)),
        in_place=st.booleans(),
    )
    def fetch_records(self, pick, layer, records, in_place):
        table = self.any_table(pick)
        tags = self.model[table][layer]
        spans = spans_there(table, layer)
        there = sorted(r for r in records if r < len(tags) and r // S in spans)
        self.store.records.is_ready(table, layer, there)
        in_place = in_place and self.store.records.reads_in_place
        check_records(self.store, table, layer, tags, there, in_place)

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
