"""`ebbtide cache`: what is found, what is counted, what is removed, and what is never touched."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from array import array
from contextlib import closing
from pathlib import Path

import platformdirs
import pytest

from ebbtide import errors, format_size
from ebbtide.cli import cache_items, main, options, settings_file
from ebbtide.cli.conversation import Conversation
from ebbtide.offload.disk.scratch import create_named
from ebbtide.offload.prefixes.head import cell_names, head_of
from ebbtide.offload.sessions.session_file import KeptTokens, SessionFile


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A state folder, a spill folder and a hub's cache with something of each kind."""
    for option in options.SHARED:
        monkeypatch.delenv(option.envvar, raising=False)
    monkeypatch.setattr(settings_file, "settings_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr(main, "_install_signals", lambda process: None)
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda name: str(tmp_path / "state"))
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for path, size in {
        "state/sessions/trip.json": 100,
        "state/sessions/chat.trip.tokens": 50,
        "state/sessions/book.tokens": 30,
        "state/jobs/abc/part-1.json": 20,
        "state/history": 10,
        "cache/spill/notes.txt": 7,
        "cache/prefixes/0a.span": 40,
        "cache/prefixes/0b.end": 5,
        "hub/models--org--name/blobs/x": 1000,
        "hub/.locks/y": 1,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x" * size)
    return tmp_path


def cache(capfd, *args, code=0):
    assert main.main(["cache", *args, "--json"]) == code
    return json.loads(capfd.readouterr().out)


def labels(capfd):
    return {
        f"{item['kind']}/{item['name']}".rstrip("/"): item["bytes"]
        for item in cache(capfd, "ls")["items"]
    }


EVERYTHING = {
    "conversations/trip": 150,
    "sessions/book": 30,
    "jobs/abc": 20,
    "prefixes/unreadable": 45,
    "history": 10,
    "models/org/name": 1000,
}


def test_everything_is_listed_with_its_size(capfd):
    assert labels(capfd) == EVERYTHING
    assert main.main(["cache", "ls"]) == 0
    assert "150 B" in capfd.readouterr().out
    found = cache(capfd, "du")
    assert found["total_bytes"] == sum(EVERYTHING.values())
    assert found["kinds"]["conversations"]["bytes"] == 150


def test_links_are_not_followed(capfd, home):
    if not hasattr(os, "symlink"):
        pytest.skip("the system has no links")
    outside = home / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x" * 5000)
    os.symlink(outside, home / "state" / "jobs" / "link")
    assert labels(capfd)["jobs/link"] == 0
    cache(capfd, "purge", "jobs", "--yes")
    assert (outside / "precious").exists() and not (home / "state" / "jobs" / "link").is_symlink()


def test_a_linked_folder_of_pages_is_nobodys_to_empty(capfd, home):
    if not hasattr(os, "symlink"):
        pytest.skip("the system has no links")
    folder = home / "cache" / "prefixes"
    (folder / "thesis.txt").write_text("precious")
    (folder / "sub.end").mkdir()
    cache(capfd, "purge", "prefixes", "--yes")
    assert sorted(os.listdir(folder)) == ["sub.end", "thesis.txt"]
    (folder / "0c.end").write_text("x")
    folder.rename(home / "elsewhere")
    os.symlink(home / "elsewhere", folder)
    assert not {kind for kind in labels(capfd) if kind.startswith("prefixes")}
    cache(capfd, "purge", "--yes")
    assert (home / "elsewhere" / "0c.end").exists()


@pytest.mark.parametrize(
    ("what", "left"),
    [
        (
            ["conversations"],
            {"sessions/book", "jobs/abc", "prefixes/unreadable", "history", "models/org/name"},
        ),
        (
            ["conversations/trip", "history"],
            {"sessions/book", "jobs/abc", "prefixes/unreadable", "models/org/name"},
        ),
        (
            ["prefixes"],
            {"conversations/trip", "sessions/book", "jobs/abc", "history", "models/org/name"},
        ),
        ([], {"models/org/name"}),
    ],
)
def test_purge_removes_what_is_named(capfd, home, what, left):
    cache(capfd, "purge", *what, "--yes")
    assert set(labels(capfd)) == left
    # Nobody's file but ours.
    assert (home / "cache" / "spill" / "notes.txt").exists()


@pytest.mark.parametrize("what", [["conversations", "sessions"], []])
def test_purge_removes_what_a_killed_process_was_saving(capfd, home, monkeypatch, what):
    """Beside the file, its beginning holds what was written too."""

    def dies(*args):
        raise SystemExit

    talk = Conversation("trip", "model")
    talk.add("user", "a secret")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        patch.setattr(os, "unlink", lambda path: None)
        for name in ("chat.trip", "chat.new", "book"):
            with closing(SessionFile(name, "")) as file, pytest.raises(SystemExit):
                file.save(KeptTokens([1, 2, 3]))
        with pytest.raises(SystemExit):
            talk.save()
    sessions = home / "state" / "sessions"
    assert len(list(sessions.glob(".*.part"))) == 4
    assert {"conversations/trip", "conversations/new", "sessions/book"} <= labels(capfd).keys()
    cache(capfd, "purge", *what, "--yes")
    assert {path.suffix for path in sessions.iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["purge"], "give --yes"),
        (["purge", "models", "--yes"], "other programs share"),
        (["purge", "nonsense", "--yes"], "kinds: conversations"),
        (["purge", "conversations/absent", "--yes"], "cache ls"),
        (["purge", "conversations/../../x", "--yes"], "cache ls"),
    ],
)
def test_what_purge_refuses(capfd, monkeypatch, args, says):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert says in cache(capfd, *args, code=2)["error"]["message"]
    assert labels(capfd) == EVERYTHING


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_purge_asks_at_a_terminal(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert main.main(["cache", "purge"]) == 1
    assert labels(capfd) == EVERYTHING
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert main.main(["cache", "purge", "history"]) == 0
    assert "history" in capfd.readouterr().err and "history" not in labels(capfd)


def test_gc_removes_what_dead_processes_left(capfd, home):
    spill = home / "cache" / "spill"
    number, alive = create_named(spill)
    dead_number, dead = create_named(spill)
    os.write(dead_number, b"x" * 300)
    os.close(dead_number)
    olds = home / "state/sessions/.trip.x.part", home / "cache/prefixes/.0a.x.part"
    news = home / "state/jobs/abc/y.part", home / "cache/prefixes/.0b.y.part"
    for path in (*olds, *news):
        path.write_bytes(b"x" * 11)
    long_ago = time.time() - 2 * 24 * 3600
    for path in olds:
        os.utime(path, (long_ago, long_ago))
    try:
        found = cache(capfd, "gc")
        assert (found["removed"], found["bytes"]) == (3, 322)
        assert Path(alive).exists() and not Path(dead).exists()
        assert all(p.exists() for p in news) and not any(p.exists() for p in olds)
        assert (home / "cache/prefixes/0a.span").exists()
    finally:
        os.close(number)
    assert {k: v for k, v in labels(capfd).items() if k.startswith(("conv", "sess"))} == {
        "conversations/trip": 150,
        "sessions/book": 30,
    }


def test_what_cannot_be_removed_is_a_storage_error(home, monkeypatch):
    items = cache_items.find_items(None)

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(errors.StorageError, match="cannot be removed"):
        cache_items.remove_items(items[:1], items)


def keep(home, text, ends, num_bytes=10, cell=4):
    """Files of a text of small cells; of each the bytes. ends: (cell, suffix) of each file."""
    tokens, sizes = array("i", list(text.encode())), {}
    names = cell_names("f", tokens, len(tokens) // cell, cell, "")
    for num_cells, suffix in ends:
        fields = {"fingerprint": "f", "num_cells": num_cells, "cell_tokens": cell, "decoded_by": ""}
        head = head_of(fields, tokens[: num_cells * cell])
        path = home / "cache/prefixes" / (names[num_cells] + suffix)
        path.write_bytes(head + bytes(num_bytes))
        sizes[path.name] = path.stat().st_size
    return sizes


@pytest.fixture
def two_texts(home):
    """Two that begin alike, the second one used last: (all files' sizes, those of the shared)."""
    long = keep(home, "one two three four five six ", [(2, ".span"), (4, ".span"), (7, ".end")])
    short = keep(home, "one two three other", [(2, ".span"), (4, ".end")])
    shared = {name: size for name, size in long.items() if name in short}
    assert len(shared) == 1
    return long, short, shared


def texts(capfd):
    """{tokens: item} of the texts whose pages are kept."""
    items = cache(capfd, "ls")["items"]
    return {item["tokens"]: item for item in items if "tokens" in item}


def test_each_text_that_is_kept_has_a_row(capfd, two_texts):
    long, short, shared = two_texts
    found = texts(capfd)
    assert set(found) == {28, 16}  # what one of them begins with is no text of its own
    assert {Path(path).name for path in found[28]["paths"]} == set(long)
    assert {Path(path).name for path in found[16]["paths"]} == set(short)
    # Each byte counts once, so that rows add up to what 'du' says.
    assert found[28]["bytes"] == sum(long.values())
    assert found[16]["bytes"] == sum(short.values()) - sum(shared.values())
    all_bytes = 45 + sum((long | short).values())  # with what is no text's
    assert cache(capfd, "du")["kinds"]["prefixes"]["bytes"] == all_bytes
    assert main.main(["cache", "ls"]) == 0
    rows = capfd.readouterr().out
    assert f"prefixes/{found[28]['name']}  28 tokens" in rows


def test_a_text_is_purged_by_its_name_and_what_another_shares_stays(capfd, home, two_texts):
    long, short, shared = two_texts
    found = texts(capfd)
    gone = cache(capfd, "purge", f"prefixes/{found[28]['name']}", "--yes")
    assert gone["bytes"] == sum(long.values()) - sum(shared.values())
    assert {p.name for p in (home / "cache/prefixes").iterdir()} == {*short, "0a.span", "0b.end"}
    (left,) = texts(capfd).values()
    assert left["name"] == found[16]["name"] and left["bytes"] == sum(short.values())
    cache(capfd, "purge", f"prefixes/{left['name']}", "--yes")
    assert {p.name for p in (home / "cache/prefixes").iterdir()} == {"0a.span", "0b.end"}


def test_purge_asks_of_what_would_go_alone(capfd, monkeypatch, two_texts):
    long, _, shared = two_texts
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    name = texts(capfd)[28]["name"]
    assert main.main(["cache", "purge", f"prefixes/{name}"]) == 1
    going = format_size(sum(long.values()) - sum(shared.values()))
    said = capfd.readouterr().err
    assert f"Remove these 1 items, {going} (what others share stays)? [y/N]" in said


def test_both_at_once_leave_nothing_of_what_they_share(capfd, home, two_texts):
    names = [f"prefixes/{item['name']}" for item in texts(capfd).values()]
    cache(capfd, "purge", *names, "--yes")
    assert {p.name for p in (home / "cache/prefixes").iterdir()} == {"0a.span", "0b.end"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"x" + data[1:],
        lambda data: data[:20],
        lambda data: data.replace(b'"num_cells":7', b'"num_cells":9'),
        lambda data: data.replace(b'"num_cells":7', b'"num_cells":' + b"9" * 30),
        lambda data: data.replace(b'"num_cells":7', b'"num_cells":-7'),
        lambda data: data.replace(b"o\0\0\0", b"p\0\0\0"),
        lambda data: b"[" * 4000,
    ],
)
def test_a_head_that_is_damaged_is_of_no_text_and_can_be_purged(capfd, home, two_texts, damage):
    long, _, _ = two_texts
    path = home / "cache/prefixes" / list(long)[-1]
    path.write_bytes(damage(path.read_bytes()))
    assert 28 not in texts(capfd) and 16 in texts(capfd)
    cache(capfd, "purge", "prefixes", "--yes")
    assert not list((home / "cache/prefixes").iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(capfd, home, two_texts):
    os.mkfifo(home / "cache/prefixes" / ("2c" * 32 + ".span"))
    assert set(texts(capfd)) == {28, 16}
    cache(capfd, "purge", "prefixes", "--yes")
    assert not list((home / "cache/prefixes").iterdir())


def test_each_row_but_models_is_purged_alone_by_its_name(capfd, home, two_texts):
    """What ls prints is what purge takes."""
    files = {
        "state/speeds.json": b"{}",
        "state/sessions/old.trip.json.json": b"a conversation may have such a name",
        "state/sessions/chat.old.trip.json.tokens": b"x",
        "state/sessions/prefixes.tokens": b"a session may be called as a kind is",
        "state/jobs/text-abc/documents.json": b"x",
        "cache/prefixes/.0a.x.part": b"x",
    }
    for name, content in files.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(content)
    number, _ = create_named(home / "cache" / "spill")
    os.close(number)
    left = cache(capfd, "ls")["items"]
    assert {item["kind"] for item in left} == set(cache_items.KINDS)
    while left[0]["kind"] != "models":
        row = left.pop(0)
        label = f"{row['kind']}/{row['name']}".rstrip("/")
        found = cache(capfd, "purge", label, "--yes")
        assert found["removed"] == [label]
        assert not any(
            os.path.lexists(p) for p in row["paths"] if all(p not in o["paths"] for o in left)
        )
        now = cache(capfd, "ls")["items"]
        assert [(o["kind"], o["name"]) for o in now] == [(o["kind"], o["name"]) for o in left]
    assert (
        "other programs share"
        in cache(capfd, "purge", "models/org/name", code=2)["error"]["message"]
    )


def test_an_empty_home(capfd, home, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda name: str(home / "other"))
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(home / "other cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "no hub"))
    assert labels(capfd) == {}
    assert cache(capfd, "du")["total_bytes"] == 0
    assert cache(capfd, "purge", "--yes")["removed"] == []
