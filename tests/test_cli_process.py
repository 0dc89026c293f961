"""The commands as processes: exit codes, signals, closed pipes, what lands on which stream.

Real processes run `cli_fake.py`, the command line with a model that answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("cli_fake.py")
# A process of these starts in 0.2 s; a loaded machine may need many times that.
PATIENCE_S = 30


def environment(tmp_path, **changes):
    """The machine's variables without ours, and a home that nobody shares."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EBBTIDE_", "FAKE_", "XDG_"))}
    homes = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "XDG_STATE_HOME": str(tmp_path / "state")}
    return {**kept, **homes, "HOME": str(tmp_path), **{k: str(v) for k, v in changes.items()}}


def start(tmp_path, *args, fake=True, **variables):
    command = [sys.executable, str(FAKE)] if fake else [sys.executable, "-m", "ebbtide"]
    return subprocess.Popen(
        [*command, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path, **variables),
        cwd=tmp_path,
    )


def run(tmp_path, *args, given="a document of five words", fake=True, **variables):
    """(exit code, standard output, standard error)"""
    process = start(tmp_path, *args, fake=fake, **variables)
    out, err = process.communicate(given.encode(), timeout=PATIENCE_S)
    return process.returncode, out.decode(), err.decode()


def wait_for(path, process):
    deadline_s = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


# --- answers


def test_the_answer_alone_goes_to_standard_output(tmp_path):
    code, out, err = run(tmp_path, "ask", "what is it")
    assert (code, out) == (0, "what is it\n")
    assert "No model given: using fake-model" in err and "warning: the fake warns" in err
    assert err.count("the fake warns") == 1


def test_quiet_silences_notes_but_no_warning(tmp_path):
    code, out, err = run(tmp_path, "ask", "what is it", "-q")
    assert (code, out, err) == (0, "what is it\n", "warning: the fake warns\n")


def test_no_escape_codes_and_no_progress_marks_without_a_terminal(tmp_path):
    _, out, err = run(tmp_path, "ask", "what is it", "-v", FORCE_COLOR="1")
    assert "\x1b" not in out + err and "\r" not in out + err


def test_json_is_one_object_on_one_line_with_every_field(tmp_path):
    code, out, _ = run(tmp_path, "ask", "what is it", "--json")
    assert code == 0 and out.count("\n") == 1
    found = json.loads(out)
    assert list(found) == [
        *("schema", "model", "text", "token_ids", "finish_reason", "usage", "timings"),
        *("memory", "kv", "plan", "warnings"),
    ]
    assert found["schema"] == 1 and found["model"] == "fake-model"
    assert found["text"] == "what is it" and found["finish_reason"] == "stop"
    # JSON has no infinity.
    assert found["timings"]["decode_tokens_per_s"] is None


def test_an_answer_that_was_cut_says_so(tmp_path):
    _, out, err = run(tmp_path, "ask", "what is it", "-n", "2")
    assert out == "what is\n" and "-n allows more" in err


# --- failures


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["ask", "q", "-m", "nofolder"], "neither a folder nor a GGUF file"),
        (["plan", "./nofolder"], "there is no folder or file"),
        (["plan", "-m", "."], "no config.json and no GGUF file"),
        (["ask", "q", "--revision", "main"], "the built-in model has no revisions"),
        (["ask", "q", "--spill-dir", "nofolder"], "--spill-dir nofolder is not a folder"),
    ],
)
def test_a_place_that_is_not_there_is_told_before_torch_is_imported(tmp_path, args, told):
    """Whose import takes seconds."""
    code = f"import sys; from ebbtide.cli import main; code = main.main({args!r})\n"
    code += "sys.exit(9 if 'torch' in sys.modules else code)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="a text",
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        cwd=tmp_path,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2 and told in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("ModelError", 2),
        ("UnsupportedModel", 2),
        ("BadCheckpoint", 2),
        ("InputError", 2),
        ("DoesNotFit", 3),
        ("ContextOverflow", 3),
        ("StorageError", 4),
    ],
)
def test_each_error_has_its_exit_code_and_its_fields(tmp_path, error, code):
    closed = tmp_path / "closed"
    found = run(tmp_path, "ask", "q", "--json", FAKE_ERROR=error, FAKE_CLOSED=closed)
    assert found[0] == code
    assert found[1].count("\n") == 1
    fields = json.loads(found[1])["error"]
    assert fields["type"] == error and fields["message"]
    if error == "DoesNotFit":
        assert fields["largest_context"] == 7 and fields["tier"] == "host"
    assert "Traceback" not in found[2]
    assert closed.read_text() == "stream closed"


def test_an_error_without_json_leaves_standard_output_empty(tmp_path):
    code, out, err = run(tmp_path, "ask", "q", FAKE_ERROR="StorageError")
    assert (code, out) == (4, "") and "Error: StorageError it is" in err


def test_our_fault_is_short_unless_verbose(tmp_path):
    code, out, err = run(tmp_path, "ask", "q", "--json", FAKE_ERROR="KeyError")
    assert code == 1 and "Traceback" not in err and "-v" in err
    assert json.loads(out)["error"]["type"] == "InternalError"
    code, _, err = run(tmp_path, "ask", "q", "-v", FAKE_ERROR="KeyError")
    assert code == 1 and "Traceback" in err


@pytest.mark.parametrize(
    "args",
    [
        ["ask"],
        ["nonsense"],
        ["ask", "q", "--nonsense"],
        ["ask", "q", "--host-memory", "8"],
        ["ask", "q", "--kv-bits", "5"],
        ["ask", "q", "--mode", "quick"],
        ["summarize", "--overflow", "refine"],
        ["ask", "q", "--overflow", "map-reduce"],
        ["ask", "q", "--pages", "9-3"],
        ["summarize", "--format", "pdf"],
        ["summarize", "--length", "epic"],
        ["ask", "q", "no-such-file"],
        ["ask", ""],
        ["chat", "model-a", "-m", "model-b", "-p", "hi"],
        ["chat", "--session", "../escape", "-p", "hi"],
        ["chat", "--continue", "-p", "hi"],
    ],
)
def test_usage_errors_exit_2_and_name_the_trouble(tmp_path, args):
    code, out, err = run(tmp_path, *args)
    assert (code, out) == (2, "") and err.startswith("Error: ")
    assert "Traceback" not in err
    code, out, _ = run(tmp_path, *args, "--json")
    assert code == 2 and out.count("\n") == 1 and json.loads(out)["error"]["message"]


def test_choices_that_do_not_exist_name_those_that_do(tmp_path):
    _, _, err = run(tmp_path, "ask", "q", "--mode=quick")
    assert "exact" in err and "bounded" in err
    _, _, err = run(tmp_path, "ask", "q", "--overflow=map-reduce")
    assert "summarize" in err and "(error)" in err


# --- signals


def interrupt(tmp_path, *args, at="piece", signum=signal.SIGINT, delay_s=0.2, **variables):
    """Sends the signal when the run is at `at`. (exit code, output, errors, marks of cleanup)"""
    ready, closed = tmp_path / f"ready-{at}", tmp_path / "closed"
    variables |= {"FAKE_READY": ready, "FAKE_CLOSED": closed, "FAKE_DELAY_S": delay_s}
    process = start(tmp_path, *args, **variables)
    process.stdin.write(b"a document of five words")
    process.stdin.close()
    process.stdin = None
    wait_for(ready, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=PATIENCE_S)
    marks = closed.read_text() if closed.exists() else ""
    return process.returncode, out.decode(), err.decode(), marks


def test_ctrl_c_keeps_the_answer_so_far_and_cleans_up(tmp_path):
    code, out, err, marks = interrupt(tmp_path, "ask", "one two three four five six", "-q")
    assert code == 130 and marks == "stream closed"
    assert out.startswith("one") and out.endswith("\n") and "six" not in out
    assert err == "warning: the fake warns\nCancelled.\n"


def test_ctrl_c_with_json_gives_the_object_of_a_cancelled_run(tmp_path):
    code, out, _, _ = interrupt(tmp_path, "ask", "one two three four five six", "--json")
    found = json.loads(out)
    assert code == 130 and out.count("\n") == 1
    assert found["finish_reason"] == "cancelled" and found["text"].startswith("one")
    assert found["usage"]["completion_tokens"] == len(found["token_ids"]) > 0


def test_ctrl_c_during_prefill(tmp_path):
    code, out, _, marks = interrupt(tmp_path, "ask", "one two", "--json", at="prefill", delay_s=0.5)
    assert code == 130 and marks == "stream closed"
    assert json.loads(out)["finish_reason"] == "cancelled" and json.loads(out)["text"] == ""


def test_ctrl_c_while_importing_is_silent(tmp_path):
    code, out, err, _ = interrupt(tmp_path, "ask", "q", at="import", FAKE_SLOW_IMPORT_S=20)
    assert (code, out, err) == (130, "", "")


def test_ctrl_c_while_importing_still_owes_json_its_object(tmp_path):
    args = ("ask", "q", "--json")
    code, out, err, _ = interrupt(tmp_path, *args, at="import", FAKE_SLOW_IMPORT_S=20)
    assert code == 130 and err == "" and out.count("\n") == 1
    assert json.loads(out)["finish_reason"] == "cancelled"


def test_sigterm_runs_the_cleanup(tmp_path):
    code, _, err, marks = interrupt(tmp_path, "ask", "one two three four", signum=signal.SIGTERM)
    assert code == 143 and marks == "stream closed" and "Traceback" not in err


def test_sigterm_while_importing(tmp_path):
    found = interrupt(
        tmp_path, "ask", "q", at="import", signum=signal.SIGTERM, FAKE_SLOW_IMPORT_S=20
    )
    assert found[:3] == (143, "", "")


# --- a reader that goes away, a disk that is full


def test_a_closed_pipe_ends_the_run_silently(tmp_path):
    process = start(tmp_path, "ask", "one two three four five", "-q", FAKE_DELAY_S=0.1)
    process.stdin.write(b"words")
    process.stdin.close()
    process.stdin = None
    assert process.stdout.read(1) == b"o"
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 141 and err == b"warning: the fake warns\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_write_that_was_cut_is_no_whole_one(tmp_path, unbuffered):
    """A text of several times what a pipe holds, of which its reader takes the beginning."""
    (tmp_path / "long.txt").write_text("words and words\n\n" * 100_000)
    args = ("summarize", str(tmp_path / "long.txt"), "--extract-only")
    process = start(tmp_path, *args, fake=False, PYTHONUNBUFFERED=unbuffered)
    assert process.stdout.read(5) == b"words"
    process.stdout.close()
    process.stdout = None
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 141


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["config", "show"], ["plan", "--json"]]
)
def test_a_pipe_that_was_closed_from_the_start(tmp_path, args):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, str(FAKE), *args],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
        timeout=PATIENCE_S,
    )
    os.close(writer)
    assert process.returncode == 141
    assert b"rror" not in process.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the system's shell has no >&-")
@pytest.mark.parametrize(
    "args", ["ask q --json", "--version", "--help", "ask q --kv-bits 5 --json"]
)
def test_a_standard_output_that_was_never_open(tmp_path, args):
    process = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" "{FAKE}" {args} >&-'],
        input=b"words",
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
        timeout=PATIENCE_S,
    )
    assert process.returncode == 141
    assert b"fault" not in process.stderr and b"Traceback" not in process.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("args", [["ask", "what is it"], ["--help"], ["ask", "-h"], ["--version"]])
def test_a_full_disk_behind_standard_output_is_a_storage_error(args, tmp_path):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, str(FAKE), *args],
            input=b"words",
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(tmp_path),
            timeout=PATIENCE_S,
        )
    assert process.returncode == 4
    assert process.stderr.count(b"No space left") == 1 and b"Traceback" not in process.stderr
    assert b"fault" not in process.stderr


# --- help


@pytest.mark.parametrize("columns", ["0", "1", "20", "79"])
def test_help_names_options_whole_in_few_columns(tmp_path, columns):
    code, out, _ = run(tmp_path, "summarize", "--help", COLUMNS=columns, fake=False)
    assert (
        code == 0 and "--max-new-tokens" in out and "--extract-only" in out and "\u2026" not in out
    )


# --- quick answers


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["ask", "--help"],
        ["chat", "--help"],
        ["summarize", "--help"],
        ["plan", "--help"],
        ["bench", "--help"],
        ["demo", "--help"],
        ["doctor", "--help"],
        ["config", "show", "--origin"],
        ["ask"],
        ["ask", "q", "--host-memory", "x"],
        ["chat", "--session", "../x", "-p", "hi"],
    ],
)
def test_help_and_usage_errors_import_no_torch(tmp_path, args):
    script = (
        "import sys\n"
        "from ebbtide.cli.main import main\n"
        f"code = main({args!r})\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(tmp_path),
        timeout=PATIENCE_S,
    )
    wrong = args == ["ask"] or "x" in args or "../x" in args
    assert process.returncode == (2 if wrong else 0), process.stderr.decode()


def test_importing_the_face_imports_no_torch(tmp_path):
    script = "import ebbtide, sys; ebbtide.errors; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(tmp_path))
