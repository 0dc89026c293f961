"""A PDF of 300 pages with the built-in model behind the commands: real processes, real answers.

What the model says is its own business: runs are compared with each other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from pdf_writer import write_pdf

from ebbtide.offload import builtin

pytest.importorskip("pypdfium2")
assert (builtin.HERE / "demo.json").exists(), "this installation lacks the built-in model"

# Several processes each import torch and read the book; another program may have the cores.
pytestmark = pytest.mark.timeout(240)
EBBTIDE = [sys.executable, "-m", "ebbtide"]
PATIENCE_S = 100
NUM_PAGES = 300
FACT, QUESTION = "The Leeds mill belongs to Egon.", "Who owns the Leeds mill?"
PARTS = [
    *("summarize", "book.pdf", "--context", "1024", "--overflow", "map-reduce", "-n", "16"),
    *("--threads", "1"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the book, and where the commands keep what they keep."""
    folder = tmp_path_factory.mktemp("home")
    pages = [f"Page {n} was quiet." for n in range(1, NUM_PAGES + 1)]
    pages[216] += f" {FACT}"
    (folder / "book.pdf").write_bytes(write_pdf(pages))
    return folder


def environment(home):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EBBTIDE_", "XDG_"))}
    places = {name: str(home / name) for name in ("cache", "config", "state")}
    return {**kept, "HOME": str(home), **{f"XDG_{k.upper()}_HOME": v for k, v in places.items()}}


def run(home, *args):
    """The object that --json prints."""
    process = subprocess.run(
        [*EBBTIDE, *args, "--json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        env=environment(home),
        cwd=home,
        timeout=PATIENCE_S,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_summary_keeps_to_a_schema_whose_memory_is_in_the_plan(home):
    pytest.importorskip("llguidance")
    schema = '{"type": "array", "items": {"enum": [0, 1, 2]}, "maxItems": 4}'
    (home / "small.txt").write_text(FACT)
    summarize = ("summarize", "small.txt", "-t", "1")
    found = run(home, *summarize, "--json-schema", schema)
    numbers = json.loads(found["text"])
    assert isinstance(numbers, list) and set(numbers) <= {0, 1, 2}
    kept, free = (
        run(home, *summarize, "--dry-run", *more)["plan"]["host"]["runtime"]
        for more in (("--json-schema", schema), ())
    )
    assert kept > free + (30 << 20)  # 36 MiB, less what one process has more than another


def test_questions_together_get_the_answers_they_get_alone(home):
    ask = ("ask", "book.pdf", "-t", "1", "-n", "16")
    together = run(home, *ask, "-Q", QUESTION, "-Q", "Summarize the document.")
    alone = run(home, *ask, "-Q", QUESTION, "--context", "8192")
    assert together["answers"][0]["token_ids"] == alone["token_ids"]
    read_twice = [answer["usage"]["prompt_tokens"] for answer in together["answers"]]
    usage = together["usage"]
    assert usage["prompt_tokens"] == sum(read_twice) and usage["recomputed_tokens"] == 0
    # The document was processed once: all that is new for the second question is the question.
    new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    assert read_twice[0] <= new < read_twice[0] + 600


def test_a_book_is_read_once(home, tmp_path):
    """Other processes find its pages, in other modes and from another folder; not if told so."""
    if shutil.disk_usage(home).free < 6 << 30:
        pytest.skip("5 GiB of the volume are to stay free, and there is no more")
    ask = ("ask", str(home / "book.pdf"), "-t", "1", "-n", "16")
    other = "What is on page 12?"
    expected = [
        run(home, *ask[:1], q, *ask[1:], "--prefix-cache", "off") for q in (QUESTION, other)
    ]
    assert [x["usage"]["prompt_tokens_details"]["cached_tokens"] for x in expected] == [0, 0]

    place = tmp_path / "else"
    place.mkdir()

    def cached(*args) -> int:
        found = run(place, *args)
        texts = [x["token_ids"] for x in found.get("answers", [found])]
        assert texts in ([expected[0]["token_ids"]], [x["token_ids"] for x in expected])
        usage = found["usage"]
        assert usage["recomputed_tokens"] == 0 and not found["warnings"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    total = expected[0]["usage"]["prompt_tokens"]
    first = (*ask[:1], QUESTION, *ask[1:])
    assert cached(*first) == 0
    assert cached(*first) == cached(*first, "--host-memory", "2GiB") == total - 1
    assert cached(*first, "--kv-bits", "6") == 0
    # Of a document with several questions whole cells are read before the first.
    assert cached(*ask, "-Q", QUESTION, "-Q", other) >= total - 600
    kept = run(place, "cache", "du")["kinds"]["prefixes"]
    assert kept["bytes"] > 1e6 and str(place) in kept["folder"]
    assert run(place, "cache", "purge", "prefixes", "-y")["bytes"] == kept["bytes"]
    assert cached(*first) == 0


def test_a_summary_in_parts_goes_on_after_a_kill(home):
    whole = run(home, *PARTS)
    parts = whole["map_reduce"]["parts"]
    assert len(parts) > 2 and parts[0]["label"].startswith("p. 1 - ")
    assert parts[-1]["label"].endswith(f"- p. {NUM_PAGES}")
    assert all(part["num_tokens"] <= 1024 and not part["reused"] for part in parts)
    assert sum(part["num_tokens"] for part in parts) <= whole["usage"]["prompt_tokens"]

    jobs = home / "state" / "ebbtide" / "jobs"
    process = subprocess.Popen(
        [*EBBTIDE, *PARTS, "-o", "out.md"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(home),
        cwd=home,
    )
    deadline_s = time.monotonic() + PATIENCE_S
    while len(list(jobs.rglob("answer-*.json"))) < 2:  # two parts are finished
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    assert not (home / "out.md").exists()
    again = run(home, *PARTS, "-o", "out.md")
    assert again["text"] == whole["text"]
    assert (home / "out.md").read_text(encoding="utf-8") == whole["text"].rstrip("\n") + "\n"
    reused = [part["reused"] for part in again["map_reduce"]["parts"]]
    assert sum(reused) >= 2 and reused == sorted(reused, reverse=True)
    assert again["usage"]["prompt_tokens"] < whole["usage"]["prompt_tokens"]
    assert [path for path in jobs.iterdir()] == []
