"""How long a question about a text that was read takes, until the first token of its answer.

    python benchmarks/checkpoints.py llama-3.2-1b FOLDER        (or qwen2.5-1.5b, with key biases)
    OMP_WAIT_POLICY=passive python benchmarks/questions.py FOLDER --tokens 32768 --question 20 256

A cache of random pages is written to the page store without computing it; all far planes lie in
memory. Printed for each length of a question: the median of its milliseconds, and those of decoding
a token there. The last line is JSON. Needs a quiet machine, and the setting because torch is
imported before Ebbtide here, and its waiting threads would spin.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from random_state import fill, random_weight

from ebbtide import LLM, Budget
from ebbtide.offload.options import Options
from ebbtide.offload.weights import weights


def measure(tokens: int, given) -> dict:
    budget = Budget(host_memory="64GiB", disk_memory="0")
    options = Options(
        model=given.folder, budget=budget, kv_bits=given.kv_bits, weight_bits=given.weight_bits
    )
    with LLM(options) as llm, llm.open_session(tokens, sequences=1, text=False) as session:
        engine, sequence = session._engine, session._sequence
        depth = tokens - given.rounds * (sum(given.question) + 2)
        fill(engine, sequence, depth)
        session._runtime.store.flush()

        def ms(count: int) -> float:
            """Of `count` tokens behind all that was read, whose last logits are found."""
            sequence.tokens.extend([5] * count)
            began = time.perf_counter()
            engine.logits(engine.prefill(sequence) if count > 1 else engine.decode(sequence))
            return 1e3 * (time.perf_counter() - began)

        taken = {n: statistics.median(ms(n) for _ in range(given.rounds)) for n in given.question}
        decode = statistics.median(ms(1) for _ in range(2 * given.rounds))
    return {"tokens": depth, "question_ms": taken, "decode_ms": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--question", type=int, nargs="+", default=[20, 60, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-bits", default="8")
    parser.add_argument("--weight-bits", default="4")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    weights.quantise_weight = random_weight
    rows = []
    for tokens in given.tokens:
        rows.append(row := measure(tokens, given))
        asked = ", ".join(f"{n} tokens: {ms:,.0f} ms" for n, ms in row["question_ms"].items())
        print(f"behind {row['tokens']:,} tokens  {asked}; decoding {row['decode_ms']:.1f} ms")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
