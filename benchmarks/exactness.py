"""Bit-equal logits after a long document, however its pages lie and however it arrived.

    python benchmarks/exactness.py [--tokens 25000] [--greedy 256] [--forced 300] [--kv-bits 8]

Reads a document with the built-in model, then writes greedy tokens, then feeds tokens of real text
one by one; every run is compared to the bit with the one whose pages all lie in memory. The
counters say how many far bytes really came from disk. Also compares full pages' greedy tokens with
transformers, where it is installed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch

from ebbtide import LLM, Budget
from ebbtide.offload.models.hub import builtin_folder
from ebbtide.offload.options import Options

REPO = Path(__file__).resolve().parent.parent
NEAR_TIE = 1e-3  # two programs may choose either of two tokens whose logits are this close


def document(num_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids of a document of real prose around the built-in story, and 1,000 that follow."""
    shared = REPO.parent / "shared" / "data" / "texts" / "moby_dick.txt"
    text = (builtin_folder().parent / "story.md").read_text(encoding="utf-8")
    if shared.exists():
        text += shared.read_text(encoding="utf-8")[2000 : 2000 + 5 * num_tokens]
    with LLM.open() as llm:
        ids = llm.encode([{"role": "user", "content": text}])
    while len(ids) < num_tokens + 1000:
        ids += ids
    return ids[:num_tokens], ids[num_tokens : num_tokens + 1000]


def open_llm(share: float, context: int, kv_bits: str, **store) -> LLM:
    """The built-in model with memory for `share` of its far planes."""
    budget = Budget(host_memory="8GiB", disk_memory="4GiB")
    llm = LLM(Options(budget=budget, kv_bits=kv_bits, context=context), **store)
    llm.admission.keep_in_memory(share, context, 4)
    return llm


def run(ids, forced, greedy: int, *, share=1.0, piece=None, kv_bits="8", **store) -> dict:
    """Logits of the greedy and the forced tokens, the greedy tokens and what moved."""
    context = len(ids) + greedy + len(forced)
    began = time.perf_counter()
    with open_llm(share, context, kv_bits, **store) as llm, llm.session() as session:
        piece = piece or len(ids)
        for start in range(0, len(ids), piece):
            session.append(ids[start : start + piece])
        rows, tokens = [session.last_logits()], []
        read = time.perf_counter() - began
        for _ in range(greedy):
            tokens.append(int(rows[-1].argmax()))
            rows.append(session.decode(tokens[-1]))
        for token in forced:
            rows.append(session.decode(token))
        stats = session._runtime.store.stats
        return {
            "logits": torch.stack(rows),
            "tokens": tokens,
            "read_s": read,
            "decode_s": time.perf_counter() - began - read,
            "disk_bytes": stats.bytes_read["disk"],
            "host_bytes": stats.bytes_read["host"],
            "disk_spans": llm.plan.far_spans["disk"],
            "num_spans": llm.plan.num_spans,
        }


def against_transformers(ids, tokens) -> str:
    """Where greedy tokens over full pages first differ from transformers', and by how much."""
    try:
        import transformers
    except ImportError:
        return "transformers is not installed"
    model = transformers.AutoModelForCausalLM.from_pretrained(builtin_folder(), dtype=torch.float32)
    with torch.inference_mode():
        cache = transformers.DynamicCache()
        for start in range(0, len(ids), 1024):
            part = torch.tensor([ids[start : start + 1024]])
            row = model(part, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        for index, token in enumerate(tokens):
            best = row.topk(2).values
            if int(row.argmax()) != token:
                gap = float(best[0] - best[1])
                verdict = "a near tie" if gap <= NEAR_TIE else "A DIFFERENCE"
                return f"token {index} differs, top two {gap:.2e} apart: {verdict}"
            row = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return f"all {len(tokens)} tokens are the same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=25_000)
    parser.add_argument("--greedy", type=int, default=256)
    parser.add_argument("--forced", type=int, default=300)
    parser.add_argument("--kv-bits", default="8")
    options = parser.parse_args()
    ids, rest = document(options.tokens)
    forced = rest[: options.forced]
    chance = random.Random(1)
    page, cell = 64, 256
    runs = {
        "all in memory": {},
        "a quarter in memory": {"share": 0.25},
        "everything on disk": {"share": 0.0},
        "a quarter, unoverlapped twin": {"share": 0.25, "overlap": False},
        "a quarter, random delays": {
            "share": 0.25,
            "read_delay": lambda: chance.random() * 2e-3,
        },
        "a quarter, history predictor": {"share": 0.25, "predictor": "history"},
    }
    for piece in (1, 7, page - 1, page + 1, cell):
        runs[f"a quarter, pieces of {piece}"] = {"share": 0.25, "piece": piece}
    results, expected = [], None
    for name, how in runs.items():
        found = run(ids, forced, options.greedy, kv_bits=options.kv_bits, **how)
        logits = found.pop("logits")
        del found["tokens"]
        expected = logits if expected is None else expected
        equal = torch.equal(logits, expected)
        results.append({"run": name, "equal": equal, **found})
        print(
            f"{name:<32} {'EQUAL' if equal else 'DIFFERENT'}  "
            f"read {found['read_s']:6.1f} s, decode {found['decode_s']:5.1f} s, "
            f"far bytes from disk {found['disk_bytes'] / 1e6:9.1f} MB, "
            f"{found['disk_spans']} of {found['num_spans']} spans there",
            flush=True,
        )
    full = run(ids, [], options.greedy, kv_bits="full")
    verdict = against_transformers(ids, full["tokens"])
    print(f"full pages against transformers: {verdict}")
    print(json.dumps({"tokens": options.tokens, "runs": results, "transformers": verdict}))


if __name__ == "__main__":
    main()
