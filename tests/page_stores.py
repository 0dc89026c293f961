"""Page stores of small records for tests: a tag fills each record, so that checks need no codec."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from ebbtide.offload.disk.disk import ScratchFile
from ebbtide.offload.pages.page_table import Tier
from ebbtide.offload.pages.pager import PageStore
from ebbtide.offload.pages.store_options import StoreOptions

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


def spans_there(table, layer) -> list[int]:
    """Those that were neither dropped nor skipped."""
    return [span for span, extent in enumerate(table.entries(layer)) if extent is not None]


def check(store, table, layer, tags) -> None:
    """Every span of the layer that is there holds these tags."""
    tags = list(tags)
    assert table.num_records(layer) == len(tags)
    for span in spans_there(table, layer):
        near, records = rows_of(store, layer, tags[span * S : (span + 1) * S])
        with store.spans.fetch(table, layer, span) as pages:
            assert torch.equal(pages.near, near) and torch.equal(pages.records, records)


def check_runs(store, table, layer, tags) -> None:
    """The same, by the addresses of as many spans at a time as the store gives."""
    there, tags = spans_there(table, layer), list(tags)
    while there:
        span = stop = there[0]
        while stop in there:
            stop += 1
        run = store.spans.fetch_run(table, layer, span, stop)
        if run is None:  # records are copied before they are read
            assert store._planes.must_copy
            return
        with run:
            assert run.first == span < run.stop <= stop
            near, records = rows_of(store, layer, tags[span * S : run.stop * S])
            for plane, addresses in ((near, run.near_at), (records, run.record_at)):
                found = [ctypes.string_at(at, plane.shape[1]) for at in addresses.tolist()]
                assert found == [row.numpy().tobytes() for row in plane]
        there = [span for span in there if span >= run.stop]


def fetched(store, table, layer, records, in_place=False) -> tuple[torch.Tensor, torch.Tensor]:
    """Near planes and records of a selection, in its order; that each of them came once."""
    near, whole = rows_of(store, layer, [0] * len(records))
    seen = []
    if in_place:
        for placed in store.records.fetch_in_place(table, layer, records):
            with placed:
                seen += placed.positions.tolist()
                for at, address in zip(placed.positions, placed.record_at.tolist(), strict=True):
                    whole[at] = _bytes(address, RECORD)
        near_at = store.records.addresses(table, layer).near_at[
            torch.tensor(records, dtype=torch.int64)
        ]
        for at, address in enumerate(near_at.tolist()):
            near[at] = _bytes(address, near.shape[1])
    else:
        for selected in store.records.fetch(table, layer, records):
            with selected:
                seen += selected.positions.tolist()
                places = torch.cat([source.positions for source in selected.sources])
                assert sorted(places.tolist()) == list(range(len(selected.positions)))
                for frames, rows, positions in selected.sources:
                    whole[selected.positions[positions]] = frames[rows]
                near[selected.positions] = selected.near[selected.near_rows]
    assert sorted(seen) == list(range(len(records))), "each record once"
    return near, whole


def _bytes(address: int, count: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(ctypes.string_at(address, count)), dtype=torch.uint8)


def check_records(store, table, layer, tags, records, in_place=False) -> None:
    """The selected records hold their tags. in_place: by their addresses."""
    wanted = rows_of(store, layer, [tags[record] for record in records])
    found = fetched(store, table, layer, records, in_place)
    assert all(torch.equal(*planes) for planes in zip(found, wanted, strict=True))


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
        moves = StoreOptions(**options)
        store = PageStore(layers, RECORD, near, S, frames, "cpu", spill, options=moves)
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
