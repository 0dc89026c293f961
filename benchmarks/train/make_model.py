"""From the corpus to a model folder, in one command.

    python benchmarks/train/make_model.py CORPUS.tar.xz WORK --size nano --minutes 60
    python benchmarks/train/make_model.py CORPUS.tar.xz WORK --size reader --minutes 100 \\
        --device cuda --compile --workers 12 --leg-minutes 8.5

Writes WORK/model: weights, tokenizer, chat template, generation settings and a card with what was
measured. Every part is skipped when its result is there, and training goes on from its checkpoint,
so the same command is repeated until it says that the model is finished; it exits with 75 when a
leg is over and there is more to train. Novels given with --novels are what is evaluated on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from corpus import unpack
from export import architecture
from model import SHAPES

HERE = Path(__file__).resolve().parent
MORE_TO_TRAIN = 75  # EX_TEMPFAIL: the same command again


def run(script: str, *arguments: str) -> None:
    command = [sys.executable, str(HERE / script), *arguments]
    print("+", " ".join(command), flush=True)
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)


def trained_share(work: Path, minutes: float) -> float:
    if not (work / "checkpoint.pt").is_file():
        return 0.0
    return progress(work)["trained_s"] / (minutes * 60)


def progress(work: Path) -> dict:
    """What the checkpoint says of its training; mapped, so that weights are not read."""
    path = work / "checkpoint.pt"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="nano")
    parser.add_argument("--prepare", action="store_true", help="corpus and tokenizer alone")
    parser.add_argument("--minutes", type=float, default=60, help="of training, all legs together")
    parser.add_argument("--leg-minutes", type=float, help="of this run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw examples")
    parser.add_argument("--query-scale", type=float, default=1.0)
    parser.add_argument("--novels", type=Path, nargs="*", default=[])
    parser.add_argument("--natural", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=40, help="questions per task and length")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths that are evaluated")
    given = parser.parse_args()
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    on_device = ["--device", given.device]
    unpack(given.archive, work)
    if not (work / "tokenizer.json").is_file():
        run("tokenizer.py", "--work", str(work), "--vocab", str(SHAPES[given.size].vocab))
    if given.prepare:
        print(f"{work} has corpus and tokenizer; the same command without --prepare trains.")
        return
    if trained_share(work, given.minutes) < 1:
        training = ["--work", str(work), "--size", given.size, "--minutes", str(given.minutes)]
        training += [*on_device, "--threads", str(given.threads)]
        training += ["--workers", str(given.workers), *["--compile"] * given.compile]
        if given.leg_minutes:
            training += ["--leg-minutes", str(given.leg_minutes)]
        run("train.py", *training)
        if trained_share(work, given.minutes) < 1:
            print("This leg is over; the same command goes on.")
            raise SystemExit(MORE_TO_TRAIN)
    model = work / "model"
    scale = ["--query-scale", str(given.query_scale)]
    run("export.py", "--work", str(work), "--out", str(model), *scale)
    measured = work / "evaluation.jsonl"
    if given.novels and not measured.is_file():
        texts = ["--novels", *map(str, given.novels), "--natural", *map(str, given.natural)]
        if given.tokens:
            texts += ["--tokens", *map(str, given.tokens)]
        run(
            "evaluate.py",
            *("--model", str(model), *on_device, "--out", str(measured)),
            *("--count", str(given.count), "--threads", str(given.threads), *texts),
        )
    text = card(given.size, progress(work), measured)
    (model / "README.md").write_text(text, encoding="utf-8")
    print(f"{model} is finished.")


def card(size: str, trained: dict, measured: Path) -> str:
    """The model's README: what it is, how it was trained, what was measured."""
    shape = SHAPES[size]
    lines = [
        f"# ebb-{size}",
        "",
        f"`{architecture(shape)['architectures'][0]}`: {shape.layers} layers, hidden size "
        f"{shape.hidden}, {shape.heads} query and {shape.kv_heads} KV heads of {shape.head_dim}, "
        f"RoPE theta {shape.rope_theta:g}, {shape.max_positions} positions, a vocabulary of "
        f"{shape.vocab}; "
        "matrices on an 8-bit grid, written in bfloat16. Trained from nothing by "
        "`benchmarks/train/make_model.py` of Ebbtide for "
        f"{trained['trained_s'] / 60:.0f} minutes: {trained['tokens'] / 1e6:.1f} million tokens "
        f"in {trained['steps']:,} steps. Apache-2.0.",
        "",
        "It answers questions about the document before it, by saying again what stands there.",
    ]
    if measured.is_file():
        rows = [json.loads(line) for line in measured.read_text(encoding="utf-8").splitlines()]
        lines += ["", "Whole answers right:", ""]
        lines += ["| task | in | tokens | right |", "|---|---|---|---|"]
        lines += [
            f"| {row['task']} | {row['haystack']} | {row['tokens']:,} "
            f"| {row['right']} of {row['asked']} |"
            for row in rows
            if "task" in row
        ]
        lines += [
            f"\n{row['text']}: perplexity {row['perplexity']}, {row['bits_per_byte']} bits a byte."
            for row in rows
            if "text" in row
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
