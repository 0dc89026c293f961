"""Decoding a token in one call of the compiled kernels, beside layer by layer.

    python benchmarks/one_call.py FOLDER [--weight-bits 4] [--threads 1] [--depth 3] [--tokens 60]

FOLDER: as benchmarks/checkpoints.py writes them; all of the model lies in memory. Both ways take
turns. Prints medians and tenths of milliseconds a token, without the output head: by the clock, and
of the calling thread's own processor time, which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from ebbtide import LLM

WARM_UP = 8
CLOCKS = {"clock": time.perf_counter, "own time": time.thread_time}


def measure(folder: Path, bits: str, threads: int, depth: int, tokens: int) -> None:
    torch.set_num_threads(threads)
    context = depth + 2 * (tokens + WARM_UP)
    llm = LLM.open(folder, weight_bits=bits, threads=threads, context=context)
    with llm, llm.open_session(context, sequences=1) as session:
        engine, sequence = session._engine, session._sequence
        sequence.tokens.extend(5 + i % 50 for i in range(max(1, depth)))
        engine.prefill(sequence)
        ways = {"layer by layer": None}
        if engine.whole_token is not None:
            ways = {"one call": engine.whole_token, **ways}
        found = {(way, clock): [] for way in ways for clock in CLOCKS}
        for number in range(WARM_UP + tokens):
            for way, engine.whole_token in ways.items():
                sequence.tokens.append(7)
                before = [now() for now in CLOCKS.values()]
                engine.decode(sequence)
                after = [now() for now in CLOCKS.values()]
                for clock, start, end in zip(CLOCKS, before, after, strict=True):
                    if number >= WARM_UP:
                        found[way, clock].append(1e3 * (end - start))
        for (way, clock), times in found.items():
            tenth = statistics.quantiles(times, n=10)[0]
            print(f"{way:>14}, {clock:<8} {statistics.median(times):8.2f} ms ({tenth:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weight-bits", default="4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60)
    given = parser.parse_args()
    measure(given.folder, given.weight_bits, given.threads, given.depth, given.tokens)


if __name__ == "__main__":
    main()
