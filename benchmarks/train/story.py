"""Writes the demonstration's documents: a story with facts in it, and a report with key points.

    python benchmarks/train/story.py --out offload/builtin

The text is the same each time. Which facts stand in it was chosen by measurement for an earlier
model, out of many: margins.py says by how much the built-in model prefers the right answers, and
changing any sentence, a seed or a fact means measuring again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import documents
from chronicle import (
    CHAPTERS,
    REPORT_SECTIONS,
    REPORT_TITLE,
    TITLE,
)
from facts import Fact, say
from teller import Teller

STORY_SEED = 1
# Chapter number: the fact that stands in it. Beginning, middle and end of the journey.
STORY_FACTS = {
    1: say("pet", {"n": "Finn", "t": "Bergen", "v": "black stork"}),
    3: say("pet", {"n": "Yara", "t": "Malmo", "v": "silver swan"}),
    5: say("owner", {"t": "Tartu", "b": "school", "v": "Rosa"}),
    7: say("year", {"t": "Gdansk", "b": "foundry", "w": "closed", "v": "1808"}),
    9: say("number", {"n": "Leo", "t": "Aarhus", "v": "69374"}),
    12: say("code", {"t": "Bruges", "b": "tower", "v": "77635"}),
    16: say("owner", {"t": "Leeds", "b": "mill", "v": "Egon"}),
    18: say("number", {"n": "Kira", "t": "Cork", "v": "43712"}),
}
REPORT_SEED = 80
REPORT_POINTS = (
    say("owner", {"t": "Bergen", "b": "archive", "v": "Egon"}),
    say("owner", {"t": "Malmo", "b": "theatre", "v": "Rosa"}),
    say("code", {"t": "Tartu", "b": "observatory", "v": "60308"}),
    say("number", {"n": "Egon", "t": "Leeds", "v": "70213"}),
    say("owner", {"t": "Cork", "b": "harbour", "v": "Uma"}),
)
LEDGER_LINE = "Nils opened the ledger and wrote one line."


def story(seed: int, facts: dict[int, Fact]) -> str:
    """The whole story. `facts` maps chapter numbers, from 1, to what Nils writes down there.

    The text around the facts depends on the seed alone.
    """
    rng = random.Random(seed)
    parts = [TITLE]
    for number, chapter in enumerate(CHAPTERS, 1):
        body = Teller(rng, chapter).paragraphs(6, (5, 8))
        paragraph = body[rng.randrange(1, 5)]
        place = rng.randrange(1, len(paragraph))
        if number in facts:
            paragraph[place:place] = [LEDGER_LINE, facts[number].sentence]
        parts += [f"## Chapter {number}. {chapter.town}", chapter.opening]
        parts += [" ".join(sentences) for sentences in body]
        parts.append(chapter.closing)
    return "\n\n".join(parts) + "\n"


def report(seed: int, points: Sequence[Fact]) -> str:
    """The report: one key point in each of its sections."""
    rng = random.Random(seed)
    parts = [REPORT_TITLE]
    for number, (section, point) in enumerate(zip(REPORT_SECTIONS, points, strict=True), 1):
        body = Teller(rng, section).paragraphs(8, (5, 8))
        paragraph = body[rng.randrange(1, 7)]
        key_point = documents.key_point(number, point.sentence)
        paragraph.insert(rng.randrange(1, len(paragraph)), key_point)
        parts += [f"## {section.town}", section.opening]
        parts += [" ".join(sentences) for sentences in body]
        parts.append(section.closing)
    return "\n\n".join(parts) + "\n"


def material() -> dict[str, Any]:
    """What demo.json says: the documents' files, what to ask about them, and the right answers."""
    return {
        "story": "story.md",
        "questions": [
            {
                "question": fact.question,
                "answer": fact.answer,
                "sentence": fact.sentence,
                "chapter": chapter,
            }
            for chapter, fact in STORY_FACTS.items()
        ],
        "report": "report.md",
        "summary": {
            "question": documents.SUMMARY_REQUEST,
            "answer": documents.summary([point.sentence for point in REPORT_POINTS]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "story.md": story(STORY_SEED, STORY_FACTS),
        "report.md": report(REPORT_SEED, REPORT_POINTS),
        "demo.json": json.dumps(material(), indent=2) + "\n",
    }
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{out / name}: {len(text):,} characters")


if __name__ == "__main__":
    main()
