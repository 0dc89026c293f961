"""The chat: one answer, a conversation at a terminal, and what of it survives on disk."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import re
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import ebbtide
from ebbtide import errors
from ebbtide.cli import conversation, dialogue, documents, main, options, settings_file
from ebbtide.cli.conversation import Conversation
from ebbtide.cli.markdown import MarkdownStyle
from ebbtide.cli.options import Settings
from ebbtide.cli.run import Run
from ebbtide.cli.signals import Signals, Stage, Terminated

FAKE = Path(__file__).with_name("cli_fake.py")
_spec = importlib.util.spec_from_file_location("cli_fake", FAKE)
fake = importlib.util.module_from_spec(_spec)
sys.modules["cli_fake"] = fake  # dataclasses look their module up
_spec.loader.exec_module(fake)
PATIENCE_S = 30


@pytest.fixture(autouse=True)
def face(tmp_path, monkeypatch):
    for name, value in fake.FACE.items():
        monkeypatch.setitem(vars(ebbtide), name, value)
    for option in options.SHARED:
        monkeypatch.delenv(option.envvar, raising=False)
    monkeypatch.setattr(settings_file, "settings_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr(main, "_install_signals", lambda process: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ebbtide, "state_dir", lambda *parts: made(tmp_path / "state", *parts))
    fake.FakeLLM.calls.clear()
    fake.FakeSession.kept.clear()


def made(folder, *parts):
    folder = folder.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def give_input(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def asked():
    return [value for name, value in fake.FakeLLM.calls if name == "stream"][-1]["prompt"]


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
    assert asked() == [
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
    path = tmp_path / "state" / "sessions" / "trip.json"
    assert json.loads(path.read_text())["messages"][-1] == {"role": "assistant", "content": "first"}
    if os.name != "nt":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    give_input(monkeypatch, "")
    assert main.main(["chat", "-p", "second", "-c"]) == 0
    assert [m["content"] for m in asked()] == ["s", "first", "first", "second"]
    # The model comes with the conversation, and the text alone was kept.
    assert [v for n, v in fake.FakeLLM.calls if n == "open"][-1]["model"] == "m"
    assert "read again" in capfd.readouterr().err
    assert os.listdir(path.parent) == ["trip.json"]


def test_a_failed_answer_leaves_the_conversation_as_it_was(capfd, monkeypatch, tmp_path):
    give_input(monkeypatch, "")
    main.main(["chat", "-p", "first", "--session", "trip"])
    path = tmp_path / "state" / "sessions" / "trip.json"
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
    (tmp_path / "state" / "sessions").mkdir(parents=True)
    conversation.session_path("x").mkdir()
    with pytest.raises(errors.StorageError, match="cannot be saved"):
        kept.save()
    assert os.listdir(tmp_path / "state" / "sessions") == ["x.json"]


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


# --- the conversation at the terminal


class Typist:
    """Types the lines it was given, then Ctrl-D; an exception among them is raised."""

    def __init__(self, lines):
        self.lines = list(lines)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def interrupt(self, wish):
        return False

    def read(self, prompt, status=None, style=""):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


def talk(*lines, kept=None, **settings):
    """A whole conversation. Returns the Dialogue after it."""
    run = Run(Settings(**settings), Signals())
    with run.open_llm() as llm:
        d = dialogue.Dialogue(run, llm, kept or Conversation(), remember=True)
        d.editor = Typist(lines)
        d.talk()
    return d


def contents(d):
    return [m["content"] for m in d.conversation.messages]


def test_questions_and_answers_pile_up(capfd):
    d = talk("hello you", "", "and now")
    assert contents(d) == ["hello you", "hello you", "and now", "and now"]
    assert [m["content"] for m in asked()] == ["hello you", "hello you", "and now"]
    assert capfd.readouterr().out == "hello you\nand now\n"


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye"])
def test_leaving(capfd, word):
    d = talk(word, "never asked")
    assert d.editor.lines == ["never asked"]


def test_ctrl_c_at_the_prompt_leaves_the_second_time(capfd, monkeypatch):
    d = talk(KeyboardInterrupt(), "hello")
    assert contents(d) == ["hello", "hello"]
    # One keypress that arrives twice is not a second wish.
    d = talk(KeyboardInterrupt(), KeyboardInterrupt(), "hello")
    assert contents(d) == ["hello", "hello"]
    monkeypatch.setattr(dialogue, "_ECHO_S", 0.0)
    d = talk(KeyboardInterrupt(), KeyboardInterrupt(), "never asked")
    assert contents(d) == [] and d.editor.lines == ["never asked"]


def test_help_names_every_command(capfd):
    talk("/help")
    told = capfd.readouterr().err
    assert all(f"/{word}" in told for word in dialogue.COMMANDS if word not in ("bye", "?"))


def test_clear_undo_and_system(capfd):
    d = talk("a", "b", "/undo", "/system be brief", "c", "/system", "/system none", "/clear", "d")
    assert contents(d) == ["d", "d"]
    d = talk("a", "b", "/undo")
    assert contents(d) == ["a", "a"]
    assert "be brief" in capfd.readouterr().err


def test_regen_asks_the_same_again(capfd, monkeypatch):
    d = talk("a", "/regen")
    assert contents(d) == ["a", "a"]
    assert [v["prompt"] for n, v in fake.FakeLLM.calls if n == "stream"] == [
        [{"role": "user", "content": "a"}]
    ] * 2


def test_set_changes_the_options_of_the_answer(capfd):
    d = talk("/set temperature=0.5", "/set top_k = 3", "/set seed=x", "/set device=cpu", "a")
    call = fake.FakeLLM.calls[-1][1]
    assert call["temperature"] == 0.5 and call["top_k"] == 3 and "seed" not in call
    assert d.run.settings.device == "auto"
    told = capfd.readouterr().err
    assert "'x' is not a whole number" in told and "K is one of max-new-tokens" in told
    talk("/set temperature=0.5", "/set temperature=default", "/set", "a")
    assert "temperature" not in fake.FakeLLM.calls[-1][1]


def test_read_sends_a_document_along(capfd):
    Path("a.txt").write_text("the text")
    d = talk("/read a.txt", "what is it", "thanks", "/read absent", "/read")
    assert contents(d)[0] == "# a.txt\n\nthe text\n\nwhat is it" and contents(d)[2] == "thanks"
    told = capfd.readouterr().err
    assert "a.txt: 2 tokens" in told and "absent" in told


def test_save_show_and_stats(capfd):
    d = talk("/save", "/stats", "a", "/save trip", "/show", "/stats", "b")
    assert Conversation.load("trip").messages == d.conversation.messages and len(contents(d)) == 4
    told = capfd.readouterr().err
    assert "say /save NAME" in told and "no answer yet" in told
    assert "saved as trip" in told and "4.50 bits" in told


def test_an_unknown_command_is_not_a_question(capfd):
    d = talk("/nonsense")
    assert contents(d) == [] and "/help lists" in capfd.readouterr().err


@pytest.mark.parametrize("error", ["ContextOverflow", "DoesNotFit", "InputError"])
def test_a_question_that_is_too_much_does_not_end_the_chat(capfd, monkeypatch, error):
    monkeypatch.setenv("FAKE_ERROR", error)
    Path("a.txt").write_text("the text")
    d = talk("/read a.txt", "too much")
    assert contents(d) == [] and "Error: " in capfd.readouterr().err
    # The document is not lost with the question.
    assert len(d.documents) == 1


def test_a_storage_error_does(capfd, monkeypatch):
    monkeypatch.setenv("FAKE_ERROR", "StorageError")
    with pytest.raises(errors.StorageError):
        talk("hello")


def test_ctrl_c_keeps_the_answer_so_far(capfd, monkeypatch):
    d = talk()
    signals, session = d.run.signals, d.session
    seen = []

    class Impatient(fake.FakeStream):
        def __iter__(self):
            for piece in super().__iter__():
                seen.append(piece.text)
                if len(seen) == 2:
                    signals._on_interrupt(signal.SIGINT, None)
                yield piece

    monkeypatch.setattr(fake, "FakeStream", Impatient)
    d.ask("one two three four")
    assert contents(d) == ["one two three four", "one two"]
    assert d.session is session and signals.stage is Stage.WORKING
    assert "Stopped." in capfd.readouterr().err


def test_a_second_ctrl_c_costs_the_session(capfd, monkeypatch):
    d = talk()
    signals, session = d.run.signals, d.session

    class Stuck(fake.FakeStream):
        def __iter__(self):
            yield next(super().__iter__())
            signals._on_interrupt(signal.SIGINT, None)
            signals._last_s -= 10
            signals._on_interrupt(signal.SIGINT, None)

    monkeypatch.setattr(fake, "FakeStream", Stuck)
    d.ask("one two three four")
    assert contents(d) == ["one two three four", "one"]
    assert d.session is not session and signals.stage is Stage.WORKING


# --- the signals alone


def test_a_signal_that_arrives_twice_at_once_is_one():
    signals = Signals()
    signals.working()
    with pytest.raises(KeyboardInterrupt):
        signals._on_interrupt(signal.SIGINT, None)
    signals._on_interrupt(signal.SIGINT, None)  # an echo: cleanup goes on
    assert signals.is_leaving
    signals.working()
    with signals.polite():
        signals._on_interrupt(signal.SIGINT, None)
        signals._on_interrupt(signal.SIGINT, None)
        with pytest.raises(KeyboardInterrupt):
            signals.check()


def test_sigterm_is_never_polite():
    signals = Signals()
    signals.working()
    with signals.polite(), pytest.raises(Terminated) as caught:
        signals._on_terminate(signal.SIGTERM, None)
    assert caught.value.exit_code == 143


# --- what is kept without a name


def test_a_conversation_without_a_name_is_the_last_one(capfd, tmp_path):
    talk("hello you", kept=Conversation(model="m"))
    assert conversation.latest_name() == conversation.LAST
    found = Conversation.load("last")
    assert [m["content"] for m in found.messages] == ["hello you", "hello you"]
    assert fake.FakeSession.kept == {"chat.last": [0, 1]}
    d = talk("and now", kept=found)
    assert contents(d)[:2] == ["hello you", "hello you"]
    # What was said is read while the user types.
    assert ("prepare", found.messages[:2]) in fake.FakeLLM.calls


def test_what_is_not_to_be_remembered(capfd):
    run = Run(Settings(), Signals())
    with run.open_llm() as llm:
        d = dialogue.Dialogue(run, llm, Conversation(), remember=False)
        d.editor = Typist(["hello"])
        d.talk()
    assert conversation.kept_conversations() == [] and fake.FakeSession.kept == {}


def test_a_state_folder_that_cannot_be_is_said_once(capfd, monkeypatch):
    monkeypatch.setenv("FAKE_KEEP_ERROR", "1")
    d = talk("one", "two")
    assert len(contents(d)) == 4
    assert capfd.readouterr().err.count("is not kept") == 1


def test_load_and_sessions(capfd):
    talk("in the first", "/save one", "more")
    d = talk(
        "in the second", "/save two", "/sessions", "/load one", "again", "/load three", "/load"
    )
    assert [m["content"] for m in d.conversation.messages] == [
        *("in the first", "in the first", "more", "more", "again", "again")
    ]
    assert d.conversation.name == "one" and d.session.name == "chat.one"
    told = capfd.readouterr().err
    assert "* two" in told and "  one " in told and "4 messages" in told
    assert "there is no conversation 'three'" in told and "say /load NAME" in told
    assert len(Conversation.load("two").messages) == 2


def test_the_conversation_that_was_left_is_the_latest(capfd):
    talk("first", "/save one")
    talk("second", "/save two")
    os.utime(conversation.session_path("one"), (9, 9))
    talk("/load one")
    assert conversation.latest_name() == "one"


def test_save_does_not_replace_another_conversation(capfd):
    talk("first", "/save one")
    d = talk("second", "/save one", "/save two")
    assert "there is a conversation 'one' already" in capfd.readouterr().err
    assert d.conversation.name == "two"
    assert Conversation.load("one").messages[0]["content"] == "first"


# --- commands that came later


def test_retry_asks_what_got_no_answer(capfd, monkeypatch):
    d = talk()
    monkeypatch.setenv("FAKE_ERROR", "ContextOverflow")
    d.ask("a question")
    assert contents(d) == [] and d.dropped == "a question"
    monkeypatch.delenv("FAKE_ERROR")
    d.editor = Typist(["/retry", "/retry"])
    d.talk()
    assert contents(d) == ["a question", "a question"] and d.dropped is None
    assert len([n for n, _ in fake.FakeLLM.calls if n == "stream"]) == 3


def test_edit_asks_the_changed_question(capfd, monkeypatch):
    import click

    seen = []

    def editor(text, **_):
        seen.append(text)
        return {"": "first\n", "first": "second\n", "second": None}[text]

    monkeypatch.setattr(click, "edit", editor)
    d = talk("/edit", "/edit", "/edit")
    assert seen == ["", "first", "second"]
    assert contents(d) == ["second", "second"]
    assert "nothing is asked" in capfd.readouterr().err


def test_compact_goes_on_from_the_summary_and_keeps_the_whole(capfd, monkeypatch):
    d = talk("one", "two", "/compact", "three", kept=Conversation(model="m"))
    assert len(d.conversation.turns) == 4
    assert d.conversation.turns[0]["content"].startswith("Summarise our conversation")
    assert [m["content"] for m in Conversation.load("last.whole").messages] == [
        *("one", "one", "two", "two")
    ]
    assert "/load last.whole" in capfd.readouterr().err
    monkeypatch.setenv("FAKE_ERROR", "ContextOverflow")
    before = list(d.conversation.messages)
    d.editor = Typist(["/compact"])
    d.talk()
    assert d.conversation.messages == before


def test_mem_and_tokens(capfd):
    Path("a.txt").write_text("the text")
    d = talk("/mem", "hello you", "/mem", "/read a.txt", "/tokens", "/mem on", "/mem what")
    told = capfd.readouterr().err
    assert "no answer yet" in told and "hit rate 1.000" in told
    disk = next(line for line in told.splitlines() if line.startswith("disk") and "3 B" in line)
    assert disk.split()[1] == "2" and "1.0 GiB" in disk
    assert "2  user       hello you" in told and "waiting    a.txt" in told
    assert d.shows_tiers and "say /mem" in told
    assert "RAM" in d._status() and "GPU" not in d._status()


def test_a_document_that_is_too_long_is_refused_at_once(capfd):
    Path("a.txt").write_text("word " * 5000)
    d = talk("/read a.txt")
    assert d.documents == [] and "a.txt has 5,000 tokens" in capfd.readouterr().err


def test_documents_are_read_while_the_user_types(capfd):
    Path("a.txt").write_text("the text")
    Path("b c.txt").write_text("more")
    talk("/read a.txt", '/read "b c.txt"', "/read b\\ c.txt", "what")
    read = [value[-1]["content"] for name, value in fake.FakeLLM.calls if name == "prepare"]
    # Each is the beginning of the next, so nothing is read twice.
    assert len(read) == 3 and read[1].startswith(read[0]) and read[2].startswith(read[1])
    assert asked()[-1]["content"] == f"{read[2]}\n\nwhat"


def test_what_is_read_ahead_is_thought_about_as_the_answer(monkeypatch):
    """Some templates write first how much is thought: all would be read again."""
    given = []
    monkeypatch.setattr(
        fake.FakeSession, "prepare", lambda self, messages, *, think: given.append(think)
    )
    Path("a.txt").write_text("the text")
    talk("/read a.txt", "/set think=high", "/read a.txt", "what")
    assert given == [None, "high"]
    ((_, options),) = [call for call in fake.FakeLLM.calls if call[0] == "stream"]
    assert options["think"] == "high"


def test_an_error_of_the_reading_is_told(capfd, monkeypatch):
    def refuse(self, messages, *, think):
        raise errors.ContextOverflow("too long", needed_tokens=2, available_tokens=1)

    monkeypatch.setattr(fake.FakeSession, "prepare", refuse)
    Path("a.txt").write_text("the text")
    d = talk("/read a.txt", "what")
    assert "Error: too long" in capfd.readouterr().err and len(contents(d)) == 2


# --- Markdown

_MARKDOWN = (
    "# Title\nsome **bold** and `code **x**` * star\n```python\nx = '**'\n``\n```\n"
    "* item\n**open\nnext **\n~~~\n```\n~~~\n``` x"
)


def strip_codes(text):
    return re.sub(r"\x1b\[[0-9]*m", "", text)


@given(text=st.text(alphabet="a*`~# \n", max_size=60), cuts=st.lists(st.integers(0, 60)))
@example(text=_MARKDOWN, cuts=[])
@example(text=_MARKDOWN, cuts=list(range(200)))
def test_markdown_keeps_every_character(text, cuts):
    def styled(pieces):
        style = MarkdownStyle()
        return "".join([style.feed(piece) for piece in pieces]) + style.finish()

    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    whole = styled([text])
    assert styled(text[a:b] for a, b in itertools.pairwise(bounds)) == whole
    assert strip_codes(whole) == text
    for line in whole.split("\n"):
        # Nothing reaches into the next line, or the prompt.
        assert not re.search(r"\x1b\[[1-9][0-9]*m(?!.*\x1b\[0m)", line)


def test_markdown_looks_like_what_it_says():
    style = MarkdownStyle()
    shown = style.feed("a **b** `c**d` # e\n# f\n") + style.finish()
    assert shown == ("a \x1b[1m**b**\x1b[0m \x1b[36m`c**d`\x1b[0m # e\n\x1b[1m# f\x1b[0m\n")


def test_undo_gives_documents_back(capfd, monkeypatch):
    import click

    monkeypatch.setattr(click, "edit", lambda text, **_: text.replace("one", "two"))
    Path("a.txt").write_text("the text")
    d = talk("/read a.txt", "question one", "/undo")
    assert contents(d) == [] and [document.name for document in d.documents] == ["a.txt"]
    assert "a.txt will go with your next message" in capfd.readouterr().err
    d = talk("/read a.txt", "question one", "/edit")
    # The editor is given the question and not the document, which goes with it all the same.
    assert contents(d)[0] == "# a.txt\n\nthe text\n\nquestion two" and len(contents(d)) == 2


def test_thoughts_are_shown_when_asked_for(capfd):
    d = talk("/thought", "hello", "/thought")
    assert capfd.readouterr().err.count("without thoughts") == 2
    d.last_output.thought = "hm, hello"
    d.editor = Typist(["/thought"])
    d.talk()
    assert "hm, hello" in capfd.readouterr().err
