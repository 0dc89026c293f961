"""`summarize --json-schema`: what is kept to it, what the model is told, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cli_fake as fake
import pytest
from cli_face import face  # noqa: F401 - a fixture

from ebbtide.cli import main
from ebbtide.cli.run import Run
from ebbtide.cli.summary_task import SummaryTask

SCHEMA = '{"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 4}'
WHOLE = ["summarize", "book.txt", "-m", "x", "--json-schema", SCHEMA]
# Some 230 words are left for a part beside instructions, the schema and answers.
PARTS = [*WHOLE, "--context", "500", "--overflow", "map-reduce"]


@pytest.fixture
def asked(face, monkeypatch):  # noqa: F811
    """What a fake model was asked: prompts, and the schemas of the answers to them."""
    monkeypatch.setattr(fake.FakeLLM, "builtin", False)
    monkeypatch.setenv("FAKE_FIRST_WORDS", "6")

    def found() -> tuple[list[str], list[str | None]]:
        streams = [value for name, value in fake.FakeLLM.calls if name == "stream"]
        prompts = [stream["prompt"][0]["content"] for stream in streams]
        return prompts, [stream.get("json_schema") for stream in streams]

    return found


def book(num_chapters: int, words: int = 40) -> None:
    chapters = (f"# Chapter {n}\n\n" + f"word{n} " * words for n in range(num_chapters))
    Path("book.txt").write_text("\n\n".join(chapters))


def test_a_summary_is_kept_to_the_schema_and_told_of_it(asked, capfd):
    book(2)
    assert main.main(WHOLE) == 0
    (prompt,), schemas = asked()
    assert schemas == [SCHEMA] and prompt.endswith(f"write nothing else: {SCHEMA}")
    assert ("expect_schemas", None) in fake.FakeLLM.calls
    assert main.main([*WHOLE, "--prompt", "Count them."]) == 0
    (_, prompt), schemas = asked()
    assert schemas == [SCHEMA] * 2 and "Count them. Write it as JSON that this schema" in prompt


def test_of_parts_the_last_answer_alone_is_kept_to_it(asked, capfd):
    book(20)
    assert main.main(PARTS) == 0
    prompts, schemas = asked()
    assert len(prompts) > 3 and schemas == [None] * (len(prompts) - 1) + [SCHEMA]
    assert [SCHEMA in prompt for prompt in prompts] == [s is not None for s in schemas]
    assert all(len(prompt.split()) <= 500 for prompt in prompts)


def test_rounds_between_are_free_too(asked, capfd, monkeypatch):
    monkeypatch.setenv("FAKE_FIRST_WORDS", "90")
    book(40)
    assert main.main([*PARTS, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["map_reduce"]["merges"] > 2
    _, schemas = asked()
    assert schemas == [None] * (len(schemas) - 1) + [SCHEMA]


def test_the_only_part_is_the_last():
    task = SummaryTask(100, None, False, False, json_schema=SCHEMA)
    assert SCHEMA in task.part(1, 1, "a") and SCHEMA not in task.part(1, 2, "a")
    assert SCHEMA in task.merge(is_last=True) and SCHEMA not in task.merge(is_last=False)


def test_nothing_is_written_into_the_value(asked, capfd, monkeypatch):
    """Quotes of the document, and places that are not there, would be marked."""
    Path("book.txt").write_text("# One\n\nThe mill was sold to Anna in the spring of that year.")
    value = '["The mill was sold to Anna in the spring of that year.", "**x** [p. 99]"]'
    monkeypatch.setenv("FAKE_ANSWER", value)
    assert main.main([*WHOLE, "-o", "out.json"]) == 0
    assert Path("out.json").read_text() == value + "\n"
    assert main.main([*WHOLE, "--format", "json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["summary"] == value and found["citations"] == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cite", "on"], "--cite: on writes into the answer"),
        (["--format", "txt"], "--format: txt changes the answer"),
        (["--json-schema", "{]"], "json_schema is not JSON"),
    ],
)
def test_what_makes_no_sense_is_refused(asked, capfd, options, says):
    book(1)
    assert main.main([*WHOLE, *options]) == 2
    assert says in " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert not fake.FakeLLM.calls
    assert main.main([*WHOLE[:2], "--cite", "on", "--extract-only", *WHOLE[4:]]) == 0


def test_parts_that_nobody_combines_are_refused(asked, capfd, monkeypatch):
    monkeypatch.setattr(fake.FakeLLM, "builtin", True)
    book(20)
    assert main.main(PARTS) == 2
    assert "cannot combine the summaries of parts" in capfd.readouterr().err
    assert asked() == ([], [])


def test_a_plan_counts_what_schemas_take(asked, capfd):
    book(1)
    assert main.main([*WHOLE, "--dry-run"]) == 0
    assert [name for name, _ in fake.FakeLLM.calls] == ["open", "expect_schemas", "measure"]


@pytest.mark.parametrize("command", ["summarize", "ask", "chat"])
def test_a_value_that_is_cut_is_an_error(asked, capfd, monkeypatch, command):
    """Half of a value must not look like a whole one, in a file least of all."""
    book(1)
    Path("out.json").write_text("[1]\n")
    monkeypatch.setenv("FAKE_ANSWER", "[1, 2, 3, 4]")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    commands = {
        "summarize": [*WHOLE, "-o", "out.json"],
        "ask": ["ask", "Q?", "book.txt", "-m", "x", "--json-schema", SCHEMA],
        "chat": ["chat", "x", "-p", "Q?", "--json-schema", SCHEMA],
    }
    given = [*commands[command], "-n", "2"]
    assert main.main(given) == 2
    said = capfd.readouterr().err
    assert "stopped after 2 tokens; --max-new-tokens (-n) allows more" in said
    assert "not a whole JSON value" in said and "Wrote" not in said
    assert main.main([*given, "--json"]) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert (error["type"], error["text"]) == ("InputError", "[1, 2,")
    assert Path("out.json").read_text() == "[1]\n" and not list(Path().glob("*out.json?*"))
    assert main.main(commands[command]) == 0


def test_an_error_has_the_whole_answers_before_it(asked, capfd, monkeypatch):
    book(1)
    answer = Run.answer

    def longer_each_time(*args, **how):
        given = answer(*args, **how)
        monkeypatch.setenv("FAKE_ANSWER", "[1, 2, 3, 4]")
        return given

    monkeypatch.setattr(Run, "answer", longer_each_time)
    monkeypatch.setenv("FAKE_ANSWER", "[1]")
    ask = ["ask", "-Q", "One?", "-Q", "Two?", "book.txt", "-m", "x", "--json-schema", SCHEMA]
    assert main.main([*ask, "-n", "2", "--json"]) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["text"] == "[1, 2,"
    assert [(a["question"], a["text"]) for a in error["answers"]] == [("One?", "[1]")]


def test_only_the_last_answer_of_parts_must_be_whole(asked, capfd, monkeypatch):
    """What parts give is text; and what was finished is kept for the next try."""
    book(20)
    monkeypatch.setenv("FAKE_FIRST_WORDS", "6")
    assert main.main([*PARTS, "-n", "3", "-o", "out.json"]) == 2
    said = capfd.readouterr().err
    assert "not a whole JSON value" in said and "What is finished is kept" in said
    assert not Path("out.json").exists()
    assert len(asked()[0]) > 3
