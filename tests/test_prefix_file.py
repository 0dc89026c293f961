"""One file of kept pages: what was written comes back whole, or is refused."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbtide.offload.prefixes import file as prefix_file
from ebbtide.offload.prefixes.file import (
    BadPrefixFile,
    read_prefix_file,
    write_prefix_file,
)
from ebbtide.offload.prefixes.head import head_of

PARTS = [torch.arange(100, dtype=torch.uint8), torch.full((3, 5), 7.5), torch.tensor([1, 2])]
SIZES = [100, 60, 16]
HEAD = head_of({"kind": "test"}, array("i", [1, 2, 70000]))


def written(path: Path) -> bytes:
    with write_prefix_file(path, HEAD) as file:
        for part in PARTS:
            file.add(part)
    return path.read_bytes()


def read(path: Path, head: bytes = HEAD, sizes=SIZES) -> list[bytes]:
    room = torch.empty(max(sizes), dtype=torch.uint8)
    with read_prefix_file(path, head, sizes) as file:
        return [file.take(room).numpy().tobytes() for _ in sizes]


def test_parts_come_back(tmp_path):
    written(tmp_path / "a")
    assert read(tmp_path / "a") == [part.numpy().tobytes() for part in PARTS]
    assert os.listdir(tmp_path) == ["a"]


def test_what_was_written_for_something_else_is_refused(tmp_path):
    written(tmp_path / "a")
    other = head_of({"kind": "test"}, array("i", [1, 2, 70001]))
    assert len(other) == len(HEAD)
    with pytest.raises(BadPrefixFile, match="other tokens"):
        read(tmp_path / "a", other)
    with pytest.raises(BadPrefixFile, match="were written"):
        read(tmp_path / "a", sizes=[100, 60, 15])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_a_file_goes_unseen(tmp_path, data):
    good = written(tmp_path / "a")
    place = data.draw(st.integers(0, len(good) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    bad = {
        "flip": good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]),
        "cut": good[:place],
        "insert": good[:place] + b"x" + good[place:],
        "remove": good[:place] + good[place + 1 :],
    }[kind]
    if kind == "flip":
        bad += good[place + 1 :]
    (tmp_path / "a").write_bytes(bad)
    with pytest.raises(BadPrefixFile):
        read(tmp_path / "a")


def test_a_block_that_raises_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with write_prefix_file(tmp_path / "a", HEAD) as file:
            file.add(PARTS[0])
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_reads_and_writes_may_be_short(tmp_path, monkeypatch):
    real = os.fdopen

    def dribbling(number, mode, buffering):
        file = real(number, mode, buffering=0)

        class Dribble:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, view):
                return file.write(view[:7])

            def fileno(self):
                return file.fileno()

        return Dribble()

    monkeypatch.setattr(prefix_file.os, "fdopen", dribbling)
    written(tmp_path / "a")
    monkeypatch.undo()
    assert read(tmp_path / "a") == [part.numpy().tobytes() for part in PARTS]
