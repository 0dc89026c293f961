"""A mixture of experts in less memory than its weights take: loading, prefill and decode by budget.

    python benchmarks/experts.py FOLDER [--host-memory 14GiB 8GiB 4GiB] [--tokens 512] [--decode 24]
                                 [--whole-layers] [--cached] [--right SHARE]

Experts that are not in memory are read when a router has chosen them, and those that the next
layer's router is expected to choose behind them. With random weights half of these expectations are
right, too few to read by; --right decodes the same tokens again with expectations of which such a
share is right, as a trained model's may be (0: none are had). --whole-layers streams layers with
all their experts, as dense models are streamed, for comparison. The system's cache of the model's
files is emptied before each token, as if there were no memory for it; --cached leaves it. What was
written to a scratch file is not emptied.
With random weights routers choose nearly evenly, which is the worst case for what is kept.

Prints for each budget: seconds to load, tokens/s of prefill, ms and MB from disk of a decoded token
(medians, after a quarter of them), of the chosen experts the share that was in memory or on the way
and the share that was expected, and the peak of the resident set. Each run is a process of its own.
The last line is JSON.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else torch's threads spin while they wait

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from ebbtide import LLM, Budget
from ebbtide.offload.options import Options
from ebbtide.offload.output import peak_rss_bytes
from ebbtide.offload.planning.bandwidth import measure_disk, measure_memory
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.weights.expert_cache import PASSING_SLOTS, ExpertCache


def empty_file_cache(folder: Path) -> None:
    """The system keeps none of a folder's files in memory: what is read next comes from disk."""
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("this system cannot be told to forget files; give --cached")
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one(given: argparse.Namespace, host_memory: str) -> dict:
    """One budget, in this process."""
    context = given.tokens + given.decode + 1
    budget = Budget(host_memory=host_memory, disk_memory="64GiB")
    llm = LLM(Options(model=str(given.folder), budget=budget, context=context, draft=False))
    if given.whole_layers:
        _stream_layers(llm, context)
    forget = (lambda folder: None) if given.cached else empty_file_cache
    forget(given.folder)
    began = time.perf_counter()
    session = llm.open_session(context, sequences=1)
    loaded_s = time.perf_counter() - began
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, llm.config.vocab_size, (given.tokens,), generator=generator).tolist()
    forget(given.folder)
    began = time.perf_counter()
    session.append(ids, process=False)
    session.last_logits()
    prefill_s = time.perf_counter() - began
    store = llm.admission.weights
    cache = store._experts
    recorded = (
        None
        if cache is None or given.right is None
        else _recorded(cache, session, ids[: given.decode])
    )
    if recorded is not None:
        session.close()
        session = llm.open_session(context, sequences=1)
        session.append(ids, process=False)
        session.last_logits()
        _replay(cache, recorded, given.right)
    before = (cache.hits, cache.misses, cache.foreseen) if cache is not None else (0, 0, 0)
    times, read = [], []
    for token in ids[: given.decode]:
        forget(given.folder)
        began, streamed = time.perf_counter(), store.bytes_streamed
        session.decode(token)
        times.append(time.perf_counter() - began)
        read.append(store.bytes_streamed - streamed)
    steady = slice(given.decode // 4, None)
    found = {
        "host_memory": host_memory,
        "experts_held": llm.plan.expert_slots - PASSING_SLOTS
        if llm.plan.expert_slots
        else llm.plan.num_experts,
        "num_experts": llm.plan.num_experts,
        "layers_streamed": llm.plan.layers_streamed,
        "sweep_cells": llm.plan.sweep_cells,
        "load_s": loaded_s,
        "prefill_tokens_per_s": given.tokens / prefill_s,
        "decode_ms": 1e3 * statistics.median(times[steady]),
        "disk_mb": statistics.median(read[steady]) / 1e6,
        "budget_bytes": llm.plan.budget_bytes["host"],
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if cache is not None:
        after = cache.hits, cache.misses, cache.foreseen
        hits, misses, foreseen = (b - a for a, b in zip(before, after, strict=True))
        found["hit_rate"] = hits / (hits + misses)
        found["foreseen"] = foreseen / (hits + misses)
    return found


def _recorded(cache, session, tokens: list[int]) -> list[tuple[int, list[int]]]:
    """What layers ask for while tokens are decoded: layers and numbers, in order."""
    asked, original = [], cache.bring

    def bring(layer, numbers, *, keeps):
        asked.append((layer, list(numbers)))
        return original(layer, numbers, keeps=keeps)

    cache.bring = bring
    for token in tokens:
        session.decode(token)
    del cache.bring
    return asked


def _replay(cache, recorded: list[tuple[int, list[int]]], right: float) -> None:
    """Expectations of which each is right with such a probability; none, for 0."""
    count = 1 + max(number for _, numbers in recorded for number in numbers)
    generator, following = torch.Generator().manual_seed(2), iter(recorded[1:])
    original, first = cache.bring, recorded[0][0]

    def bring(layer, numbers, *, keeps):
        after = next(following, None)
        if right and after is not None and after[0] != first:
            drawn = torch.rand(len(after[1]), generator=generator).tolist()
            others = torch.randint(0, count, (len(drawn),), generator=generator).tolist()
            picked = zip(after[1], others, drawn, strict=True)
            said = {a if x < right else b for a, b, x in picked}
            ExpertCache.expect(cache, after[0], sorted(said))
        return original(layer, numbers, keeps=keeps)

    cache.bring, cache.expect = bring, lambda layer, numbers: None


def _stream_layers(llm: LLM, context: int) -> None:
    """As few as the budget allows."""
    original = llm.admission.plan
    for layers in range(llm.config.num_layers + 1):
        loaded = Loaded(layers, True)
        if original(context, 1, loaded=loaded).fits:
            break
    llm.admission.plan = lambda context, sequences=1, **request: original(
        context, sequences, **{**request, "loaded": loaded}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host-memory", nargs="+", default=["14GiB", "8GiB", "4GiB"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, default=24)
    parser.add_argument("--whole-layers", action="store_true", help="stream them, experts and all")
    parser.add_argument("--right", type=float, help="the share of expectations that is right")
    parser.add_argument("--cached", action="store_true", help="leave files in the system's cache")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given, given.host_memory[0])))
        return
    bandwidth = {
        "memory": measure_memory().all_threads_bytes_per_s,
        "disk": measure_disk(given.folder).sequential_bytes_per_s,
    }
    print(" ".join(f"{name} {speed / 1e9:.1f} GB/s" for name, speed in bandwidth.items()))
    flags = [flag for flag in ("--whole-layers", "--cached") if flag in sys.argv]
    if given.right is not None:
        flags += ["--right", str(given.right)]
    rows = []
    for budget in given.host_memory:
        command = [sys.executable, __file__, str(given.folder), "--one", "--host-memory", budget]
        command += ["--tokens", str(given.tokens), "--decode", str(given.decode), *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{budget:>8}: {row['experts_held']:4} of {row['num_experts']} "
            f"experts in memory, {row['layers_streamed']} layers streamed; load "
            f"{row['load_s']:.1f} s; prefill {row['prefill_tokens_per_s']:.1f} tokens/s; decode "
            f"{row['decode_ms']:.0f} ms, {row['disk_mb']:.0f} MB from disk, hit rate "
            f"{row.get('hit_rate', 1):.2f}, expected {row.get('foreseen', 0):.2f}; peak "
            f"{row['peak_rss_bytes'] / 2**20:,.0f} MiB of {row['budget_bytes'] / 2**20:,.0f}",
            flush=True,
        )
    print(json.dumps({"bandwidth": bandwidth, "rows": rows}))


if __name__ == "__main__":
    main()
