"""What the spill folder and memory can do, and how much of it the page store reaches.

    python benchmarks/disk.py [--dir DIR] [--way o_direct|nocache|portable] [--gib 1]

The ceiling comes first: large sequential reads by several threads. Then extents at random, by size
and threads; then records, in order and at random, by a plain loop of `preadv` in each of several
threads, by the reader in Python and by the compiled one (CRCs, and neighbours in one go); then the
page store, queues and all; each as a fraction of the ceiling. The last line is JSON. Numbers are of
this machine at this moment: run it again before comparing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import threading
import time
from pathlib import Path

import numpy as np
import torch

from ebbtide.kernels import dispatch
from ebbtide.offload.disk.disk import ScratchFile, Way
from ebbtide.offload.disk.extent_file import ExtentFile
from ebbtide.offload.disk.reads import NativeReads, State, ThreadReads, Urgency
from ebbtide.offload.disk.spill_dir import default_spill_dir, volume_warnings
from ebbtide.offload.pages.page_table import Tier
from ebbtide.offload.pages.pager import PageStore
from ebbtide.offload.pages.store_options import StoreOptions
from ebbtide.offload.pages.tier import aligned_bytes
from ebbtide.offload.planning.bandwidth import measure_disk, measure_memory

GB = 1e9
_DEPTH = 32  # records on their way at once


def through_readers(directory, way, record_bytes: int, seconds: float, num_threads: int) -> dict:
    """Bytes per second of 256 MiB of records, by whom and in which order they are read."""
    num_frames = (256 << 20) // record_bytes
    scratch = ScratchFile(directory, way)
    crcs = np.zeros(num_frames, dtype=np.uint32)
    file = ExtentFile(scratch, record_bytes, crcs, lambda frame: None)
    memory = aligned_bytes(_DEPTH * record_bytes)
    memory.random_(0, 256)
    view = memoryview(memory.numpy()).cast("B")
    for frame in range(0, num_frames - _DEPTH + 1, _DEPTH):
        file.write(frame, view)
    scratch.sync()
    num_frames -= num_frames % _DEPTH
    places = memory.data_ptr() + np.arange(_DEPTH) * record_bytes
    orders = {
        "sequential": np.arange(num_frames),
        "random": np.random.default_rng(1).permutation(num_frames),
    }
    made = {
        "in Python": lambda: ThreadReads(file, _DEPTH, num_threads),
        "compiled": lambda: NativeReads(file, _DEPTH, num_threads, memory),
    }
    if dispatch.compiled_for() is None:
        del made["compiled"]
    rates = {}
    for order, frames in orders.items():
        rates["plain loop", order] = _plain_loop(
            scratch, frames, view, record_bytes, seconds, num_threads
        )
        for name, make in made.items():
            reads = make()
            rates[name, order] = _by_reader(reads, frames, places, record_bytes, seconds)
            reads.close(10)
    scratch.close()
    return rates


def _plain_loop(scratch, frames, view, record_bytes: int, seconds: float, num_threads: int):
    """Threads that do nothing but read the next record; what they read is not looked at."""
    until, counts = time.perf_counter() + seconds, [0] * num_threads

    def read(thread: int) -> None:
        place = view[thread * record_bytes : (thread + 1) * record_bytes]
        for frame in itertools.cycle(frames[thread::num_threads].tolist()):
            scratch.read_into(place, frame * record_bytes)
            counts[thread] += 1
            if time.perf_counter() > until:
                return

    started = time.perf_counter()
    threads = [threading.Thread(target=read, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) * record_bytes / (time.perf_counter() - started)


def _by_reader(reads, frames, places, record_bytes: int, seconds: float) -> float:
    """Two halves of the depth in turn: one is waited for while the other is read."""
    half, ones = _DEPTH // 2, np.ones(_DEPTH // 2, dtype=np.int64)
    started, done, pending = time.perf_counter(), 0, []
    for turn in itertools.count():
        first = turn * half % len(frames)
        tags = np.arange(half) + turn % 2 * half
        reads.submit(tags, frames[first : first + half], ones, places[tags], Urgency.DEMAND)
        pending.append(tags)
        if len(pending) == 2:
            waited = pending.pop(0)
            reads.expect(waited)
            while (reads.states[waited] != State.READY).any():
                seen = reads.happened()
                if (reads.states[waited] != State.READY).any():
                    reads.wait(seen, 1)
                if (failure := reads.failure()) is not None:
                    raise failure
            done += half
            if time.perf_counter() - started > seconds:
                return done * record_bytes / (time.perf_counter() - started)
    raise AssertionError


def through_the_store(directory, way, num_bytes, extent_bytes, overlap: bool) -> dict:
    """Writes num_bytes in extents of 16 records and walks them three times, layer by layer."""
    num_layers, records, near_bytes = 8, 16, 2048
    record_bytes = extent_bytes // records
    num_spans = max(2, num_bytes // extent_bytes // num_layers)
    near = torch.zeros(records, near_bytes, dtype=torch.uint8)
    far = torch.randint(0, 256, (records, record_bytes), dtype=torch.uint8)
    with PageStore(
        num_layers,
        record_bytes,
        near_bytes,
        records,
        {Tier.DISK: num_layers * num_spans * records},
        spill=lambda: ScratchFile(directory, way),
        options=StoreOptions(overlap=overlap),
    ) as store:
        table = store.open_table(num_spans)
        started = time.perf_counter()
        for span in range(num_spans):
            for layer in range(num_layers):
                store.write(table, layer, span * records, near, far)
        store.flush()
        write_s = time.perf_counter() - started
        before, started = store.stats.snapshot(), time.perf_counter()
        store.spans.prefetch(table, 0)
        for step in range(3 * num_layers):
            store.spans.prefetch(table, (step + 1) % num_layers)
            for span in range(num_spans):
                store.spans.fetch(table, step % num_layers, span).close()
        read_s = time.perf_counter() - started
        since = store.stats - before
        return {
            "write_gb_per_s": store.stats.bytes_written["disk"] / write_s / GB,
            "read_gb_per_s": since.bytes_read["disk"] / read_s / GB,
            "hit_rate": since.hit_rate,
            "write_amplification": store.stats.write_amplification,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", help="folder for scratch (default: the user's cache folder)")
    parser.add_argument("--way", choices=[way.value for way in Way])
    parser.add_argument("--gib", type=float, default=1, help="bytes that go through the page store")
    parser.add_argument("--record-kib", type=int, nargs="+", default=[60], help="record sizes")
    parser.add_argument("--threads", type=int, nargs="+", default=[8], help="of the readers")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a measurement")
    args = parser.parse_args()
    directory = Path(args.dir) if args.dir else default_spill_dir()
    for warning in volume_warnings(directory):
        print("warning:", warning)

    large = measure_disk(directory, args.way, 4 << 20, 4, seconds=2 * args.seconds)
    memory = measure_memory(num_bytes=256 << 20)
    ceiling = large.sequential_bytes_per_s
    result = {"way": large.way, "ceiling_gb_per_s": ceiling / GB, "random": [], "store": {}}
    print(f"ceiling: {ceiling / GB:.2f} GB/s, 4 MiB reads in sequence, 4 threads, {large.way}")
    print(f"written: {large.write_bytes_per_s / GB:.2f} GB/s, one thread")
    one, every = memory.one_thread_bytes_per_s / GB, memory.all_threads_bytes_per_s / GB
    print(f"memory:  {one:.1f} GB/s with one thread, {every:.1f} with {memory.num_threads}")
    result["memory_gb_per_s"] = {"1": one, str(memory.num_threads): every}

    for kib in (32, 128, 512, 2048):
        for num_threads in (1, 4):
            speed = measure_disk(directory, args.way, kib << 10, num_threads, args.seconds)
            rate = speed.random_bytes_per_s
            print(
                f"random {kib:5d} KiB, {num_threads} threads: {rate / GB:5.2f} GB/s, "
                f"{rate / ceiling:4.0%} of the ceiling"
            )
            row = {"kib": kib, "threads": num_threads, "gb_per_s": rate / GB}
            result["random"].append(row)

    result["records"] = []
    for kib in args.record_kib:
        for num_threads in args.threads:
            rates = through_readers(directory, args.way, kib << 10, args.seconds, num_threads)
            for (name, order), rate in rates.items():
                print(
                    f"records of {kib:4d} KiB, {order:10s}, {name:10s}, {num_threads:2d} threads: "
                    f"{rate / GB:5.2f} GB/s, {rate / ceiling:4.0%} of the ceiling"
                )
                row = {"kib": kib, "order": order, "by": name, "threads": num_threads}
                result["records"].append({**row, "gb_per_s": rate / GB})

    for name, overlap in (("overlap", True), ("plain", False)):
        row = through_the_store(directory, args.way, int(args.gib * 2**30), 512 << 10, overlap)
        result["store"][name] = row
        print(
            f"page store, {name}: reads {row['read_gb_per_s']:.2f} GB/s, "
            f"{row['read_gb_per_s'] * GB / ceiling:4.0%} of the ceiling; "
            f"writes {row['write_gb_per_s']:.2f} GB/s"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
