"""The public face with a fake model behind it, for the tests of the commands."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import cli_fake as fake
import pytest

import ebbtide
from ebbtide.cli import main, options, settings_file


@pytest.fixture(autouse=True)
def face(tmp_path, monkeypatch):
    """cli_fake's LLM in place of the face's; no settings of the machine's user; own folders.

    The test runs in a new folder, state goes to another. Gives the fake's class.
    """
    for name, value in fake.FACE.items():
        # The face fetches names when asked; setattr would ask for the old one first.
        monkeypatch.setitem(vars(ebbtide), name, value)
    for option in options.SHARED:
        monkeypatch.delenv(option.envvar, raising=False)
    monkeypatch.setattr(settings_file, "settings_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr(main, "_install_signals", lambda process: None)
    # Processes that a test starts find by the variable what this one has by the function.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    state = tmp_path / "state" / "ebbtide"
    monkeypatch.setattr(ebbtide, "state_dir", lambda *parts: _made(state.joinpath(*parts)))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    fake.FakeLLM.calls.clear()
    fake.FakeSession.kept.clear()
    return fake.FakeLLM


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def give_input(monkeypatch, text: str) -> None:
    """Standard input that is not a terminal."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def all_asked() -> list[dict]:
    """What each stream was asked: prompt and generation options."""
    return [value for name, value in fake.FakeLLM.calls if name == "stream"]


def asked() -> dict:
    """What the last stream was asked."""
    return all_asked()[-1]


def opened() -> dict:
    """What the last model was opened with."""
    return [value for name, value in fake.FakeLLM.calls if name == "open"][-1]


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
