"""Groups of weights come in whatever order they are asked for, and the next one is read ahead."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interruptions import interrupted_after

from ebbtide.offload.errors import StorageError
from ebbtide.offload.weights.weight_stream import WeightStream

KEYS = [0, 1, 2, ("head", 0)]


class Source:
    """Fills a buffer with the key's number; notes what was read."""

    def __init__(self):
        self.reads: list = []
        self.fails: set = set()

    def read(self, key, buffer):
        self.reads.append(key)
        if key in self.fails:
            raise StorageError(f"{key} cannot be read")
        buffer.fill_(KEYS.index(key))
        return {"tensor": buffer[:8]}


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def stream(source):
    stream = WeightStream(KEYS, source.read, 64)
    yield stream
    stream.close()


def holds(tensors, key) -> bool:
    return bool((tensors["tensor"] == KEYS.index(key)).all())


def settled(stream) -> None:
    """What is read ahead is there."""
    stream._ahead[1].exception()


@given(st.lists(st.sampled_from(KEYS), max_size=30))
def test_any_order_gives_what_was_asked_for_until_the_next_group_is(order):
    source = Source()
    stream = WeightStream(KEYS, source.read, 64)
    for key in order:
        tensors = stream.next(key)
        settled(stream)
        assert holds(tensors, key)
    stream.close()


def test_in_order_each_group_is_read_once_and_one_ahead(source, stream):
    for key in KEYS * 3:
        assert holds(stream.next(key), key)
    settled(stream)
    assert source.reads == KEYS * 3 + [KEYS[0]]


def test_another_order_is_learnt_in_one_round(source, stream):
    layers = KEYS[:3]  # sweeps of a prompt: no output head
    for key in layers * 2:
        stream.next(key)
    settled(stream)
    source.reads.clear()
    for key in layers * 3:
        stream.next(key)
    settled(stream)
    assert source.reads == [*layers[1:], *layers * 2, layers[0]]


def test_what_could_not_be_read_is_read_again(source, stream):
    source.fails.add(1)
    stream.next(0)
    for _ in range(2):
        with pytest.raises(StorageError, match="1 cannot be read"):
            stream.next(1)
    source.fails.clear()
    assert holds(stream.next(1), 1) and holds(stream.next(2), 2)


def test_an_interrupted_wait_loses_nothing(source, stream, monkeypatch):
    stream.next(0)
    future = stream._ahead[1]

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.next(1)
    monkeypatch.undo()
    assert holds(stream.next(1), 1) and holds(stream.next(2), 2)
    settled(stream)
    assert source.reads == KEYS


@pytest.mark.parametrize("asked", [1, 2])  # what is being read, and another
def test_wherever_it_is_interrupted_what_comes_then_is_right(asked):
    count, is_interrupted = 1, True
    while is_interrupted:
        stream = WeightStream(KEYS, Source().read, 64)
        stream.next(0)
        functions = [WeightStream.next, WeightStream._begin]
        is_interrupted = interrupted_after(
            count, functions, lambda stream=stream: stream.next(asked), instructions=True
        )
        for key in (asked, 0, ("head", 0), 0, 1):
            tensors = stream.next(key)
            settled(stream)
            assert holds(tensors, key)
        stream.close()
        count += 1
    assert count > 50


def test_closing_waits_for_what_is_being_read():
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def read(key, buffer):
        began.set()
        may_end.wait(10)
        buffer.fill_(1)  # memory that must still be there
        ended.set()
        return {"tensor": buffer}

    stream = WeightStream([0], read, 64)
    assert began.wait(10)
    threading.Timer(0.05, may_end.set).start()
    stream.close()
    assert ended.is_set()
    stream.close()


def test_the_only_group_is_read_for_each_time(source):
    stream = WeightStream([0], source.read, 64)
    for _ in range(3):
        assert holds(stream.next(0), 0)
    settled(stream)
    assert source.reads == [0] * 4
    stream.close()
