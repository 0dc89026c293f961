"""What signals do to the work that is under way."""

from __future__ import annotations

import signal

import pytest

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
