"""What is read ahead and when, what waits for what: wishes and buffers never change a byte."""

from __future__ import annotations

import random
import time
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_stores import (
    DISK,
    HOST,
    RECORD,
    Gated,
    S,
    check,
    io_threads,
    later,
    opened,
    rows,
    until,
    write,
)


def test_wishes_are_read_in_order_ahead_of_the_need(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=1, staging_slots=4) as store:
        table = store.open_table()
        write(store, table, 0, range(8 * S), flush=True)
        store.spans.prefetch(table, 0, [6, 2, 6, 4, 0, 3])  # no neighbours: they would go together
        until(lambda: store.spans.is_ready(table, 0, 0), "all slots are filled")
        assert store.file.reads == [6, 2, 4, 0]  # as many as there are slots
        for span in (6, 2, 4, 0):
            with store.spans.fetch(table, 0, span) as pages:
                assert torch.equal(pages.records, rows(range(span * S, span * S + S))[1])
        until(lambda: store.spans.is_ready(table, 0, 3), "the freed slots are used")
        assert (store.stats.hits, store.stats.late, store.stats.misses) == (4, 0, 0)
        assert store.stats.stall_s == 0


def test_hits_late_and_misses_are_told_apart(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=1, staging_slots=4) as store:
        table = store.open_table()
        write(store, table, 0, range(5 * S), flush=True)
        store.spans.prefetch(table, 0, [0])
        until(lambda: store.spans.is_ready(table, 0, 0), "the wish is there")
        store.file.may_read.clear()
        store.spans.prefetch(table, 0, [1, 2])
        until(lambda: store.file.reads == [0, 1], "the second wish is under way")
        timer = later(store.file.may_read.set)
        for span in (0, 1, 2, 3):  # ready, under way, wished for, never heard of
            store.spans.fetch(table, 0, span).close()
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
        store.spans.prefetch(table, 0, [0, 1, 2, 3])
        until(lambda: store.spans.is_ready(table, 0, 1), "both slots are filled")
        store.spans.fetch(table, 0, 5).close()  # nobody wished for it
        assert store.file.reads[:3] == [0, 1, 5]
        assert store.spans.is_ready(table, 0, 0)  # what is needed first is still there
        assert (store.stats.misses, store.stats.wasted) == (1, 1)


def test_what_gave_way_once_is_read_once_more(tmp_path):
    """And in time: asked for behind all others, it would find every slot taken, and the next one
    would give way to it, for ever after."""
    num_spans, rounds = 8, 4
    with opened(tmp_path, layers=2, staging_slots=4) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, range(num_spans * S), flush=True)
        store.spans.prefetch(table, 0)
        until(lambda: store.spans.is_ready(table, 0, 3), "all slots are filled")
        store.spans.fetch(table, 1, 7).close()  # nobody wished for it
        for _ in range(rounds):
            for layer in range(2):
                store.spans.prefetch(table, layer)
                store.spans.prefetch(table, 1 - layer)
                for span in range(num_spans):
                    is_there = partial(store.spans.is_ready, table, layer, span)
                    until(is_there, "it is there in time")
                    store.spans.fetch(table, layer, span).close()
        assert (store.stats.misses, store.stats.wasted) == (1, 1)


def test_wrong_wishes_are_dropped_when_their_layer_is_over(tmp_path):
    with opened(tmp_path, layers=3, file=Gated, io_threads=1, staging_slots=4) as store:
        table = store.open_table()
        for layer in range(3):
            write(store, table, layer, range(4 * S), flush=True)
        store.spans.prefetch(table, 0, [0, 1, 2])
        until(lambda: store.spans.is_ready(table, 0, 2), "three slots are filled")
        store.spans.fetch(table, 0, 0).close()
        store.spans.prefetch(table, 1, [0, 1, 2, 3])  # room for two while layer 0's wishes are kept
        store.spans.fetch(table, 1, 0).close()  # layer 0 is over
        assert store.stats.wasted == 2
        until(lambda: store.spans.is_ready(table, 1, 3), "their slots serve layer 1")


def test_a_wish_for_the_next_pass_survives_the_end_of_this_one(tmp_path):
    with opened(tmp_path, layers=2, staging_slots=4) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, range(S), flush=True)
        store.spans.fetch(table, 0, 0).close()
        store.spans.prefetch(table, 0, [0])  # early, for the next token
        until(lambda: store.spans.is_ready(table, 0, 0), "the wish is there")
        store.spans.fetch(table, 1, 0).close()
        assert store.spans.is_ready(table, 0, 0) and store.stats.wasted == 0


def test_a_wish_made_again_is_as_good_as_new(tmp_path):
    with opened(tmp_path, layers=2, staging_slots=4) as store:
        table = store.open_table()
        for layer in range(2):
            write(store, table, layer, range(2 * S), flush=True)
        store.spans.prefetch(table, 0, [1])
        until(lambda: store.spans.is_ready(table, 0, 1), "the wish is there")
        store.spans.fetch(table, 0, 0).close()
        store.spans.prefetch(table, 0, [1])  # still wanted after this pass
        store.spans.fetch(table, 1, 0).close()
        assert store.spans.is_ready(table, 0, 1) and store.stats.wasted == 0


def test_with_one_layer_a_pass_ends_when_a_span_comes_again(tmp_path):
    with opened(tmp_path, layers=1, staging_slots=4, predictor="history") as store:
        table = store.open_table()
        write(store, table, 0, range(4 * S), flush=True)
        store.spans.fetch(table, 0, 2).close()
        store.spans.prefetch(table, 0, [2, 0])
        until(lambda: store.spans.is_ready(table, 0, 0), "the next pass is there")
        store.spans.fetch(table, 0, 1).close()
        store.spans.fetch(table, 0, 2).close()  # the next pass
        assert store.spans.is_ready(table, 0, 0) and store.stats.wasted == 0
        assert store.spans._predictor.predict(0, 4) == [2, 1, 3]


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
        store.spans.prefetch(table, 0, [0])
        until(lambda: store.spans.is_ready(table, 0, 0), "the first wish is there")
        store.file.may_read.clear()
        store.spans.prefetch(table, 0, [1])
        until(lambda: len(store.file.reads) == 2, "the second is under way")
        store.spans.fetch(table, 0, 0).close()
        store.spans.fetch(table, 1, 0).close()  # layer 0 is over, and the read still under way
        timer = later(store.file.may_read.set)
        if wanted:
            store.spans.fetch(table, 0, 1).close()  # not over, after all: the same read serves
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
        store.spans.prefetch(table, 0, [0, 1, -1, 4, 99])
        check(store, table, 0, range(4 * S))
        assert store.stats.misses == 2 and store.stats.hits == 0
        assert store.spans.is_ready(table, 0, 0) and not store.spans.is_ready(table, 0, 3)


def test_the_plain_twin_ignores_wishes_and_reads_the_same(tmp_path):
    with opened(tmp_path, layers=1, overlap=False) as store:
        assert not io_threads()
        table = store.open_table()
        write(store, table, 0, range(4 * S), flush=True)
        store.spans.prefetch(table, 0)
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
            store.spans.fetch(table, 0, span).close()
        store.spans.fetch(table, 1, 0).close()
        store.file.reads.clear()
        store.spans.prefetch(table, 0)
        until(lambda: store.spans.is_ready(table, 0, 1), "what was used last time is there")
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
            store.spans.prefetch(table, layer, wishes)
            store.spans.prefetch(table, 1 - layer, list(reversed(wishes)))
            for span in order:
                with store.spans.fetch(table, layer, span) as pages:
                    first = layer + span * S
                    assert torch.equal(pages.records, rows(range(first, first + S))[1])
        store.check_integrity()
        stats = store.stats
        assert stats.hits + stats.late + stats.misses == 8 * len(passes)
        # Every read served a fetch or was wasted, or still waits in a slot.
        num_read = stats.bytes_read["disk"] // (S * RECORD)
        unused = num_read - 8 * len(passes) - stats.wasted
        assert 0 <= unused <= slots


@pytest.mark.parametrize("overlap", [True, False])
def test_the_next_span_is_read_while_one_is_used(tmp_path, overlap):
    """With wishes; the plain twin reads each span when it is fetched, and none before."""
    spans, begun = 12, []

    def delay() -> float:
        begun.append(None)
        return 0.0

    with opened(tmp_path, layers=1, read_delay=delay, overlap=overlap, staging_slots=4) as store:
        table = store.open_table()
        write(store, table, 0, range(spans * S), flush=True)
        store.spans.prefetch(table, 0)
        for span in range(spans):
            with store.spans.fetch(table, 0, span):
                until = time.monotonic() + 20  # computing, for as long as it takes
                while overlap and len(begun) < min(span + 2, spans):
                    assert time.monotonic() < until, "nothing is read ahead"
                    time.sleep(0.001)
                assert overlap or len(begun) == span + 1


# ---- writing behind --------------------------------------------------------------------------


def test_a_record_that_is_not_on_disk_yet_is_waited_for(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=2, staging_slots=2) as store:
        table = store.open_table()
        store.file.may_write.clear()
        write(store, table, 0, range(S))  # returns although the disk stands still
        store.spans.prefetch(table, 0, [0])
        assert not store.spans.is_ready(table, 0, 0)
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
        store.spans.prefetch(table, 0)
        until(lambda: store.file.reads == [0], "the first wish is under way")
        write(store, table, 0, range(S))  # takes the buffer
        until(lambda: len(store.file.writes) == 5, "all writes are done")
        assert store.file.writes[-1] == (4, 1)
        store.file.may_read.set()
        until(lambda: len(store.file.reads) == 4, "all wishes are read")


def test_closing_does_not_wait_for_writes_that_have_not_begun(tmp_path):
    with opened(tmp_path, layers=1, file=Gated, io_threads=1, write_buffers=4) as store:
        table = store.open_table()
        store.file.may_write.clear()
        write(store, table, 0, range(4 * S))
        later(store.file.may_write.set).join()
    assert store.file.counters.num_writes <= 4
