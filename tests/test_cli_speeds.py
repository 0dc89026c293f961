"""What is remembered of how fast a model read and wrote: estimates are made from it."""

from __future__ import annotations

import cli_fake as fake
import pytest

from ebbtide.cli import options, speeds


@pytest.fixture
def home(monkeypatch, tmp_path):
    """The folder of the user's state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def test_speeds_are_no_trouble(home):
    settings = options.Settings()
    path = home / "ebbtide" / "speeds.json"
    path.parent.mkdir(parents=True)
    for content in (b"", b"[]", b'{"x": 1}', b"\xff"):
        path.write_bytes(content)
        assert speeds.recall(fake.FakeLLM, settings) is None
    speeds.remember(fake.FakeLLM, settings, [])


@pytest.mark.parametrize(("cached", "speed"), [(0, 20.0), (450, 20.0), (900, 10.0)])
def test_an_answer_to_what_was_kept_says_nothing_of_speed(home, cached, speed):
    """The few tokens behind many that are kept are read slowly."""

    def answered(cached, speed):
        usage = {"prompt_tokens": 1000, "prompt_tokens_details": {"cached_tokens": cached}}
        return {
            "usage": usage,
            "timings": {"prefill_tokens_per_s": speed, "decode_tokens_per_s": 5.0},
        }

    settings = options.Settings()
    speeds.remember(fake.FakeLLM, settings, [answered(0, 10.0)])
    speeds.remember(fake.FakeLLM, settings, [answered(cached, 20.0)])
    assert speeds.recall(fake.FakeLLM, settings)["prefill"] == speed
