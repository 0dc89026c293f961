"""The text that facts are hidden in: pieces of books, or simple sentences that nobody asks about.

Everything is drawn from one `random.Random`. Knows no facts and no tokens.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import NamedTuple

import teller
import words

ENDS = re.compile(r"[.!?][\"'”’)]*\s+")


class Prose:
    """Pieces of books. `books` are their texts; `rng` chooses."""

    def __init__(self, books: list[str], rng: random.Random):
        self.rng = rng
        self.books = [book for book in books if len(book) > 20000]
        self.sizes = [len(book) for book in self.books]

    def piece(self, num_chars: int) -> str:
        """About `num_chars` from somewhere in a book, from the beginning of a sentence on.

        Half of the pieces keep their line breaks; in the others every gap is one blank.
        """
        book = self.rng.choices(self.books, self.sizes)[0]
        start = self.rng.randrange(max(1, len(book) - num_chars - 1000))
        piece = book[start : start + num_chars + 400]
        begin = ENDS.search(piece, 0, 400)
        piece = piece[begin.end() if begin else 0 :][:num_chars]
        return " ".join(piece.split()) if self.rng.random() < 0.5 else piece


def filler(rng: random.Random) -> str:
    """A simple sentence that nobody asks about."""

    def thing() -> str:
        return f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"

    name, other = rng.choice(words.NAMES), rng.choice(words.NAMES)
    town, building = rng.choice(words.TOWNS), rng.choice(words.BUILDINGS)
    where = rng.choice(("near", "behind", "beside", "under", "above"))
    patterns = (
        "The {a} stood {where} the {b}.",
        "{name} walked past the {building} and wrote a {a}.",
        "Nobody in {town} remembered the {a} {where} the {building}.",
        "It was a long day, and {name} met {other} {where} the {building}.",
        "{name} of {town} found the {a} but not the {b}.",
        "The {building} had a {a} and a {b}.",
        "{name} asked {other} about the {a}, and nothing was said of the {b}.",
    )
    return rng.choice(patterns).format(
        a=thing(), b=thing(), name=name, other=other, town=town, building=building, where=where
    )


def filler_sentences(rng: random.Random, num_chars: int) -> list[str]:
    """Filler until `num_chars` are reached, a blank after each sentence counted in."""
    sentences, size = [], 0
    while size < num_chars:
        sentences.append(filler(rng))
        size += len(sentences[-1]) + 1
    return sentences


# Kinds of haystacks and their shares; filler is simple sentences of many subjects.
HAYSTACKS = {"prose": 0.56, "tale": 0.36, "filler": 0.08}


def pieces_of_text(
    rng: random.Random,
    prose: Prose | None,
    num_chars: int,
    sentences: list[str],
    kind: str | None = None,
) -> list[str]:
    """Pieces of text of about num_chars together; `sentences` may be put between any two.

    `kind` is one of HAYSTACKS; without it, any.
    """
    if kind is None:
        kind = rng.choices(list(HAYSTACKS), list(HAYSTACKS.values()))[0]
    if prose is not None and kind == "prose":
        text = prose.piece(num_chars)
        cuts = [0, *(match.end() for match in ENDS.finditer(text)), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(cuts) if b > a]
    if kind == "tale":
        return teller.pieces(rng, num_chars, sentences)
    return [sentence + " " for sentence in filler_sentences(rng, num_chars)]


def hide(rng: random.Random, pieces: list[str], sentences: list[str]) -> list[str]:
    """`pieces` with each of `sentences` somewhere among them, in their order."""
    places = sorted(rng.randrange(len(pieces) + 1) for _ in sentences)
    hidden, begin = [], 0
    for place, sentence in zip(places, sentences, strict=True):
        hidden += pieces[begin:place]
        if hidden and not hidden[-1][-1].isspace():
            hidden.append(" ")
        hidden.append(sentence + " ")
        begin = place
    return hidden + pieces[begin:]


class Setting(NamedTuple):
    """What a conversation is drawn from: how long its document and how many turns are.

    `haystack` is the kind of text that facts are hidden in; without it, any.
    """

    rng: random.Random
    prose: Prose | None
    num_chars: int
    num_turns: int
    haystack: str | None = None

    def document(self, sentences: list[str]) -> str:
        room = max(0, self.num_chars - sum(len(sentence) + 1 for sentence in sentences))
        pieces = []
        if room > 60:
            pieces = pieces_of_text(self.rng, self.prose, room, sentences, self.haystack)
        return "".join(hide(self.rng, pieces, sentences)).strip()
