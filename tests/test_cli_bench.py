"""bench and doctor: what they measure and find, and the pages that commands write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cli_fake as fake
import pytest
from cli_face import all_asked, asked, face, give_input, opened  # noqa: F401 - a fixture

import ebbtide
from ebbtide import errors
from ebbtide.cli import main
from ebbtide.offload.planning import bandwidth, memory_at_hand

# --- bench


def test_bench_measures_the_ceilings_first_and_each_depth_on_a_fork(capfd):
    assert main.main(["bench", "m", "--depths", "100,0,20,20", "--prefill-tokens", "7"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith("ceilings") and "GB/s" in out[1]
    assert [line.split()[0] for line in out if line[8:9].isdigit()] == ["0", "20", "100"]
    calls = fake.FakeLLM.calls
    assert opened()["context"] == 100 + 7 + 16
    assert [len(p) for n, p in calls if n == "append"] == [0, 20, 80]
    assert all(p["eos_token_ids"] == () for n, p in calls if n == "stream")
    assert [len(p["prompt"]) for n, p in calls if n == "stream"] == [7, 7, 7]


def test_depths_may_be_counted_in_thousands():
    args = ["bench", "m", "--depths", "1k,0", "--prefill-tokens", "2k", "-n", "1k"]
    assert main.main(args) == 0
    assert opened()["context"] == 1024 + 2048 + 1024
    assert [len(p) for n, p in fake.FakeLLM.calls if n == "append"] == [0, 1024]


def test_bench_measures_nothing_for_what_is_no_model(capfd, monkeypatch):
    def refuse(model, **options):
        raise errors.ModelError("there is no folder")

    monkeypatch.setattr(fake.FakeLLM, "open", refuse)
    assert main.main(["bench", "m"]) == errors.ModelError.exit_code
    assert capfd.readouterr().out == ""


def test_bench_as_json(capfd):
    assert main.main(["bench", "--depths", "0", "--json", "-n", "3"]) == 0
    out = capfd.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1 and found["bandwidth_bytes_per_s"]["disk"] == 2000
    assert found["depths"][0]["depth"] == 0
    assert found["depths"][0]["decode_ceiling_tokens_per_s"] == 2


def test_bench_forgets_files_before_each_token_and_measures_with_its_threads(capfd, monkeypatch):
    monkeypatch.setenv("FAKE_FIRST_WORDS", "3")
    assert main.main(["bench", "--depths", "0", "--prefill-tokens", "3", "-t", "1"]) == 0
    names = [name for name, _ in fake.FakeLLM.calls]
    # Three pieces come, and the end.
    assert names[names.index("stream") :].count("forget files") == 4
    assert "with 1 thread\n" in capfd.readouterr().out


def test_bench_has_no_ceiling_where_files_stay_in_the_cache(capfd, monkeypatch):
    monkeypatch.setenv("FAKE_KEEPS_FILES", "1")
    assert main.main(["bench", "--depths", "0", "--json"]) == 0
    row = json.loads(capfd.readouterr().out)["depths"][0]
    assert row["decode_ceiling_tokens_per_s"] is row["decode_share_of_ceiling"] is None


@pytest.mark.parametrize("depths", ["", "x", "-1", "1,,2", "8kB", ",".join(map(str, range(40)))])
def test_depths_that_are_none(capfd, depths):
    assert main.main(["bench", "--depths", depths]) == 2


def test_one_token_has_no_time_between(capfd):
    assert main.main(["bench", "-n", "1"]) == 2
    assert "2 or more are needed" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("command", ["bench", "doctor"])
def test_what_is_measured_of_a_disk_keeps_to_its_allowance(capfd, monkeypatch, tmp_path, command):
    monkeypatch.setitem(vars(ebbtide), "measure_disk", bandwidth.measure_disk)
    args = [command, "--json", "--spill-dir", str(tmp_path), "--disk-memory"]
    assert main.main([*args, "2MiB"]) == 0
    out, err = capfd.readouterr()
    assert "is less certain than usual: --disk-memory allows 2.0 MiB" in err
    found = json.loads(out)
    assert found.get("bandwidth_bytes_per_s", {}).get("disk") or found["bandwidth"]["disk_way"]
    assert main.main([*args, "0"]) == 0
    out, err = capfd.readouterr()
    assert "not measured" in err and "--disk-memory allows 0 bytes" in err
    found = json.loads(out)
    assert "disk" not in " ".join(found.get("bandwidth_bytes_per_s") or found["bandwidth"])
    assert not found.get("problems")


# --- doctor


def test_doctor_looks_at_no_model(capfd, monkeypatch):
    assert main.main(["doctor", "-m", "m", "--quick"]) == 2
    assert "'ebbtide plan MODEL'" in " ".join(capfd.readouterr().err.split())
    monkeypatch.setenv("EBBTIDE_MODEL", "m")
    assert main.main(["doctor", "--quick"]) == 0


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


def test_doctor_tells_a_containers_memory_from_the_machines(capfd, monkeypatch):
    monkeypatch.setattr(memory_at_hand, "_control_groups", lambda: [(64 << 20, 16 << 20)])
    assert main.main(["doctor", "--json", "--quick"]) == 0
    memory = json.loads(capfd.readouterr().out)["memory"]
    assert (memory["total_bytes"], memory["available_bytes"]) == (64 << 20, 16 << 20)
    assert memory["machine_bytes"] > 64 << 20


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

    monkeypatch.setattr(ebbtide, "state_dir", refuse)
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
        (["summarize", "a.txt", "-o", "x", "--report", "./x"], "is where -o writes the summary"),
        (["bench", "--report", "."], "--report needs the name of a file"),
    ],
)
def test_a_page_that_cannot_be_is_said_before_the_work(capfd, args, says):
    Path("a.txt").write_text("Text of a.")
    assert main.main(args) == 2
    assert says in capfd.readouterr().err and not fake.FakeLLM.calls
    assert Path("a.txt").read_text() == "Text of a."
