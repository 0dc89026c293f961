"""What the spill folder and memory can do, and how much of it the page store reaches.

    python benchmarks/disk.py [--dir DIR] [--way o_direct|nocache|portable] [--gib 1]

The ceiling comes first: large sequential reads by several threads. Then extents at random, by size
and threads, then the page store (CRCs, queues and all), each as a fraction of the ceiling. The last
line is JSON. Numbers are of this machine at this moment: run it again before comparing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from ebbtide.offload.bandwidth import measure_disk, measure_memory
from ebbtide.offload.disk import ScratchFile, Way
from ebbtide.offload.page_table import Tier
from ebbtide.offload.pager import PageStore
from ebbtide.offload.spill_dir import default_spill_dir, volume_warnings

GB = 1e9


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
        overlap=overlap,
    ) as store:
        table = store.open_table(num_spans)
        started = time.perf_counter()
        for span in range(num_spans):
            for layer in range(num_layers):
                store.write(table, layer, span * records, near, far)
        store.flush()
        write_s = time.perf_counter() - started
        before, started = store.stats.snapshot(), time.perf_counter()
        store.prefetch(table, 0)
        for step in range(3 * num_layers):
            store.prefetch(table, (step + 1) % num_layers)
            for span in range(num_spans):
                store.fetch(table, step % num_layers, span).close()
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
    args = parser.parse_args()
    directory = Path(args.dir) if args.dir else default_spill_dir()
    for warning in volume_warnings(directory):
        print("warning:", warning)

    large = measure_disk(directory, args.way, 4 << 20, 4, seconds=3)
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
            speed = measure_disk(directory, args.way, kib << 10, num_threads, seconds=1.5)
            rate = speed.random_bytes_per_s
            print(
                f"random {kib:5d} KiB, {num_threads} threads: {rate / GB:5.2f} GB/s, "
                f"{rate / ceiling:4.0%} of the ceiling"
            )
            row = {"kib": kib, "threads": num_threads, "gb_per_s": rate / GB}
            result["random"].append(row)

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
