"""Predictors, the queue of wishes and the counters, with a fake source of pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.offload.errors import InputError
from ebbtide.offload.pages.page_table import Tier
from ebbtide.offload.pages.pager import PageStore
from ebbtide.offload.pages.store_options import StoreOptions
from ebbtide.prefetch.queue import WishQueue
from ebbtide.prefetch.registry import PREDICTORS, make_predictor
from ebbtide.prefetch.source import PageSource, Predictor
from ebbtide.prefetch.stats import Stats
from ebbtide.prefetch.walk import Walk


class FakeSource:
    """Brings the first `room` wishes and remembers the rest."""

    def __init__(self, room: int):
        self.room, self.wished = room, []

    def prefetch(self, table, layer, spans=None):
        self.wished += [(layer, span) for span in spans]

    def is_ready(self, table, layer, span):
        return (layer, span) in self.wished[: self.room]


def test_the_store_and_the_fake_speak_the_same_protocol():
    assert isinstance(FakeSource(1), PageSource)
    with PageStore(1, 4096, 0, 2, {Tier.HOST: 2}) as store:
        assert isinstance(store.spans, PageSource)


# ---- every predictor, one matrix -------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PREDICTORS))
@given(used=st.lists(st.integers(0, 20), max_size=12), num_spans=st.integers(0, 24))
def test_predictions_are_spans_that_exist_each_once(name, used, num_spans):
    predictor = make_predictor(name)
    assert isinstance(predictor, Predictor)
    for _ in range(2):
        predictor.record(3, used)
        for layer in (0, 3):  # one without a history and one with
            spans = predictor.predict(layer, num_spans)
            assert len(spans) == len(set(spans)) and all(0 <= s < num_spans for s in spans)
    assert predictor.predict(0, num_spans) == list(range(num_spans))


@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_a_full_pass_is_predicted_in_full(name):
    predictor = make_predictor(name)
    for num_spans in (5, 5, 6, 9):
        assert predictor.predict(1, num_spans) == list(range(num_spans))
        predictor.record(1, range(num_spans))


def test_history_predicts_what_was_used_then_what_is_new():
    predictor = make_predictor("history")
    predictor.record(0, [4, 1, 4, 2])
    assert predictor.predict(0, 5) == [4, 1, 2]
    assert predictor.predict(0, 7) == [4, 1, 2, 5, 6]
    assert predictor.predict(0, 3) == [1, 2]  # the table was truncated
    predictor.record(0, [])
    assert predictor.predict(0, 3) == [0, 1, 2]


def test_a_prediction_in_the_order_of_use_is_ready_earlier():
    """The order is what a predictor is for: the source brings what comes first."""
    predictor, used = make_predictor("history"), [9, 3, 7]
    predictor.record(0, used)
    source, plain = FakeSource(room=3), FakeSource(room=3)
    source.prefetch(None, 0, predictor.predict(0, 10))
    plain.prefetch(None, 0, make_predictor("in_order").predict(0, 10))
    assert [source.is_ready(None, 0, span) for span in used] == [True, True, True]
    assert [plain.is_ready(None, 0, span) for span in used] == [False, False, False]


def test_an_unknown_predictor_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'oracle'; known: history, in_order"):
        make_predictor("oracle")
    with pytest.raises(InputError, match=r"'oracle'; known: history, in_order"):
        PageStore(1, 4096, 0, 2, {Tier.HOST: 2}, options=StoreOptions(predictor="oracle"))


# ---- the queue -------------------------------------------------------------------------------


def drain(queue: WishQueue, accept=lambda key: True) -> list:
    taken = []
    while (wish := queue.take(accept)) is not None:
        taken.append(wish.key)
    return taken


def test_wishes_are_served_in_order_and_once():
    queue = WishQueue()
    queue.open_batch()
    queue.add([3, 1, 3, 2], "a")
    queue.open_batch()
    queue.add([1, 9], "a")
    assert len(queue) == 4 and 1 in queue
    assert drain(queue) == [3, 1, 2, 9]


def test_what_cannot_be_served_now_is_passed_over_and_stays():
    queue = WishQueue()
    queue.add(range(6), "a")
    assert drain(queue, lambda key: key % 2) == [1, 3, 5]
    assert drain(queue) == [0, 2, 4]


def test_stale_wishes_go_and_renewed_ones_stay():
    queue = WishQueue()
    old = queue.open_batch()
    queue.add([1, 2, 3], "a")
    queue.add([7], "b")
    queue.open_batch()
    queue.add([2], "a")  # wished again
    queue.add([4], "a")
    assert queue.drop("a", old) == 2
    assert drain(queue) == [2, 7, 4]


def test_a_wish_knows_its_place():
    queue = WishQueue()
    queue.add(["x", "y"], "a")
    x, y = queue.remove("x"), queue.remove("y")
    assert x.order < y.order < queue.make("z", "a").order
    assert queue.remove("x") is None and len(queue) == 0


# ---- the walk --------------------------------------------------------------------------------


def test_a_pass_ends_with_another_group_or_a_span_that_comes_again():
    walk = Walk()
    assert walk.follow("a", 3, 1) is None
    assert walk.follow("a", 1, 2) is None
    assert walk.follow("b", 1, 5) == ("a", [3, 1], 2, True)
    assert walk.follow("b", 1, 6) == ("b", [1], 5, False)
    walk.forget()
    assert walk.follow("a", 0, 7) is None


# ---- the counters ----------------------------------------------------------------------------


def test_a_difference_of_snapshots_is_what_happened_between():
    stats = Stats(bytes_read={"host": 5, "disk": 0})
    stats.hits = 2
    before = stats.snapshot()
    stats.hits, stats.misses, stats.stall_s = 5, 1, 0.5
    stats.bytes_read["disk"] = 7
    since = stats - before
    assert (since.hits, since.misses, since.stall_s) == (3, 1, 0.5)
    assert since.bytes_read == {"host": 0, "disk": 7}
    assert before.hits == 2 and before.bytes_read == {"host": 5, "disk": 0}
    assert since.hit_rate == 0.75


def test_rates_of_nothing_are_one():
    assert (Stats().hit_rate, Stats().write_amplification) == (1.0, 1.0)
