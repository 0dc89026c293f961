"""How near selecting pages comes to the speed that the bytes and the disk allow.

    python benchmarks/checkpoints.py llama-3.2-1b FOLDER
    python benchmarks/ceiling.py FOLDER --tokens 32768 131072 [--read-tokens 2048] [--drift 0.25]

A cache of random pages is written to the page store without computing it, and tokens are decoded
over it, with all far planes in memory or all on disk. A fixed number of records is selected in each
layer, of which a fixed share is new in each step, drawn at random, so that nothing foresees it; the
others were read for the step before.

Printed first, for each length: what a token takes with everything fetched from disk (full) and
with a selection from memory (resident), and the ceiling of what selecting gains over the former,

    min(full / resident, full bytes / missing selected bytes * random over sequential bandwidth)

then every way to select, with the fraction of it that is reached. Other people's selectors follow,
each with the ceiling of the bytes that it lacks itself. The last line is JSON. Random weights are
for speed only: what they select means nothing. Needs a quiet machine, and room for the far planes
in memory and on disk (2 GB for 131,072 tokens of a 1B model at 8 bits).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from drifting import drifting
from random_state import fill, random_weight

from ebbtide import LLM, Budget
from ebbtide.offload.disk.spill_dir import default_spill_dir
from ebbtide.offload.mode import Mode
from ebbtide.offload.options import Options
from ebbtide.offload.planning.bandwidth import measure_disk
from ebbtide.offload.weights import weights
from ebbtide.prefetch.foresight import FORESIGHTS

SLACK_TOKENS = 512  # of the context: for what is decoded
SEQUENTIAL_BYTES = 4 << 20
MEASURED_S = 1.0  # each time the disk is measured
OTHERS = ("quest", "freekv", "infinigen", "random", "window")


@dataclass(frozen=True)
class Found:
    """Of one run, per token: the median of milliseconds, and means.

    missing_bytes: of selected records that were not at hand since an earlier step; foreseen: the
    share of them that had been read when their turn came.
    """

    ms: float
    far_bytes: int  # of all layers' far planes
    record_bytes: int
    disk_bytes: float
    selected_bytes: float = 0.0
    missing_bytes: float = 0.0
    foreseen: float = 1.0
    wasted_bytes: float = 0.0
    stall_ms: float = 0.0


def decode(mode: Mode, on_disk: bool, tokens: int, given) -> Found:
    """A few tokens over a cache of `tokens`."""
    budget = Budget(host_memory="64GiB", disk_memory="64GiB")
    options = Options(
        model=given.folder,
        budget=budget,
        mode=mode.name,
        kv_bits=given.kv_bits,
        weight_bits=given.weight_bits,
        draft=False,  # one token at a time
    )
    with LLM(options, mode=mode) as llm:
        if on_disk:
            llm.admission.keep_in_memory(0, tokens, text=False)
        with llm.open_session(tokens, sequences=1, text=False) as session:
            engine, sequence, store = session._engine, session._sequence, session._runtime.store
            fill(engine, sequence, tokens - SLACK_TOKENS)
            store.flush()
            times = []
            for step in range(given.warm_up + given.steps):
                if step == given.warm_up:
                    before = store.stats.snapshot()
                    if engine.selected:
                        engine.selected.fidelity.take()
                sequence.tokens.append((step * 7919 + 1) % engine.config.vocab_size)
                began = time.perf_counter()
                engine.logits(engine.decode(sequence))
                times.append(time.perf_counter() - began)
            spent, record = store.stats - before, engine.geometry.layout.record_bytes
            found = Found(
                1e3 * statistics.median(times[given.warm_up :]),
                sum(session._runtime.plan.far_spans.values()) * engine.geometry.span_bytes,
                record,
                spent.bytes_read["disk"] / given.steps,
            )
            if not engine.selected:
                return found
            missing = spent.foreseen + spent.late + spent.misses
            return Found(
                *(found.ms, found.far_bytes, record, found.disk_bytes),
                selected_bytes=engine.selected.fidelity.selected * record / given.steps,
                missing_bytes=missing * record / given.steps,
                foreseen=spent.foreseen / missing if missing else 1.0,
                wasted_bytes=spent.wasted * record / given.steps,
                stall_ms=1e3 * spent.stall_s / given.steps,
            )


def bandwidths(record_bytes: int) -> tuple[float, float]:
    """Bytes per second of large reads in sequence, and of records at random."""
    place = default_spill_dir()
    large = measure_disk(place, extent_bytes=SEQUENTIAL_BYTES, seconds=MEASURED_S)
    small = measure_disk(place, extent_bytes=record_bytes, num_threads=8, seconds=MEASURED_S)
    return large.sequential_bytes_per_s, small.random_bytes_per_s


def measure(tokens: int, given) -> dict:
    with drifting(given.read_tokens, given.drift):
        resident = decode(Mode("bounded"), False, tokens, given)
    exact = decode(Mode(), False, tokens, given)
    full = decode(Mode(), True, tokens, given)
    sequential, at_random = bandwidths(resident.record_bytes)

    def ceiling(missing_bytes: float) -> float:
        reads = full.far_bytes * at_random / max(1.0, missing_bytes * sequential)
        return min(full.ms / resident.ms, reads)

    expected = given.drift * resident.selected_bytes
    print(
        f"\n{tokens} tokens: everything from disk {full.ms:.1f} ms "
        f"({full.far_bytes / 1e6:.0f} MB; {1e3 * full.far_bytes / sequential:.1f} ms alone), "
        f"everything in memory {exact.ms:.1f} ms, a selection of "
        f"{resident.selected_bytes / 1e6:.1f} MB in memory {resident.ms:.1f} ms\n"
        f"disk {sequential / 1e9:.2f} GB/s in sequence, {at_random / 1e9:.2f} at random; "
        f"{expected / 1e6:.1f} MB new each step ({1e3 * expected / at_random:.1f} ms alone)\n"
        f"ceiling {ceiling(expected):.1f} times everything from disk",
        flush=True,
    )
    rows = {}
    for name in given.foresight:
        with drifting(given.read_tokens, given.drift):
            rows[name] = decode(Mode("bounded", foresight=name), True, tokens, given)
        _say(name, rows[name], full, exact, ceiling(expected))
    for name in given.others:
        options = {} if name == "infinigen" else {"num_tokens": given.read_tokens}
        found = rows[name] = decode(Mode("bounded", name, options), True, tokens, given)
        _say(name, found, full, exact, ceiling(found.missing_bytes))
    return {
        "tokens": tokens,
        "read_tokens": given.read_tokens,
        "drift": given.drift,
        "ceiling": ceiling(expected),
        "sequential_bytes_per_s": sequential,
        "random_bytes_per_s": at_random,
        "full": asdict(full),
        "exact_in_memory": asdict(exact),
        "resident": asdict(resident),
        "runs": {name: asdict(found) for name, found in rows.items()},
    }


def _say(name: str, found: Found, full: Found, exact: Found, ceiling: float) -> None:
    gain = full.ms / found.ms
    print(
        f"{name:10} {found.ms:7.1f} ms, {gain:5.1f} of {ceiling:5.1f} times everything from disk "
        f"({gain / ceiling:4.2f}), {exact.ms / found.ms:4.2f} times everything in memory; "
        f"{found.selected_bytes / 1e6:6.1f} MB selected, {found.missing_bytes / 1e6:6.1f} new, "
        f"{100 * found.foreseen:3.0f} % foreseen, {found.disk_bytes / 1e6:6.1f} read, "
        f"{found.wasted_bytes / 1e6:5.1f} in vain, waiting {found.stall_ms:5.1f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a checkpoint; of its weights only the shapes count")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--read-tokens", type=int, default=2048, help="of each layer, in each step")
    parser.add_argument("--drift", type=float, default=0.25, help="the share of them that is new")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--kv-bits", default="8")
    parser.add_argument("--weight-bits", default="4", choices=["4", "8"])
    parser.add_argument(
        "--foresight", nargs="*", default=["nothing", "history"], choices=FORESIGHTS
    )
    parser.add_argument("--others", nargs="*", default=list(OTHERS), choices=OTHERS)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    weights.quantise_weight = random_weight
    print(f"{torch.get_num_threads()} threads, {given.weight_bits}-bit weights, {given.kv_bits}")
    print(json.dumps([measure(tokens, given) for tokens in given.tokens]))


if __name__ == "__main__":
    main()
