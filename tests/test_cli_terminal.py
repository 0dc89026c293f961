"""The chat as a person meets it: a real process in a real pseudo-terminal, keys and screen.

The model is a fake but for the last tests.
"""

from __future__ import annotations

import re
import signal
import stat
import sys
import time

import pytest

if sys.platform == "win32":
    pytest.skip("the system has no pseudo-terminals", allow_module_level=True)
from person import Person

PROMPT = "/4,096] >"


@pytest.fixture
def chat(tmp_path):
    """Begins a chat; ends it with the test."""
    people = []

    def begin(*args, **more):
        person = Person(tmp_path, "chat", *args, **more)
        people.append(person)
        person.wait_for(PROMPT)
        return person

    yield begin
    for person in people:
        person.child.close(force=True)


def test_a_conversation(chat, tmp_path):
    person = chat()
    person.say("hello **you**")
    person.wait_for("[2" + PROMPT)
    assert "\nhello **you**\n" in person.look()  # the answer, every character of it
    assert b"\x1b[1m**you**" in person.raw
    person.say("/exit")
    assert person.wait_for_end() == 0
    assert "ebbtide chat -c" in person.look()
    history = tmp_path / "state" / "ebbtide" / "history"
    assert "hello **you**" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700


def test_a_pasted_text_is_one_message(chat):
    person = chat()
    person.paste("first line\nsecond line\nthird")
    person.wait_for("[5" + PROMPT)
    assert "\nthird\n" in person.look()
    person.say('"""one')
    person.say("two")
    person.say('three"""')
    person.wait_for("[9" + PROMPT)


def test_a_long_paste(chat):
    person = chat()
    person.paste("\n".join(f"line {number} of a long text" for number in range(700)))
    person.wait_for("[4,200" + PROMPT)


def test_keys(chat, tmp_path):
    (tmp_path / "my notes.txt").write_text("words of the notes")
    person = chat()
    person.say("hello you")
    person.wait_for("[2" + PROMPT)
    person.type("/rea\t")
    person.wait_for("/read")
    person.type(" my\t")
    person.wait_for("/read my notes.txt")
    person.type("\r")
    person.wait_for("my notes.txt: 4 tokens")
    person.type("\x1b[A\x1b[A\r")  # two lines up
    person.wait_for("[13" + PROMPT)  # hello you, twice, and "# my notes.txt", 4 words, hello you


def test_ctrl_c_stops_an_answer_and_the_next_one_leaves(chat):
    person = chat(FAKE_DELAY_S=0.2)
    person.say("one two three four five six seven eight nine ten eleven twelve")
    person.wait_for("\none two")
    person.press_ctrl("c")
    person.wait_for(PROMPT, after="Stopped.")
    assert "\none two three four five six seven eight nine ten eleven twelve\n" not in person.look()
    person.say("/retry")
    person.wait_for("\none two", after="/retry")
    person.press_ctrl("c")
    person.wait_for(PROMPT, after="/retry")
    time.sleep(0.7)  # more than the echo of a keypress
    person.press_ctrl("c")
    assert person.wait_for_end() == 0


def test_ctrl_c_at_an_empty_prompt_warns_first(chat):
    person = chat()
    person.press_ctrl("c")
    person.wait_for("Ctrl-C again", PROMPT)
    person.say("still here")
    person.wait_for("[2" + PROMPT)
    person.press_ctrl("d")
    assert person.wait_for_end() == 0


def test_ctrl_c_takes_back_what_was_typed(chat):
    person = chat()
    for _ in range(3):
        person.type("not this")
        person.wait_for("> not this")
        person.press_ctrl("c")
    person.say("but this one")
    person.wait_for("[3" + PROMPT)


def test_reading_goes_on_while_one_types(chat, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 60)
    person = chat(FAKE_DELAY_S=0.1)
    person.say("/read a.txt")
    person.wait_for("a.txt: [", "of 62 tokens")
    person.type("what is it")
    person.wait_for("> what is it", "of 62 tokens")
    person.type("\r")
    person.wait_for("\nwhat is it\n", after="> what is it")


def test_ctrl_c_stops_the_reading_and_drops_the_document(chat, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 300)
    person = chat(FAKE_DELAY_S=0.1)
    person.say("/read a.txt")
    person.wait_for("of 302 tokens")
    person.press_ctrl("c")
    person.wait_for("Stopped reading a.txt; it will not be sent.", PROMPT)
    person.say("hello")
    person.wait_for("[1" + PROMPT)


def test_leaving_while_something_is_read(chat, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 300)
    person = chat(FAKE_DELAY_S=0.1)
    person.say("/read a.txt")
    person.wait_for("of 302 tokens")
    person.press_ctrl("d")
    assert person.wait_for_end() == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_at_the_prompt(chat, name):
    person = chat()
    person.child.kill(getattr(signal, name))
    assert person.wait_for_end() == 128 + getattr(signal, name)
    assert "Traceback" not in person.look()


def test_a_terminal_that_changes_its_size(chat):
    person = chat()
    person.type("a line that is rather long and will not fit into half of the width")
    person.wait_for("half of the width")
    person.resize(12, 40)
    person.type(" now")
    person.wait_for("now")
    person.type("\r")
    person.wait_for("[16" + PROMPT)


def test_the_last_conversation_goes_on(chat):
    person = chat()
    person.say("remember me")
    person.wait_for("[2" + PROMPT)
    person.press_ctrl("d")
    assert person.wait_for_end() == 0
    person = chat("-c")
    person.wait_for("Resuming 'last' with 2 messages")
    person.say("/show")
    person.wait_for("saved as last")


def test_no_color(chat):
    person = chat(NO_COLOR=1)
    person.say("**hello**")
    person.wait_for("[1" + PROMPT)
    colours = [code for code in re.findall(rb"\x1b\[([0-9;]*)m", person.raw) if code.strip(b"0;")]
    assert colours == []


def test_a_dumb_terminal(chat):
    person = chat(TERM="dumb")
    person.say("hello you")
    person.wait_for("[2" + PROMPT)
    assert b"\x1b" not in person.raw


def test_a_state_folder_that_cannot_be_used(chat, tmp_path):
    (tmp_path / "state").write_text("a file where the folder should be")
    person = chat()
    person.say("hello")
    person.wait_for("is not kept", "[1" + PROMPT)
    person.press_ctrl("d")
    assert person.wait_for_end() == 0


def test_answers_redirected_to_a_file(chat, tmp_path):
    person = chat(output="answers")
    person.say("**hello**")
    person.wait_for("[1" + PROMPT)
    person.say("/exit")
    assert person.wait_for_end() == 0
    assert (tmp_path / "answers").read_text() == "**hello**\n"
