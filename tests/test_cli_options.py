"""The shared options: how values are read, where they come from, and what the user is told."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ebbtide import errors
from ebbtide.cli import app, config, failure, main, options, settings_file, values
from ebbtide.offload.sessions import setting_checks

MIB, GIB = 2**20, 2**30
pytestmark = pytest.mark.usefixtures("alone")


def shown(capfd, *args):
    """What `config show --origin --json` says: {option: {"value": ..., "origin": ...}}."""
    assert main.main(["config", "show", "--origin", "--json", *args]) == 0
    return json.loads(capfd.readouterr().out)["options"]


# --- values


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("512MiB", 512 * MIB),
        ("6GiB", 6 * GIB),
        ("6 gib", 6 * GIB),
        ("2GB", 2 * 10**9),
        ("1.5KiB", 1536),
        ("0.5GiB", GIB // 2),
        ("100B", 100),
        ("0", 0),
        ("0GiB", 0),
        (" auto ", "auto"),
        ("AUTO", "auto"),
    ],
)
def test_sizes(text, wanted):
    assert values.size(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "-1GiB",
        "GiB",
        "6G",
        "6GiBs",
        "1e3MiB",
        "nan",
        "inf GiB",
        "0x10B",
        "9" * 400 + "TiB",
    ],
)
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="allowed are sizes such as 512MiB, 6GiB or 2GB, "):
        values.size(text)


def test_a_number_without_unit_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 8GiB"):
        values.size("8")
    with pytest.raises(ValueError, match="did you mean 6GiB"):
        values.size("6G")


def test_tokens_may_be_counted_in_thousands_and_millions():
    for text in ("32k", "32K", "32Ki", "32768"):
        assert values.tokens()(text) == 32768
    for text in ("4M", "4m", "4Mi", "4096k"):
        assert values.tokens()(text) == 4 * 2**20
    with pytest.raises(ValueError, match=r"'2048M' is not .* from 1 to 2147483647, .*32k or 1M"):
        values.tokens()("2048M")
    assert values.tokens(0)("0") == 0
    for text in ("0", "-1", "1.5k", "8kB", "k", "", "8 k", "2k"):
        with pytest.raises(ValueError, match="is not a number of tokens from 1 to 2047"):
            values.tokens(1, 2047)(text)


def test_every_count_of_tokens_is_read_alike(capfd):
    found = shown(capfd, "--context", "32k", "-n", "2k")
    assert found["context"]["value"] == 32768 and found["max-new-tokens"]["value"] == 2048


def test_a_time_has_a_unit_or_is_never():
    found = [values.duration(text) for text in ("90s", "10M", " 2h ", "never")]
    assert found == [90, 600, 7200, math.inf]
    for text in ("10", "0s", "-1m", "1.5h", "", "m", "10 m"):
        with pytest.raises(ValueError, match="allowed are never, or one such as 90s, 10m or 2h"):
            values.duration(text)


@given(st.text(max_size=20))
def test_no_text_breaks_a_parser(text):
    """A wrong value is a ValueError, whatever it is."""
    for option in options.SHARED:
        if option.parse is not None:
            try:
                option.parse(text)
            except ValueError as error:
                assert str(error)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("threads", "2", ["0", "-1", "1.5", "x", "²", "1_0"]),
        (
            "context",
            "32k",
            ["0", "-1", "0k", "0M", "k", "1.5k", "9999999k", "32kk", "9i", "9\u212a", "9" * 20],
        ),
        ("epsilon", "0.02", ["0", "1", "nan", "-0.1"]),
        ("temperature", "0", ["-1", "inf", "nan"]),
        ("top_p", "1", ["-0.1", "1.1"]),
        ("min_p", "0", ["-0.1", "2"]),
        ("typical_p", "0.9", ["-0.1", "2"]),
        ("repetition_penalty", "1.1", ["0", "101"]),
        ("presence_penalty", "-2", ["-2.1", "2.1", "nan"]),
        ("frequency_penalty", "0.5", ["-3", "3"]),
        ("no_repeat_ngram_size", "0", ["-1", "2.5"]),
        ("min_new_tokens", "0", ["-1", "x"]),
        ("kv_bits", "6", ["5", "16", "6.0"]),
        ("weight_bits", "full", ["6"]),
        ("device", "CPU", ["gpu"]),
        ("think", "on", ["yes", "true", "max"]),
        ("think", "LOW", ["1"]),
        ("mode", "deadline", ["quick", "bound"]),
        ("overflow", "error", ["drop", "map"]),
        ("seed", "0", ["-1", str(2**64)]),
    ],
)
def test_limits_of_options(name, good, bad):
    parse = options.BY_NAME[name].parse
    parse(good)
    for text in bad:
        with pytest.raises(ValueError):
            parse(text)


def test_settings_have_a_field_with_the_same_default_for_every_option():
    defaults = {f.name: f.default for f in fields(options.Settings) if f.name != "origins"}
    table = {o.name: False if o.parse is None else o.default for o in options.SHARED}
    assert defaults == table


# --- precedence


def test_command_line_over_environment_over_file_over_default(capfd, monkeypatch, alone):
    assert shown(capfd)["host-memory"] == {"value": "auto", "origin": "default"}
    alone.write_text('host-memory = "1GiB"\nseed = 1\nquiet = true\nstop = ["a", "b c"]\n')
    found = shown(capfd)
    assert found["host-memory"] == {"value": GIB, "origin": f"host-memory in {alone}"}
    assert found["seed"]["value"] == 1 and found["quiet"]["value"] is True
    assert found["stop"]["value"] == ["a", "b c"]
    monkeypatch.setenv("EBBTIDE_HOST_MEMORY", "2GiB")
    monkeypatch.setenv("EBBTIDE_STOP", "one two")
    monkeypatch.setenv("EBBTIDE_QUIET", "0")
    found = shown(capfd)
    assert found["host-memory"] == {"value": 2 * GIB, "origin": "EBBTIDE_HOST_MEMORY"}
    assert found["stop"]["value"] == ["one two"]
    assert found["quiet"] == {"value": False, "origin": "EBBTIDE_QUIET"}
    found = shown(capfd, "--host-memory", "3GiB", "--stop", "x", "--stop", "y")
    assert found["host-memory"] == {"value": 3 * GIB, "origin": "--host-memory"}
    assert found["stop"] == {"value": ["x", "y"], "origin": "--stop"}


def test_what_commands_alone_have_is_shown_where_it_is_set(capfd, monkeypatch, alone):
    alone.write_text('[chat]\nhistory = false\nsystem = "x"\n[serve]\napi-key = "secret"\n')
    monkeypatch.setenv("EBBTIDE_SYSTEM", "be\nbrief")
    monkeypatch.setenv("EBBTIDE_PORT", "99")
    assert main.main(["config", "show", "--origin", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["commands"]
    assert found["chat"] == {
        "system": {"value": "be\nbrief", "origin": "EBBTIDE_SYSTEM"},
        "history": {"value": False, "origin": f"history in [chat] of {alone}"},
    }
    assert found["serve"]["port"] == {"value": "99", "origin": "EBBTIDE_PORT"}
    assert main.main(["config", "show"]) == 0
    out = capfd.readouterr().out
    lines = [line.split(maxsplit=1) for line in out.splitlines()[-4:]]
    assert lines == [
        *(["chat.system", "be brief"], ["chat.history", "false"]),
        *(["serve.port", "99"], ["serve.api-key", "(hidden)"]),
    ]
    assert "secret" not in out


def test_values_are_shown_in_words_that_options_take(capfd, monkeypatch):
    texts = {"draft": "off", "think": "on", "verbose": "true", "prefix_cache": "1.5 GiB"}
    for name, text in texts.items():
        monkeypatch.setenv(f"EBBTIDE_{name.upper()}", text)
    assert main.main(["config", "show"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines())
    for name, text in texts.items():
        assert shown[name.replace("_", "-")].strip() == text


def test_an_empty_variable_is_none(capfd, monkeypatch):
    monkeypatch.setenv("EBBTIDE_SEED", "")
    assert shown(capfd)["seed"] == {"value": None, "origin": "the model's, or the default"}


def test_every_option_reads_its_variable_and_its_key(capfd, monkeypatch, alone):
    """One name for all commands: EBBTIDE_<OPTION>, whatever the command."""
    texts = {
        **{"model": "m", "revision": "r", "device": "cpu", "threads": "3", "spill_dir": "d"},
        **{"device_memory": "1GiB", "host_memory": "1GiB", "disk_memory": "0", "context": "9"},
        **{"overflow": "error", "mode": "exact", "epsilon": "0.5", "kv_bits": "8"},
        **{"draft": "off", "prefix_cache": "off"},
        **{"weight_bits": "4", "max_new_tokens": "7", "temperature": "0.5", "top_k": "5"},
        **{"top_p": "0.5", "min_p": "0.5", "repetition_penalty": "1.5", "stop": "s", "seed": "6"},
        **{"presence_penalty": "1", "frequency_penalty": "-1"},
        **{"typical_p": "0.5", "no_repeat_ngram_size": "3", "min_new_tokens": "2"},
        **{"think": "on", "json": "true", "quiet": "true", "verbose": "true"},
    }
    assert set(texts) == set(options.BY_NAME)
    for name, text in texts.items():
        monkeypatch.setenv(f"EBBTIDE_{name.upper()}", text)
    for key, entry in shown(capfd).items():
        # --json itself is on this command line.
        wanted = "--json" if key == "json" else f"EBBTIDE_{key.upper().replace('-', '_')}"
        assert entry["origin"] == wanted
    for name in texts:
        monkeypatch.delenv(f"EBBTIDE_{name.upper()}")
    switches = ("json", "quiet", "verbose")
    lines = [f"{n} = {t}" if n in switches else f'{n} = "{t}"' for n, t in texts.items()]
    alone.write_text("\n".join(lines))
    for key, entry in shown(capfd).items():
        assert entry["origin"] == ("--json" if key == "json" else f"{key} in {alone}")


# --- what the user is told


def test_a_wrong_value_is_named_with_its_place(capfd, monkeypatch, alone):
    alone.write_text("kv-bits = 5\n")
    assert main.main(["config", "show"]) == 2
    assert f"kv-bits in {alone}: '5' is not allowed" in capfd.readouterr().err
    assert main.main(["config", "show", "--prefix-cache", "banana"]) == 2
    assert "'banana' is not a size; allowed are sizes such as" in (err := capfd.readouterr().err)
    assert "off (or 0) to keep none" in " ".join(err.split())
    monkeypatch.setenv("EBBTIDE_KV_BITS", "7")
    assert main.main(["config", "show"]) == 2
    assert "EBBTIDE_KV_BITS: '7' is not allowed; choose from" in capfd.readouterr().err
    assert main.main(["config", "show", "--kv-bits", "9"]) == 2
    assert "--kv-bits: '9' is not allowed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kv_bit = 4", "unknown key 'kv_bit'; did you mean 'kv-bits'?"),
        ("modle = 'x'", "unknown key 'modle'; did you mean 'model'?"),
        ("zebra = 4", "unknown key 'zebra'; known are model,"),
        ("[chap]\nsystem = 'x'", "unknown key 'chap'"),
        ("json = 'yes'", "json in"),
        ("seed = [1]", "seed in"),
        ("seed = true", "seed in"),
        ("stop = [1]", "stop in"),
        ("kv-bits = ", "not valid TOML"),
        ("\xff", "it must be UTF-8, and its byte 0 (0xff) is not"),
    ],
)
def test_a_wrong_file_is_named_and_stops_no_help(capfd, alone, text, told):
    alone.write_bytes(text.encode("latin-1"))
    assert main.main(["config", "show"]) == 2
    error = capfd.readouterr().err
    assert told in error and str(alone) in error
    assert main.main(["ask", "--help"]) == 0
    assert main.main(["--version"]) == 0


def test_a_settings_file_that_is_a_folder_is_said_to_be(capfd, alone):
    alone.mkdir()
    assert main.main(["config", "show"]) == 2
    assert f"{alone} cannot be read: it is a folder" in capfd.readouterr().err


@pytest.mark.parametrize("command", [["chat", "-p", "x"], ["config", "show"]])
def test_a_switch_that_is_neither_true_nor_false(capfd, monkeypatch, command):
    monkeypatch.setenv("EBBTIDE_HISTORY" if command[0] == "chat" else "EBBTIDE_QUIET", "maybe")
    assert main.main(command) == 2
    assert ": 'maybe' is not allowed; choose from true and false" in capfd.readouterr().err


def test_a_text_that_ends_answers_has_a_length(capfd):
    for text in ("", "x" * (setting_checks.MAX_STOP_CHARS + 1)):
        assert main.main(["config", "show", "--stop", text]) == 2
        assert "--stop: a text of 1 to 1000 characters" in capfd.readouterr().err
    assert main.main(["config", "show", "--stop", "x" * setting_checks.MAX_STOP_CHARS]) == 0


def test_a_variable_that_nothing_reads_is_told_once_and_stops_nothing(capfd, monkeypatch):
    monkeypatch.setenv("EBBTIDE_HOST_MEMROY", "1GiB")
    monkeypatch.setenv("EBBTIDE_ZEBRA", "4")
    # All that there is, of every command and of the kernels.
    for name in ("SEED", "SYSTEM", "PORT", "API_KEY", "PAGES", "KERNELS", "INSTRUCTION_SET"):
        monkeypatch.setenv(f"EBBTIDE_{name}", "3")
    assert main.main(["config", "show", "-q"]) == 0
    assert capfd.readouterr().err.splitlines() == [
        "warning: EBBTIDE_HOST_MEMROY changes nothing: Ebbtide reads no such variable; "
        "did you mean EBBTIDE_HOST_MEMORY?",
        "warning: EBBTIDE_ZEBRA changes nothing: Ebbtide reads no such variable; "
        "'ebbtide config show' lists the options.",
    ]


@pytest.mark.parametrize(
    ("group", "commands"), [("cache", "ls, du, gc or purge"), ("config", "show or path")]
)
def test_a_group_alone_says_what_it_wants(capfd, group, commands):
    assert main.main([group]) == 2
    out, err = capfd.readouterr()
    assert "Usage: ebbtide" in out
    assert err.startswith(f"Error: ebbtide {group} wants a command: {commands}.\n")


def test_on_and_off_may_be_booleans_in_the_file(capfd, alone):
    alone.write_text("think = false\n")
    assert shown(capfd)["think"]["value"] is False
    alone.write_text("think = 'low'\n")
    assert shown(capfd)["think"]["value"] == "low"


def test_a_mark_before_the_text_is_no_part_of_it(capfd, alone):
    alone.write_bytes(b"\xef\xbb\xbfseed = 3\r\n")
    assert shown(capfd)["seed"]["value"] == 3


def test_a_file_that_is_a_folder(tmp_path):
    with pytest.raises(errors.InputError, match="cannot be read"):
        settings_file.read_settings(tmp_path, {})
    assert settings_file.read_settings(tmp_path / "absent.toml", {}) == ({}, {})


# --- the commands' faces


def commands():
    """(path, command) of everything that can be run."""
    found = []

    def walk(path, command):
        found.append((path, command))
        for name, below in getattr(command, "commands", {}).items():
            walk([*path, name], below)

    walk([], app.build_command())
    return found


def test_all_commands_are_there():
    assert {" ".join(path) for path, _ in commands()} == {
        *("", "chat", "ask", "serve", "summarize", "plan", "demo", "bench"),
        *("calibrate", "doctor"),
        *("config", "config show", "config path"),
        *("cache", "cache ls", "cache du", "cache gc", "cache purge"),
    }


@pytest.mark.parametrize(
    ("path", "command"), commands(), ids=lambda x: "-".join(x) if isinstance(x, list) else ""
)
def test_help_has_a_summary_and_every_parameter_its_words(path, command):
    result = CliRunner().invoke(app.build_app(), [*path, "--help"])
    assert result.exit_code == 0
    # Switches take no value, and what may be repeated is said to be once.
    assert "bool" not in result.output and "...]..." not in result.output
    assert command.help and command.help.splitlines()[0].endswith(".")
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name


def test_no_two_options_of_a_command_share_a_flag():
    for path, command in commands():
        flags = [flag for p in command.params for flag in [*p.opts, *p.secondary_opts]]
        assert len(flags) == len(set(flags)), path


def test_the_bare_name_shows_the_commands(capfd):
    assert main.main([]) == 0
    assert "summarize" in capfd.readouterr().out


def test_an_unknown_command_is_named(capfd):
    assert main.main(["sumarize"]) == 2
    assert "'sumarize'" in capfd.readouterr().err


def test_config_path(capfd, alone, monkeypatch):

    monkeypatch.setattr(config, "settings_path", lambda: alone)
    assert main.main(["config", "path"]) == 0
    assert Path(capfd.readouterr().out.strip()) == alone


def test_the_usage_error_is_found_in_the_library():
    assert issubclass(typer.BadParameter, failure.USAGE_ERROR)
    assert failure.USAGE_ERROR.__name__ == "UsageError"


# --- what went wrong


def test_a_file_that_was_taken_for_an_option_is_named(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hint = "The file -a.txt is named by ./-a.txt"
    assert main.main(["ask", "Q?", "-a.txt"]) == 2
    assert hint not in capfd.readouterr().err  # there is none
    Path("-a.txt").write_text("")
    assert main.main(["ask", "Q?", "-a.txt"]) == 2
    assert hint in capfd.readouterr().err
    assert main.main(["ask", "Q?", "--", "-a.txt"]) == 2  # is empty
    assert main.main(["ask", "Q?", "./-a.txt"]) == 2
    assert "-a.txt is empty" in (said := capfd.readouterr().err) and hint not in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_file_that_may_not_be_written_is_no_fault_of_ours(number):
    """Such as a shell's, by --install-completion."""
    error = OSError(number, os.strerror(number), "/home/ann/.bashrc")
    fields, lines, code = failure.describe(error)
    assert code == 2 and fields["type"] == "InputError"
    assert lines == [f"Error: /home/ann/.bashrc cannot be used: {os.strerror(number)}."]
    assert failure.describe(OSError(errno.EIO, "odd", "x"))[2] == 1
