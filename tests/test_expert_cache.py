"""Routed experts that are read when they are chosen: each is the right one, whatever was held,
passed by, failed or was interrupted before; and a model that holds few of them gives the bits of
one that holds all.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llm import TINY, hold_few_experts, open_small

from ebbtide.offload.errors import StorageError
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.weights.expert_cache import PASSING_SLOTS, READERS, ExpertCache, fewest_slots

LAYERS, EXPERTS, CHOSEN = 3, 8, 3
SLOT_BYTES = 64


def number_of(expert) -> int:
    return expert[0] * EXPERTS + expert[1]


def fill(expert, buffer):
    """A slot's bytes say whose they are."""
    buffer.fill_(number_of(expert))
    return {"w": buffer}


def cache_of(num_stay: int, fill=fill) -> ExpertCache:
    return ExpertCache(fill, SLOT_BYTES, PASSING_SLOTS + num_stay, LAYERS)


def check(cache, layer: int, numbers, keeps: bool) -> None:
    assert brought(cache, layer, numbers, keeps=keeps) == list(numbers)


def brought(cache, layer: int, numbers, **how) -> list[int]:
    """In the order in which they come, each with its own numbers."""
    given = []
    for number, tensors in cache.bring(layer, numbers, **how):
        assert set(tensors["w"].tolist()) == {number_of((layer, number))}
        given.append(number)
    return given


STEPS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.sets(st.integers(0, EXPERTS - 1), min_size=1),
        st.booleans(),  # keeps
        st.integers(0, EXPERTS),  # how many are taken before an interruption
        st.sets(st.integers(0, EXPERTS - 1), max_size=2),  # whose reads fail
        st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1))),  # expected
        st.booleans(),  # at_hand_first
    ),
    max_size=12,
)


@given(st.integers(1, 12), STEPS)
@settings(max_examples=60)
def test_whatever_came_before_each_slot_holds_what_was_asked_for(num_stay, steps):
    failing = set()  # reads that go on after an interruption may fail or not

    def fill_or_fail(expert, buffer):
        if expert in failing:
            buffer.fill_(255)  # half written
            raise StorageError("a read failed")
        return fill(expert, buffer)

    cache, may_fail = cache_of(num_stay, fill_or_fail), False
    cache._right = dict.fromkeys(range(LAYERS), 1000.0)  # whatever was expected is read
    try:
        for layer, numbers, keeps, taken, fail, expected, first in steps:
            failing, may_fail = {(layer, number) for number in fail}, may_fail or bool(fail)
            cache.expect(expected[0], sorted(expected[1]))
            given = cache.bring(layer, sorted(numbers), keeps=keeps, at_hand_first=first)
            try:
                for number, tensors in itertools.islice(given, taken):
                    assert set(tensors["w"].tolist()) == {number_of((layer, number))}
            except StorageError:
                assert may_fail
            given.close()
        failing = set()
        for layer in range(LAYERS):
            cache._pool.submit(time.sleep, 0).result()  # what was queued has begun
            for slot in cache._slots + cache._passing:
                with slot._writing:  # a read that failed while nobody waited is done again
                    pass
            check(cache, layer, range(EXPERTS), keeps=False)
        assert len(cache._held) <= num_stay
        assert len({id(slot) for slot in cache._held.values()}) == len(cache._held)
    finally:
        cache.close()


def test_the_least_recently_used_expert_goes():
    cache, held = cache_of(4), OrderedDict()
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        layer = int(torch.randint(0, LAYERS, (1,), generator=generator))
        number = int(torch.randint(0, EXPERTS, (1,), generator=generator))
        before = cache.hits
        check(cache, layer, [number], keeps=True)
        assert (cache.hits > before) == ((layer, number) in held)
        held[layer, number] = None
        held.move_to_end((layer, number))
        if len(held) > 4:
            held.popitem(last=False)
    cache.close()


def test_a_cell_of_prefill_leaves_its_share_to_each_layer_and_pushes_nothing_out():
    cache = cache_of(2 * LAYERS)
    for _ in range(2):
        for layer in range(LAYERS):
            check(cache, layer, range(EXPERTS), keeps=False)
    # The first two of each layer were kept, and served the second time.
    assert cache.hits == 2 * LAYERS
    check(cache, 0, [6, 7], keeps=True)
    held = set(cache._held)
    check(cache, 1, range(EXPERTS), keeps=False)
    assert set(cache._held) == held
    cache.close()


def test_a_reading_that_was_begun_and_forgotten_writes_into_no_others_slot(monkeypatch):
    """Ctrl-C may fall behind the beginning of a reading and before anybody knows of it."""
    begun, go = threading.Event(), threading.Event()

    def slow(expert, buffer):
        if expert == (0, 0):
            begun.set()
            go.wait(20)
        return fill(expert, buffer)

    cache = cache_of(1, slow)
    submit = cache._pool.submit

    def interrupted(*args):
        submit(*args)
        begun.wait(20)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache._pool, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check(cache, 0, [0], keeps=True)
    threading.Timer(0.05, go.set).start()
    for _ in range(2):  # read, and held
        check(cache, 0, [1], keeps=True)
    assert cache.hits == 1
    cache.close()


def test_a_slot_taken_before_a_reading_has_begun_is_left_alone():
    held, go = [], threading.Event()

    def slow(expert, buffer):
        held.append(expert)
        go.wait(20)
        return fill(expert, buffer)

    cache = cache_of(1, slow)
    for _ in range(4):  # all readers are busy elsewhere
        cache._pool.submit(go.wait, 20)
    slot = cache._slots[0]
    cache._read((0, 0), slot)
    cache._read((0, 1), slot)
    go.set()
    assert set(slot.reading.result()["w"].tolist()) == {1}
    assert held == [(0, 1)]
    cache.close()


def test_what_is_given_back_and_closed_holds_no_memory():
    cache = cache_of(8)
    check(cache, 0, range(8), keeps=True)
    slots = [weakref.ref(slot) for slot in cache._slots + cache._passing]
    gc.disable()
    try:
        cache.shrink(PASSING_SLOTS + 3)
        assert sum(slot() is not None for slot in slots) == PASSING_SLOTS + 3
        check(cache, 0, [5, 6, 7], keeps=True)  # the last ones stayed
        assert cache.hits == 3
        check(cache, 1, range(8), keeps=True)
        cache.close()
        assert not any(slot() for slot in slots)
    finally:
        gc.enable()


def test_what_is_given_back_is_written_into_no_more():
    """Readings of expected experts may be under way, and queued, when a session needs the room."""
    begun, go, read = threading.Semaphore(0), threading.Event(), []

    def slow(expert, buffer):
        begun.release()
        go.wait(20)
        read.append(expert)
        return fill(expert, buffer)

    cache = cache_of(READERS + 4, slow)
    cache._right[1] = 1.0
    cache.expect(1, range(READERS + 2))
    cache._begin_expected(set())
    for _ in range(READERS):
        assert begun.acquire(timeout=20)
    buffers = [weakref.ref(slot.buffer) for slot in cache._slots]
    threading.Timer(0.05, go.set).start()
    cache.shrink(PASSING_SLOTS + 1)
    assert sum(buffer() is not None for buffer in buffers) == 1
    cache._pool.shutdown(wait=True)
    # Of the two that were queued the last one alone, which stays.
    assert sorted(read) == [(1, n) for n in (*range(READERS), READERS + 1)]
    cache.close()


def test_all_that_a_layer_lacks_is_read_at_once():
    arrived = threading.Barrier(CHOSEN, timeout=20)

    def together(expert, buffer):
        arrived.wait()
        return fill(expert, buffer)

    cache = cache_of(CHOSEN, together)
    check(cache, 1, range(CHOSEN), keeps=True)
    cache.close()


def test_what_is_at_hand_need_not_wait_for_what_is_read():
    """The readers fill nothing before those that are held have come."""
    may_read = threading.Event()

    def later(expert, buffer):
        assert may_read.wait(20)
        return fill(expert, buffer)

    cache = cache_of(4, later)
    may_read.set()
    assert brought(cache, 0, [2, 5], keeps=True) == [2, 5]
    may_read.clear()
    coming = cache.bring(0, range(6), keeps=True, at_hand_first=True)
    assert [next(coming)[0], next(coming)[0]] == [2, 5]
    may_read.set()
    assert [number for number, _ in coming] == [0, 1, 3, 4]
    assert (cache.hits, cache.misses) == (2, 6)
    cache.close()


def test_what_is_expected_is_read_while_the_layer_before_it_is_busy():
    read = threading.Semaphore(0)

    def counted(expert, buffer):
        given = fill(expert, buffer)
        read.release()
        return given

    cache = cache_of(2 * CHOSEN, counted)
    cache._right[1] = 1.0
    cache.expect(1, range(CHOSEN))
    given = cache.bring(0, range(CHOSEN), keeps=True)
    next(given)
    for _ in range(2 * CHOSEN):
        assert read.acquire(timeout=20)
    list(given)
    check(cache, 1, range(CHOSEN), keeps=True)
    assert (cache.hits, cache.misses, cache.reads) == (CHOSEN, CHOSEN, 2 * CHOSEN)
    cache.close()


def test_what_is_expected_takes_no_room_that_the_layer_at_hand_needs():
    cache = cache_of(CHOSEN)
    cache._right[1] = 1.0
    cache.expect(1, range(CHOSEN))
    for number, _ in cache.bring(0, range(CHOSEN), keeps=True):
        # Only those that have been multiplied make room.
        assert sum(held[0] == 1 for held in cache._held) <= number
        assert (0, number) in cache._held
    cache.close()


def test_what_was_expected_in_vain_goes_first():
    cache = cache_of(CHOSEN + 2)
    cache._right[1] = 1.0
    cache.expect(1, [0, 1])
    check(cache, 0, range(CHOSEN), keeps=True)
    for number in (0, 1):
        assert cache._held[1, number].reading.result()
    check(cache, 1, [5, 6], keeps=True)
    assert set(cache._held) == {(0, n) for n in range(CHOSEN)} | {(1, 5), (1, 6)}
    cache.close()


def test_what_is_expected_in_vain_and_not_begun_is_never_read():
    go, read = threading.Event(), []

    def slow(expert, buffer):
        read.append(expert)
        go.wait(20)
        return fill(expert, buffer)

    cache = cache_of(2 * EXPERTS, slow)
    cache._right[1] = 1.0
    cache.expect(1, range(READERS + 2))
    cache._begin_expected(set())  # all readers are busy, two of the expected wait for one
    threading.Timer(0.05, go.set).start()
    check(cache, 1, [EXPERTS - 1], keeps=True)
    assert (1, READERS) not in read and (1, READERS + 1) not in read
    assert cache.reads == READERS + 1
    cache.close()


def test_expecting_is_for_layers_of_which_it_is_mostly_right():
    cache = cache_of(2 * EXPERTS)

    def token(right: set[int]) -> set[int]:
        """Layers choose their first experts; those in `right` were expected to. The layers of which
        something was read for being expected."""
        begun = set()
        for layer in range(LAYERS):
            following = layer + 1
            if following < LAYERS:
                is_right = following in right
                cache.expect(following, range(CHOSEN) if is_right else range(CHOSEN, 2 * CHOSEN))
            check(cache, layer, range(CHOSEN), keeps=True)
            begun.update(expert[0] for expert in cache._begun_early)
        for layer in range(LAYERS):  # push out what is held
            check(cache, layer, range(CHOSEN, EXPERTS), keeps=True)
        return begun

    assert token({1, 2}) == set()  # nothing is known yet
    assert [token({1}) for _ in range(40)][-1] == {1}
    assert [token({2}) for _ in range(40)][-1] == {2}
    assert cache.foreseen == (2 + 40 + 40) * CHOSEN
    cache.close()


IDS = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.mark.parametrize("bits", ["full", "8", "4"])
@pytest.mark.parametrize(
    "name",
    [
        *("mixtral", "qwen3-moe-dense", "gpt-oss", "qwen3.5-moe", "lfm2-moe", "nemotron-h-moe"),
        "nemotron-h-moe-latent",
        *("cohere2-moe", "deepseek-v3-moe", "afmoe", "phimoe", "kolibri-moe", "llama4-moe"),
    ],
)
def test_few_experts_in_memory_change_no_bit(checkpoint, tmp_path, name, bits):
    folder = checkpoint(name)
    with open_small(folder, tmp_path, "8", weight_bits=bits, **TINY) as llm:
        expected = llm.logits(IDS, prefill_tokens=140)
        assert llm.plan.expert_slots == 0
    with open_small(folder, tmp_path, "8", weight_bits=bits, **TINY) as llm:
        hold_few_experts(llm, sweep_cells=3)
        assert torch.equal(llm.logits(IDS, prefill_tokens=140), expected)
        store = llm.admission.weights
        assert store._experts.misses > 0 and store.bytes_streamed > 0
        # Random routers see much the same in layers that follow one another.
        assert store._experts.foreseen > 0
        assert torch.equal(llm.logits(IDS, prefill_tokens=140), expected)


def test_an_expert_is_read_once_for_the_cells_of_a_sweep(checkpoint, tmp_path):
    read = []
    for cells in (1, 4):
        with open_small(checkpoint("mixtral"), tmp_path, "8", **TINY) as llm:
            hold_few_experts(llm, sweep_cells=cells)
            llm.logits(IDS[:128])
            read.append(llm.admission.weights._experts.misses)
    assert read[1] < read[0] / 2


def test_after_a_read_that_failed_the_next_run_is_right(checkpoint, tmp_path, monkeypatch):
    with open_small(checkpoint("mixtral"), tmp_path, "8", weight_bits="8", **TINY) as llm:
        hold_few_experts(llm)
        expected = llm.logits(IDS[:100], prefill_tokens=80)
        cache, count = llm.admission.weights._experts, 0
        original = cache._fill

        def fill_or_fail(expert, buffer):
            nonlocal count
            count += 1
            if count % 7 == 0:
                buffer.fill_(255)
                raise StorageError("a read failed")
            return original(expert, buffer)

        with monkeypatch.context() as failing:
            failing.setattr(cache, "_fill", fill_or_fail)
            for _ in range(3):
                with pytest.raises(StorageError, match="a read failed"):
                    llm.logits(IDS[:100], prefill_tokens=80)
        assert torch.equal(llm.logits(IDS[:100], prefill_tokens=80), expected)


@pytest.fixture
def many(checkpoint):
    """A model that is mostly experts, 72 of them."""
    return checkpoint("mixtral", num_local_experts=24, intermediate_size=256)


def limit_to(llm, context: int, slots: int, sequences: int = 1) -> None:
    """Memory for so many slots besides what a request takes."""
    loaded = Loaded(0, True, slots)
    plan = llm.admission.plan(context, sequences, loaded=loaded, sweep_cells=1)
    host = sum(plan.host.values())
    llm.admission.limits = replace(llm.admission.limits, host_bytes=host)


@pytest.mark.parametrize("bits", ["full", "8"])
def test_more_sessions_take_room_from_experts(many, tmp_path, bits):
    with open_small(many, tmp_path, "8", weight_bits=bits, **TINY) as llm:
        expected = llm.logits(IDS[:64])[-1]
    with (
        open_small(many, tmp_path, "8", weight_bits=bits, **TINY) as llm,
        contextlib.ExitStack() as stack,
    ):
        llm._context = 400
        limit_to(llm, 400, 60, sequences=4)
        first = stack.enter_context(llm.session())
        first.append(IDS[:64])
        store, slots = llm.admission.weights, llm.plan.expert_slots
        # Pages would go to disk before experts give way.
        no_disk = replace(llm.admission.limits, disk_bytes=llm.plan.disk["weights"])
        llm.admission.limits = no_disk
        cache, sessions = store._experts, [first]
        while len(cache._slots) + PASSING_SLOTS == slots and len(sessions) < 20:
            sessions.append(stack.enter_context(llm.session()))
            sessions[-1].append(IDS[:64])
            assert torch.equal(sessions[-1].last_logits(), expected)
        assert llm.admission.weights is store
        assert fewest_slots(2) <= len(cache._slots) + PASSING_SLOTS < slots
        assert torch.equal(first.last_logits(), expected)


def test_a_context_that_is_promised_fits(many, tmp_path):
    with open_small(many, tmp_path, "8", **TINY) as llm:
        for slots in (7, 8, 9, 11, 14, 20, 40, 70):
            limit_to(llm, 256, slots, sequences=4)
            natural = llm.admission.natural_context(4)
            plan = llm.admission.plan(natural, 4)
            assert natural >= 128 and plan.fits
            assert plan.expert_slots and not plan.layers_streamed


def test_pages_go_to_disk_where_a_share_of_them_is_asked_for(many, tmp_path):
    with open_small(many, tmp_path, "8", **TINY) as llm:
        limit_to(llm, 1000, 40)
        assert llm.admission.plan(1000).expert_slots
        llm.admission.keep_in_memory(0.25, 1000)
        kept = llm.admission.plan(1000)
        assert kept.expert_slots and 0 < kept.far_spans["host"] <= 0.25 * kept.num_spans
