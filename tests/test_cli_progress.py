"""What commands show while they work, and how they write what comes out."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
from cli_face import all_asked, asked, face, give_input, opened  # noqa: F401 - a fixture

import ebbtide
from ebbtide import errors
from ebbtide.cli import documents, progress
from ebbtide.cli.output_file import OutputFile
from ebbtide.cli.terminal import Terminal


def test_a_single_document_has_no_heading():
    joined = documents.join_documents([ebbtide.Document("n", "\n\nT\n")], "Q")
    assert joined == "T\n\nQ"


def test_progress_as_lines(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    display = progress.ProgressDisplay(Terminal())
    step = SimpleNamespace(
        phase="prefill",
        done_tokens=4096,
        total_tokens=8192,
        elapsed_s=6,
        tokens_per_s=700,
        eta_s=65,
    )
    display(step)
    display(step)
    display(step)
    assert capsys.readouterr().err == (
        "reading: 4,096 of 8,192 tokens, 700 tokens/s, about 1 min 05 s left\n"
    )


def test_progress_of_loading_is_in_bytes():
    step = SimpleNamespace(
        phase="load",
        done_tokens=2**20,
        total_tokens=2**21,
        elapsed_s=1,
        tokens_per_s=2**20,
        eta_s=1,
    )
    assert progress.sentence(step) == "loading: 1.0 MiB of 2.0 MiB, 1.0 MiB/s, about 1.0 s left"
    step.eta_s, step.tokens_per_s = None, None
    assert progress.sentence(step) == "loading: 1.0 MiB of 2.0 MiB, 0 B/s"


def test_progress_can_stop_the_work():
    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        progress.ProgressDisplay(Terminal(quiet=True), check)(SimpleNamespace())


def test_the_bar_is_drawn_and_taken_away(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    step = SimpleNamespace(
        phase="prefill", done_tokens=1, total_tokens=2, elapsed_s=1, tokens_per_s=1, eta_s=None
    )
    with progress.ProgressDisplay(Terminal()) as display:
        display(step)
        assert "1 of 2 tokens" in capsys.readouterr().err
    assert "\x1b[2K" in capsys.readouterr().err


def test_no_color_means_no_escape_codes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    step = SimpleNamespace(
        phase="prefill", done_tokens=1, total_tokens=2, elapsed_s=1, tokens_per_s=1, eta_s=1
    )
    with progress.ProgressDisplay(Terminal()) as display:
        display._last_line_s = -100
        display(step)
    found = capsys.readouterr().err
    assert found.startswith("reading: 1 of 2") and "\x1b" not in found


def test_a_full_output_file_is_a_storage_error(monkeypatch):
    with OutputFile("out.md") as out:
        monkeypatch.setattr(
            os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        with pytest.raises(errors.StorageError, match="No space left"):
            out.commit("text")
    assert os.listdir() == []
