"""What each codec costs in fidelity: KL divergence and same-top-1 against unquantised pages.

    python benchmarks/fidelity.py [--models ../shared/data/models] [--pages 32,64,128]

Every row is a whole run of the model: text is prefilled, pages are sealed, and the logits of the
last tokens are compared with those of the same run over full pages. Models: the built-in one on a
document of its own kind, stories260K on a story it tells itself, a random Qwen2 whose key
biases are as large as a real one's, and a random model with latent attention, whose values are its
keys, so that the bits of values say nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from ebbtide import LLM, Budget
from ebbtide.kernels.layout import PageLayout
from ebbtide.offload.models.hub import builtin_folder
from ebbtide.offload.models.model_config import read_model_config
from ebbtide.offload.options import Options
from ebbtide.offload.pages.geometry import Geometry

REPO = Path(__file__).resolve().parent.parent
CODECS = {"8": (8, 8), "6": (6, 6), "6/4": (6, 4), "5/5": (5, 5), "4": (5, 4), "4/4": (4, 4)}


def logits(folder: Path, geometry: Geometry, ids: list[int], last: int) -> torch.Tensor:
    """Log-probabilities (last, vocab) of the last tokens."""
    options = Options(model=folder, budget=Budget(disk_memory=0), weight_bits="full")
    llm = LLM(options, geometry=geometry)
    try:
        return llm.logits(ids, last=last).log_softmax(-1)
    finally:
        llm.close()


def compare(name: str, folder: Path, ids: list[int], last: int, cell: int, pages: list[int]):
    """One dictionary per codec, page size and rotation."""
    config = read_model_config(folder)

    def geometry(page: int, **codec) -> Geometry:
        layout = PageLayout(
            config.num_kv_heads,
            config.page_dim,
            page,
            raw_dtype=getattr(torch, config.dtype),
            shared_from=config.values_from,
            **codec,
        )
        return Geometry(cell, 4 * cell, layout)

    full = logits(folder, geometry(pages[0], codec="full"), ids, last)
    for page in pages:
        for codec, (key_bits, value_bits) in CODECS.items():
            for rotate in (False, True) if config.latent is None else (False,):
                bits = {"key_bits": key_bits, "value_bits": value_bits, "near_bits": 2}
                own = geometry(page, rotate=rotate, **bits)
                coarse = logits(folder, own, ids, last)
                kl = (full.exp() * (full - coarse)).sum(-1)
                row = {
                    "model": name,
                    "page": page,
                    "codec": codec,
                    "rotate": rotate,
                    "kl": kl.mean().item(),
                    "kl_max": kl.max().item(),
                    "same_top_1": (full.argmax(-1) == coarse.argmax(-1)).float().mean().item(),
                }
                print(
                    f"{name:<12} P {page:<4} {codec:<4} {'rotated' if rotate else '':<8}"
                    f" KL {row['kl']:.6f} (max {row['kl_max']:.4f})"
                    f"  same top-1 {100 * row['same_top_1']:.1f} %",
                    flush=True,
                )
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=REPO.parent / "shared" / "data" / "models")
    parser.add_argument("--pages", default="64")
    options = parser.parse_args()
    pages = [int(p) for p in options.pages.split(",")]
    rows = []
    with LLM.open() as llm:
        text = (builtin_folder().parent / "story.md").read_text(encoding="utf-8")
        ids = llm.encode([{"role": "user", "content": text}])[:4500]
    rows += compare("built-in", builtin_folder(), ids, 1500, 256, pages)
    stories = options.models / "stories260K"
    if stories.is_dir():
        with LLM.open(stories) as llm:
            ids = [1, *llm.generate([1], max_new_tokens=500, temperature=0.8, seed=3).token_ids]
        rows += compare("stories260K", stories, ids, 350, 64, [p for p in pages if p <= 64])
    sys.path.insert(0, str(REPO / "tests"))
    from random_checkpoints import make

    with tempfile.TemporaryDirectory() as folder:
        make("qwen2-key-biases", folder)
        ids = torch.randint(0, 256, (1500,), generator=torch.Generator().manual_seed(1)).tolist()
        rows += compare("key biases", Path(folder), ids, 500, 256, pages)
    with tempfile.TemporaryDirectory() as folder:
        make("youtu", folder)
        rows += compare("latent", Path(folder), ids, 500, 256, pages)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
