"""Runs of benchmarks/train on a corpus that is made up: for tests. Imported first, it makes the
scripts' modules importable by their names."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks" / "train"
if not SCRIPTS.exists():
    pytest.skip("this is not a checkout", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))
try:
    import attention
    import birth
    import corpus
    import documents
    import evaluate
    import examples
    import export
    import facts
    import feed
    import haystack
    import model as network
    import pack
    import selection
    import story
    import teller
    import tokenizer as tokenizers_
    import train
finally:
    sys.path.remove(str(SCRIPTS))

__all__ = [
    "SCRIPTS",
    "attention",
    "birth",
    "book",
    "corpus",
    "documents",
    "evaluate",
    "examples",
    "export",
    "facts",
    "feed",
    "haystack",
    "make_work",
    "network",
    "pack",
    "selection",
    "story",
    "teller",
    "train",
    "trainer",
]
SENTENCE = "On the {} day of the journey the old captain wrote to his sister in the north. "


def book(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(SENTENCE.format(facts.words.made_word(rng)) for _ in range(400))


def make_work(folder: Path) -> Path:
    """A folder with a corpus and a tokenizer for the tiny network."""
    (folder / "corpus").mkdir()
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The captain."}]
    for name, lines in {
        "books": [{"title": str(n), "text": book(n)} for n in range(11)],
        "docs": [{"title": "d", "text": book(20)}],
        "chat": [{"messages": talk}],
    }.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "corpus" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    texts = [book(n) for n in range(3)]
    trained = tokenizers_.train_tokenizer(texts, network.SHAPES["tiny"].vocab)
    trained.save(str(folder / "tokenizer.json"))
    return folder


def trainer(work: Path, fresh: bool, dtype: str = "float32", **more: object) -> train.Trainer:
    """A tiny network in training on the CPU; `more`: other arguments of the command."""
    arguments = {"minutes": 1e9, "compile": False, "seed": 1, "workers": 0, "device": "cpu"}
    arguments |= {"bounded": False, "start": None, "size": "tiny", "dtype": dtype, "fresh": fresh}
    return train.Trainer(argparse.Namespace(work=work, **(arguments | more)))
