"""What each command asks the model, and what it does with the answer; the model is a fake."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import ebbtide
from ebbtide import errors
from ebbtide.cli import bench, documents, main, options, progress, settings_file, summary_task
from ebbtide.cli.output_file import OutputFile
from ebbtide.cli.terminal import Terminal

_spec = importlib.util.spec_from_file_location("cli_fake", Path(__file__).with_name("cli_fake.py"))
fake = importlib.util.module_from_spec(_spec)
sys.modules["cli_fake"] = fake  # dataclasses look their module up
_spec.loader.exec_module(fake)


@pytest.fixture(autouse=True)
def face(tmp_path, monkeypatch):
    """The public face with the fake behind it; no settings of the machine's user; an own folder."""
    for name, value in fake.FACE.items():
        # The face fetches names when asked; setattr would ask for the old one first.
        monkeypatch.setitem(vars(ebbtide), name, value)
    for option in options.SHARED:
        monkeypatch.delenv(option.envvar, raising=False)
    monkeypatch.setattr(settings_file, "settings_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr(main, "_install_signals", lambda process: None)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path.parent / f"{tmp_path.name}-state"))
    monkeypatch.chdir(tmp_path)
    fake.FakeLLM.calls.clear()
    return fake.FakeLLM


def give(monkeypatch, text):
    """Standard input that is not a terminal."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def all_asked():
    """What each stream was asked: prompt and generation options."""
    return [value for name, value in fake.FakeLLM.calls if name == "stream"]


def asked():
    return all_asked()[-1]


def opened():
    return [value for name, value in fake.FakeLLM.calls if name == "open"][-1]


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
    assert main.main(["ask", "a.txt", "b.txt"]) == 2  # a question that names a file
    assert main.main(["ask", "What is it?", "b.txt"]) == 2
    assert "there is no file b.txt" in capfd.readouterr().err


def test_several_documents_get_headings(capfd, monkeypatch):
    Path("a.txt").write_text("Text of a.")
    give(monkeypatch, "Given text.\n")
    assert main.main(["ask", "Q?", "a.txt", "-"]) == 0
    content = asked()["prompt"][0]["content"]
    assert content == "# a.txt\n\nText of a.\n\n# standard input\n\nGiven text.\n\nQ?"


def test_standard_input_without_a_file(capfd, monkeypatch):
    give(monkeypatch, "Given text.")
    assert main.main(["ask", "Q?"]) == 0
    assert asked()["prompt"][0]["content"] == "Given text.\n\nQ?"


@pytest.mark.parametrize("files", [["-", "-"], ["empty.txt"], ["absent.txt"]])
def test_documents_that_cannot_be_read(capfd, monkeypatch, files):
    give(monkeypatch, "x")
    Path("empty.txt").write_text(" \n")
    assert main.main(["ask", "Q?", *files]) == 2
    assert not fake.FakeLLM.calls


def test_all_options_reach_the_model(capfd, monkeypatch):
    give(monkeypatch, "x")
    given = (
        "ask Q? -m some/model --revision v1 --device cpu -t 2 --device-memory 0 --host-memory 1GiB "
        "--disk-memory 2GiB --spill-dir d --context 999 --epsilon 0.1 --kv-bits 4 --weight-bits 8 "
        "-n 5 --temperature 0.5 --top-k 3 --seed 1 --top-p 0.9 --min-p 0.1 "
        "--repetition-penalty 1.2 --stop END --think off --draft off --prefix-cache 3GiB"
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
        **{"repetition_penalty": 1.2, "seed": 1, "stop_strings": ["END"], "think": False},
    }
    assert "No model given" not in capfd.readouterr().err


def test_a_question_in_broken_bytes_is_a_usage_error(capfd):
    assert main.main(["ask", "caf\udce9?"]) == 2
    assert "no valid text" in capfd.readouterr().err


def test_control_characters_of_a_model_do_not_reach_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal = Terminal()
    terminal.answer("a\x1b]0;title\x07b\tc\n\x9bd")
    assert capsys.readouterr().out == "a]0;titleb\tc\nd"


def test_what_the_terminal_cannot_show_becomes_a_question_mark(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    give(monkeypatch, "x")
    assert main.main(["ask", "naïve €?", "-q"]) == 0
    assert stream.buffer.getvalue() == b"na?ve ??\n"
    stream.buffer.truncate(0)
    stream.buffer.seek(0)
    give(monkeypatch, "x")
    assert main.main(["ask", "naïve €?", "-q", "--json"]) == 0
    assert json.loads(stream.buffer.getvalue())["text"] == "naïve €?"


# --- summarize


def test_the_built_in_model_hears_the_words_it_was_taught(capfd):
    Path("a.txt").write_text("Text of a.\n")
    assert main.main(["summarize", "a.txt"]) == 0
    assert asked()["prompt"][0]["content"] == "Text of a.\n\nSummarize the document."


@pytest.mark.parametrize(("length", "num_words"), [("short", 100), ("medium", 300), ("long", 800)])
def test_other_models_are_told_the_length(capfd, monkeypatch, length, num_words):
    monkeypatch.setattr(fake.FakeLLM, "builtin", False)
    Path("a.txt").write_text("Text of a.")
    assert main.main(["summarize", "a.txt", "-m", "x", "--length", length]) == 0
    content = asked()["prompt"][0]["content"]
    assert f"about {num_words} words" in content.removeprefix("Text of a.\n\n")
    # Room for the words asked for: no tokenizer needs three tokens for one.
    assert 3 * num_words <= asked()["max_new_tokens"]
    several = summary_task.SummaryTask(length, None, builtin=False, several=True)
    assert "one summary" in several.whole()


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


def test_plan_prints_the_plan_and_opens_nothing(capfd):
    assert main.main(["plan", "some/model", "--context", "77"]) == 0
    assert capfd.readouterr().out == "the plan of the fake\n"
    ((name, call),) = fake.FakeLLM.calls
    assert name == "plan_for" and call["model"] == "some/model" and call["context"] == 77


def test_a_plan_that_does_not_fit_is_still_a_plan(capfd):
    assert main.main(["plan", "too-big", "--json"]) == 0
    out = capfd.readouterr().out
    assert (
        out.count("\n") == 1 and json.loads(out)["fits"] is False and json.loads(out)["schema"] == 1
    )


def test_the_same_model_twice_is_no_contradiction(capfd):
    assert main.main(["plan", "m", "-m", "m"]) == 0
    assert main.main(["plan", "m", "-m", "other"]) == 2


def test_an_argument_beats_the_environment(capfd, monkeypatch):
    monkeypatch.setenv("EBBTIDE_MODEL", "from-environment")
    assert main.main(["plan", "m"]) == 0
    assert fake.FakeLLM.calls[-1][1]["model"] == "m"


# --- pieces


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


# --- bench


def test_bench_measures_the_ceilings_first_and_each_depth_on_a_fork(capfd):
    assert main.main(["bench", "m", "--depths", "100,0,20,20", "--prefill-tokens", "7"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith("ceilings") and "GB/s" in out[1]
    assert [line.split()[0] for line in out if line[8:9].isdigit()] == ["0", "20", "100"]
    calls = fake.FakeLLM.calls
    assert opened()["context"] == 100 + 7 + 16
    assert [len(p) for n, p in calls if n == "append"] == [0, 20, 80]
    assert all(p["eos_token_ids"] == () for n, p in calls if n == "generate")
    assert [len(p["prompt"]) for n, p in calls if n == "generate"] == [7, 7, 7]


def test_bench_as_json(capfd):
    assert main.main(["bench", "--depths", "0", "--json", "-n", "3"]) == 0
    out = capfd.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1 and found["bandwidth_bytes_per_s"]["disk"] == 1000
    assert found["depths"][0]["depth"] == 0


@pytest.mark.parametrize("depths", ["", "x", "-1", "1,,2", ",".join(map(str, range(40)))])
def test_depths_that_are_none(capfd, depths):
    assert main.main(["bench", "--depths", depths]) == 2


def test_the_ceiling_counts_pages_by_depth_and_weights_whole():
    plan = fake.FakePlan(context=100)
    # Per token at full depth: 1000 bytes of weights and 2000 of pages from RAM, 2000 from disk.
    full = bench.ceiling_tokens_per_s(plan, 100, {"host": 1e4, "disk": 1e3})
    assert full == pytest.approx(1 / (0.3 + 2.0))
    half = bench.ceiling_tokens_per_s(plan, 50, {"host": 1e4, "disk": 1e3})
    assert half == pytest.approx(1 / (0.2 + 1.0))
    assert bench.ceiling_tokens_per_s(plan, 50, {"host": 1e4}) is None
    # Where pages are selected, none of them is counted, at any depth.
    selecting = replace(plan, selects=True)
    assert bench.ceiling_tokens_per_s(selecting, 50, {"host": 1e4, "disk": 1e3}) == full


# --- demo


def test_the_demo_leaves_a_quarter_of_the_pages_room(capfd, monkeypatch):
    Path("story.md").write_text("A story.\n")
    monkeypatch.setenv("FAKE_STORY", "story.md")
    assert main.main(["demo"]) == 0
    found = capfd.readouterr()
    assert found.out == "Say blue. ✓\nSay green. ✓\n"
    assert ("keep_in_memory", 0.25) in fake.FakeLLM.calls
    assert "A quarter" in found.err or "a quarter" in found.err
    assert "ebbtide plan" in found.err
    assert [call["prompt"][0]["content"] for call in all_asked()] == [
        "A story.\n\nSay blue.",
        "A story.\n\nSay green.",
    ]


def test_the_demo_takes_the_budget_it_is_given(capfd, monkeypatch):
    Path("story.md").write_text("A story.\n")
    monkeypatch.setenv("FAKE_STORY", "story.md")
    assert main.main(["demo", "--host-memory", "1GiB", "--context", "999"]) == 0
    assert opened()["budget"].host_memory == 2**30 and opened()["context"] == 999
    assert not any(name == "keep_in_memory" for name, _ in fake.FakeLLM.calls)


def test_a_wrong_answer_fails_the_demo(capfd, monkeypatch):
    Path("story.md").write_text("A story.\n")
    monkeypatch.setenv("FAKE_STORY", "story.md")
    monkeypatch.setenv("FAKE_ANSWER", "green")
    assert main.main(["demo", "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["passed"] is False and found["answers"][0]["correct"] is False
    assert found["summary"]["correct"] is False


def test_the_demo_writes_its_facts_into_a_novel(capfd):
    Path("novel.txt").write_text("One two. Three four! Five six. Seven eight.\n" * 100)
    assert main.main(["demo", "novel.txt", "--context", "212", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["passed"] and found["summary"] is None
    content = asked()["prompt"][0]["content"]
    assert content.endswith("\n\nSay blue.") and content.count("It is blue. ") == 1
    # Room for 20 words, the fact among them, near the middle.
    read = content.removesuffix("\n\nSay blue.")
    assert 18 <= len(read.split()) <= 20 and 6 <= read.split().index("It") <= 11


def test_a_wrong_answer_about_a_novel_is_counted(capfd, monkeypatch):
    Path("novel.txt").write_text("One two. " * 50)
    monkeypatch.setenv("FAKE_ANSWER", "red")
    assert main.main(["demo", "novel.txt"]) == 0
    assert "0 of 1 answers are right" in capfd.readouterr().err


def test_the_demo_is_the_built_in_models(capfd):
    assert main.main(["demo", "-m", "other"]) == 2


# --- doctor


def test_doctor_says_what_there_is(capfd, tmp_path):
    assert main.main(["doctor", "--json", "--spill-dir", str(tmp_path)]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["disk"]["spill_dir"] == os.path.realpath(tmp_path)
    assert found["disk"]["writable"] is True and found["disk"]["free_bytes"] > 0
    assert found["kernels"]["cpu"] in ("compiled", "reference")
    assert found["memory"]["total_bytes"] > 0
    assert found["packages"]["torch"] and found["packages"]["prompt_toolkit"]
    assert found["bandwidth"]["disk_random_bytes_per_s"] == 1e3
    assert found["state"]["writable"] is True
    # The tests' own environment keeps the hub out of it.
    assert "HF_HUB_OFFLINE" in found["hub"]["reachable"]


def test_a_quick_doctor_measures_nothing(capfd, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert main.main(["doctor", "--json", "--quick"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert "bandwidth" not in found and "reachable" not in found["hub"]


def test_doctor_asks_whether_the_hub_is_there(capfd, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert main.main(["doctor", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["hub"]["reachable"].startswith("no (")
    assert not any("127.0.0.1" in problem for problem in found["problems"])


def test_doctor_names_a_state_folder_that_cannot_be(capfd, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")

    def refuse(*parts):
        raise errors.InputError("no folder")

    monkeypatch.setitem(vars(ebbtide), "state_dir", refuse)
    assert main.main(["doctor", "--json", "--quick"]) == 0
    problems = json.loads(capfd.readouterr().out)["problems"]
    assert any("Nothing can be kept" in problem for problem in problems)


def test_doctor_names_what_is_wrong_and_hides_the_token(capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main.main(["doctor", "--spill-dir", "absent"]) == 0
    out = capfd.readouterr().out
    assert "! The spill folder" in out and "hf_secret" not in out


# --- reports


def test_summarize_writes_a_page(capfd):
    Path("a.txt").write_text("Text of a.")
    args = ["summarize", "a.txt", "-o", "s.md", "--report", "r.html"]
    assert main.main(args) == 0
    page = Path("r.html").read_text()
    assert "Summary of a.txt" in page and "What happened when" in page
    assert Path("s.md").read_text().strip() in page
    assert "Wrote r.html." in capfd.readouterr().err


def test_bench_writes_a_page(capfd):
    assert main.main(["bench", "--depths", "0,100", "--report", "b.html"]) == 0
    assert "Speed over depth" in Path("b.html").read_text()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["summarize", "a.txt", "--report", "no/such/folder.html"], "with --report"),
        (["summarize", "a.txt", "--report", "a.txt"], "one of the documents"),
        (["bench", "--report", "."], "--report needs the name of a file"),
    ],
)
def test_a_page_that_cannot_be_is_said_before_the_work(capfd, args, says):
    Path("a.txt").write_text("Text of a.")
    assert main.main(args) == 2
    assert says in capfd.readouterr().err and not fake.FakeLLM.calls
    assert Path("a.txt").read_text() == "Text of a."


# --- the settings file


def test_a_commands_own_options_have_a_table(capfd, tmp_path, monkeypatch):
    give(monkeypatch, "hello")
    (tmp_path / "config.toml").write_text('seed = 5\n[chat]\nsystem = "be brief"\n')
    assert main.main(["chat"]) == 0
    system = {"role": "system", "content": "be brief"}
    assert asked()["prompt"][0] == system and asked()["seed"] == 5
    give(monkeypatch, "hello")
    monkeypatch.setenv("EBBTIDE_SYSTEM", "from the environment")
    assert main.main(["chat"]) == 0
    assert asked()["prompt"][0]["content"] == "from the environment"
