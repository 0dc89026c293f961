"""Single records from disk: wishes that come in time, wishes that were wrong, and who has to go."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from page_stores import DISK, HOST, RECORD, Gated, S, check_records, later, opened, until, write

from ebbtide.offload.errors import InputError, StorageError
from ebbtide.offload.pages.eviction import EVICTIONS, LeastFrequent, LeastRecent
from ebbtide.prefetch.foresight import STEPS_BYTES, is_worth_scoring

NUM_RECORDS = 8 * S
TAGS = list(range(100, 100 + NUM_RECORDS))


def filled(store, num_layers=2):
    table = store.open_table()
    for layer in range(num_layers):
        write(store, table, layer, TAGS)
    store.flush()
    return table


def released(coming):
    for part in coming:
        with part:
            yield part


def test_what_was_wished_for_is_there_without_waiting(tmp_path):
    with opened(tmp_path, hot_records=12) as store:
        table = filled(store)
        store.records.prefetch(table, 0, [3, 9, 4])
        until(lambda: store.records.is_ready(table, 0, [3, 4, 9]).all(), "wishes are read")
        store.flush()  # takes over the bytes that the reading threads counted
        before = store.stats.snapshot()
        check_records(store, table, 0, TAGS, [3, 4, 9])
        spent = store.stats - before
        assert (spent.hits, spent.foreseen, spent.late, spent.misses) == (3, 3, 0, 0)
        assert spent.bytes_read["disk"] == 0
        check_records(store, table, 0, TAGS, [3, 4, 9])  # again: they are still there
        spent = store.stats - before
        assert (spent.hits, spent.foreseen, spent.misses) == (6, 3, 0)


def test_only_what_is_selected_is_read(tmp_path):
    with opened(tmp_path, hot_records=12) as store:
        table = filled(store)
        before = store.stats.snapshot()
        check_records(store, table, 1, TAGS, [0, 7, 20])
        assert (store.stats - before).bytes_read["disk"] == 3 * RECORD


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_selection_larger_than_the_cache_comes_in_parts(tmp_path, eviction, in_place):
    with opened(tmp_path, disk=10, host=6, hot_records=4, eviction=eviction) as store:
        table = filled(store)
        for _ in range(2):
            check_records(store, table, 0, TAGS, list(range(NUM_RECORDS)), in_place)
        store.check_integrity()
        on_disk = [r for r in range(NUM_RECORDS) if table.extent(0, r // S).tier is DISK]
        parts = [len(p.positions) for p in released(store.records.fetch(table, 0, on_disk))]
        assert sum(parts) == len(on_disk)
        assert max(parts[1:]) <= 2, "after what is there half of the frames at a time"


def test_selections_larger_than_the_cache_leave_most_of_it_alone(tmp_path):
    """Layers take turns, and what does not fit passes through a few frames."""
    with opened(tmp_path, hot_records=12) as store:
        table = filled(store)
        wanted = list(range(0, NUM_RECORDS, 2))  # of each of two layers, more than fit of one
        for _ in range(3):
            for layer in range(2):
                check_records(store, table, layer, TAGS, wanted)
        before = store.stats.snapshot()
        for layer in range(2):
            check_records(store, table, layer, TAGS, wanted)
        # At best all but one frame keep theirs; half of the frames are for what passes through.
        assert (store.stats - before).hits >= 12 - 12 // 2
        store.check_integrity()


def test_of_many_frames_those_that_somebody_selected_last_are_spared(tmp_path):
    """Of more frames than are looked at for what to give up."""
    tags = list(range(600))
    with opened(tmp_path, disk=2 * 600 // S, hot_records=900) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, tags)
        store.flush()
        for layer in range(2):
            check_records(store, table, layer, tags, tags)
        before = store.stats.snapshot()
        for first in range(0, 600, 100):
            selected = [*range(first, first + 100)]
            check_records(store, table, 1, tags, [0, *selected] if first else selected)
            check_records(store, table, 0, tags, [1, 599])
        spent = store.stats - before
        assert spent.hits + spent.misses == 6 * 102 + 5
        assert spent.misses < 600 - 100, "at least some of what was there before"
        again = store.stats.snapshot()
        check_records(store, table, 0, tags, [1, 599])
        check_records(store, table, 1, tags, selected)
        assert (store.stats - again).misses == 0
        store.check_integrity()


def test_what_nobody_selected_last_makes_room_for_any_number(tmp_path):
    with opened(tmp_path, file=Gated, hot_records=12, io_threads=1) as store:
        table = filled(store)
        check_records(store, table, 0, TAGS, list(range(12)))
        check_records(store, table, 0, TAGS, [0])
        store.file.may_read.clear()
        coming = store.records.fetch(table, 1, list(range(0, 22, 2)))
        opening = later(store.file.may_read.set)
        positions = [at for part in released(coming) for at in part.positions.tolist()]
        opening.join()
        assert sorted(positions) == list(range(11))
        assert store.stats.late + store.stats.misses == 12 + 11
        before = store.stats.snapshot()
        check_records(store, table, 0, TAGS, [0])  # selected last: still there
        assert (store.stats - before).hits == 1


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("num_hot", [0, 2])
def test_what_is_there_comes_first(tmp_path, in_place, num_hot):
    with opened(tmp_path, host=4, file=Gated, hot_records=12, io_threads=1) as store:
        table = filled(store)
        in_memory = [r for r in range(NUM_RECORDS) if table.extent(0, r // S).tier is HOST]
        on_disk = [r for r in range(NUM_RECORDS) if table.extent(0, r // S).tier is DISK]
        assert in_memory and len(on_disk) > 3
        check_records(store, table, 0, TAGS, on_disk[:num_hot])
        store.file.may_read.clear()
        wanted = sorted([*in_memory, *on_disk[:4]])
        fetch = store.records.fetch_in_place if in_place else store.records.fetch
        coming = fetch(table, 0, wanted)
        with next(coming) as first:  # while the disk does nothing
            found = [wanted[at] for at in first.positions]
            assert found == sorted([*in_memory, *on_disk[:num_hot]])
        store.file.may_read.set()
        for part in released(coming):
            found += [wanted[at] for at in part.positions]
        assert sorted(found) == wanted


def test_a_selection_that_is_left_half_way_harms_nobody(tmp_path):
    with opened(tmp_path, hot_records=4) as store:
        table = filled(store)
        next(store.records.fetch(table, 0, list(range(NUM_RECORDS)))).__enter__()
        check_records(store, table, 0, TAGS, list(range(NUM_RECORDS)))
        store.check_integrity()


def test_what_is_waited_for_comes_in_one_part(tmp_path):
    with opened(tmp_path, file=Gated, hot_records=12, io_threads=1) as store:
        table = filled(store)
        store.file.may_read.clear()
        coming = store.records.fetch(table, 0, [0, 5, 7])
        opening = later(store.file.may_read.set)
        parts = [part.positions.tolist() for part in released(coming)]
        opening.join()
        assert parts == [[0, 1, 2]]


def test_wrong_wishes_are_cancelled_when_their_layer_has_its_turn(tmp_path):
    with opened(tmp_path, file=Gated, hot_records=12, io_threads=1) as store:
        table = filled(store)
        store.file.reads.clear()
        store.file.may_read.clear()
        store.records.prefetch(table, 0, [0, 5, 6, 7])
        until(lambda: store.file.reads, "the first wish is being read")
        store.file.may_read.set()
        check_records(store, table, 0, TAGS, [1])
        # The first was under way, and nobody needed it; the rest was never read, save what the
        # thread began before the demand came.
        assert len(store.file.reads) <= 5
        before = store.stats.bytes_read["disk"]
        check_records(store, table, 0, TAGS, [1])
        assert store.stats.bytes_read["disk"] == before
        store.check_integrity()


def test_wishes_are_cancelled_when_their_layer_needs_nothing_from_disk(tmp_path):
    with opened(tmp_path, host=4, file=Gated, hot_records=12, io_threads=1) as store:
        table = filled(store)
        in_memory = [r for r in range(NUM_RECORDS) if table.extent(0, r // S).tier is HOST]
        on_disk = [r for r in range(NUM_RECORDS) if table.extent(0, r // S).tier is DISK]
        store.file.may_read.clear()
        store.records.prefetch(table, 0, on_disk[::S])  # no neighbours, which are read in one go
        until(lambda: store.file.reads, "the first wish is being read")
        check_records(store, table, 0, TAGS, in_memory[:2])
        store.file.may_read.set()
        check_records(store, table, 1, TAGS, [0])
        assert len(store.file.reads) <= 2 + 1  # one more may have been taken by its thread


def test_wishes_of_all_layers_leave_room_for_demands(tmp_path):
    with opened(tmp_path, hot_records=8) as store:
        table = filled(store)
        for layer in range(2):
            store.records.prefetch(table, layer, list(range(NUM_RECORDS)))
        until(lambda: store.records.is_ready(table, 0, range(NUM_RECORDS)).sum() == 4, "half")
        assert not store.records.is_ready(table, 1, range(NUM_RECORDS)).any()
        check_records(store, table, 0, TAGS, [20])  # its turn: what it did not need makes room
        store.records.prefetch(table, 1, list(range(NUM_RECORDS)))
        until(lambda: store.records.is_ready(table, 1, range(NUM_RECORDS)).sum() == 4, "half")


def test_a_wish_that_is_under_way_is_late_and_not_read_twice(tmp_path):
    with opened(tmp_path, file=Gated, hot_records=12, io_threads=1) as store:
        table = filled(store)
        store.file.reads.clear()
        store.file.may_read.clear()
        store.records.prefetch(table, 0, [4])
        until(lambda: store.file.reads, "the wish is being read")
        store.file.may_read.set()
        check_records(store, table, 0, TAGS, [4])
        assert len(store.file.reads) == 1
        assert store.stats.late + store.stats.hits == 1 and store.stats.misses == 0


def test_waste_is_counted(tmp_path):
    with opened(tmp_path, hot_records=4) as store:
        table = filled(store)
        store.records.prefetch(table, 0, [1, 2])
        until(lambda: store.records.is_ready(table, 0, [1, 2]).all(), "wishes are read")
        for record in range(5, 12):  # enough to push both out
            check_records(store, table, 0, TAGS, [record])
        assert store.stats.wasted == 2


@pytest.mark.parametrize("stage", range(6))
def test_a_table_that_is_closed_after_an_interruption_leaves_no_wrong_record(tmp_path, stage):
    """Ctrl-C between the assignments of a read, and a branch is closed next."""
    with opened(tmp_path, disk=60, hot_records=8) as store:
        table, other = filled(store), filled(store)
        check_records(store, table, 0, TAGS, [0, 1])
        check_records(store, other, 0, TAGS, [2, 3, 4, 5])
        hot = store.records._hot
        interrupted = []

        def trace(frame, event, arg):
            if frame.f_code is not type(hot)._read.__code__:
                return None

            def line(frame, event, arg):
                if event == "line":
                    interrupted.append(frame.f_lineno)
                    if len(set(interrupted)) > stage + 2:
                        raise KeyboardInterrupt
                return line

            return line

        sys.settrace(trace)
        try:
            with pytest.raises(KeyboardInterrupt):
                check_records(store, table, 0, TAGS, [6, 7, 8])
        finally:
            sys.settrace(None)
        store.close_table(other)
        store.check_integrity()
        check_records(store, table, 1, TAGS, list(range(12)))
        check_records(store, table, 0, TAGS, list(range(12)))
        store.check_integrity()


def test_nothing_is_there_after_clearing(tmp_path):
    with opened(tmp_path, hot_records=12) as store:
        table = filled(store)
        check_records(store, table, 0, TAGS, [1, 2])
        store.records.prefetch(table, 1, [3, 4])
        store.records.clear_hot()
        store.check_integrity()
        before = store.stats.snapshot()
        check_records(store, table, 0, TAGS, [1, 2])
        assert (store.stats - before).misses == 2


def test_a_failing_disk_is_an_error_and_no_wrong_record(tmp_path):
    with opened(tmp_path, hot_records=4) as store:
        table = filled(store)
        extent = table.extent(0, 1)
        extent.crcs[1] ^= 1
        with pytest.raises(StorageError, match="layer 0, span 1: record 1"):
            check_records(store, table, 0, TAGS, [0, S + 1])
        with pytest.raises(StorageError):  # the failure stays
            check_records(store, table, 0, TAGS, [2])


def test_an_unknown_eviction_names_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="least_frequent, least_recent"):
        with opened(tmp_path, hot_records=4, eviction="newest"):
            pass


def test_least_recent_and_least_frequent_order():
    recent, frequent = LeastRecent(4), LeastFrequent(4)
    for eviction in (recent, frequent):
        eviction.touch(np.arange(4))
        for used in ([0], [0], [0], [1], [2], [3]):
            eviction.use(np.array(used))
    records = np.arange(4)
    assert np.argsort(recent.worth(records)).tolist() == [0, 1, 2, 3]
    assert np.argmax(frequent.worth(records)) == 0, "used most"
    assert np.argmin(frequent.worth(records)) == 3, "of those used once, the latest"
    for eviction in (recent, frequent):
        eviction.forget(slice(0, 1))
        assert np.argmin(eviction.worth(records)) == 0, "another record has the number now"


def test_uses_count_on_while_a_record_is_not_there(tmp_path):
    with opened(tmp_path, hot_records=2) as store:
        table = filled(store)
        for others in ([5, 6], [7, 8], [9, 10]):
            for record in [0, *others]:  # 0 is used, and pushed out again
                check_records(store, table, 0, TAGS, [record])
        for record in [0, 11, 12]:  # 12 takes the place of 0, used before 11, or of 11, used once
            check_records(store, table, 0, TAGS, [record])
        before = store.stats.snapshot()
        check_records(store, table, 0, TAGS, [0])
        assert (store.stats - before).hits == 1


def test_what_a_layer_selected_last_goes_after_what_none_did(tmp_path):
    with opened(tmp_path, hot_records=6) as store:
        table = filled(store)
        for _ in range(4):
            check_records(store, table, 0, TAGS, [1, 2])
        check_records(store, table, 0, TAGS, [3])  # 1 and 2 were used more, but not last
        for record in range(8, 14):
            check_records(store, table, 1, TAGS, [record])
        before = store.stats.snapshot()
        check_records(store, table, 0, TAGS, [3])
        assert (store.stats - before).hits == 1
        store.close_table(table)
        store.check_integrity()


def test_what_a_layer_lacks_is_remembered(tmp_path):
    with opened(tmp_path, hot_records=8) as store:
        table = filled(store)
        assert store.records.lacked_bytes(table, 0) == 0
        check_records(store, table, 0, TAGS, [1, 2])
        assert store.records.lacked_bytes(table, 0) == 2 * RECORD
        check_records(store, table, 0, TAGS, [1, 2])  # both are there
        assert 0 < store.records.lacked_bytes(table, 0) < 2 * RECORD
        assert store.records.lacked_bytes(table, 1) == 0


def test_a_query_is_rehearsed_where_reading_takes_longer_than_scoring():
    assert is_worth_scoring(1 << 20, STEPS_BYTES + (1 << 20))
    assert not is_worth_scoring(2 << 20, STEPS_BYTES + (1 << 20))
    assert not is_worth_scoring(0, STEPS_BYTES / 2)  # nor are its other steps free


def test_hot_frames_are_reserved(tmp_path):
    with opened(tmp_path, hot_records=5) as with_hot:
        reserved = with_hot.reserved_bytes()
    with opened(tmp_path) as without:
        assert sum(reserved.values()) - sum(without.reserved_bytes().values()) == 5 * RECORD
        assert reserved[DISK] == without.reserved_bytes()[DISK]


def test_torch_indexing_of_nothing_selected(tmp_path):
    with opened(tmp_path, hot_records=4) as store:
        table = filled(store)
        assert list(store.records.fetch(table, 0, [])) == []
        assert store.records.near_plane(table, 0)[1].dtype == torch.int64
