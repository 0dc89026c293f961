"""How many selected records are at hand: selections of real text, replayed through a cache.

    python benchmarks/eviction.py TEXT [--model MODEL] [--tokens 16384] [--epsilon 0.02]

Reads TEXT in bounded mode with everything in memory, decodes its last tokens as they stand there,
and keeps what each layer selected. Then caches of several sizes are filled as hot records are,
without reading ahead, by every eviction there is. The ceiling comes first: the share that a cache
of that size could hold. Bytes and hits only: no time is measured. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ebbtide import LLM, Budget
from ebbtide.offload.mode import Mode
from ebbtide.offload.options import Options
from ebbtide.offload.pages.eviction import EVICTIONS, make_eviction

MOST_STREAMED = 32  # records that may push out last selections at a time
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6)  # of all records


def selections(given) -> tuple[list[list[np.ndarray]], int]:
    """By step and layer, numbers of selected records; and how many records a layer has."""
    options = {"epsilon": given.epsilon}
    mode = Mode("bounded", selector_options=options, foresight="nothing")
    budget = Budget(host_memory="64GiB")
    with LLM(Options(model=given.model, budget=budget, mode="bounded"), mode=mode) as llm:
        ids = llm.encode(given.text.read_text(encoding="utf-8"))[: given.tokens]
        llm._context = len(ids)
        with llm.session() as session:
            session.append(ids[: -given.steps])
            session.last_logits()
            sequence, trace = session._sequence, []
            for token in ids[-given.steps :]:
                session.decode(token)
                last = sequence.trail.last
                trace.append([last[i].numpy() for i in range(llm.config.num_layers)])
            return trace, sequence.table.num_records(0)


def hit_rate(trace, per_layer: int, num_frames: int, name: str) -> float:
    """The share of selected records that were there, with the rules of HotRecords."""
    count, streamed = len(trace[0]) * per_layer, min(MOST_STREAMED, num_frames // 2)
    eviction = make_eviction(name, count)
    is_there, is_standing = (np.zeros(count, dtype=bool) for _ in range(2))
    num_hits = num_asked = 0
    for step in trace:
        for layer, chosen in enumerate(step):
            numbers = chosen + layer * per_layer
            is_standing[layer * per_layer : (layer + 1) * per_layer] = False
            is_standing[numbers] = True
            here, missing = numbers[is_there[numbers]], numbers[~is_there[numbers]]
            num_hits, num_asked = num_hits + len(here), num_asked + len(numbers)
            eviction.use(here)
            while len(missing):
                num_easy = num_frames - np.count_nonzero(is_there & is_standing)
                batch, missing = np.split(missing, [max(num_easy, streamed)])
                others = np.flatnonzero(is_there)
                order = np.lexsort((eviction.worth(others), is_standing[others]))
                too_many = max(0, len(others) + len(batch) - num_frames)
                is_there[others[order[:too_many]]] = False
                is_there[batch] = True
                eviction.touch(batch)
                eviction.use(batch)
    return num_hits / max(1, num_asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--epsilon", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    trace, per_layer = selections(given)
    total, selected = len(trace[0]) * per_layer, np.mean([sum(map(len, s)) for s in trace])
    print(f"{selected:.0f} of {total} records selected in a step, {len(trace)} steps")
    rows = []
    for share in SHARES:
        frames = max(2, int(share * total))
        row = {"frames": frames, "ceiling": min(1.0, frames / selected)}
        row |= {name: hit_rate(trace, per_layer, frames, name) for name in EVICTIONS}
        rows.append(row)
        found = ", ".join(f"{name} {row[name]:.3f}" for name in EVICTIONS)
        print(f"{frames} frames, at most {row['ceiling']:.2f}: {found}", flush=True)
    print(json.dumps({"selected": float(selected), "records": total, "rows": rows}))


if __name__ == "__main__":
    main()
