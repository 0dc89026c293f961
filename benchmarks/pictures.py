"""Makes the pictures in docs/images: the chat and its /mem, as a terminal shows them (SVG).

    python benchmarks/pictures.py [FOLDER]

A real process types at the built-in model, which reads its story. The report's picture is a
browser's: chromium --headless --screenshot=report.png --window-size=1000,1500 run.html
"""

from __future__ import annotations

import io
import itertools
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import person as person_module
from person import Person
from rich.console import Console
from rich.style import Style
from rich.text import Text

import ebbtide

ARGS = ("--host-memory", "342MiB", "--context", "13824", "--no-history")


def main() -> None:
    person_module.PATIENCE_S = 300  # a busy machine reads slowly
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    material = ebbtide.demo_material()
    story = Path(material["story"]).read_text(encoding="utf-8")
    first, second = (entry["question"] for entry in material["questions"][:2])
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "story.txt").write_text(story, encoding="utf-8")
        with Person(Path(home), "chat", *ARGS, real=True, rows=16, columns=108) as person:
            prompt = "/13,824] >"
            person.wait_for(prompt)
            person.say("/read story.txt")
            person.wait_for("story.txt: [", "####")
            person.type(first)
            person.wait_for(f"> {first}")
            save(person, folder / "chat-reading.svg", "ebbtide chat")
            person.type("\r")
            person.wait_for(prompt, after=f"> {first}")
            person.say(second)
            person.wait_for(prompt, after=f"> {second}")
            person.say("/stats")
            person.wait_for(prompt, after="/stats")
            save(person, folder / "chat.svg", "ebbtide chat")
            person.say("/mem on")
            person.wait_for(prompt, after="/mem on")
            person.say("/mem")
            person.wait_for("read again so far", " | process ", after="/mem\n")
            save(person, folder / "mem.svg", "ebbtide chat: /mem")


def save(person: Person, path: Path, title: str) -> None:
    """The screen as SVG that fetches nothing, fonts included."""
    console = Console(record=True, width=person.screen.columns, file=io.StringIO())
    for y in range(person.screen.lines):
        line, row = Text(), [person.screen.buffer[y][x] for x in range(person.screen.columns)]
        # Runs of one look, for each is an element of the picture.
        for (colour, bold), run in itertools.groupby(row, lambda cell: (cell.fg, cell.bold)):
            name = None if colour == "default" else colour.replace("brown", "yellow")
            line.append("".join(cell.data or " " for cell in run), Style(color=name, bold=bold))
        console.print(line, no_wrap=True, overflow="crop")
    svg = console.export_svg(title=title)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S).replace("Fira Code, ", "")
    path.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
