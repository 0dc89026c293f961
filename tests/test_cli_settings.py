"""The settings file's tables: what a command alone has, and how a wrong value is named."""

from __future__ import annotations

import pytest

from ebbtide.cli import main

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[chat]\nsytem = 'x'", "known are system, history"),
        ("[chat]\nsystem = [5]", "must be a text or a number"),
        ("[serve]\nport = true", "must be a text or a number"),
        ("[chat]\nhistory = 'no'", "must be true or false"),
        ("[chats]\nsystem = 'x'", "unknown key 'chats'"),
        ("[chat]\nprompt = 'x'", "unknown key 'prompt'"),
    ],
)
def test_a_wrong_table_is_named(capfd, tmp_path, text, says):
    (tmp_path / "config.toml").write_text(text)
    assert main.main(["config", "show"]) == 2
    assert says in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "key", "text", "says"),
    [
        ("summarize", "length", "x", "choose from short, medium, long"),
        ("summarize", "format", "pdf", "choose from md, txt, json"),
        ("summarize", "cite", "maybe", "choose from auto, on, off"),
        ("summarize", "prompt", " ", "it is empty"),
        ("ask", "pages", "9-1", "'9-1' holds no page"),
        ("calibrate", "pages", "x", "'x'"),
        ("serve", "port", "65536", "a whole number from 0 to 65535"),
        ("serve", "queue", "-1", "a whole number from 0 to 512"),
        ("serve", "max-body", "1KiB", "too small"),
        ("serve", "unload-after", "soon", "such as 90s, 10m or 2h"),
        ("serve", "api-key", "a b", "without spaces"),
    ],
)
def test_what_a_command_would_refuse_is_named_with_its_place(
    capfd, alone, monkeypatch, command, key, text, says
):
    """By the command, before it does anything, and by `config show`."""
    alone.write_text(f"[{command}]\n{key} = '{text}'\n")
    place = f"Invalid value for {key} in [{command}] of {alone}: "
    for args in ([command], ["config", "show", "--json"]):
        assert main.main(args) == 2
        said = " ".join(capfd.readouterr().err.split())
        assert place in said and says in said and f"'ebbtide {command} --help'" in said
        assert (text in said.partition(place)[2]) == (key != "api-key")
    alone.unlink()
    variable = f"EBBTIDE_{key.upper().replace('-', '_')}"
    monkeypatch.setenv(variable, text)
    assert main.main(["config", "show"]) == 2
    assert f"Invalid value for {variable}: " in capfd.readouterr().err
    monkeypatch.delenv(variable)
    assert main.main([command, f"--{key}", text]) == 2
    assert f"Invalid value for --{key}: " in capfd.readouterr().err


def test_a_key_is_not_shown_even_where_it_is_wrong(capfd, tmp_path):
    (tmp_path / "config.toml").write_text("[serve]\napi-key = ['hidden']")
    assert main.main(["config", "show"]) == 2
    said = capfd.readouterr().err
    assert "api-key in [serve]" in said and "hidden" not in said
