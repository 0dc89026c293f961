"""Facts: a sentence that says something, the question for it, and the right answer.

Every relation has one way to answer, in which what is asked about comes before the value, so that
an answer first says again what was asked. Documents say most facts in just these words, and some
in others. Knows no documents and no tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import words

UNSAID = "The document does not say."


class Fact(NamedTuple):
    """What a document says (`sentence`), what may be asked, and how that is answered.

    `subject` is what the question is about and of which kind; a document says one thing at most
    about a subject. `value` is the last part of the answer, `unsaid` the right answer where the
    document does not say it.
    """

    sentence: str
    question: str
    answer: str
    kind: str = ""
    subject: str = ""
    value: str = ""
    unsaid: str = ""


class Relation(NamedTuple):
    """How facts of one kind are drawn and said.

    `draw` gives the names in the texts; {v} is the value. The first text is the answer as well;
    what stands before its bar is what the question is about.
    """

    kind: str
    texts: tuple[str, ...]
    questions: tuple[str, ...]
    draw: Callable[[random.Random], dict[str, str]]


def _at_building(value: Callable[[random.Random], str]) -> Callable[[random.Random], dict]:
    return lambda rng: {"t": words.town(rng), "b": rng.choice(words.BUILDINGS), "v": value(rng)}


def _of_person(value: Callable[[random.Random], str]) -> Callable[[random.Random], dict]:
    return lambda rng: {"n": words.person(rng), "v": value(rng)}


def _in_town(value: Callable[[random.Random], str]) -> Callable[[random.Random], dict]:
    return lambda rng: {"n": words.person(rng), "t": words.town(rng), "v": value(rng)}


def _of_thing(value: Callable[[random.Random], str]) -> Callable[[random.Random], dict]:
    return lambda rng: {"x": words.thing(rng), "v": value(rng)}


def _two_words(rng: random.Random) -> str:
    return f"{rng.choice(words.ADJECTIVES)}-{rng.choice(words.NOUNS)}"


RELATIONS = (
    Relation(
        "code",
        (
            "The code of the {t} {b}| is {v}.",
            "Remember that the code of the {t} {b} is {v}.",
            "The code of the {t} {b} is still {v}, as before.",
        ),
        ("What is the code of the {t} {b}?", "Which code does the {t} {b} have?"),
        _at_building(words.code),
    ),
    Relation(
        "owner",
        ("The {t} {b}| belongs to {v}.", "It is known that the {t} {b} belongs to {v}."),
        ("Who owns the {t} {b}?", "Who is the owner of the {t} {b}?"),
        _at_building(words.person),
    ),
    Relation(
        "year",
        ("The {t} {b} was {w}| in {v}.", "As everybody knows, the {t} {b} was {w} in {v}."),
        ("When was the {t} {b} {w}?", "In which year was the {t} {b} {w}?"),
        lambda rng: {
            "t": words.town(rng),
            "b": rng.choice(words.BUILDINGS),
            "w": rng.choice(words.VERBS),
            "v": str(rng.randrange(1100, 2030)),
        },
    ),
    Relation(
        "pet",
        ("{n} of {t}| keeps a {v}.",),
        ("What does {n} of {t} keep?", "Which animal does {n} of {t} keep?"),
        _in_town(lambda rng: f"{rng.choice(words.COLOURS)} {rng.choice(words.ANIMALS)}"),
    ),
    Relation(
        "number",
        ("The number of {n} in {t}| is {v}.", "You should note: the number of {n} in {t} is {v}."),
        ("What is the number of {n} in {t}?",),
        _in_town(words.digits),
    ),
    Relation(
        "password",
        (
            "The password of the {x}| is {v}.",
            "By the way, the password of the {x} is {v}.",
        ),
        ("What is the password of the {x}?", "Tell me the password of the {x}."),
        _of_thing(words.secret),
    ),
    Relation(
        "magic",
        (
            "The special magic number for {x}| is {v}.",
            "One of the special magic numbers for {x} is: {v}.",
        ),
        (
            "What is the special magic number for {x}?",
            "What is the special magic number for {x} mentioned in the provided text?",
        ),
        lambda rng: {"x": _two_words(rng), "v": words.digits(rng, 5, 8)},
    ),
    Relation(
        "home",
        ("{n}| lives in {v}.", "All her life {n} lives in {v}."),
        ("Where does {n} live?", "In which town does {n} live?"),
        _of_person(words.town),
    ),
    Relation(
        "job",
        ("{n}| works as a {v}.",),
        ("What is the work of {n}?", "What does {n} work as?"),
        _of_person(lambda rng: rng.choice(words.JOBS)),
    ),
    Relation(
        "meeting",
        (
            "The meeting about the {x}| is on {v}.",
            "Please note that the meeting about the {x} is on {v}.",
        ),
        ("When is the meeting about the {x}?", "On which day is the meeting about the {x}?"),
        _of_thing(
            lambda rng: (
                f"{rng.choice(words.DAYS)} at {rng.randrange(1, 13)}:{rng.randrange(10, 60)}"
                if rng.random() < 0.6
                else f"{rng.choice(words.MONTHS)} {rng.randrange(1, 31)}"
            )
        ),
    ),
    Relation(
        "price",
        ("The {x}| costs {v}.", "In this shop the {x} costs {v}."),
        ("How much does the {x} cost?", "What does the {x} cost?"),
        _of_thing(lambda rng: f"{words.digits(rng, 1, 5)} {rng.choice(words.COINS)}"),
    ),
    Relation(
        "place",
        (
            "The {x}| is kept in the {v}.",
            "Since last year the {x} is kept in the {v}.",
        ),
        ("Where is the {x} kept?", "Where is the {x}?"),
        _of_thing(lambda rng: f"{words.town(rng)} {rng.choice(words.BUILDINGS)}"),
    ),
    Relation(
        "liking",
        ("The favourite {w} of {n}| is {v}.",),
        ("What is the favourite {w} of {n}?",),
        lambda rng: {
            "w": rng.choice(words.LIKED),
            "n": words.person(rng),
            "v": words.secret(rng),
        },
    ),
)
KINDS = {relation.kind: relation for relation in RELATIONS}


def say(kind: str, names: dict[str, str], wording: int = 0, question: int = 0) -> Fact:
    """A fact of `kind`; `names` are the words its texts need, "v" the value."""
    relation = KINDS[kind]
    stem = relation.texts[0].split("|")[0].format(**names)
    sentence, answer = (
        _articles(text.replace("|", "").format(**names))
        for text in (relation.texts[wording], relation.texts[0])
    )
    asked = relation.questions[question].format(**names)
    return Fact(sentence, asked, answer, kind, f"{kind}: {stem}", names["v"], f"{stem}? {UNSAID}")


def _articles(sentence: str) -> str:
    for article in (" keeps a ", " works as a "):
        at = sentence.find(article)
        if at >= 0 and sentence[at + len(article)] in "aeiou":
            return sentence[: at + len(article) - 1] + "n " + sentence[at + len(article) :]
    return sentence


def draw(rng: random.Random, used: set[str], kind: str | None = None, plain: float = 0.6) -> Fact:
    """A fact about a subject that `used` does not hold; it is added there.

    `plain` is the share of facts said in the words of the answer.
    """
    while True:
        relation = KINDS[kind] if kind else rng.choice(RELATIONS)
        wording = 0 if rng.random() < plain else rng.randrange(len(relation.texts))
        fact = say(
            relation.kind,
            relation.draw(rng),
            wording,
            rng.randrange(len(relation.questions)),
        )
        if fact.subject not in used:
            used.add(fact.subject)
            return fact


def neighbour(rng: random.Random, fact: Fact, used: set[str]) -> Fact:
    """A fact of the same kind about another subject, one that shares a name with that of `fact`."""
    names = set(fact.subject.split())
    for _ in range(30):
        seen = set(used)
        other = draw(rng, seen, fact.kind)
        common = {word for word in names & set(other.subject.split()) if word[0].isupper()}
        if common - {"The"}:
            used.add(other.subject)
            return other
    return draw(rng, used, fact.kind)


def about(rng: random.Random, kind: str, name: str) -> Fact:
    """A fact of `kind` about the person called `name`."""
    relation = KINDS[kind]
    return say(kind, relation.draw(rng) | {"n": name}, 0, rng.randrange(len(relation.questions)))
