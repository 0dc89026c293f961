"""What loading a model's weights takes, beside what reading its files and writing the result take.

    python benchmarks/loading.py MODEL [--weight-bits auto] [--threads N] [--repeats 3] [--cold]

MODEL: a folder or a GGUF file. First the ceiling: reading the files from the system's cache, a
mebibyte at a time, and filling fresh memory as large as the weights; seconds of one thread's
processor time, which the threads share out. Then seconds that loading takes, the best of some, and
processor time, all threads together. --cold: the system's cache lets go of the files each time. The
last line is one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: else its threads spin

import argparse
import json
import time
from pathlib import Path

import torch

from ebbtide import LLM
from ebbtide.offload.models.open_file import forget, open_descriptor
from ebbtide.offload.pages.tier import aligned_bytes
from ebbtide.offload.planning import admission

PIECE = 1 << 20


def files(model: Path) -> list[Path]:
    return [model] if model.is_file() else sorted(model.glob("*.safetensors"))


def read_s(paths: list[Path]) -> float:
    """Processor time."""
    piece, began = memoryview(aligned_bytes(PIECE).numpy()), time.thread_time()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return time.thread_time() - began


def write_s(num_bytes: int) -> float:
    began = time.thread_time()
    aligned_bytes(num_bytes).fill_(1)
    return time.thread_time() - began


def load(given) -> tuple[float, float, int]:
    """Seconds, processor time, and bytes that layers and the head take."""
    took = []

    class Measured(admission.WeightStore):
        def __init__(self, *args, **options):
            began, used = time.perf_counter(), time.process_time()
            super().__init__(*args, **options)
            took.extend((time.perf_counter() - began, time.process_time() - used))

    usual, admission.WeightStore = admission.WeightStore, Measured
    try:
        with LLM.open(given.model, weight_bits=given.weight_bits, threads=given.threads) as llm:
            for path in files(given.model) if given.cold else ():
                descriptor = open_descriptor(path)
                forget(descriptor)
                os.close(descriptor)
            llm.logits([1, 2, 3])
            facts = llm.admission.facts
            return took[0], took[1], sum(facts.layer_sizes) + facts.head_bytes()
    finally:
        admission.WeightStore = usual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--weight-bits", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    paths = files(given.model)
    loads = [load(given) for _ in range(given.repeats)]
    report = {
        "file_bytes": sum(path.stat().st_size for path in paths),
        "weights_bytes": loads[0][2],
        "read_cpu_s": min(read_s(paths) for _ in range(3)),
        "write_cpu_s": min(write_s(loads[0][2]) for _ in range(3)),
        "load_s": min(took for took, *_ in loads),
        "load_cpu_s": min(used for _, used, _ in loads),
    }
    print("ceiling: reading {read_cpu_s:.2f} s, writing {write_cpu_s:.2f} s".format(**report))
    print("loading: {load_s:.2f} s, processor {load_cpu_s:.2f} s".format(**report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
