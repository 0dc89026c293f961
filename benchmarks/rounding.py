"""What rounding activations costs in fidelity, next to what rounding weights costs.

    python benchmarks/rounding.py [--models ../shared/data/models] [--only NAME]

Weights of 8 and 4 bits are multiplied with rows in groups of 8 bits. Each run of a model, over full
pages and through the torch reference, is compared with the same run over float32 rows, and with the
model as it is: KL divergence, and how often the likeliest token is the same. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ["EBBTIDE_KERNELS"] = "reference"  # where rounding can be left out

import torch

from ebbtide import LLM, Budget
from ebbtide.kernels import matmul
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.quantised import rounded_rows
from ebbtide.offload.models.hub import builtin_folder
from ebbtide.offload.models.model_config import read_model_config
from ebbtide.offload.options import Options
from ebbtide.offload.pages.geometry import Geometry

REPO = Path(__file__).resolve().parent.parent


def groups_of_16(x: torch.Tensor) -> torch.Tensor:
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % 16)).unflatten(1, (-1, 16))
    greatest = groups.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)
    return ((groups * (127 / greatest)).round() * (greatest / 127)).flatten(1)[:, : x.shape[1]]


ROWS = {
    "float32": lambda x: x,
    "groups of 32": rounded_rows,
    "groups of 16": groups_of_16,
    "bfloat16": lambda x: x.bfloat16().float(),
}


def log_probabilities(folder: Path, ids, last: int, cell: int, bits: str, rows: str):
    """(last, vocab) of the last tokens."""
    matmul.rounded_rows = ROWS[rows]
    c = read_model_config(folder)
    raw = getattr(torch, c.dtype)
    layout = PageLayout(c.num_kv_heads, c.head_dim, 64, raw_dtype=raw, codec="full")
    options = Options(model=folder, budget=Budget(disk_memory=0), weight_bits=bits)
    with LLM(options, geometry=Geometry(cell, 4 * cell, layout)) as llm:
        return llm.logits(ids, last=last).log_softmax(-1)


def distance(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    kl = (a.exp() * (a - b)).sum(-1)
    same = (a.argmax(-1) == b.argmax(-1)).float().mean()
    return {"kl": kl.mean().item(), "kl_max": kl.max().item(), "same_top_1": same.item()}


def compare(name: str, folder: Path, ids, last: int, cell: int):
    """One dictionary per kind of weights and rows."""
    full = log_probabilities(folder, ids, last, cell, "full", "float32")
    for bits in ("8", "4"):
        exact = log_probabilities(folder, ids, last, cell, bits, "float32")
        for rows in ROWS:
            got = log_probabilities(folder, ids, last, cell, bits, rows)
            row = {"model": name, "weight_bits": bits, "rows": rows}
            row |= {"against_float_rows": distance(exact, got), "against_full": distance(full, got)}
            shown = "; ".join(
                f"{key.replace('_', ' ')} KL {row[key]['kl']:.6f}, "
                f"same top-1 {100 * row[key]['same_top_1']:.1f} %"
                for key in ("against_float_rows", "against_full")
            )
            print(f"{name:<12} {bits}-bit weights, {rows:<12} {shown}", flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=REPO.parent / "shared" / "data" / "models")
    parser.add_argument("--only", default="", help="built-in, stories260K or ebb-nano-0")
    options = parser.parse_args()
    rows = []
    if options.only in ("", "built-in"):
        with LLM.open() as llm:
            text = (builtin_folder().parent / "story.md").read_text(encoding="utf-8")
            ids = llm.encode([{"role": "user", "content": text}])[:3000]
        rows += compare("built-in", builtin_folder(), ids, 1000, 256)
    stories, nano = options.models / "stories260K", options.models / "ebb-nano-0"
    if stories.is_dir() and options.only in ("", "stories260K"):
        with LLM.open(stories) as llm:
            ids = [1, *llm.generate([1], max_new_tokens=500, temperature=0.8, seed=3).token_ids]
        rows += compare("stories260K", stories, ids, 350, 64)
    novel = options.models.parent / "texts" / "moby_dick.txt"
    if nano.is_dir() and novel.is_file() and options.only in ("", "ebb-nano-0"):
        with LLM.open(nano) as llm:
            ids = llm.encode(novel.read_text(encoding="utf-8")[40000:60000])[:2500]
        rows += compare("ebb-nano-0", nano, ids, 1000, 256)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
