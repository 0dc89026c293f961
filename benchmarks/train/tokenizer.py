"""Trains the byte-level tokenizer on the corpus and on synthetic conversations.

    python benchmarks/train/tokenizer.py --work WORK [--vocab 4096]

Reads WORK/corpus (corpus.py unpacks it) and writes WORK/tokenizer.json. Every digit is a token of
its own.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import corpus
import documents
import haystack
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTROL_TOKENS = ("<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>")
BOS_ID, END_ID, USER_ID, ASSISTANT_ID, PAD_ID = 0, 1, 2, 3, 5
FIRST_ORDINARY_ID = len(CONTROL_TOKENS)
PIECE_CHARS = 60000  # of each text, so that no book outweighs the others


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    rng = random.Random(1)
    prose = haystack.Prose(texts, rng)
    pieces = [text[:PIECE_CHARS] for text in texts]
    for _ in range(1500):
        made = documents.conversation(haystack.Setting(rng, prose, 800, 6))
        pieces.append(made.document + "\n".join(f"{q}\n{a}" for q, a in made.turns))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=4096)
    given = parser.parse_args()
    found = corpus.read(given.work)
    tokenizer = train_tokenizer(found.books + found.docs + found.chat_texts(), given.vocab)
    partial = given.work / "tokenizer.partial"
    tokenizer.save(str(partial))
    os.replace(partial, given.work / "tokenizer.json")
    text = found.books[0][5000:15000]
    print(f"prose: {len(text) / len(tokenizer.encode(text).ids):.2f} characters a token")


if __name__ == "__main__":
    main()
