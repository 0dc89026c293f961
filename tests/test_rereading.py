"""What is read again and again comes through the system's cache as far as that can hold it, and
past it beyond: the same numbers either way.
"""

import os
import shutil

import pytest
import torch
from gguf_writer import write
from small_llm import hold, hold_few_experts, open_small

from ebbtide.offload.errors import BadCheckpoint
from ebbtide.offload.models import past_cache
from ebbtide.offload.models.checkpoint import Checkpoint
from ebbtide.offload.models.past_cache import PastCacheReader
from ebbtide.offload.planning.memory_at_hand import MemoryAtHand
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.weights import rereading
from ebbtide.offload.weights.rereading import Rereading

IDS = [1, 2, 3, 4, 5]
PART = 1 << 20


@pytest.fixture
def memory(monkeypatch):
    """Sets how much there is for the system's cache, which is asked about each time; and parts of
    any size count."""
    monkeypatch.setattr(rereading, "_FEWEST_BYTES", 1)
    monkeypatch.setattr(rereading, "_ASKED_AGAIN_S", 0.0)

    def of(num_bytes):
        available = int(num_bytes / rereading._CACHE_SHARE) + 1
        found = MemoryAtHand(1 << 40, available)
        monkeypatch.setattr(rereading, "memory_at_hand", lambda: found)

    return of


needs_way = pytest.mark.skipif(
    past_cache._mincore() is None, reason="only Linux says what its cache has"
)


@pytest.fixture
def parts(tmp_path):
    """Two files of three parts each with as much between them, and of each part what reads it."""
    descriptors, places = {}, []
    for name in "ab":
        path = tmp_path / name
        path.write_bytes(bytes(6 * PART))
        descriptors[path] = os.open(path, os.O_RDONLY)
        places += [(path, 2 * i * PART, PART) for i in range(3)]
    again = Rereading(reversed(places))

    def past(which):
        return [again.reader(p, descriptors[p], *rest) is not None for p, *rest in which]

    yield again, places, past
    again.close()
    again.close()
    for descriptor in descriptors.values():
        os.close(descriptor)


@needs_way
@pytest.mark.parametrize("held", range(7))
def test_the_first_parts_that_fit_come_through_the_cache(memory, parts, held):
    _, places, past = parts
    memory(held * PART + PART // 2)
    assert past(places) == [False] * held + [True] * (6 - held)


@needs_way
def test_a_part_of_a_part_counts_from_where_it_lies(memory, parts):
    _, places, past = parts
    memory(PART + PART // 2)
    path, offset, _ = places[1]
    quarters = [(path, offset + i * PART // 4, PART // 4) for i in range(4)]
    assert past(quarters) == [False, False, True, True]


@needs_way
def test_memory_is_asked_about_once_a_second(memory, parts, monkeypatch):
    _, places, past = parts
    monkeypatch.setattr(rereading, "_ASKED_AGAIN_S", 1.0)
    now = [100.0]
    monkeypatch.setattr(rereading.time, "monotonic", lambda: now[0])
    memory(6 * PART)
    assert not any(past(places))
    memory(0)
    now[0] += 0.9
    assert not any(past(places))
    now[0] += 0.2
    assert all(past(places))


def test_what_is_short_comes_through_the_cache(memory, parts, monkeypatch):
    _, places, past = parts
    memory(0)
    monkeypatch.setattr(rereading, "_FEWEST_BYTES", PART + 1)
    assert not any(past(places))


def streamed(llm):
    hold(llm, Loaded(llm.config.num_layers, False))


def some_streamed(llm):
    hold(llm, Loaded(1, True))


MODELS = {
    "16 bits": ("llama2", streamed, None),
    "one layer": ("llama2", some_streamed, None),
    "experts": ("mixtral", hold_few_experts, None),
    "GGUF": ("llama2", streamed, "Q8_0"),
}


@pytest.fixture
def model(checkpoint, tmp_path, request):
    name, how, kind = MODELS[request.param]
    folder = checkpoint(name, dtype="bfloat16")
    if kind is not None:
        folder = write(folder, tmp_path / "m.gguf", kind)
    return folder, how


def logits(model, spill, **more):
    folder, how = model
    with open_small(folder, spill, **more) as llm:
        how(llm)
        return llm.logits(IDS)


@pytest.fixture
def reads(monkeypatch):
    """Of model files, past the cache, as far as that has nothing: each one's bytes."""
    read, found = PastCacheReader.read, []

    def counting(self, view, offset):
        if self._bounce is not None:  # a scratch file's has none
            found.append(len(view))
        return read(self, view, offset)

    monkeypatch.setattr(PastCacheReader, "read", counting)
    return found


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_logits_are_the_same_to_the_bit_either_way(model, tmp_path, memory, reads):
    memory(1 << 40)
    through = logits(model, tmp_path)
    assert not reads
    memory(0)
    assert torch.equal(logits(model, tmp_path), through)
    assert reads or past_cache._mincore() is None
    memory(sum(reads) // 4)  # some of it
    assert torch.equal(logits(model, tmp_path), through)


@pytest.mark.parametrize("model", ["16 bits", "experts"], indirect=True)
def test_one_that_was_cut_short_is_an_error(model, tmp_path, memory):
    memory(0)
    folder, how = model
    folder = shutil.copytree(folder, tmp_path / "model")
    with open_small(folder, tmp_path) as llm:
        how(llm)
        llm.logits(IDS)
        for file in folder.glob("*.safetensors"):
            os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(BadCheckpoint, match="changed while it was open"):
            llm.logits([9, 8, 7])


def test_a_file_that_ends_early_is_said_to_be_truncated(checkpoint, tmp_path, memory, monkeypatch):
    """Where nothing else tells that it changed."""
    memory(0)
    folder = checkpoint("llama2", dtype="bfloat16")
    with open_small(folder, tmp_path) as llm:
        streamed(llm)
        llm.logits(IDS)
        monkeypatch.setattr(Checkpoint, "_check", lambda self, path: None)
        monkeypatch.setattr(past_cache, "read_at", lambda *_: 0)
        monkeypatch.setattr("ebbtide.offload.models.checkpoint.read_at", lambda *_: 0)
        with pytest.raises(BadCheckpoint, match="ends before its tensors do; it was truncated"):
            for _ in range(3):  # what was read ahead by then is whole
                llm.logits(IDS)


@needs_way
def test_what_comes_past_the_cache_is_not_announced(checkpoint, tmp_path, memory, monkeypatch):
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *what: told.append(what))
    with open_small(checkpoint("llama2", dtype="bfloat16"), tmp_path) as llm:
        streamed(llm)
        memory(1 << 40)
        llm.logits(IDS)
        assert told
        memory(0)
        llm.logits(IDS)  # what is read ahead may still have been announced
        told.clear()
        llm.logits(IDS)
        assert not told


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux lists open files there")
def test_closing_leaves_nothing_open(checkpoint, tmp_path, memory):
    memory(0)
    before = len(os.listdir("/proc/self/fd"))
    logits((checkpoint("mixtral", dtype="bfloat16"), hold_few_experts), tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
