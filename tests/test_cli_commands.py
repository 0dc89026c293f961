"""What ask, summarize and plan ask the model, and what they do with the answer."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import tracemalloc
from pathlib import Path

import cli_fake as fake
import pytest
from cli_face import all_asked, asked, face, give_input, opened  # noqa: F401 - a fixture

from ebbtide import errors
from ebbtide.cli import main, schema_option, summary_task
from ebbtide.cli.documents import names_apart
from ebbtide.cli.output_file import OutputFile
from ebbtide.cli.terminal import Terminal

# --- documents that no context holds


@pytest.mark.parametrize(
    "args", [["ask", "Q?"], ["ask", "-Q", "Q?", "-Q", "R?"], ["summarize"], ["calibrate"]]
)
def test_no_copy_is_made_of_a_text_that_no_context_holds(capfd, monkeypatch, args):
    """One character beyond the first 65,536 makes Python take four bytes for each."""
    text = "\U0001f600" + "word " * 200_000
    Path("a.txt").write_text(text, encoding="utf-8")
    open_model = fake.FakeLLM.open

    def start(model, **options):
        tracemalloc.start()
        return open_model(model, **options)

    def refuse(llm, prompt, context=None):
        assert sum(len(message["content"]) for message in prompt) >= 1_000_000
        raise errors.ContextOverflow("too long", needed_tokens=9, available_tokens=8)

    monkeypatch.setattr(fake.FakeLLM, "open", start)
    monkeypatch.setattr(fake.FakeLLM, "refuse_too_long", refuse)
    monkeypatch.setattr(fake.FakeLLM, "least_tokens", lambda llm, text: 200_000)
    try:
        assert main.main([*args, "a.txt"]) == errors.ContextOverflow.exit_code
        assert tracemalloc.get_traced_memory()[1] < len(text)  # a quarter of a copy
    finally:
        tracemalloc.stop()


# --- ask


def test_the_question_follows_the_document_in_one_message(capfd, tmp_path):
    Path("a.txt").write_text("Text of a.\n")
    assert main.main(["ask", "What is it?", "a.txt"]) == 0
    assert capfd.readouterr().out == "What is it?\n"
    assert asked() == {
        "prompt": [{"role": "user", "content": "Text of a.\n\nWhat is it?"}],
        "max_new_tokens": 512,
    }


def test_a_file_in_place_of_the_question_is_told_apart(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Text.")
    assert main.main(["ask", "a.txt", "What is it?"]) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert "a.txt is a file and What is it? is none" in error
    assert "the question comes before its files" in error
    assert main.main(["ask", "a.txt"]) == 2  # and reads no standard input
    assert 'ebbtide ask "..." a.txt' in " ".join(capfd.readouterr().err.split())
    assert main.main(["ask", "a.txt", "b.txt"]) == 2  # a question that names a file
    assert main.main(["ask", "What is it?", "b.txt"]) == 2
    assert "there is no file b.txt" in capfd.readouterr().err


def test_several_documents_get_headings(capfd, monkeypatch):
    Path("a.txt").write_text("Text of a.")
    give_input(monkeypatch, "Given text.\n")
    assert main.main(["ask", "Q?", "a.txt", "-"]) == 0
    content = asked()["prompt"][0]["content"]
    assert content == "# a.txt\n\nText of a.\n\n# standard input\n\nGiven text.\n\nQ?"


def test_files_of_one_name_are_told_apart_by_their_folders(capfd):
    for folder in ("a/x", "b/x", "c"):
        Path(folder).mkdir(parents=True)
        Path(folder, "t.txt").write_text(f"Text of {folder}.")
    assert main.main(["ask", "Q?", "a/x/t.txt", "b/x/t.txt", "c/t.txt"]) == 0
    headings = [line for line in asked()["prompt"][0]["content"].split("\n") if line[:1] == "#"]
    assert headings == ["# a/x/t.txt", "# b/x/t.txt", "# c/t.txt"]
    # A short path that others end in is all there is of it; one file twice is numbered.
    assert names_apart(["t.txt", "c/t.txt", "d.txt"]) == ["t.txt", "c/t.txt", "d.txt"]
    assert main.main(["ask", "Q?", "c/t.txt", "c/t.txt"]) == 0
    content = asked()["prompt"][0]["content"]
    assert "# t.txt\n" in content and "# t.txt (2)\n" in content


def test_an_answer_of_one_token_is_told_as_one(capfd):
    Path("a.txt").write_text("Text of a.")
    assert main.main(["ask", "What is it?", "a.txt", "-n", "1"]) == 0
    assert "The answer stopped after 1 token; -n allows more." in capfd.readouterr().err


def test_standard_input_without_a_file(capfd, monkeypatch):
    give_input(monkeypatch, "Given text.")
    assert main.main(["ask", "Q?"]) == 0
    assert asked()["prompt"][0]["content"] == "Given text.\n\nQ?"


@pytest.mark.parametrize("given", ['{"type": "object"}', "schema.json"])
def test_a_schema_is_a_text_or_a_file(capfd, monkeypatch, given):
    Path("schema.json").write_text('{"type": "object"}')
    give_input(monkeypatch, "x")
    assert main.main(["ask", "Q?", "--json-schema", given]) == 0
    assert asked()["json_schema"] == '{"type": "object"}'
    assert asked()["max_new_tokens"] == 512
    Path("a.txt").write_text("Text.")
    assert main.main(["ask", "-Q", "a", "-Q", "b", "a.txt", "--json-schema", given]) == 0
    assert [each["json_schema"] for each in all_asked()[-2:]] == ['{"type": "object"}'] * 2
    assert ("expect_schemas", None) in fake.FakeLLM.calls
    assert main.main(["chat", "-p", "Q?", "--json-schema", given]) == 0
    assert asked()["json_schema"] == '{"type": "object"}'


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ask", "Q?", "--json-schema", "absent.json"], "absent.json: No such file"),
        (["ask", "Q?", "--json-schema", "wrong.json"], "wrong.json: json_schema is not JSON"),
        (["ask", "Q?", "--json-schema", "large.json"], "large.json: it has more than 1,048,576"),
        (["ask", "Q?", "--json-schema", " "], "it is empty"),
        (["ask", "Q?", "--json-schema", "{]"], "json_schema is not JSON"),
        (["chat", "-p", "Q?", "--json-schema", "[1]"], "[1]: No such file"),
    ],
)
def test_what_is_no_schema_is_a_usage_error(capfd, monkeypatch, words, says):
    Path("wrong.json").write_text("{")
    Path("large.json").write_text("{}" + " " * (1 << 20))
    give_input(monkeypatch, "x")
    assert main.main(words) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert "--json-schema" in error and says in error
    assert not fake.FakeLLM.calls


def test_a_schema_needs_its_library(capfd, monkeypatch):
    monkeypatch.setattr(schema_option, "find_spec", lambda name: None)
    give_input(monkeypatch, "x")
    assert main.main(["ask", "Q?", "--json-schema", "{}"]) == 2
    assert "pip install 'ebbtide[structured]'" in capfd.readouterr().err
    assert not fake.FakeLLM.calls


def test_a_conversation_keeps_to_no_schema(capfd, monkeypatch):
    give_input(monkeypatch, "")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main.main(["chat", "--json-schema", "{}"]) == 2
    assert "a conversation keeps to no schema" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("files", [["-", "-"], ["empty.txt"], ["absent.txt"]])
def test_documents_that_cannot_be_read(capfd, monkeypatch, files):
    give_input(monkeypatch, "x")
    Path("empty.txt").write_text(" \n")
    assert main.main(["ask", "Q?", *files]) == 2
    assert not fake.FakeLLM.calls


def test_all_options_reach_the_model(capfd, monkeypatch):
    give_input(monkeypatch, "x")
    given = (
        "ask Q? -m some/model --revision v1 --device cpu -t 2 --device-memory 0 --host-memory 1GiB "
        "--disk-memory 2GiB --spill-dir d --context 999 --epsilon 0.1 --kv-bits 4 --weight-bits 8 "
        "-n 5 --temperature 0.5 --top-k 3 --seed 1 --top-p 0.9 --min-p 0.1 "
        "--repetition-penalty 1.2 --presence-penalty -0.5 --frequency-penalty 0.3 "
        "--typical-p 0.8 --no-repeat-ngram-size 4 --min-new-tokens 2 "
        "--stop END --think off --draft off --prefix-cache 3GiB"
    )
    code = main.main(given.split())
    assert code == 0
    assert opened() == {
        "model": "some/model",
        "revision": "v1",
        "device": "cpu",
        "budget": fake.FakeBudget(0, 2**30, 2**31),
        "mode": "exact",
        "epsilon": 0.1,
        "kv_bits": 4,
        "weight_bits": 8,
        "context": 999,
        "spill_dir": "d",
        "threads": 2,
        "draft": False,
        "prefix_cache": 3 * 2**30,
    }
    generation = {k: v for k, v in asked().items() if k != "prompt"}
    assert generation == {
        **{"max_new_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
        **{"presence_penalty": -0.5, "frequency_penalty": 0.3},
        **{"typical_p": 0.8, "no_repeat_ngram_size": 4, "min_new_tokens": 2},
        **{"repetition_penalty": 1.2, "seed": 1, "stop_strings": ["END"], "think": False},
    }
    assert "No model given" not in capfd.readouterr().err


def test_a_question_in_broken_bytes_is_a_usage_error(capfd):
    assert main.main(["ask", "caf\udce9?"]) == 2
    assert "not valid text" in capfd.readouterr().err


def test_control_characters_of_a_model_do_not_reach_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal = Terminal()
    terminal.answer("a\x1b]0;title\x07b\tc\n\x9bd")
    assert capsys.readouterr().out == "a]0;titleb\tc\nd"


def test_what_the_terminal_cannot_show_becomes_a_question_mark(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    give_input(monkeypatch, "x")
    assert main.main(["ask", "naïve €?", "-q"]) == 0
    assert stream.buffer.getvalue() == b"na?ve ??\n"
    stream.buffer.truncate(0)
    stream.buffer.seek(0)
    give_input(monkeypatch, "x")
    assert main.main(["ask", "naïve €?", "-q", "--json"]) == 0
    assert json.loads(stream.buffer.getvalue())["text"] == "naïve €?"


# --- summarize


def test_the_built_in_model_hears_the_words_it_was_taught(capfd):
    Path("a.txt").write_text("Text of a.\n")
    assert main.main(["summarize", "a.txt"]) == 0
    assert asked()["prompt"][0]["content"] == "Text of a.\n\nSummarize the document."


@pytest.mark.parametrize(
    ("length", "num_words"),
    [("short", 100), ("medium", 300), ("Long", 800), ("250w", 250), ("1200W", 1200), ("10w", 10)],
)
def test_other_models_are_told_the_length(capfd, monkeypatch, length, num_words):
    monkeypatch.setattr(fake.FakeLLM, "builtin", False)
    Path("a.txt").write_text("Text of a.")
    assert main.main(["summarize", "a.txt", "-m", "x", "--length", length]) == 0
    content = asked()["prompt"][0]["content"]
    assert f"about {num_words} words" in content.removeprefix("Text of a.\n\n")
    # Room for the words asked for: no tokenizer needs three tokens for one.
    assert 3 * num_words <= asked()["max_new_tokens"]
    several = summary_task.SummaryTask(num_words, None, builtin=False, several=True)
    assert "one summary" in several.whole()


@pytest.mark.parametrize(
    "length", ["brief", "250", "w", "9w", "0w", "-5w", "1.5kw", "²w", "1000000w"]
)
def test_a_length_that_is_none_is_told_with_those_that_are(capfd, length):
    Path("a.txt").write_text("Text of a.")
    assert main.main(["summarize", "a.txt", f"--length={length}"]) == 2
    told = " ".join(capfd.readouterr().err.split())
    assert f"--length: {length!r} is not allowed" in told
    assert "short, medium, long, or give a number of words such as 250w" in told


def test_the_summary_goes_to_its_file(capfd):
    Path("a.txt").write_text("x")
    Path("out.md").write_text("old")
    os.chmod("out.md", 0o640)
    assert main.main(["summarize", "a.txt", "-o", "out.md"]) == 0
    assert Path("out.md").read_text() == "Summarize the document.\n"
    assert stat.S_IMODE(os.stat("out.md").st_mode) == 0o640
    found = capfd.readouterr()
    assert found.out == "" and "Wrote out.md" in found.err
    assert sorted(os.listdir()) == ["a.txt", "out.md"]


def test_a_dash_is_standard_output(capfd):
    Path("a.txt").write_text("x")
    assert main.main(["summarize", "a.txt", "-o", "-"]) == 0
    assert capfd.readouterr().out == "Summarize the document.\n" and os.listdir() == ["a.txt"]


@pytest.mark.parametrize("option", ["-o", "--report"])
def test_a_file_without_a_name_is_refused(capfd, option):
    """As of a variable of a script that is not set: the summary went to standard output."""
    Path("a.txt").write_text("x")
    assert main.main(["summarize", "a.txt", option, ""]) == 2
    out, err = capfd.readouterr()
    assert out == "" and f"'' is not the name of a file; {option} needs one" in err


def test_a_failure_keeps_the_old_file(capfd, monkeypatch):
    Path("a.txt").write_text("x")
    Path("out.md").write_text("old")
    for error, code in (("StorageError", 4), ("KeyError", 1)):
        monkeypatch.setenv("FAKE_ERROR", error)
        assert main.main(["summarize", "a.txt", "-o", "out.md"]) == code
        assert Path("out.md").read_text() == "old"
        assert sorted(os.listdir()) == ["a.txt", "out.md"]


def test_an_interrupted_summary_is_printed_and_not_filed(capfd, monkeypatch):
    Path("a.txt").write_text("x")
    Path("out.md").write_text("old")
    monkeypatch.setattr(fake, "fake_output", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main.main(["summarize", "a.txt", "-o", "out.md"]) == 130
    assert Path("out.md").read_text() == "old"
    assert sorted(os.listdir()) == ["a.txt", "out.md"]
    assert capfd.readouterr().out == "Summarize the document.\n"


@pytest.mark.parametrize(
    "out", ["absent/out.md", "folder", "a.txt", "./folder/../a.txt", "a.txt/x"]
)
def test_a_place_that_cannot_be_written_is_found_before_the_work(capfd, out):
    Path("a.txt").write_text("x")
    Path("folder").mkdir()
    assert main.main(["summarize", "a.txt", "-o", out]) == 2
    assert not fake.FakeLLM.calls and Path("a.txt").read_text() == "x"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(capfd):
    Path("a.txt").write_text("x")
    Path("locked").mkdir(mode=0o500)
    assert main.main(["summarize", "a.txt", "-o", "locked/out.md"]) == 2


def test_a_device_is_written_and_not_replaced(capfd):
    Path("a.txt").write_text("x")
    assert main.main(["summarize", "a.txt", "-o", os.devnull]) == 0
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)


def test_a_link_stays_and_its_target_is_replaced(capfd):
    Path("target.md").write_text("old")
    os.symlink("target.md", "link.md")
    with OutputFile("link.md") as out:
        out.commit("new\n")
    assert os.path.islink("link.md") and Path("target.md").read_text() == "new\n"


def test_a_new_file_has_the_permissions_of_any_new_file():
    Path("plain").touch()
    with OutputFile("out.md") as out:
        out.commit("x")
    assert os.stat("out.md").st_mode == os.stat("plain").st_mode


# --- plan


def test_plan_prints_the_plan_and_asks_for_nothing_more(capfd):
    assert main.main(["plan", "some/model", "--context", "77"]) == 0
    assert capfd.readouterr().out == "the plan of the fake\n"
    (name, call), *others = fake.FakeLLM.calls
    # Of a context that does not fit there is a plan, too.
    assert name == "open" and call["model"] == "some/model" and call["context"] is None
    assert others == [("measure", None)]
    assert main.main(["plan", "some/model", "--context", "77", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["context"] == 77


def test_a_plan_of_several_contexts_is_a_table(capfd):
    assert main.main(["plan", "m", "--context", "9,8k"]) == 0
    _, head, *rows = capfd.readouterr().out.splitlines()
    assert head.split()[:3] == ["tokens", "fits", "RAM"]
    assert [row.split()[:2] for row in rows] == [["9", "yes"], ["8,192", "yes"]]
    assert len({len(line) for line in (head, *rows)}) == 1  # one below the other
    assert main.main(["plan", "m", "--context", "9,8k", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [plan["context"] for plan in found["plans"]] == [9, 8192] and found["schema"] == 1
    assert main.main(["plan", "m", "--context", "9,,8k"]) == 2
    assert main.main(["ask", "q", "--context", "9,8k"]) == 2


def test_a_plan_knows_the_speed_of_the_last_run(capfd):
    Path("a.txt").write_text("word " * 100)
    assert main.main(["ask", "q", "a.txt", "-m", "m"]) == 0
    capfd.readouterr()
    # The fake reads 10 tokens a second.
    assert main.main(["plan", "m", "--context", "100"]) == 0
    assert "reading about 10 s at the speed of an earlier run" in capfd.readouterr().out
    assert main.main(["plan", "m", "--context", "100,200", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["plans"]
    assert [plan["prefill_expected_s"] for plan in found] == [10, 20]


def test_a_plan_that_does_not_fit_is_still_a_plan(capfd, monkeypatch):
    assert main.main(["plan", "too-big", "--json"]) == 0
    out = capfd.readouterr().out
    assert (
        out.count("\n") == 1 and json.loads(out)["fits"] is False and json.loads(out)["schema"] == 1
    )
    monkeypatch.setattr(fake.FakePlan, "prefill_least_s", 2.0)
    for model, is_told in (("m", True), ("too-big", False)):  # nothing of it will be read
        assert main.main(["plan", model]) == 0
        assert ("reading at least" in capfd.readouterr().out) == is_told


def test_the_same_model_twice_is_no_contradiction(capfd):
    assert main.main(["plan", "m", "-m", "m"]) == 0
    assert main.main(["plan", "m", "-m", "other"]) == 2


def test_an_argument_beats_the_environment(capfd, monkeypatch):
    monkeypatch.setenv("EBBTIDE_MODEL", "from-environment")
    assert main.main(["plan", "m"]) == 0
    assert opened()["model"] == "m"


# --- the settings file


def test_a_commands_own_options_have_a_table(capfd, tmp_path, monkeypatch):
    give_input(monkeypatch, "hello")
    (tmp_path / "config.toml").write_text('seed = 5\n[chat]\nsystem = "be brief"\n')
    assert main.main(["chat"]) == 0
    system = {"role": "system", "content": "be brief"}
    assert asked()["prompt"][0] == system and asked()["seed"] == 5
    give_input(monkeypatch, "hello")
    monkeypatch.setenv("EBBTIDE_SYSTEM", "from the environment")
    assert main.main(["chat"]) == 0
    assert asked()["prompt"][0]["content"] == "from the environment"
