"""A disk that is full where an answer should go: what was made at length is shown, and no file
looks finished."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import cli_fake as fake
import pytest
from cli_face import face  # noqa: F401 - a fixture

from ebbtide.cli import ask, main

WORDS = "Nine words of a text, and then two more."


@pytest.fixture(autouse=True)
def other_model(face, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fake.FakeLLM, "builtin", False)
    monkeypatch.setenv("FAKE_FIRST_WORDS", "9")
    Path("book.txt").write_text(WORDS)


@pytest.fixture
def full(monkeypatch):
    def no_room(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)


def test_a_summary_that_finds_no_room_is_shown(capfd, full):
    """Nor has the folder of what is finished room for it: it lies on the same disk."""
    assert main.main(["summarize", "book.txt", "-m", "x", "-o", "out.md"]) == 4
    found = capfd.readouterr()
    assert found.out == WORDS + "\n"
    assert "out.md cannot be written: No space left on device." in found.err
    assert "goes on from here" not in found.err
    assert os.listdir() == ["book.txt"]


def test_the_object_of_the_error_holds_it_too(capfd, full):
    assert main.main(["summarize", "book.txt", "-m", "x", "-o", "out.md", "--json"]) == 4
    error = json.loads(capfd.readouterr().out)["error"]
    assert (error["type"], error["text"]) == ("StorageError", WORDS)


def test_an_answer_whose_conversation_finds_no_room_is_told(capfd, full, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main.main(["chat", "x", "-p", WORDS, "--session", "trip", "--json"]) == 4
    found = capfd.readouterr()
    assert json.loads(found.out)["text"]
    assert "trip.json cannot be saved: No space left on device." in found.err


def test_what_is_not_kept_is_not_promised(capfd, full, monkeypatch):
    """Where parts were made, none could be kept, and then there was an end."""
    Path("book.txt").write_text("\n\n".join(f"## Part {n}\n\n" + f"w{n} " * 60 for n in range(30)))
    real = fake.FakeLLM._stream
    num_streams = 0

    def fails_late(self, prompt, generation, session):
        nonlocal num_streams
        num_streams += 1
        if num_streams == 3:
            raise KeyboardInterrupt
        return real(self, prompt, generation, session)

    monkeypatch.setattr(fake.FakeLLM, "_stream", fails_late)
    args = ["summarize", "book.txt", "-m", "x", "--context", "500", "--overflow", "map-reduce"]
    assert main.main(args) == 130
    found = capfd.readouterr().err
    assert "cannot be kept for a second try: No space left" in found
    assert "goes on from here" not in found


def test_a_question_s_prompt_is_made_when_its_turn_comes(capfd, monkeypatch):
    """Each holds all of the documents."""
    events = []
    joined, stream = ask.join_documents, fake.FakeLLM._stream
    monkeypatch.setattr(ask, "join_documents", lambda d, q: events.append(q) or joined(d, q))

    def streams(self, prompt, generation, session):
        events.append("answer")
        return stream(self, prompt, generation, session)

    monkeypatch.setattr(fake.FakeLLM, "_stream", streams)
    assert main.main(["ask", "-m", "x", "-Q", "One?", "-Q", "Two?", "book.txt"]) == 0
    capfd.readouterr()
    assert events[-4:] == ["One?", "answer", "Two?", "answer"]
