"""What a measured program offers, and the loop that lets another process ask for it.

Each program runs in a process of its own, so that none shares a runtime, an allocator or a pool of
threads with another; compare.py asks them in turn, one JSON line for a call, one for its answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Protocol

CHUNK_TOKENS = 256  # that a deep cache is made of
WARM_TOKENS = 2  # decoded before the clock starts, in each run


class Program(Protocol):
    """One program with one model loaded."""

    variants: list[str]  # ways to run it, of which the best counts
    prefill_variants: list[str]  # those that may be the best at reading

    def facts(self) -> dict:
        """{"weight_bytes": read for a token, "kv_bytes_per_token": {variant: ...}, ...}"""
        ...

    def fill(self, depth: int) -> None:
        """Bring every variant's KV cache to `depth` tokens, by whatever is quick."""
        ...

    def decode(self, variant: str, threads: int, tokens: int) -> None:
        """Process `tokens` more, one by one, each up to its logits."""
        ...

    def prefill(self, variant: str, threads: int, tokens: int) -> None:
        """Process `tokens` into an empty cache, up to the last one's logits."""
        ...


def serve(make) -> None:
    """Answer calls from standard input until it ends. make() loads the program."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer
    program = make()
    facts = {
        "variants": program.variants,
        "prefill_variants": program.prefill_variants,
        **program.facts(),
    }
    _say(answers, facts)
    for line in sys.stdin:
        call = json.loads(line)
        kind = call.pop("call")
        if kind == "fill":
            program.fill(**call)
            _say(answers, {})
            continue
        if kind == "decode":
            program.decode(call["variant"], call["threads"], WARM_TOKENS)
        began, began_cpu = time.perf_counter(), time.process_time()
        getattr(program, kind)(**call)
        spent = {
            "wall_s": time.perf_counter() - began,
            "cpu_s": time.process_time() - began_cpu,
        }
        _say(answers, spent)


def _say(answers, what: dict) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()
