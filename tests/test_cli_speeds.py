"""What is remembered of how fast a model read and wrote: estimates are made from it."""

from __future__ import annotations

import json

import cli_fake as fake
import pytest

from ebbtide.cli import options, speeds

SETTINGS = options.Settings()


@pytest.fixture
def path(monkeypatch, tmp_path):
    """Of the file, in a folder of the user's state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "ebbtide").mkdir()
    return tmp_path / "ebbtide" / "speeds.json"


def answered(num_tokens, prefill, decode=5.0, cached=0):
    usage = {"prompt_tokens": num_tokens, "prompt_tokens_details": {"cached_tokens": cached}}
    timings = {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
    return {"usage": usage, "timings": timings}


def remember(*answers):
    speeds.remember(fake.FakeLLM, SETTINGS, list(answers))


def recall():
    return speeds.recall(fake.FakeLLM, SETTINGS)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"x": 1}', b"\xff", b"[[1]]", b'"x"'])
def test_a_damaged_file_is_no_trouble_and_is_written_anew(path, content):
    path.write_bytes(content)
    remember()
    assert path.read_bytes() == content and recall() == speeds.Speeds()
    remember(answered(1000, 10.0))
    assert recall().reading_s(1000) == 100


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: {"prefill": 10.0, "decode": 5.0},
        lambda entry: {**entry, "prefill": {"x": 1.0}},
        lambda entry: {**entry, "prefill": {"10": 0}},
        lambda entry: {**entry, "decode": {"10": float("nan")}},
        lambda entry: {**entry, "decode": {"10": 10**400}},
        lambda entry: {"prefill": entry["prefill"]},
        lambda entry: None,
    ],
)
def test_an_entry_that_is_none_says_nothing(path, damage):
    remember(answered(1000, 10.0))
    known = json.loads(path.read_bytes())
    path.write_text(json.dumps({key: damage(entry) for key, entry in known.items()}))
    assert recall() == speeds.Speeds()


@pytest.mark.parametrize(("cached", "speed"), [(0, 20.0), (450, 20.0), (900, 10.0)])
def test_an_answer_to_what_was_kept_says_nothing_of_speed(path, cached, speed):
    """The few tokens behind many that are kept are read slowly."""
    remember(answered(1000, 10.0))
    remember(answered(1000, 20.0, cached=cached))
    assert recall().reading_s(1000) == 1000 / speed


def test_a_short_reading_says_nothing_of_a_long_one(path):
    """A token of a long text takes longer, for it sees those before it."""
    remember(answered(20_000, 40.0, decode=2.0))
    remember(answered(300, 200.0, decode=9.0))
    known = recall()
    assert known.reading_s(20_000) == 500 and known.reading_s(32_000) == 800
    assert known.reading_s(300) == 1.5 and known.reading_s(100) == 0.5
    assert known.writing_s(10, 20_000) == 5 and known.writing_s(9, 300) == 1


def test_the_last_reading_of_a_length_counts(path):
    remember(answered(20_000, 40.0), answered(300, 200.0))
    remember(answered(17_000, 80.0))
    assert recall().reading_s(20_000) == 250 and recall().reading_s(300) == 1.5


def test_between_two_lengths_the_nearer_counts_and_else_the_slower(path):
    remember(answered(1024, 100.0), answered(16_384, 50.0))
    known = recall()
    assert [known.reading_s(n) for n in (2048, 4096, 8192)] == [20.48, 81.92, 163.84]


def test_an_answer_of_one_token_says_nothing_of_writing(path):
    remember(answered(1000, 10.0, decode=0.0))
    assert recall().reading_s(10) == 1 and recall().writing_s(10, 1000) is None


def test_few_tokens_say_nothing(path):
    remember(answered(63, 10.0))
    assert recall() == speeds.Speeds() and not path.exists()
