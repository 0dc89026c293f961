"""The built-in model and its documents: package data, and where it lies.

    model/        a checkpoint like any other (its card is README.md beside this file)
    story.md      a story of 13,000 tokens with facts in it
    report.md     a report of 4,500 tokens with numbered key points
    demo.json     what to ask about both, and the right answers

Knows paths only: it opens no model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def model_folder() -> Path:
    """The folder of the built-in checkpoint."""
    return HERE / "model"


def demo_material() -> dict[str, Any]:
    """What the demonstration shows.

    "story": path of the story; "questions": a list of {question, answer, sentence, chapter};
    "report": path of the report; "summary": {question, answer}. A right answer of the built-in
    model is `answer` to the letter, under greedy decoding.
    """
    material = json.loads((HERE / "demo.json").read_text(encoding="utf-8"))
    for name in ("story", "report"):
        material[name] = HERE / material[name]
    return material
