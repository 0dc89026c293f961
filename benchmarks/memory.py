"""Measured memory and traffic against the plan, on a 135M shape or any model.

    python benchmarks/memory.py peak MODEL --tokens 32768 --host-memory 600MiB
    python benchmarks/memory.py growth MODEL --tokens 8192,16384,32768,65536
    python benchmarks/memory.py share MODEL --tokens 16384 --shares 0,0.25,0.5,0.75,1

peak: the highest resident set against the budget. growth: how much each document's tokens add to
it with all far planes on disk, against the plan's resident bytes per token. share: far bytes that a
decoded token reads from disk with a share f of them in memory, against 1 - f, write amplification,
and time per token against those bytes over the measured bandwidth. Each run is a process of its
own, since a peak never falls. The last line is JSON. benchmarks/checkpoints.py writes shapes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

import torch

from ebbtide import LLM, Budget
from ebbtide.offload.options import Options
from ebbtide.offload.output import peak_rss_bytes
from ebbtide.offload.planning.bandwidth import measure_disk, measure_memory


def random_ids(count: int, vocab: int) -> list[int]:
    return torch.randint(
        0, vocab, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.int32
    ).tolist()


def one(model: str, tokens: int, host: str, kv_bits: str, share: float | None, decode: int) -> dict:
    """One run: read `tokens` random ids, decode some, and what it took."""
    options = Options(
        model=model,
        budget=Budget(host_memory=host, disk_memory="32GiB"),
        kv_bits=kv_bits,
        context=tokens + decode + 1,
    )
    llm = LLM(options)
    if share is not None:
        llm.admission.keep_in_memory(share, tokens + decode + 1)
    session = llm.open_session(tokens + decode + 1, sequences=1)
    ids = random_ids(tokens, llm.config.vocab_size)
    session.append(ids[:1], process=False)
    session.last_logits()  # everything that loads once has loaded
    began, peaks = time.perf_counter(), {}

    def note_peak(progress) -> None:
        peaks[1 + progress.done_tokens] = peak_rss_bytes()

    llm.on_progress = note_peak
    session.append(ids[1:], process=False)
    session.last_logits()
    prefill_s = time.perf_counter() - began
    store, before = session._runtime.store, session._runtime.store.stats.snapshot()
    times = []
    for token in ids[:decode]:
        began = time.perf_counter()
        session.decode(token)
        times.append(time.perf_counter() - began)
    spent = store.stats - before
    far = sum(spent.bytes_read.values())
    stored = store.stats.bytes_written
    result = {
        "tokens": tokens,
        "peaks": peaks,
        "peak_bytes": peak_rss_bytes(),
        "budget_bytes": llm.admission.limits.host_bytes,
        "planned_bytes": sum(llm.plan.host.values()),
        "resident_bytes_per_token": llm.plan.resident_bytes_per_token,
        "layers_streamed": llm.plan.layers_streamed,
        "near_resident": llm.plan.near_resident,
        "far_share_in_memory": stored["host"] / (stored["host"] + stored["disk"]),
        "far_share_read_from_disk": spent.bytes_read["disk"] / far if far else 0.0,
        "disk_bytes_per_token": spent.bytes_read["disk"] / decode,
        "write_amplification": store.stats.write_amplification,
        "prefill_tokens_per_s": (tokens - 1) / prefill_s,
        "decode_s_per_token": statistics.median(times),
    }
    llm.close()
    return result


def in_process(model, tokens, host, kv_bits, share=None, decode=8) -> dict:
    command = [sys.executable, __file__, "one", model, "--tokens", str(tokens)]
    command += ["--host-memory", host, "--kv-bits", kv_bits, "--decode", str(decode)]
    if share is not None:
        command += ["--shares", str(share)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak(options) -> list[dict]:
    rows = []
    for tokens in options.tokens:
        row = in_process(options.model, tokens, options.host_memory, options.kv_bits)
        rows.append(row)
        print(
            f"{tokens:,} tokens: peak {row['peak_bytes'] / 2**20:.1f} MiB of "
            f"{row['budget_bytes'] / 2**20:.1f} MiB, planned {row['planned_bytes'] / 2**20:.1f}; "
            f"{row['layers_streamed']} layers streamed; "
            f"{row['prefill_tokens_per_s']:.0f} tokens/s read, "
            f"{1 / row['decode_s_per_token']:.2f} tokens/s written"
        )
    return rows


def growth(options) -> list[dict]:
    """Peaks at milestones of one run: between processes the allocator alone varies by megabytes."""
    last = options.tokens[-1]
    row = in_process(options.model, last, options.host_memory, options.kv_bits, share=0.0)
    peaks = {int(tokens): peak for tokens, peak in row["peaks"].items()}
    marks = [min(peaks, key=lambda t, mark=mark: abs(t - mark)) for mark in options.tokens]
    planned = row["resident_bytes_per_token"]
    for less, more in itertools.pairwise(marks):
        grown = (peaks[more] - peaks[less]) / (more - less)
        print(
            f"{less:,} to {more:,} tokens: {grown:,.0f} bytes per token, planned {planned:,.0f}: "
            f"{100 * (grown / planned - 1):+.1f} %"
        )
    return [{**row, "peaks": {mark: peaks[mark] for mark in marks}}]


def share(options) -> list[dict]:
    print(f"ceilings: {measure_disk()}, {measure_memory()}")
    rows = []
    for part in options.shares:
        row = in_process(
            options.model, options.tokens[0], options.host_memory, options.kv_bits, part, decode=24
        )
        rows.append(row)
        print(
            f"f = {row['far_share_in_memory']:.3f}: {row['far_share_read_from_disk']:.3f} of the "
            f"far bytes from disk (1 - f = {1 - row['far_share_in_memory']:.3f}), write "
            f"amplification {row['write_amplification']:.3f}, "
            f"{1e3 * row['decode_s_per_token']:.1f} ms and "
            f"{row['disk_bytes_per_token'] / 1e6:.1f} MB of disk per token"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["peak", "growth", "share", "one"])
    parser.add_argument("model")
    parser.add_argument("--tokens", default="8192", type=lambda s: [int(n) for n in s.split(",")])
    parser.add_argument("--host-memory", default="8GiB")
    parser.add_argument("--kv-bits", default="8")
    parser.add_argument("--shares", type=lambda s: [float(n) for n in s.split(",")])
    parser.add_argument("--decode", type=int, default=8)
    options = parser.parse_args()
    if options.what == "one":
        part = options.shares[0] if options.shares else None
        row = one(
            options.model,
            options.tokens[0],
            options.host_memory,
            options.kv_bits,
            part,
            options.decode,
        )
        print(json.dumps(row))
        return
    options.shares = options.shares or [0.0, 0.25, 0.5, 0.75, 1.0]
    print(json.dumps({"peak": peak, "growth": growth, "share": share}[options.what](options)))


if __name__ == "__main__":
    main()
