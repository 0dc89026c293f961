"""Trains the byte-level tokenizer of 2048 tokens, and gathers the natural text of the training.

    python benchmarks/train/tokenizer.py --texts FOLDER... --work WORK

Writes WORK/tokenizer.json and WORK/natural.jsonl. It learns from synthetic documents and from
natural text: .txt, .md, .rst and .pod files below the folders that are mostly letters, such as
documentation or books. Every digit is a token of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTROL_TOKENS = ("<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>")
BOS_ID, END_ID, PAD_ID = 0, 1, 5
VOCAB_SIZE = 2048
SUFFIXES = (".txt", ".md", ".rst", ".pod")
MIN_FILE_BYTES, MAX_FILE_BYTES = 8 << 10, 600 << 10
MIN_LETTERS_SHARE = 0.78  # letters and blanks; tables and listings have fewer
# Lists and test data, not prose.
SKIPPED = re.compile(
    "license|top_level|words|unicode|entry|record|cmakelists|cacert|test", re.IGNORECASE
)


def natural_texts(folders: list[Path]) -> list[str]:
    """The texts of all files below `folders` that look like prose, in the order of their paths."""
    texts = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.suffix not in SUFFIXES or SKIPPED.search(name) or not path.is_file():
                continue
            if not MIN_FILE_BYTES < path.stat().st_size < MAX_FILE_BYTES:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            letters = sum(c.isalpha() or c == " " for c in text)
            if letters > MIN_LETTERS_SHARE * len(text):
                texts.append(text)
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    rng = random.Random(1)
    corpus = [documents.conversation(rng, 2000)[0] for _ in range(1500)]
    corpus += [text[:20000] for text in texts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    texts = natural_texts(given.texts)
    if not texts:
        parser.error("no prose in those folders")
    print(f"{len(texts)} natural texts, {sum(map(len, texts)) / 1e6:.1f} million characters")
    given.work.mkdir(parents=True, exist_ok=True)
    with open(given.work / "natural.jsonl", "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps(text) + "\n")
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(given.work / "tokenizer.json"))
    for kind, text in (
        ("synthetic", documents.conversation(random.Random(5), 2000)[0]),
        ("natural", texts[0][:3000]),
    ):
        print(f"{kind}: {len(text) / len(tokenizer.encode(text).ids):.2f} characters a token")


if __name__ == "__main__":
    main()
