"""Synthetic long documents in plain English, with questions whose answers stand in the text.

A document is filler sentences with facts spread among them; the turns after it ask for the facts,
or for its numbered key points. Everything is drawn from one `random.Random`, so a seed fixes a
document. Knows no tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

NAMES = (
    "Ada Ben Cleo Dora Egon Finn Greta Hugo Iris Jonas Kira Leo Mira Nils Olga Pavel Quinn Rosa "
    "Sven Tara Uma Viktor Wanda Xenia Yara Zeno Anton Berta Carl Dina Emil Frida"
).split()
TOWNS = (
    "Lisbon Oslo Turin Graz Porto Ghent Lyon Bergen Zadar Malmo Tartu Vilnius Cork Bruges Siena "
    "Basel Kiel Delft Leeds York Nantes Split Gdansk Bath Aarhus Turku Parma Lucca Ulm Linz "
    "Brno Pecs"
).split()
BUILDINGS = (
    "harbour library museum depot garden bridge tower station market school mill theatre "
    "archive bakery foundry chapel quarry lighthouse orchard observatory"
).split()
COLOURS = "red blue green white black yellow violet silver golden brown grey orange".split()
ANIMALS = (
    "fox heron otter badger owl hare lynx stork beaver falcon raven deer swan toad wolf crane"
).split()
VERBS = (
    "rebuilt painted sold opened closed moved repaired surveyed flooded extended restored insured"
).split()
ADJECTIVES = (
    "quiet narrow early late heavy light plain careful slow steady cold warm old new small "
    "large open empty"
).split()
NOUNS = (
    "street letter meeting road boat cart report window table lamp field garden path door "
    "market ledger bell stone roof fence"
).split()
PLACES = "near behind beside beyond under above along past".split()

SUMMARY_REQUEST = "Summarize the document."


class Fact(NamedTuple):
    """A sentence of a document, the question that asks for it, and the right answer."""

    sentence: str
    question: str
    answer: str


def filler(rng: random.Random) -> str:
    """A sentence that nobody asks about."""
    kind = rng.randrange(8)

    def adjective() -> str:
        return rng.choice(ADJECTIVES)

    def noun() -> str:
        return rng.choice(NOUNS)

    def place() -> str:
        return rng.choice(PLACES)

    def town() -> str:
        return rng.choice(TOWNS)

    def name() -> str:
        return rng.choice(NAMES)

    def building() -> str:
        return rng.choice(BUILDINGS)

    def thing() -> str:
        return f"{adjective()} {noun()}"

    # Only the chosen one may draw from rng.
    kinds = (
        lambda: f"The {thing()} stood {place()} the {thing()}.",
        lambda: f"{name()} walked {place()} the {noun()} and wrote a {thing()}.",
        lambda: f"In {town()} the {noun()} was {adjective()} and the {noun()} was {adjective()}.",
        lambda: f"Nobody in {town()} remembered the {thing()} {place()} the {building()}.",
        lambda: (
            f"It was a {adjective()} day, and {name()} met {name()} {place()} the {building()}."
        ),
        lambda: f"A {thing()} and a {thing()} were kept {place()} the {noun()}.",
        lambda: (
            f"{name()} of {town()} found the {noun()} {adjective()} but the {noun()} {adjective()}."
        ),
        lambda: f"The {building()} had a {thing()}, a {thing()} and a {thing()}.",
    )
    return kinds[kind]()


def fact(rng: random.Random, used: set[tuple]) -> Fact:
    """A fact about something that no fact in `used` is about; it is added there."""
    while True:
        key, made = _draw_fact(rng)
        if key not in used:
            used.add(key)
            return made


def _draw_fact(rng: random.Random) -> tuple[tuple, Fact]:
    kind = rng.randrange(5)
    if kind == 0:
        town, building = rng.choice(TOWNS), rng.choice(BUILDINGS)
        return ("code", town, building), code_fact(town, building, _five_digits(rng))
    if kind == 1:
        town, building = rng.choice(TOWNS), rng.choice(BUILDINGS)
        return ("owner", town, building), owner_fact(town, building, rng.choice(NAMES))
    if kind == 2:
        name, town = rng.choice(NAMES), rng.choice(TOWNS)
        pet = f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}"
        return ("pet", name, town), pet_fact(name, town, pet)
    if kind == 3:
        town, building, verb = rng.choice(TOWNS), rng.choice(BUILDINGS), rng.choice(VERBS)
        year = str(rng.randrange(1700, 2000))
        return ("year", town, building, verb), year_fact(town, building, verb, year)
    name, town = rng.choice(NAMES), rng.choice(TOWNS)
    return ("number", name, town), number_fact(name, town, _five_digits(rng))


def fact_about(
    rng: random.Random, town: str, people: Sequence[str], buildings: Sequence[str]
) -> Fact:
    """A fact about someone or something of one town."""
    name, building = rng.choice(people), rng.choice(buildings)
    kinds = (
        code_fact(town, building, _five_digits(rng)),
        owner_fact(town, building, name),
        pet_fact(name, town, f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}"),
        year_fact(town, building, rng.choice(VERBS), str(rng.randrange(1700, 2000))),
        number_fact(name, town, _five_digits(rng)),
    )
    return rng.choice(kinds)


def _five_digits(rng: random.Random) -> str:
    return str(rng.randrange(10000, 99999))


def code_fact(town: str, building: str, code: str) -> Fact:
    said = f"The code of the {town} {building} is {code}."
    return Fact(said, f"What is the code of the {town} {building}?", said)


def owner_fact(town: str, building: str, name: str) -> Fact:
    said = f"The {town} {building} belongs to {name}."
    return Fact(said, f"Who owns the {town} {building}?", said)


def pet_fact(name: str, town: str, pet: str) -> Fact:
    said = f"{name} of {town} keeps a {pet}."
    return Fact(said, f"What does {name} of {town} keep?", said)


def year_fact(town: str, building: str, verb: str, year: str) -> Fact:
    said = f"The {town} {building} was {verb} in {year}."
    return Fact(said, f"When was the {town} {building} {verb}?", said)


def number_fact(name: str, town: str, number: str) -> Fact:
    said = f"The number of {name} in {town} is {number}."
    return Fact(said, f"What is the number of {name} in {town}?", said)


def filler_sentences(rng: random.Random, num_chars: int) -> list[str]:
    """Filler until `num_chars` are reached, a blank after each sentence counted in."""
    sentences, size = [], 0
    while size < num_chars:
        sentences.append(filler(rng))
        size += len(sentences[-1]) + 1
    return sentences


def conversation(
    rng: random.Random, num_chars: int, max_questions: int = 8
) -> tuple[str, list[tuple[int, int]]]:
    """One training text: a document of about `num_chars`, and turns about it.

    Three in four documents hold 4 to 23 facts; the others 2 to 7 numbered key points, which the
    first turn asks to list, and a few facts. Returns the text, control tokens written out, and
    the (start, end) characters of the answers.
    """
    wants_summary = rng.choices([False, True], [0.75, 0.25])[0]
    used: set[tuple] = set()
    num_facts = rng.randrange(4, 24)
    document = filler_sentences(rng, num_chars)
    facts: list[Fact] = []
    turns: list[tuple[str, str]] = []
    if wants_summary:
        num_facts = rng.randrange(2, 4)
    for _ in range(num_facts):
        facts.append(fact(rng, used))
        document.insert(rng.randrange(len(document) + 1), facts[-1].sentence)
    if wants_summary:
        num_points = rng.randrange(2, 8)
        places = sorted(rng.randrange(len(document) + 1) for _ in range(num_points))
        points: list[str] = []
        for number, place in reversed(list(enumerate(places, 1))):
            points.insert(0, fact(rng, used).sentence)
            document.insert(place, key_point(number, points[0]))
        turns.append((SUMMARY_REQUEST, summary(points)))
    asked = facts[:]
    rng.shuffle(asked)
    turns += [(f.question, f.answer) for f in asked[:max_questions]]
    return _with_turns(" ".join(document), turns)


def key_point(number: int, sentence: str) -> str:
    """How a document states one of its key points."""
    return f"Key point {number}: {sentence}"


def summary(points: list[str]) -> str:
    """What a model should answer to SUMMARY_REQUEST."""
    return "\n".join(f"{number}. {point}" for number, point in enumerate(points, 1))


def _with_turns(document: str, turns: list[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and where its answers lie."""
    text, spans = "<|bos|><|user|>" + document, []
    for i, (question, answer) in enumerate(turns):
        text += ("<|user|>" if i else "\n\n") + question + "<|assistant|>"
        start = len(text)
        text += answer + "<|end|>"
        spans.append((start, len(text)))
    return text, spans
