"""What selecting pages costs and saves in a decode step: exact and bounded mode side by side.

    python benchmarks/selection.py TEXT [--model MODEL] [--tokens 16000] [--epsilon 0.02 0.1]
        [--share 0 0.15 0.3 0.5]

Reads the first tokens of TEXT, then writes `--steps` tokens greedily, with every far plane in
memory, or with memory for `--share` of them, and for a tenth more in bounded mode. For each run:
milliseconds per token (median), far bytes read from disk, what part of the records selected anew
had been read ahead (foreseen), and what was read in vain. The ceiling of a run is what its reads
take alone at the measured bandwidth. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from ebbtide import LLM, Budget
from ebbtide.offload.disk.spill_dir import default_spill_dir
from ebbtide.offload.mode import Mode
from ebbtide.offload.options import Options
from ebbtide.offload.planning.bandwidth import measure_disk
from ebbtide.prefetch.foresight import FORESIGHTS

SEQUENCES = 4  # of a session, as LLM.session has them


def runs(given) -> list[tuple[str, Mode, float]]:
    """(label, mode, the share of the far planes that memory is for)."""
    made = [("exact, in memory", Mode(), 1.0)]
    made += [(f"exact, {share} in memory", Mode(), share) for share in given.share]
    for epsilon in given.epsilon:
        options = {"selector_options": {"epsilon": epsilon}}
        made.append((f"bounded {epsilon}, in memory", Mode("bounded", **options), 1.0))
        for share in given.share:
            for foresight in given.foresight:
                mode = Mode("bounded", foresight=foresight, **options)
                made.append((f"bounded {epsilon}, {share} in memory, {foresight}", mode, share))
    return made


def measure(label: str, mode: Mode, share: float, given) -> dict:
    budget = Budget(host_memory="64GiB", disk_memory="16GiB")
    options = Options(
        model=given.model, budget=budget, mode=mode.name, kv_bits=given.kv_bits, draft=False
    )
    with LLM(options, mode=mode) as llm:
        ids = llm.encode(given.text.read_text(encoding="utf-8"))[: given.tokens]
        context = len(ids) + given.steps + 1
        llm._context = context
        if share < 1:
            llm.admission.keep_in_memory(share, context, SEQUENCES)
        with llm.session() as session:
            session.append(ids)
            logits, times = session.last_logits(), []
            for _ in range(given.warm_up):
                logits = session.decode(int(logits.argmax()))
            session.usage.begin_count()
            stats = session._runtime.store.stats
            before = stats.snapshot()
            for _ in range(given.steps - given.warm_up):
                started = time.perf_counter()
                logits = session.decode(int(logits.argmax()))
                times.append(time.perf_counter() - started)
            spent, kv = stats - before, session.usage.kv()
            far = sum(session._runtime.plan.far_spans.values()) * llm.geometry.span_bytes
            fresh = spent.foreseen + spent.late + spent.misses
            return {
                "run": label,
                "ms_per_token": 1e3 * statistics.median(times),
                "disk_bytes_per_token": spent.bytes_read["disk"] / len(times),
                "far_bytes": far,
                "selected_share": kv.get("selected_share", 1.0),
                "foreseen_share": spent.foreseen / fresh if fresh else 1.0,
                "wasted": spent.wasted,
                "stall_ms_per_token": 1e3 * spent.stall_s / len(times),
                "missed_mass": kv["missed_mass"]["mean"],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, default=16000)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.02, 0.1])
    parser.add_argument("--share", type=float, nargs="+", default=[0.0])
    parser.add_argument("--foresight", nargs="+", choices=FORESIGHTS, default=list(FORESIGHTS))
    parser.add_argument("--kv-bits", default="8")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    disk = measure_disk(default_spill_dir()).random_bytes_per_s
    threads = torch.get_num_threads()
    print(f"random reads {disk / 1e9:.2f} GB/s; {given.tokens} tokens; {threads} threads")
    found = []
    for label, mode, share in runs(given):
        row = measure(label, mode, share, given)
        row["reads_alone_ms"] = 1e3 * row["disk_bytes_per_token"] / disk
        found.append(row)
        print(
            f"{label:40s} {row['ms_per_token']:7.1f} ms/token  "
            f"{row['disk_bytes_per_token'] / 1e6:6.2f} MB from disk "
            f"({row['reads_alone_ms']:5.1f} ms alone)  "
            f"selected {100 * row['selected_share']:5.1f} %  "
            f"foreseen {100 * row['foreseen_share']:3.0f} %  wasted {row['wasted']}  "
            f"stall {row['stall_ms_per_token']:5.1f} ms",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
