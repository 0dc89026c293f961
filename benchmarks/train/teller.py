"""Tales of plain sentences: a few people and buildings of a town, spoken of again and again.

A tale is the hardest text to hide a fact in: its sentences are as simple as the facts are, and
speak of the same names, towns and buildings. The demonstration's story is made of it, and a good
part of what a model is trained on. Knows no facts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import words
from chronicle import KINDS, OBJECTS, PLACES, WHERE, WRITTEN

DAYS = ("quiet", "cold", "warm", "long", "late")
PARAGRAPH = (5, 8)  # sentences, fewest and most
CHAPTER_SENTENCES = (8, 60)


@dataclass(frozen=True)
class Scene:
    """What a chapter's sentences speak of."""

    town: str
    people: tuple[str, str]
    buildings: tuple[str, str]


class Teller:
    """Draws sentences about one scene's town, people and buildings, and who walks through it."""

    def __init__(self, rng: random.Random, scene: Scene, walker: str = "Nils"):
        self.rng, self.scene, self.walker = rng, scene, walker
        self._recent: list[int] = []

    def thing(self, nouns: tuple[str, ...]) -> str:
        noun = self.rng.choice(nouns)
        return f"{self.rng.choice(KINDS[noun])} {noun}"

    def sentence(self) -> str:
        """One sentence; its pattern is none of the last four."""
        rng, town, walker = self.rng, self.scene.town, self.walker
        one, other = rng.sample(self.scene.people, 2)
        near, far = rng.sample(self.scene.buildings, 2)
        first, second = rng.sample(OBJECTS + PLACES, 2)
        is_first, is_second = rng.choice(KINDS[first]), rng.choice(KINDS[second])
        thing, another, third = (self.thing(OBJECTS) for _ in range(3))
        place, beyond = self.thing(PLACES), self.thing(PLACES)
        paper, where, day = self.thing(WRITTEN), rng.choice(WHERE), rng.choice(DAYS)
        patterns = (
            f"The {thing} stood {where} the {near}.",
            f"{one} walked past the {near} and wrote {_a(paper)}.",
            f"In {town} the {first} was {is_first} and the {second} was {is_second}.",
            f"Nobody in {town} remembered the {thing} {where} the {near}.",
            f"It was a {day} day, and {one} met {other} {where} the {near}.",
            f"{_a(thing).capitalize()} and {_a(another)} were kept {where} the {near}.",
            f"{one} of {town} found the {first} {is_first} but the {second} {is_second}.",
            f"The {near} had {_a(thing)}, {_a(another)} and {_a(third)}.",
            f"{walker} walked along the {place} and past the {near}.",
            f"{one} showed {walker} the {thing} {where} the {near}.",
            f"{walker} asked {one} about the {thing}, and {one} told him about the {another}.",
            f"{other} read the {paper} and put it under the {thing}.",
            f"Beyond the {near} lay the {place}, and beyond it the {beyond}.",
            f"{one} said that the {first} was {is_first}, and {other} said nothing.",
            f"Between the {near} and the {far} there was {_a(place)}.",
            f"{one} took the {paper} from the {near} to the {far}.",
        )
        choice = rng.choice([i for i in range(len(patterns)) if i not in self._recent])
        self._recent = [*self._recent[-3:], choice]
        return patterns[choice]

    def paragraphs(self, num_paragraphs: int, sentences: tuple[int, int]) -> list[list[str]]:
        """Paragraphs of `sentences` (fewest, most) sentences each."""
        return [
            [self.sentence() for _ in range(self.rng.randint(*sentences))]
            for _ in range(num_paragraphs)
        ]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _known(spoken: set[str], listed: tuple[str, ...] | list[str]) -> list[str]:
    return [word for word in listed if word in spoken]


def pieces(rng: random.Random, num_chars: int, facts: list[str]) -> list[str]:
    """A tale of about `num_chars`, one sentence a piece with the gap after it.

    Half of its towns, people and buildings are those that `facts` speak of.
    """
    spoken = {word.strip(".,:") for fact in facts for word in fact.split()}
    known = [_known(spoken, names) for names in (words.TOWNS, words.NAMES, words.BUILDINGS)]
    walker = rng.choice(words.NAMES)
    heading = rng.choice(("", "## {town}\n\n", "## Chapter {number}. {town}\n\n"))
    told: list[str] = []
    size = number = 0
    while size < num_chars:
        number += 1
        scene = _scene(rng, known)
        teller = Teller(rng, scene, walker)
        left, paragraph = rng.randint(*CHAPTER_SENTENCES), rng.randint(*PARAGRAPH)
        opening = heading.format(town=scene.town, number=number)
        while left and size < num_chars:
            left, paragraph = left - 1, paragraph - 1
            told.append(opening + teller.sentence() + (" " if paragraph and left else "\n\n"))
            size += len(told[-1])
            opening, paragraph = "", paragraph or rng.randint(*PARAGRAPH)
    return told


def _scene(rng: random.Random, known: list[list[str]]) -> Scene:
    def two(which: int, listed: list[str]) -> tuple[str, str]:
        drawn: list[str] = []
        while len(drawn) < 2:
            names = known[which] if known[which] and rng.random() < 0.5 else listed
            drawn += [name for name in [rng.choice(names)] if name not in drawn]
            if len(known[which]) == 1 and drawn == known[which]:
                drawn += [rng.choice([name for name in listed if name not in drawn])]
        return drawn[0], drawn[1]

    town = two(0, words.TOWNS)[0]
    return Scene(town, two(1, words.NAMES), two(2, words.BUILDINGS))
