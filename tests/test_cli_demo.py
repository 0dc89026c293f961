"""The demonstration: what it gives the model to read, and what counts as right."""

from __future__ import annotations

import json
from pathlib import Path

import cli_fake as fake
from cli_face import all_asked, asked, face, give_input, opened  # noqa: F401 - a fixture

from ebbtide.cli import main


def test_the_demo_leaves_a_quarter_of_the_pages_room(capfd, monkeypatch):
    Path("story.md").write_text("A story.\n")
    monkeypatch.setenv("FAKE_STORY", "story.md")
    assert main.main(["demo"]) == 0
    found = capfd.readouterr()
    assert found.out == "Say blue. ✓\nSay green. ✓\n"
    assert ("keep_in_memory", 0.25) in fake.FakeLLM.calls
    assert "A quarter" in found.err or "a quarter" in found.err
    assert "ebbtide plan" in found.err
    assert [call["prompt"][0]["content"] for call in all_asked()] == [
        "A story.\n\nSay blue.",
        "A story.\n\nSay green.",
    ]


def test_the_demo_takes_the_budget_it_is_given(capfd, monkeypatch):
    Path("story.md").write_text("A story.\n")
    monkeypatch.setenv("FAKE_STORY", "story.md")
    assert main.main(["demo", "--host-memory", "1GiB", "--context", "999"]) == 0
    assert opened()["budget"].host_memory == 2**30 and opened()["context"] == 999
    assert not any(name == "keep_in_memory" for name, _ in fake.FakeLLM.calls)


def test_a_wrong_answer_fails_the_demo(capfd, monkeypatch):
    Path("story.md").write_text("A story.\n")
    monkeypatch.setenv("FAKE_STORY", "story.md")
    monkeypatch.setenv("FAKE_ANSWER", "green")
    assert main.main(["demo", "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["passed"] is False and found["answers"][0]["correct"] is False
    assert found["summary"]["correct"] is False


def test_the_demo_writes_its_facts_into_a_novel(capfd):
    Path("novel.txt").write_text("One two. Three four! Five six. Seven eight.\n" * 100)
    assert main.main(["demo", "novel.txt", "--context", "212", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["passed"] and found["summary"] is None
    content = asked()["prompt"][0]["content"]
    assert content.endswith("\n\nSay blue.") and content.count("It is blue. ") == 1
    # Room for 20 words, the fact among them, near the middle.
    read = content.removesuffix("\n\nSay blue.")
    assert 18 <= len(read.split()) <= 20 and 6 <= read.split().index("It") <= 11


def test_a_wrong_answer_about_a_novel_is_counted(capfd, monkeypatch):
    Path("novel.txt").write_text("One two. " * 50)
    monkeypatch.setenv("FAKE_ANSWER", "red")
    assert main.main(["demo", "novel.txt"]) == 0
    assert "0 of 1 answers are right" in capfd.readouterr().err


def test_a_text_without_pages_gets_no_quarter_of_them(capfd, monkeypatch):
    Path("short.txt").write_text("One two. " * 50)
    keep = fake.FakeLLM.keep_in_memory

    def none_needed(llm, share):
        keep(llm, share)
        llm.plan.num_spans = 0

    monkeypatch.setattr(fake.FakeLLM, "keep_in_memory", none_needed)
    assert main.main(["demo", "short.txt"]) == 0
    told = capfd.readouterr().err
    assert "So few need no pages" in told and "a quarter" not in told


def test_the_demo_is_the_built_in_models(capfd):
    assert main.main(["demo", "-m", "other"]) == 2
