"""The chat's commands: one answer, and conversations that are kept on disk."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import time

import cli_fake as fake
import pytest
from cli_face import asked, face, give_input, opened  # noqa: F401 - a fixture among them

from ebbtide import errors
from ebbtide.cli import chat, conversation, documents, main
from ebbtide.cli.conversation import Conversation
from ebbtide.offload.documents import limits

PATIENCE_S = 30


# --- one answer


@pytest.mark.parametrize(
    ("piped", "args", "message"),
    [
        ("", ["-p", "hello"], "hello"),
        ("from a pipe\n", [], "from a pipe"),
        ("from a pipe\n", ["-p", "and this"], "from a pipe\n\nand this"),
    ],
)
def test_piped_input_comes_first(capfd, monkeypatch, piped, args, message):
    give_input(monkeypatch, piped)
    assert main.main(["chat", *args, "--system", "be kind"]) == 0
    assert asked()["prompt"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": message},
    ]
    assert capfd.readouterr().out == message.splitlines()[-1] + "\n"


def test_one_answer_as_json(capfd, monkeypatch):
    give_input(monkeypatch, "")
    assert main.main(["chat", "-p", "hello there", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == "hello there"


@pytest.mark.parametrize("given", [b"", b" \n", b"\xff\xfe\x00"])
def test_nothing_to_answer(capfd, monkeypatch, given):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert main.main(["chat"]) == 2
    assert not fake.FakeLLM.calls


def test_an_empty_question_is_said_to_be(capfd, monkeypatch):
    give_input(monkeypatch, "")
    assert main.main(["chat", "-p", ""]) == 2
    assert "-p is empty" in capfd.readouterr().err


def test_one_conversation_is_named_once(capfd):
    assert main.main(["chat", "-p", "x", "-c", "--session", "new"]) == 2
    assert "--session names 'new'; give one" in " ".join(capfd.readouterr().err.split())


def test_a_closed_standard_input_is_said_to_be(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main.main(["chat"]) == 2
    assert "no standard input to read; give -p TEXT" in capfd.readouterr().err
    assert main.main(["chat", "-p", "hello"]) == 0


def test_no_limit_on_the_answer_but_the_users(capfd, monkeypatch):
    give_input(monkeypatch, "one two three")
    assert main.main(["chat"]) == 0
    assert "max_new_tokens" not in fake.FakeLLM.calls[-1][1]


def test_what_is_waited_for_is_said(capfd, monkeypatch):
    from ebbtide.cli.terminal import Terminal

    monkeypatch.setattr(documents, "_PATIENCE_S", 0.01)
    give_input(monkeypatch, "")
    with documents.waiting_for_input(Terminal()):
        deadline_s = time.monotonic() + PATIENCE_S
        said = ""
        while "Waiting for standard input" not in said:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
            said += capfd.readouterr().err


# --- kept conversations


def test_a_named_conversation_goes_on(capfd, monkeypatch, tmp_path):
    give_input(monkeypatch, "")
    assert main.main(["chat", "m", "-p", "first", "--session", "trip", "--system", "s"]) == 0
    path = tmp_path / "state" / "ebbtide" / "sessions" / "trip.json"
    assert json.loads(path.read_text())["messages"][-1] == {"role": "assistant", "content": "first"}
    if os.name != "nt":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    give_input(monkeypatch, "")
    assert main.main(["chat", "-p", "second", "-c"]) == 0
    assert [m["content"] for m in asked()["prompt"]] == ["s", "first", "first", "second"]
    # The model comes with the conversation, and the text alone was kept.
    assert opened()["model"] == "m"
    assert "read again" in capfd.readouterr().err
    assert os.listdir(path.parent) == ["trip.json"]


def test_a_failed_answer_leaves_the_conversation_as_it_was(capfd, monkeypatch, tmp_path):
    give_input(monkeypatch, "")
    main.main(["chat", "-p", "first", "--session", "trip"])
    path = tmp_path / "state" / "ebbtide" / "sessions" / "trip.json"
    before = path.read_text()
    monkeypatch.setenv("FAKE_ERROR", "ContextOverflow")
    give_input(monkeypatch, "")
    assert main.main(["chat", "-p", "second", "--session", "trip"]) == 3
    assert path.read_text() == before


def test_the_latest_conversation_is_continued(tmp_path):
    for number, name in enumerate(("b", "a", "c")):
        kept = Conversation(name)
        kept.add("user", name)
        kept.save()
        os.utime(conversation.session_path(name), (number, number))
    os.utime(conversation.session_path("a"), (9, 9))
    assert conversation.latest_name() == "a"


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a\\b", "a b", "x" * 65, "é", "a\n"])
def test_names_that_could_lead_elsewhere(name):
    with pytest.raises(errors.InputError, match="allowed are"):
        conversation.session_path(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema": 2, "messages": []}',
        '{"schema": 1, "messages": [{"role": "x", "content": ""}]}',
        '{"schema": 1, "messages": [{"role": "user", "content": 1}]}',
        '{"schema": 1, "model": 3, "messages": []}',
    ],
)
def test_a_damaged_conversation_is_an_input_error(text):
    path = conversation.session_path("bad")
    path.write_text(text)
    with pytest.raises(errors.InputError):
        Conversation.load("bad")


def test_a_conversation_that_cannot_be_saved(tmp_path):
    kept = Conversation("x")
    (tmp_path / "state" / "ebbtide" / "sessions").mkdir(parents=True)
    conversation.session_path("x").mkdir()
    with pytest.raises(errors.StorageError, match="cannot be saved"):
        kept.save()
    assert os.listdir(tmp_path / "state" / "ebbtide" / "sessions") == ["x.json"]


def test_the_system_message_stands_first_and_once():
    kept = Conversation()
    kept.add("user", "u")
    kept.system = "one"
    kept.system = "two"
    assert kept.system == "two" and [m["role"] for m in kept.messages] == ["system", "user"]
    kept.clear()
    assert kept.messages == [{"role": "system", "content": "two"}]
    assert kept.pop_answer() is None and kept.pop_question() is None
    kept.system = None
    assert kept.messages == []


def test_ctrl_c_as_the_file_is_renamed(monkeypatch):
    """The conversation is there, and Ctrl-C is what it was: no trouble with the disk."""
    replace = os.replace

    def interrupted(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    talk = Conversation("trip")
    talk.add("user", "Hello.")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            talk.save()
    assert Conversation.load("trip").messages == talk.messages


def test_of_standard_input_no_more_is_taken_than_a_document_may_have(monkeypatch):
    sizes = []

    class Bytes(io.BytesIO):
        def read(self, size=-1):
            sizes.append(size)
            return super().read(size)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Bytes(b"one two")))
    assert main.main(["chat"]) == 0
    assert sizes == [chat._PLENTY_BYTES]
    assert chat._PLENTY_BYTES > limits.MAX_BYTES  # so that what is more is refused, and not cut


def test_a_conversation_without_a_name_is_not_the_last_one(capfd, monkeypatch):
    """As of a variable of a script that is not set: what was asked went into another one."""
    give_input(monkeypatch, "")
    assert main.main(["chat", "--session", "trip", "-p", "one"]) == 0
    before = Conversation.load("trip").turns
    assert main.main(["chat", "--session", "", "-p", "two"]) == 2
    assert "'' is not a name for a conversation" in capfd.readouterr().err
    assert Conversation.load("trip").turns == before
