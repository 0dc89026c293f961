"""Long documents with questions: what a reading model is trained on and measured with.

A conversation is a document and turns about it. The document is prose (of books, or of simple
sentences made here) with facts among it; the turns ask for the facts, for several at once, over
several hops, for numbered points, for the end of a sentence, or for what the document does not
say. Everything is drawn from one `random.Random`, so that a seed fixes a conversation. Knows no
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import facts
import words
from haystack import Setting

SUMMARY_REQUEST = "Summarize the document."
SUMMARY_REQUESTS = (
    SUMMARY_REQUEST,
    SUMMARY_REQUEST,
    "List the key points of the document.",
    "What are the key points?",
)
RECORDS = ("Record", "Item", "Decision", "Rule", "Step", "Task")


class Conversation(NamedTuple):
    """A document and (question, answer) turns about it."""

    document: str
    turns: list[tuple[str, str]]


def needles(at: Setting) -> Conversation:
    """Facts about different things; some questions are about what is not said."""
    rng, used = at.rng, set()
    fits = max(2, min(120, at.num_chars // 110))
    told = [facts.draw(rng, used) for _ in range(rng.randint(min(3, fits), fits))]
    turns = [(fact.question, fact.answer) for fact in told]
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        absent = (
            facts.neighbour(rng, rng.choice(told), used)
            if rng.random() < 0.5
            else facts.draw(rng, used)
        )
        turns.append((absent.question, absent.unsaid))
    rng.shuffle(turns)
    return Conversation(at.document([fact.sentence for fact in told]), turns[: at.num_turns])


def multi_key(at: Setting) -> Conversation:
    """Facts that are all of one kind, their subjects alike."""
    rng, used = at.rng, set()
    kind = rng.choice(facts.RELATIONS).kind
    fits = max(2, min(120, at.num_chars // 90))
    told = [facts.draw(rng, used, kind, plain=0.9)]
    for _ in range(rng.randint(min(3, fits), fits) - 1):
        told.append(
            facts.neighbour(rng, rng.choice(told), used)
            if rng.random() < 0.6
            else facts.draw(rng, used, kind, plain=0.9)
        )
    turns = [(fact.question, fact.answer) for fact in told]
    absent = facts.neighbour(rng, rng.choice(told), used)
    if rng.random() < 0.4:
        turns.append((absent.question, absent.unsaid))
    rng.shuffle(turns)
    rng.shuffle(told)
    return Conversation(at.document([fact.sentence for fact in told]), turns[: at.num_turns])


def several(at: Setting) -> Conversation:
    """Questions for two to five facts at once."""
    rng, used = at.rng, set()
    fits = max(3, min(40, at.num_chars // 90))
    told = [facts.draw(rng, used) for _ in range(rng.randint(3, fits))]
    turns = []
    for _ in range(at.num_turns):
        asked = rng.sample(told, min(len(told), rng.randint(2, 5)))
        question = " ".join(fact.question for fact in asked)
        turns.append((question, " ".join(fact.answer for fact in asked)))
    return Conversation(at.document([fact.sentence for fact in told]), turns)


def hops(at: Setting) -> Conversation:
    """What is asked about one thing is said of another: its owner, or what it equals."""
    rng, used = at.rng, set()
    told, turns = [], []
    fits = max(1, min(12, at.num_chars // 200))
    for _ in range(rng.randint(1, fits)):
        owner = facts.draw(rng, used, "owner")
        name = owner.value
        second = rng.choice(("home", "job", "liking"))
        fact = facts.about(rng, second, name)
        if fact.subject in used:
            continue
        used.add(fact.subject)
        told += [owner.sentence, fact.sentence]
        of_owner = owner.answer.split(" belongs to ")[0]
        of_owner = "the owner of " + of_owner[0].lower() + of_owner[1:]
        asked = fact.question.replace(name, of_owner)
        turns.append((asked, f"{owner.answer} {fact.answer}"))
    rng.shuffle(told)
    rng.shuffle(turns)
    return Conversation(at.document(told), turns[: at.num_turns])


def variables(at: Setting) -> Conversation:
    """Variables that equal numbers or each other; answers follow the chain."""
    rng = at.rng
    count = max(2, min(40, at.num_chars // 50))
    names: list[str] = []
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    while len(names) < rng.randint(2, count):
        name = "".join(rng.choice(letters) for _ in range(rng.randint(1, 3)))
        if name not in names:
            names.append(name)
    said: dict[str, str] = {}
    chains: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        earlier = [other for other in names[:i] if len(chains[other]) < 5]
        if earlier and rng.random() < 0.6:
            other = rng.choice(earlier)
            said[name] = f"Variable {name} equals variable {other}."
            chains[name] = [said[name], *chains[other]]
        else:
            said[name] = f"Variable {name} is {words.digits(rng, 3, 6)}."
            chains[name] = [said[name]]
    asked = rng.sample(names, min(len(names), at.num_turns))
    turns = [(f"What is the value of variable {name}?", " ".join(chains[name])) for name in asked]
    sentences = [said[name] for name in names]
    if rng.random() < 0.3:
        rng.shuffle(sentences)
    return Conversation(at.document(sentences), turns)


def key_point(number: int, sentence: str) -> str:
    """How a document states one of its key points."""
    return f"Key point {number}: {sentence}"


def summary(points: list[str]) -> str:
    """What a model should answer to SUMMARY_REQUEST."""
    return "\n".join(f"{number}. {point}" for number, point in enumerate(points, 1))


def _series(at: Setting, used: set[str], label: str, quoted: list[str], most: int) -> list[str]:
    """The points of one numbered list: mostly facts, some sentences of the prose."""
    rng = at.rng
    count = 5 if rng.random() < 0.5 else rng.randint(2, max(2, most))
    kinds = rng.sample(list(facts.KINDS), rng.randint(1, 4)) if rng.random() < 0.5 else [None]
    quotes = 0.25 if quoted and rng.random() < 0.4 else 0.0
    return [
        rng.choice(quoted)
        if rng.random() < quotes
        else facts.draw(rng, used, rng.choice(kinds)).sentence
        for _ in range(count)
    ]


def numbered(at: Setting) -> Conversation:
    """Numbered key points and records, to be listed in order; other facts lie between them.

    Several lists may run through a document, each to be told from the others and to be ended where
    it ends.
    """
    rng, used = at.rng, set()
    room = max(1, at.num_chars // 700)
    labels = rng.sample(RECORDS, min(len(RECORDS), room, rng.choice([0, 0, 0, 0, 1, 2, 4])))
    if not labels or rng.random() < 0.8:
        labels.append("Key point")
    quoted = _quotable(at.prose.piece(4000)) if at.prose is not None else []
    most = max(2, min(9, at.num_chars // (160 * len(labels))))
    turns: list[tuple[str, str]] = []
    others = [facts.draw(rng, used) for _ in range(rng.randint(0, max(1, room * 2)))]
    sentences = [fact.sentence for fact in others]
    rng.shuffle(sentences)
    for label in labels:
        points = _series(at, used, label, quoted, most)
        stated = [f"{label} {number}: {point}" for number, point in enumerate(points, 1)]
        requests = SUMMARY_REQUESTS
        if label != "Key point":
            requests = (
                f"List every {label.lower()}.",
                f"List all {label.lower()}s of the document.",
            )
        turns.append((rng.choice(requests), summary(points)))
        for number in rng.sample(range(1, len(points) + 1), min(2, len(points))):
            turns.append((f"What is {label.lower()} {number}?", stated[number - 1]))
        if rng.random() < 0.3:
            number = len(points) + 1
            asked = f"{label} {number}? {facts.UNSAID}"
            turns.append((f"What is {label.lower()} {number}?", asked))
        if rng.random() < 0.3:
            question = f"How many {label.lower()}s are there?"
            turns.append((question, f"The last one is {label.lower()} {len(points)}: {points[-1]}"))
        places = sorted(rng.randrange(len(sentences) + 1) for _ in stated)
        for place, sentence in zip(places[::-1], stated[::-1], strict=True):
            sentences.insert(place, sentence)
    rng.shuffle(others)
    asked_others = [(fact.question, fact.answer) for fact in others[: max(1, len(labels))]]
    if rng.random() < 0.5:
        turns += asked_others
    else:
        turns += asked_others
        rng.shuffle(turns)
    return Conversation(at.document(sentences), turns[: max(2, at.num_turns)])


def every(at: Setting) -> Conversation:
    """All facts of one kind, to be listed in their order though no numbers lead from one to the
    next."""
    rng, used = at.rng, set()
    kind = rng.choice(("code", "owner", "password", "price", "job"))
    told = [facts.draw(rng, used, kind, 1) for _ in range(rng.randint(2, 7))]
    names = {"code": "code", "owner": "owner", "password": "password", "price": "price"}
    request = f"List every {names.get(kind, 'work')} in the document."
    answer = "\n".join(fact.sentence for fact in told)
    turns = [(request, answer)] + [(fact.question, fact.answer) for fact in told]
    return Conversation(at.document([fact.sentence for fact in told]), turns[: at.num_turns])


def _quotable(text: str) -> list[str]:
    sentences = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text)[1:-1])
    return [s for s in sentences if 25 < len(s) < 160 and s[0].isupper() and s[-1] in ".!?"]


def quoting(at: Setting) -> Conversation:
    """Sentences of the prose, to be finished from their first words."""
    rng = at.rng
    if at.prose is None:
        return needles(at)
    text = " ".join(at.prose.piece(max(300, at.num_chars)).split())
    sentences = _quotable(text)
    turns = []
    for sentence in rng.sample(sentences, min(len(sentences), at.num_turns)):
        start = " ".join(sentence.split()[: rng.randint(3, 6)])
        turns.append((f"Finish the sentence: {start}", sentence))
    return Conversation(text, turns) if turns else needles(at)


TASKS: dict[str, tuple[float, Callable[[Setting], Conversation]]] = {
    "needles": (0.37, needles),
    "multi_key": (0.22, multi_key),
    "several": (0.03, several),
    "hops": (0.04, hops),
    "variables": (0.04, variables),
    "numbered": (0.25, numbered),
    "every": (0.04, every),
    "quoting": (0.01, quoting),
}


def conversation(at: Setting, task: str | None = None) -> Conversation:
    """One conversation, of `task` or of any."""
    if task is None:
        task = at.rng.choices(list(TASKS), [share for share, _ in TASKS.values()])[0]
    return TASKS[task][1](at)
