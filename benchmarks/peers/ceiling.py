"""Measured ceilings of this machine: read bandwidth and multiply-adds, by numbers of threads.

    python benchmarks/peers/ceiling.py [THREADS ...]

Two loops in C, built here and run from Python threads. One buffer, far larger than the caches, is
only ever read.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BUFFER_BYTES = 1 << 30
STEPS = 1_000_000
CHAINS = 256


def measure(threads: list[int]) -> dict[int, dict[str, float]]:
    """For each number of threads: {"read_bytes_per_s", "flop_per_s"}, the best of five runs."""
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "ceiling.so")
        source = str(Path(__file__).with_name("ceiling.c"))
        flags = [
            "-O3",
            "-march=native",
            "-mprefer-vector-width=512",
            "-ffast-math",
            "-funroll-loops",
        ]
        command = ["cc", *flags, "-shared", "-fPIC", source, "-o", library]
        subprocess.run(command, check=True)
        loops = ctypes.CDLL(library)
    loops.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loops.multiply_add.argtypes = [ctypes.c_size_t, ctypes.c_float]
    loops.multiply_add.restype = ctypes.c_float
    buffer = np.ones(BUFFER_BYTES // 8, np.uint64)
    found = {}
    for count in threads:
        share = len(buffer) // count
        starts = [buffer.ctypes.data + 8 * share * i for i in range(count)]
        with ThreadPoolExecutor(count) as pool:

            def run(call, tasks, pool=pool) -> float:
                began = time.perf_counter()
                list(pool.map(call, tasks))
                return time.perf_counter() - began

            read_s = min(
                run(lambda at, share=share: loops.read_all(at, share), starts) for _ in range(5)
            )
            steps = [STEPS] * count
            flop_s = min(run(lambda n: loops.multiply_add(n, 0.5), steps) for _ in range(5))
        found[count] = {
            "read_bytes_per_s": 8 * share * count / read_s,
            "flop_per_s": 2 * CHAINS * STEPS * count / flop_s,
        }
    return found


if __name__ == "__main__":
    print(json.dumps(measure([int(n) for n in sys.argv[1:]] or [1, 2])))
