"""`summarize` and `ask` on documents: plans, parts, citations, formats, and going on after a kill.

The model is a fake; where processes are killed, it kills its own, at an event and not at a time.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import cli_fake as fake
import pytest
from cli_face import face  # noqa: F401 - a fixture
from fault_counts import TIMES
from pdf_writer import write_pdf

from ebbtide import errors
from ebbtide.cli import job, main
from ebbtide.cli.terminal import Terminal

FAKE = Path(fake.__file__)


@pytest.fixture(autouse=True)
def other_model(face, monkeypatch):  # noqa: F811
    """Not the built-in model, which is asked in its own words; its answers are long enough."""
    monkeypatch.setattr(fake.FakeLLM, "builtin", False)
    monkeypatch.setenv("FAKE_FIRST_WORDS", "9")


def prompts():
    streams = [value for name, value in fake.FakeLLM.calls if name == "stream"]
    return [stream["prompt"][0]["content"] for stream in streams]


def paged(num_pages, words=8):
    pytest.importorskip("pypdfium2")
    pages = [
        f"Page {n} begins and says " + " ".join(f"w{n}x{i}" for i in range(words)) + "."
        for n in range(1, num_pages + 1)
    ]
    Path("book.pdf").write_bytes(write_pdf(pages))
    return pages


def kept():
    folder = Path(os.environ["XDG_STATE_HOME"]) / "ebbtide" / "jobs"
    return sorted(folder.rglob("*")) if folder.exists() else []


# --- what is asked


def test_help_shows_a_citation_and_not_markup(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main.main(["summarize", "--help"]) == 0
    assert "citations such as [p. 12], their quoted" in " ".join(capfd.readouterr().out.split())


def test_pages_are_marked_and_citations_asked_for(capfd):
    paged(2)
    assert main.main(["summarize", "book.pdf", "-m", "x"]) == 0
    (prompt,) = prompts()
    assert prompt.startswith("[p. 1]\nPage 1 begins") and "\n\n[p. 2]\nPage 2 begins" in prompt
    assert "about 300 words" in prompt and "Marks such as [p. 1] show" in prompt
    fake.FakeLLM.calls.clear()
    assert main.main(["summarize", "book.pdf", "-m", "x", "--cite", "off"]) == 0
    assert "[p." not in prompts()[0]


def test_the_built_in_model_sees_no_marks(capfd, monkeypatch):
    monkeypatch.setattr(fake.FakeLLM, "builtin", True)
    pages = paged(2)
    monkeypatch.setenv("FAKE_ANSWER", f"1. {pages[1]}")
    assert main.main(["summarize", "book.pdf"]) == 0
    assert "[p." not in prompts()[0]
    # What it says word for word is cited for it.
    assert capfd.readouterr().out == f"1. {pages[1]} [p. 2]\n"


def test_an_own_prompt_takes_the_place_of_the_instruction(capfd):
    Path("a.txt").write_text("Text.")
    assert main.main(["summarize", "a.txt", "-m", "x", "--prompt", "List the names."]) == 0
    assert prompts() == ["Text.\n\nList the names."]


def test_chosen_pages_alone_are_asked_about(capfd):
    paged(9)
    assert main.main(["ask", "Q?", "book.pdf", "--pages", "3-4"]) == 0
    assert "Page 3" in prompts()[0] and "Page 5" not in prompts()[0]
    assert main.main(["ask", "Q?", "book.pdf", "--pages", "30-"]) == 2
    assert "has 9 pages" in capfd.readouterr().err


def test_a_page_without_text_is_warned_of(capfd):
    pytest.importorskip("pypdfium2")
    Path("half.pdf").write_bytes(write_pdf(["Words.", ""]))
    for command in (["ask", "Q?"], ["summarize"]):
        assert main.main([*command, "half.pdf", "--json"]) == 0
        found = capfd.readouterr()
        assert "No text on 1 of 2 pages" in found.err
        assert "No text on 1 of 2 pages" in json.loads(found.out)["warnings"][0]


# --- citations and formats

ANSWER = '# Sum\n"page 2 begins" [p. 2] but **never** "that was said here" [p. 1].'


def test_citations_are_checked_and_flagged(capfd, monkeypatch):
    paged(3)
    monkeypatch.setenv("FAKE_ANSWER", ANSWER)
    assert main.main(["summarize", "book.pdf", "-m", "x", "--json"]) == 0
    found = capfd.readouterr()
    fields = json.loads(found.out)
    assert fields["text"].endswith('"that was said here" [p. 1: words not found].')
    assert [c["verdict"] for c in fields["citations"]] == ["verified", "not_found"]
    assert "1 of 2 citations do not hold" in found.err
    assert any("1 of 2 citations" in warning for warning in fields["warnings"])
    assert fields["documents"][0]["num_pages"] == 3 and "text" not in fields["documents"][0]


@pytest.mark.parametrize(
    ("format", "wanted"),
    [
        ("md", "# Sum\n"),
        ("txt", 'Sum\n"page 2 begins" [p. 2] but never "that'),
        ("json", '{\n  "schema": 1,\n  "summary": "# Sum\\n'),
    ],
)
def test_formats_to_a_file_and_to_standard_output(capfd, monkeypatch, format, wanted):
    paged(3)
    monkeypatch.setenv("FAKE_ANSWER", ANSWER)
    args = ["summarize", "book.pdf", "-m", "x", "--format", format]
    assert main.main(args) == 0
    out = capfd.readouterr().out
    assert out.startswith(wanted)
    assert main.main([*args, "-o", "out"]) == 0
    assert Path("out").read_text() == out and capfd.readouterr().out == ""
    if format == "json":
        assert json.loads(out)["citations"][0]["verdict"] == "verified"


def test_extract_only_opens_no_model(capfd):
    paged(2)
    assert main.main(["summarize", "book.pdf", "--extract-only"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("[p. 1]\nPage 1 begins") and out.endswith("w2x7.\n")
    assert main.main(["summarize", "book.pdf", "--extract-only", "--json"]) == 0
    (document,) = json.loads(capfd.readouterr().out)["documents"]
    assert document["text"][document["places"][1]["start"] :].startswith("Page 2")
    assert main.main(["summarize", "book.pdf", "--extract-only", "-o", "t.txt"]) == 0
    assert Path("t.txt").read_text() == out
    assert not fake.FakeLLM.calls and not kept()


# --- plans


def test_the_plan_comes_first_and_alone_when_asked_for(capfd):
    paged(3)
    assert main.main(["summarize", "book.pdf", "-m", "x", "--dry-run", "-o", "out"]) == 0
    found = capfd.readouterr()
    assert "book.pdf: pdf, 3 pages" in found.out and "whole in one context" in found.out
    assert "keys and values: " in found.out and "written to disk: 0 B" in found.out
    assert "kept on disk for the next time: up to about" in found.out
    assert "time: " in found.out and not Path("out").exists() and not kept()
    # One process knows its limits once: a second look would count the text as the runtime's.
    assert [name for name, _ in fake.FakeLLM.calls] == ["open", "measure"]
    assert main.main(["summarize", "book.pdf", "-m", "x"]) == 0
    found = capfd.readouterr()
    assert "whole in one context" in found.err and "whole in one context" not in found.out


def test_a_plan_as_json_counts_parts_and_knows_the_time_from_the_last_run(capfd):
    paged(60, words=20)
    args = ["summarize", "book.pdf", "-m", "x", "--json", "--dry-run", "-n", "10"]
    assert main.main(args) == 0
    assert json.loads(capfd.readouterr().out)["eta_s"] is None
    assert main.main(args[:4]) == 0
    capfd.readouterr()
    assert main.main([*args, "--context", "400", "--overflow", "map-reduce"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert len(found["parts"]) > 1 and found["prompt_tokens"] > 400
    # The fake reads 10 tokens a second.
    read = sum(part["num_tokens"] for part in found["parts"])
    assert found["eta_s"] >= read / 10 and not kept()
    pages = sum(found["kv_bytes"].values()) * len(found["parts"])
    assert pages < found["kept_bytes"] < 1.5 * pages
    for off in (["--prefix-cache", "off"], ["--disk-memory", "0"]):
        assert main.main([*args, *off]) == 0
        assert json.loads(capfd.readouterr().out)["kept_bytes"] == 0


def test_a_plan_of_what_was_never_read_says_what_reading_takes_at_least(capfd, monkeypatch):
    monkeypatch.setattr(fake.FakePlan, "reading_least_s", lambda plan, length: 2.0 * length)
    paged(60, words=20)
    args = ["summarize", "book.pdf", "-m", "x", "--dry-run", "-n", "10"]
    assert main.main([*args, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["reading_least_s"] == 2 * found["prompt_tokens"]
    assert main.main(args) == 0
    assert "reading at least " in capfd.readouterr().out
    assert main.main([*args, "--json", "--context", "400", "--overflow", "map-reduce"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["reading_least_s"] == 2 * sum(part["num_tokens"] for part in found["parts"])


def test_a_plan_says_what_does_not_fit(capfd):
    Path("long.txt").write_text("word " * 5000)
    args = ["summarize", "long.txt", "-m", "x", "--dry-run"]
    assert main.main(args) == 0
    assert "do NOT FIT into one context (4,096)" in capfd.readouterr().out
    assert main.main([*args, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["fits"] is False
    assert main.main([*args, "--json", "--overflow", "map-reduce"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["fits"] is True and len(found["parts"]) > 1


# --- parts

# Some 290 words are left for a page's part beside instructions and answers; a page has 25.
PARTS = ["summarize", "book.pdf", "-m", "x", "--context", "500", "--overflow", "map-reduce"]


def test_a_text_that_does_not_fit_is_an_error_that_names_the_way_out(capfd, monkeypatch):
    paged(60, words=20)
    assert main.main(PARTS[:-2]) == 0  # a fake admits what it is given; a real one says:
    monkeypatch.setenv("FAKE_ERROR", "ContextOverflow")
    assert main.main(PARTS[:-2]) == 3
    assert "too long Or read it in parts: --overflow map-reduce." in capfd.readouterr().err


def test_parts_that_have_no_name_but_their_number_are_numbered_once(capfd):
    Path("plain.txt").write_text("One two three four five six seven. " * 200)
    assert main.main(["summarize", "plain.txt", *PARTS[2:], "--json"]) == 0
    parts = json.loads(capfd.readouterr().out)["map_reduce"]["parts"]
    assert f"The text above is part 1 of {len(parts)} of a longer text" in prompts()[0]


def test_parts_are_read_summarized_and_combined(capfd, monkeypatch):
    paged(60, words=20)
    monkeypatch.setenv("FAKE_FIRST_WORDS", "6")
    assert main.main([*PARTS, "--json"]) == 0
    found = capfd.readouterr()
    fields = json.loads(found.out)
    report = fields["map_reduce"]
    *parts, last = prompts()
    assert len(parts) == len(report["parts"]) > 2 and report["merges"] == 1
    # Each page is in one part, and the parts are told apart.
    for number in range(1, 61):
        assert sum(f"[p. {number}]\n" in part for part in parts) == 1
    assert f"part 1 of {len(parts)} ({report['parts'][0]['label']}) of a longer text" in parts[0]
    assert all(len(part.split()) <= 500 for part in parts)
    assert "summaries of consecutive parts" in last and "[p. 1] Page 1 begins and" in last
    sentence = f"The text was read in {len(parts)} parts, not as a whole"
    assert sentence in found.err and any(sentence in w for w in fields["warnings"])
    assert fields["usage"]["prompt_tokens"] == sum(len(p.split()) for p in prompts())


def test_summaries_are_combined_again_until_they_fit(capfd, monkeypatch):
    paged(99, words=20)
    monkeypatch.setenv("FAKE_FIRST_WORDS", "99")
    assert main.main([*PARTS, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)["map_reduce"]
    assert report["merges"] > 2
    assert all(len(prompt.split()) <= 500 for prompt in prompts())


def test_an_answer_never_takes_the_room_of_what_follows(capfd):
    paged(60, words=20)
    assert main.main([*PARTS, "-n", "450"]) == 0
    streams = [value for name, value in fake.FakeLLM.calls if name == "stream"]
    assert len(streams) > 2 and all(0 < stream["max_new_tokens"] <= 125 for stream in streams)


def test_the_built_in_models_summaries_stand_in_order(capfd, monkeypatch):
    monkeypatch.setattr(fake.FakeLLM, "builtin", True)
    paged(60, words=20)
    monkeypatch.setenv("FAKE_ANSWER", "1. A point.")
    assert main.main(PARTS) == 0
    found = capfd.readouterr()
    assert found.out.startswith("## p. 1 - p. ") and found.out.count("1. A point.") > 1
    assert "stand one after the other" in found.err


def test_what_fits_is_read_whole_though_parts_are_allowed(capfd):
    paged(3)
    assert main.main([*PARTS[:4], "--overflow", "map-reduce", "-n", "20"]) == 0
    assert len(prompts()) == 1 and "parts" not in capfd.readouterr().err


def test_a_text_that_fits_beside_a_shorter_answer_is_not_said_to_be_in_parts(capfd):
    paged(12)
    assert main.main([*PARTS, "--length", "2000w", "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert " and up to 6,464 for the answer, more than one context holds (500): " in shown
    assert "read in 1 part of up to " in shown
    assert main.main([*PARTS, "--length", "2000w"]) == 0
    said = capfd.readouterr().err
    assert "warning: The text was read whole, but a context holds 500 tokens" in said
    assert "parts" not in said and len(prompts()) == 1


def test_a_context_too_small_for_anything(capfd):
    paged(3)
    args = ["summarize", "book.pdf", "-m", "x", "--overflow", "map-reduce", "--context"]
    assert main.main([*args, "40"]) == 3
    assert "leaves no room for parts" in capfd.readouterr().err


def test_the_variable_serves_all_commands(capfd, monkeypatch):
    Path("a.txt").write_text("Text.")
    monkeypatch.setenv("EBBTIDE_OVERFLOW", "map-reduce")
    assert main.main(["ask", "Q?", "a.txt"]) == 0
    monkeypatch.delenv("EBBTIDE_OVERFLOW")
    assert main.main(["ask", "Q?", "a.txt", "--overflow", "map-reduce"]) == 2


# --- going on


def test_nothing_is_left_of_a_job_that_ended_well(capfd):
    paged(60, words=20)
    assert main.main([*PARTS, "-o", "out.md"]) == 0
    assert kept() == [] and sorted(os.listdir()) == ["book.pdf", "out.md"]


def test_what_was_finished_is_not_read_again(capfd, monkeypatch):
    paged(60, words=20)
    monkeypatch.setenv("FAKE_FIRST_WORDS", "6")
    assert main.main([*PARTS, "-o", "whole.md"]) == 0
    num_whole = len(prompts())
    fake.FakeLLM.calls.clear()
    real = fake.FakeLLM._stream

    def fails_late(self, prompt, generation, session):
        if len(prompts()) == 3:
            raise KeyboardInterrupt
        return real(self, prompt, generation, session)

    with monkeypatch.context() as patch:
        patch.setattr(fake.FakeLLM, "_stream", fails_late)
        assert main.main([*PARTS, "-o", "out.md"]) == 130
    assert "goes on from here" in capfd.readouterr().err and not Path("out.md").exists()
    assert main.main([*PARTS, "-o", "out.md", "--json"]) == 0
    assert len(prompts()) == num_whole  # of both runs together
    fields = json.loads(capfd.readouterr().out)
    assert [part["reused"] for part in fields["map_reduce"]["parts"]][:4] == [True] * 3 + [False]
    assert Path("out.md").read_bytes() == Path("whole.md").read_bytes()
    # Tokens of this run alone.
    assert fields["usage"]["prompt_tokens"] == sum(len(p.split()) for p in prompts()[3:])


@pytest.mark.parametrize(
    "change", [["--length", "short"], ["--seed", "1"], ["--pages", "1-59"], ["--prompt", "x"]]
)
def test_another_request_is_another_job(capfd, monkeypatch, change):
    paged(60, words=20)
    monkeypatch.setattr(job.Job, "finish", lambda self: None)
    assert main.main(PARTS) == 0
    num = len(prompts())
    assert main.main(PARTS) == 0
    assert len(prompts()) == num
    assert main.main([*PARTS, *change]) == 0
    assert len(prompts()) > num + 1
    fake.FakeLLM.calls.clear()
    monkeypatch.setattr(fake.FakeLLM, "fingerprint", "trained further")
    assert main.main(PARTS) == 0
    assert len(prompts()) == num


def test_jobs_are_private_and_forgotten_ones_swept(capfd, monkeypatch):
    one = job.Job("one", Terminal())
    one.save("answer", {"text": "secret"})
    assert one.load("answer") == {"text": "secret"}
    if os.name != "nt":
        assert oct(one.folder.stat().st_mode)[-3:] == "700"
        assert oct((one.folder / "answer.json").stat().st_mode)[-3:] == "600"
    (one.folder / "answer.json").write_text('{"text": "cut sh')
    assert one.load("answer") is None and one.load("absent") is None
    os.utime(one.folder, (0, 0))
    job.Job("two", Terminal())
    assert not one.folder.exists()


def test_a_job_that_cannot_be_kept_is_done_all_the_same(capfd, monkeypatch):
    paged(60, words=20)
    full = lambda *args, **options: (_ for _ in ()).throw(OSError(28, "No space left"))  # noqa: E731
    monkeypatch.setattr(job.tempfile, "mkstemp", full)
    assert main.main(PARTS) == 0
    assert capfd.readouterr().err.count("cannot be kept for a second try: No space left") == 1
    monkeypatch.setattr(
        job, "jobs_folder", lambda: (_ for _ in ()).throw(errors.InputError("no home"))
    )
    assert main.main(PARTS) == 0
    assert "second try: no home" in capfd.readouterr().err


@pytest.mark.timeout(240 * TIMES)  # some fifteen processes; another program may have the cores
def test_killed_at_ten_points_and_resumed_to_the_same_file(tmp_path):
    """Pieces of answers, flushes and renames are where it may be killed; then it is run again."""
    # Text, for a PDF would cost each of the processes another one.
    sections = (f"## Part {n}\n\n" + f"w{n} " * 25 for n in range(60))
    Path("book.md").write_text("\n\n".join(sections))
    command = ["book.md" if word == "book.pdf" else word for word in PARTS]

    def run(home, out, **variables):
        changes = {
            **{"XDG_STATE_HOME": home / "state", "HOME": home, "FAKE_FIRST_WORDS": 9},
            **{"FAKE_ASKED": home / "asked", "FAKE_BUILTIN": "0", **variables},
        }
        home.mkdir(exist_ok=True)
        kept_variables = {k: v for k, v in os.environ.items() if not k.startswith("EBBTIDE_")}
        return subprocess.run(
            [sys.executable, FAKE, *command, "-o", out],
            env={**kept_variables, **{k: str(v) for k, v in changes.items()}},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=100,
        ).returncode

    whole, events = tmp_path / "whole", tmp_path / "events"
    assert run(whole, "whole.md", FAKE_EVENTS=events) == 0
    wanted = Path("whole.md").read_bytes()
    asked = (whole / "asked").read_text().split()
    assert len(asked) > 3 and b"sec. 1 - sec. " in wanted
    num_events = int(events.read_text())
    num_points = min(10 * TIMES, num_events)
    points = sorted(random.Random(7).sample(range(1, num_events + 1), num_points))
    # One home: each run goes on from what the one before it left, killed at its own event.
    home, num_kills = tmp_path / "home", 0
    for point in points:
        code = run(home, "out.md", FAKE_KILL_AT=point)
        if Path("out.md").exists():  # whole or not there, whatever became of the process
            assert Path("out.md").read_bytes() == wanted
            Path("out.md").unlink()
        num_kills += code != 0
    assert num_kills >= 5
    assert run(home, "out.md") == 0
    assert Path("out.md").read_bytes() == wanted
    # And each point alone, from nothing: what was finished is read once, only the rest again.
    num_resumed = 0
    for point in points[2:-2:4]:
        home = tmp_path / f"home-{point}"
        Path("out.md").unlink()
        assert run(home, "out.md", FAKE_KILL_AT=point) != 0
        if Path("out.md").exists():  # at some of the last events it is there, and whole
            assert Path("out.md").read_bytes() == wanted
            continue
        num_resumed += 1
        assert run(home, "out.md") == 0
        assert Path("out.md").read_bytes() == wanted
        assert len(asked) <= len((home / "asked").read_text().split()) <= len(asked) + 1
    assert num_resumed >= 2
    assert not [
        name
        for name in os.listdir()
        if name not in ("book.md", "out.md", "whole.md") and not name.endswith(".part")
    ]


# --- several questions


def test_several_questions_are_asked_of_one_reading(capfd, monkeypatch):
    monkeypatch.delenv("FAKE_FIRST_WORDS")
    paged(2)
    assert main.main(["ask", "-Q", "First?", "-Q", "Second?", "book.pdf"]) == 0
    found = capfd.readouterr()
    assert found.out == "First?\nSecond?\n" and "Q: First?" in found.err
    appended = [value for name, value in fake.FakeLLM.calls if name == "append"]
    assert len(appended) == 1 and appended[0][0]["content"].startswith("Page 1 begins")
    assert all(prompt.startswith(appended[0][0]["content"]) for prompt in prompts())


def test_several_answers_as_json(capfd, monkeypatch):
    monkeypatch.delenv("FAKE_FIRST_WORDS")
    Path("a.txt").write_text("Some text.")
    assert main.main(["ask", "-Q", "First?", "-Q", "Second?", "a.txt", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["text"] == "First?\nSecond?"
    assert [(a["question"], a["text"]) for a in found["answers"]] == [
        ("First?", "First?"),
        ("Second?", "Second?"),
    ]
    usages = [answer["usage"]["prompt_tokens"] for answer in found["answers"]]
    assert found["usage"]["prompt_tokens"] == sum(usages)


def test_one_question_by_option_is_the_same_as_one_by_argument(capfd):
    Path("a.txt").write_text("Some text.")
    assert main.main(["ask", "-Q", "Only?", "a.txt"]) == 0
    assert prompts() == ["Some text.\n\nOnly?"]
    assert main.main(["ask"]) == 2 and main.main(["ask", "-Q", " ", "a.txt"]) == 2
