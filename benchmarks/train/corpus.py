"""The corpus: books, documentation and conversations, as JSON lines in a .tar.xz.

    python benchmarks/train/corpus.py CORPUS.tar.xz --work WORK

unpacks it into WORK/corpus. The last book of every ten is held out: evaluations hide facts in it,
training never sees it. Knows neither tokens nor tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = 10
FILES = ("books.jsonl", "docs.jsonl", "chat.jsonl")


@dataclass
class Corpus:
    """Texts by kind. `chat` holds lists of {"role", "content"}."""

    books: list[str]
    held_out_books: list[str]
    docs: list[str]
    chat: list[list[dict[str, str]]]

    def chat_texts(self) -> list[str]:
        return ["\n".join(m["content"] for m in messages) for messages in self.chat[::4]]


def unpack(archive: Path, work: Path) -> None:
    """The archive's files in WORK/corpus, unless they are there."""
    folder = work / "corpus"
    if all((folder / name).is_file() for name in FILES):
        return
    partial = work / "corpus.partial"
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        os.replace(file, folder / file.name)
    partial.rmdir()


def read(work: Path) -> Corpus:
    folder = work / "corpus"
    books = [entry["text"] for entry in _lines(folder / "books.jsonl")]
    docs = [entry["text"] for entry in _lines(folder / "docs.jsonl")]
    chat = [entry["messages"] for entry in _lines(folder / "chat.jsonl")]
    held_out = books[HELD_OUT - 1 :: HELD_OUT]
    kept = [book for i, book in enumerate(books) if i % HELD_OUT != HELD_OUT - 1]
    return Corpus(kept, held_out, docs, chat)


def _lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    unpack(given.archive, given.work)
    found = read(given.work)
    print(
        f"{len(found.books)} books, {len(found.held_out_books)} held out, "
        f"{len(found.docs)} documents, {len(found.chat)} conversations"
    )


if __name__ == "__main__":
    main()
