"""What verifying several tokens at once takes, by how many they are, beside decoding one.

    python benchmarks/checkpoints.py llama-3.2-1b FOLDER
    python benchmarks/verifying.py FOLDER --tokens 32768 131072 [--read-tokens 2048] [--drift 0.25]

A cache of random pages is written to the page store without computing it; all far planes lie in
memory, or there is memory for a fifth, most of which is needed to draft. Printed for each:
milliseconds to decode a token in exact mode, to verify 1, 2, 4 ... tokens together, and to draft
one by a selection of fixed size (of which a fixed share is new each time). From these follows what
a token takes where guesses are right with a given probability, each by itself, for the best number
of guesses: computed, not measured, since random weights have nothing to guess. The last line is
JSON. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from drifting import drifting
from random_state import fill, random_weight

from ebbtide import LLM, Budget
from ebbtide.offload.options import Options
from ebbtide.offload.weights import weights

SLACK_TOKENS = 512  # of the context: for what is decoded
RIGHT = (0.6, 0.8, 0.9, 0.95)  # probabilities that a guess is


def median_ms(run, count: int) -> float:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def measure(tokens: int, on_disk: bool, given) -> dict:
    budget = Budget(host_memory="64GiB", disk_memory="64GiB")
    options = Options(
        model=given.folder, budget=budget, kv_bits=given.kv_bits, weight_bits=given.weight_bits
    )
    with LLM(options) as llm:
        if on_disk:
            llm.admission.keep_in_memory(given.share, tokens, text=False)
        with llm.open_session(tokens, sequences=1, text=False) as session:
            engine, sequence = session._engine, session._sequence
            fill(engine, sequence, tokens - SLACK_TOKENS)
            session._runtime.store.flush()
            vocab = engine.config.vocab_size

            def decode(by) -> None:
                sequence.tokens.append(len(sequence.tokens) * 7919 % vocab)
                by.logits(by.decode(sequence))

            def verify(count: int) -> None:
                some = [(len(sequence.tokens) + i) * 7919 % vocab for i in range(count)]
                engine.logits(engine.verify(sequence, some))

            decode(engine)
            plain = median_ms(lambda: decode(engine), given.steps)
            counts = (1, 2, 4, 6, 8, 12, 16)
            verified = {n: median_ms(lambda n=n: verify(n), given.steps) for n in counts}
            drafted = None
            drafter = session._runtime.make_drafter()
            if drafter is not None:
                median_ms(lambda: decode(drafter), given.warm_up)
                drafted = median_ms(lambda: decode(drafter), 2 * given.steps)
    return {
        "tokens": tokens,
        "on_disk": on_disk,
        "decode_ms": plain,
        "verify_ms": verified,
        "draft_ms": drafted,
        "ms_per_token": {p: best(p, plain, verified, drafted or 0.0) for p in RIGHT},
    }


def best(right: float, plain: float, verified: dict[int, float], drafted: float) -> float:
    """The least milliseconds for a token, where each guess is right with a probability."""
    took = [plain]
    for count, ms in verified.items():
        tokens = (1 - right**count) / (1 - right)  # the first needs no guess
        took.append((ms + (count - 1) * drafted) / tokens)
    return min(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--share", type=float, default=0.2, help="of memory; drafts take most")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--read-tokens", type=int, default=2048)
    parser.add_argument("--drift", type=float, default=0.25)
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
        for on_disk in (False, True):
            with drifting(given.read_tokens, given.drift):
                row = measure(tokens, on_disk, given)
            rows.append(row)
            verified = ", ".join(f"{n}: {ms:.0f}" for n, ms in row["verify_ms"].items())
            drafted = "none" if row["draft_ms"] is None else f"{row['draft_ms']:.1f} ms"
            gained = ", ".join(f"{p}: {ms:.0f}" for p, ms in row["ms_per_token"].items())
            print(
                f"{tokens} tokens {'on disk' if on_disk else 'in memory'}: decoding one "
                f"{row['decode_ms']:.1f} ms; verifying {verified} ms; a draft {drafted}\n"
                f"    a token, where guesses are right by {gained} ms",
                flush=True,
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
