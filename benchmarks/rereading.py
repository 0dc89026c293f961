"""Weights read from a model's files for each token: `rereading.py` beside the cache alone.

    sudo python benchmarks/rereading.py MODEL --host-memory 700MiB [--memory 740MiB]
                                        [--weight-bits full] [--tokens 8] [--rounds 3]

Both ways in turn, each in a process of its own. --memory: of a control group that they run in, what
the system's cache holds of files included (Linux with root's rights); the cache of the model's
files is emptied before each run then. Without it all memory is there, and the cache is left alone.

Prints for each run ms of a decoded token (median), of processor time too, and MB from the disk; the
ways' ratio; and whether the last token's logits were the same. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from small_memory import CONTEXT, PROMPT, WARM_UP, Group, bytes_read

THROUGH, RULE = "through the cache", "by the rule"


def one(given: argparse.Namespace) -> dict:
    from ebbtide import LLM, Budget
    from ebbtide.offload.options import Options
    from ebbtide.offload.planning.memory_at_hand import MemoryAtHand
    from ebbtide.offload.weights import rereading

    if given.way == THROUGH:
        rereading.memory_at_hand = lambda: MemoryAtHand(1 << 60, 1 << 60)
    budget = Budget(host_memory=given.host_memory)
    bits = given.weight_bits
    options = Options(
        model=given.model, context=CONTEXT, draft=False, weight_bits=bits, budget=budget
    )
    with LLM(options).open_session(CONTEXT, sequences=1) as session:
        engine, sequence = session._engine, session._sequence
        sequence.tokens.extend(PROMPT)
        engine.logits(engine.prefill(sequence))
        times = []
        for token in range(WARM_UP + given.tokens):
            if token == WARM_UP:
                before, processor = bytes_read(), time.process_time()
            began = time.perf_counter()
            sequence.tokens.append(100 + token)  # others, so that experts are others too
            logits = engine.logits(engine.decode(sequence))
            times.append(time.perf_counter() - began)
        return {
            "seconds": statistics.median(times[WARM_UP:]),
            "processor_s": (time.process_time() - processor) / given.tokens,
            "bytes": (bytes_read() - before) / given.tokens,
            "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        }


def run(given: argparse.Namespace, way: str, num_bytes: int | None) -> dict:
    command = [sys.executable, __file__, given.model, "--host-memory", given.host_memory]
    command += ["--weight-bits", given.weight_bits, "--tokens", str(given.tokens), "--way", way]
    group = None if num_bytes is None else Group(num_bytes)
    try:
        if group is not None:
            _forget(Path(given.model))
        enter = None if group is None else group.enter
        out = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=enter
        )
    finally:
        if group is not None:
            group.close()
    return json.loads(out.stdout.splitlines()[-1])


def _forget(model: Path) -> None:
    os.sync()
    for path in model.glob("*.safetensors") if model.is_dir() else [model]:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--host-memory", required=True)
    parser.add_argument("--memory", help="of the control group; none: no group")
    parser.add_argument("--weight-bits", default="full")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=[THROUGH, RULE], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(one(given)))
        return
    from ebbtide.offload.planning.budget import parse_size

    num_bytes = None if given.memory is None else parse_size(given.memory)
    rows: dict[str, list[dict]] = {THROUGH: [], RULE: []}
    for _ in range(given.rounds):
        for way, found in rows.items():
            row = run(given, way, num_bytes)
            found.append(row)
            print(
                f"{way}: {1e3 * row['seconds']:.0f} ms a token, {1e3 * row['processor_s']:.0f} of "
                f"processor time, {row['bytes'] / 1e6:.0f} MB from disk",
                flush=True,
            )
    pairs = list(zip(*rows.values(), strict=True))
    ratios = [through["seconds"] / by_rule["seconds"] for through, by_rule in pairs]
    same = len({row["logits"] for found in rows.values() for row in found}) == 1
    print(
        f"{statistics.median(ratios):.2f} times the tokens/s by the rule "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}); logits "
        f"{'the same' if same else 'differ'}"
    )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
