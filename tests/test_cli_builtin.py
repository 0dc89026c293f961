"""The commands with the built-in model behind them: real processes, real answers, to the letter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from ebbtide.offload import builtin

assert (builtin.HERE / "demo.json").exists(), "this installation lacks the built-in model"
MATERIAL = builtin.demo_material()
EBBTIDE = [sys.executable, "-m", "ebbtide"]
PATIENCE_S = 55


def environment(tmp_path, **changes):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EBBTIDE_", "XDG_"))}
    homes = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    return {**kept, **homes, "XDG_CACHE_HOME": str(tmp_path / "cache"), **changes}


def run(tmp_path, *args, given=None, command=EBBTIDE):
    """(exit code, standard output, standard error)"""
    process = subprocess.run(
        [*command, *map(str, args), "--threads", "1"],
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        encoding="utf-8",
        env=environment(tmp_path),
        cwd=tmp_path,
        timeout=PATIENCE_S,
    )
    return process.returncode, process.stdout, process.stderr


def opening_of_the_story(num_chapters=2):
    """Its first chapters, and the questions that they answer."""
    text = Path(MATERIAL["story"]).read_text(encoding="utf-8")
    starts = [m.start() for m in re.finditer(r"^## ", text, re.MULTILINE)]
    questions = [q for q in MATERIAL["questions"] if q["chapter"] <= num_chapters]
    return text[: starts[num_chapters]], questions


def test_ask_finds_the_fact(tmp_path):
    text, questions = opening_of_the_story()
    (tmp_path / "story.md").write_text(text)
    code, out, err = run(tmp_path, "ask", questions[0]["question"], "story.md")
    assert (code, out) == (0, questions[0]["answer"] + "\n")
    assert "No model given" in err


def test_json_has_every_field_with_its_own_type(tmp_path):
    text, questions = opening_of_the_story(1)
    code, out, err = run(tmp_path, "ask", questions[0]["question"], "-", "--json", "-q", given=text)
    assert (code, err) == (0, "") and out.count("\n") == 1
    found = json.loads(out)
    assert found["text"] == questions[0]["answer"] and found["finish_reason"] == "stop"
    usage, kv, memory = found["usage"], found["kv"], found["memory"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len(found["token_ids"])
    assert usage["recomputed_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert set(found["timings"]) == {
        *("load_s", "prefill_s", "ttft_s", "decode_s"),
        *("prefill_tokens_per_s", "decode_tokens_per_s"),
    }
    assert set(kv) == {
        *("bits_per_element", "pages", "resident_bytes_per_token", "bytes_read"),
        *("bytes_written", "bytes_kept", "hit_rate", "stall_s", "missed_mass"),
    }
    assert memory["device"] is None or set(memory["device"]) == {"budget_bytes", "peak_bytes"}
    for tier in ("host", "disk"):
        assert 0 <= memory[tier]["peak_bytes"] <= memory[tier]["budget_bytes"]
    assert found["plan"]["fits"] is True and found["warnings"] == []


def test_summarize_to_a_file(tmp_path):
    code, out, _ = run(tmp_path, "summarize", MATERIAL["report"], "-o", "summary.md", "-q")
    assert (code, out) == (0, "")
    summary = (tmp_path / "summary.md").read_text()
    # To the letter: the model's own tests show that every token of it wins with a wide margin.
    assert summary == MATERIAL["summary"]["answer"] + "\n"


def test_what_windows_lacks_is_not_needed(tmp_path):
    """The demonstration, pages on disk included, where no call that is POSIX's alone is found."""
    script = Path(__file__).with_name("like_windows.py")
    (tmp_path / "story.md").write_text(opening_of_the_story()[0])
    like_windows = [sys.executable, str(script), "ebbtide"]
    code, out, err = run(tmp_path, "demo", "story.md", "--json", command=like_windows)
    assert code == 0, err
    found = json.loads(out)
    assert found["passed"] and len(found["answers"]) > 1


def test_the_demo_answers_from_a_quarter_of_the_memory(tmp_path):
    """On the opening of its story, which is as much as a test has time for."""
    text, questions = opening_of_the_story(6)
    (tmp_path / "opening.md").write_text(text)
    # A question stands for the summary: the report is longer than this story.
    material = {"story": str(tmp_path / "opening.md"), "questions": questions}
    material |= {"report": material["story"], "summary": questions[0]}
    script = (
        "import sys, ebbtide\n"
        f"ebbtide.demo_material = lambda: {material!r}\n"
        "from ebbtide.cli.main import main\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", script]
    code, out, err = run(tmp_path, "demo", "--json", command=command)
    assert code == 0, err
    found = json.loads(out)
    assert found["passed"] and len(found["answers"]) == len(questions) > 1
    assert found["summary"]["text"] == questions[0]["answer"]
    spans = found["plan"]["far_spans"]
    assert spans["host"] / sum(spans.values()) <= 0.25
    assert found["kv"]["bytes_read"]["disk"] > 0
    host = found["memory"]["host"]
    assert host["peak_bytes"] <= host["budget_bytes"]
    # Nothing is left where pages were spilled.
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_what_does_not_fit_is_told_with_the_numbers(tmp_path):
    code, out, _ = run(
        tmp_path, "ask", "q", "--host-memory", "16MiB", "--json", given="a few words"
    )
    error = json.loads(out)["error"]
    assert code == 3 and error["type"] == "DoesNotFit" and error["tier"] == "host"
    assert error["needed_bytes"] > error["available_bytes"] == 16 * 2**20
    assert "largest_context" in error
    code, out, _ = run(tmp_path, "plan", "--host-memory", "16MiB", "--json")
    assert code == 0 and json.loads(out)["fits"] is False


def test_a_prompt_that_is_too_long_is_never_cut(tmp_path):
    code, out, err = run(tmp_path, "ask", "q", "--context", "8", given="many words " * 50)
    assert (code, out) == (3, "") and "--context" in err


def test_sigterm_while_reading_leaves_nothing_behind(tmp_path):
    text = Path(MATERIAL["story"]).read_text(encoding="utf-8") * 2
    (tmp_path / "long.md").write_text(text)
    process = subprocess.Popen(
        [*EBBTIDE, "ask", "q", "long.md", "-t", "1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
        cwd=tmp_path,
    )
    # Notes come once torch is there and the model is open.
    assert b"No model given" in process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143 and out == b"" and b"Traceback" not in err
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
