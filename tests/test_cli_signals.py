"""What signals do to the work that is under way."""

from __future__ import annotations

import signal

import pytest
from prompt_toolkit import PromptSession
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from ebbtide.cli.line_editor import LineEditor
from ebbtide.cli.signals import Signals, Terminated


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


def test_sigterm_behind_ctrl_c_is_obeyed_where_the_chat_goes_on():
    """It came within half a second of a Ctrl-C, was taken for its echo, and the chat went on."""
    signals = Signals()
    signals.working()
    with pytest.raises(KeyboardInterrupt):
        signals._on_interrupt(signal.SIGINT, None)
    signals._on_terminate(signal.SIGTERM, None)  # cleanup goes on
    with pytest.raises(Terminated) as caught:
        signals.working()
    assert caught.value.exit_code == 143 and signals.is_leaving


@pytest.mark.parametrize("when", ["before it runs", "while it runs", "when it has a line"])
def test_a_signal_while_a_line_is_edited_comes_out_of_the_editor(when):
    """Raised in the event loop it would be lost, and an editor that has its line cannot be ended
    once more: it said so, and waited for Enter."""
    wish, editor = Terminated(signal.SIGTERM), LineEditor(remember=False)
    with create_pipe_input() as typed:
        session = PromptSession(input=typed, output=DummyOutput())
        editor._session = session
        prompt = session.prompt

        def ask(message, pre_run, **options):
            def run():
                if when == "when it has a line":
                    session.app.exit(result="a line")
                if when != "before it runs":
                    assert editor.interrupt(wish)
                pre_run()

            if when == "before it runs":
                assert editor.interrupt(wish)
            return prompt(message, pre_run=run, **options)

        session.prompt = ask
        with pytest.raises(Terminated) as caught:
            editor.read("> ")
        assert caught.value is wish
        assert not editor.interrupt(wish)  # nothing is edited: the handler raises it
        session.prompt = prompt
        typed.send_text("next\r")
        assert editor.read("> ") == "next"
