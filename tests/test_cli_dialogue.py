"""A conversation at a terminal: questions, commands, Ctrl-C, and what of it is kept."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import cli_fake as fake
import pytest
from cli_face import Typist, asked, face  # noqa: F401 - a fixture among them

from ebbtide import errors
from ebbtide.cli import conversation, dialogue, line_editor
from ebbtide.cli.conversation import Conversation
from ebbtide.cli.options import Settings
from ebbtide.cli.run import Run
from ebbtide.cli.signals import Signals, Stage


def talk(*lines, kept=None, remember=True, **settings):
    """A whole conversation. Returns the Dialogue after it."""
    run = Run(Settings(**settings), Signals())
    with run.open_llm() as llm:
        d = dialogue.Dialogue(run, llm, kept or Conversation(), remember=remember)
        d.editor = Typist(lines)
        d.talk()
    return d


def contents(d):
    return [m["content"] for m in d.conversation.messages]


def test_questions_and_answers_pile_up(capfd):
    d = talk("hello you", "", "and now")
    assert contents(d) == ["hello you", "hello you", "and now", "and now"]
    assert [m["content"] for m in asked()["prompt"]] == ["hello you", "hello you", "and now"]
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
    talk("/set temperature=0.5", "/set temperature=default", "/set max-new-tokens=2k", "/set", "a")
    call = fake.FakeLLM.calls[-1][1]
    assert "temperature" not in call and call["max_new_tokens"] == 2048


def test_a_model_whose_files_changed_is_loaded_anew_for_the_next_answer(capfd, monkeypatch):
    monkeypatch.setenv("FAKE_CHANGED", "1")
    d = talk("a", "b")
    assert contents(d) == ["a", "a", "b", "b"]
    names = [name for name, _ in fake.FakeLLM.calls]
    first = names.index("stream")
    assert names[:first].count("unload") == 1 and names[first:].count("unload") == 0
    assert names.index("close session") < names.index("unload")
    assert "files changed: it is loaded anew" in capfd.readouterr().err


def test_a_model_whose_files_are_damaged_leaves_the_chat_open(capfd, monkeypatch):
    monkeypatch.setenv("FAKE_ERROR", "BadCheckpoint")
    assert contents(talk("a", "/retry")) == []
    told = capfd.readouterr().err
    assert told.count("BadCheckpoint it is") == 2 and "/retry loads the model anew" in told


def test_a_session_that_was_closed_in_vain_is_opened_for_the_next_answer(capfd, monkeypatch):
    """The files were not whole, and are what they were before when the user asks again."""
    monkeypatch.setenv("FAKE_CHANGED", "1")
    monkeypatch.setenv("FAKE_UNLOAD_FAILS", "1")
    Path("a.txt").write_text("the text")
    d = talk("a", "/clear", "/read a.txt", "/clear", "b", "c")
    assert contents(d) == ["b", "b", "c", "c"] and d.session.is_open
    told = capfd.readouterr().err
    assert "it is not whole" in told and "is closed" not in told
    assert told.count("loaded anew") == 1


@pytest.mark.parametrize("num_before", [0, 1])
def test_what_is_stopped_while_it_loads_is_no_answer(capfd, monkeypatch, num_before):
    """Not the half of one that was stopped before it either."""
    num_loads = []

    def load(self):
        num_loads.append(1)
        if len(num_loads) > num_before:
            raise KeyboardInterrupt

    def answer(self, *_, **__):
        self.when_cancelled = {"text": "half"}
        raise KeyboardInterrupt

    monkeypatch.setattr(dialogue.Dialogue, "_load_changed", load)
    monkeypatch.setattr(Run, "answer", answer)
    d = talk(*["a", "b"][-1 - num_before :])
    assert contents(d) == ["a", "half"] * num_before
    assert "Stopped before the answer" in capfd.readouterr().err


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
    d = talk("/show", "/set think=off", "/set stop=x y", "/show")
    told = capfd.readouterr().err
    assert "0 messages, not saved yet" in told and "think = default" in told
    assert "think = off" in told and "stop = 'x y'" in told
    talk("/show", remember=False)
    assert "0 messages, not saved\n" in capfd.readouterr().err


def test_a_name_in_use_is_told_as_the_user_knows_it(capfd, monkeypatch):
    def refuse(self, name):
        raise errors.InputError(f"the session {name!r} is in use; choose another name")

    monkeypatch.setattr(fake.FakeSession, "keep_as", refuse)
    talk("/save trip")
    assert "the conversation 'trip' is in use; choose another" in capfd.readouterr().err


def test_an_unknown_command_is_not_a_question(capfd):
    d = talk("/nonsense")
    assert contents(d) == [] and "/help lists" in capfd.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["/usr/bin is what?", "// a comment", "/* one */ int main() {}", "/exit\nin a text", "/2"],
)
def test_a_message_may_begin_with_a_slash(text):
    assert contents(talk(text))[:1] == [text]


def test_what_stood_between_quotes_is_no_command():
    d = talk(line_editor.Quoted("/system be brief"), "/system keep\nboth lines")
    assert (
        contents(d)[1:] == ["/system be brief"] * 2 and d.conversation.system == "keep\nboth lines"
    )


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


# --- what is kept


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


# --- more commands


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


def test_compact_writes_over_nothing():
    """Neither the whole of an earlier one, nor a conversation that somebody named so."""
    d = talk("one", "/compact", "two", "/compact")
    first, second = Conversation.load("last.whole"), Conversation.load("last.whole-2")
    assert first.messages[0]["content"] == "one" and len(first.messages) == 2
    assert "two" in [m["content"] for m in second.messages]
    long = "n" * 58
    d = talk("one", f"/save {long}", "/compact")
    assert (
        d.conversation.name == long and Conversation.load(long).messages == d.conversation.messages
    )
    (cut,) = [k.name for k in conversation.kept_conversations() if k.name.endswith("n.whole")]
    assert len(cut) == 58 and Conversation.load(cut).messages[0]["content"] == "one"


def test_compact_to_half_a_summary_changes_nothing(capfd, monkeypatch):
    d = talk("one two", "/compact", max_new_tokens=2)
    assert (
        contents(d) == ["one two"] * 2 == [m["content"] for m in Conversation.load("last").messages]
    )
    assert "summary is not complete" in capfd.readouterr().err

    def stop(self, *_, **__):
        self.when_cancelled = {"text": "half"}
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "answer", stop)
    d.editor = Typist(["/compact"])
    d.talk()
    assert contents(d) == ["one two"] * 2


def test_compact_of_what_is_not_kept_keeps_nothing(capfd):
    d = talk("one", "two", "/compact", remember=False)
    assert len(d.conversation.turns) == 2 and "It is not kept." in capfd.readouterr().err
    assert conversation.kept_conversations() == []


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


def test_a_document_that_is_too_long_is_refused_at_once(capfd, monkeypatch):
    """And is not counted as a whole, which takes memory by the token."""
    Path("a.txt").write_text("word " * 5000)
    monkeypatch.setattr(fake.FakeLLM, "count_tokens", lambda llm, prompt: pytest.fail("counted"))
    d = talk("/read a.txt")
    assert d.documents == [] and "a.txt has at least 5,000 tokens" in capfd.readouterr().err


def test_documents_are_read_while_the_user_types(capfd):
    Path("a.txt").write_text("the text")
    Path("b c.txt").write_text("more")
    talk("/read a.txt", '/read "b c.txt"', "/read b\\ c.txt", "what")
    read = [value[-1]["content"] for name, value in fake.FakeLLM.calls if name == "prepare"]
    # Each is the beginning of the next, so nothing is read twice.
    assert len(read) == 3 and read[1].startswith(read[0]) and read[2].startswith(read[1])
    assert asked()["prompt"][-1]["content"] == f"{read[2]}\n\nwhat"


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


def test_what_was_read_can_be_dropped(capfd):
    Path("a.txt").write_text("the text")
    d = talk("/read none", "/read a.txt", "/read none", "what")
    assert contents(d)[0] == "what"
    told = capfd.readouterr().err
    assert "Error: no document waits" in told and "Dropped a.txt." in told


def test_files_of_one_name_are_told_apart_by_their_folders():
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "t.txt").write_text(f"of {folder}")
    d = talk("/read a/t.txt", "what", "/read b/t.txt", "and")
    assert contents(d)[0].startswith("# t.txt\n\nof a")
    assert contents(d)[2].startswith("# b/t.txt\n\nof b")


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
    told = capfd.readouterr().err
    assert "no answer yet" in told and told.count("without thoughts") == 1
    d.last_output.thought = "hm, hello"
    d.editor = Typist(["/thought"])
    d.talk()
    assert "hm, hello" in capfd.readouterr().err
