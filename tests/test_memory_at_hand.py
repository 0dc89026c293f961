"""The memory at hand is what the tightest of machine and control groups leaves."""

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from ebbtide.offload.planning import memory_at_hand as module
from ebbtide.offload.planning.budget import Budget, resolve
from ebbtide.offload.planning.memory_at_hand import MemoryAtHand, memory_at_hand

GIB = 1 << 30
MACHINE = MemoryAtHand(16 * GIB, 10 * GIB)
NO_LIMIT = {1: str((1 << 63) - 4096), 2: "max"}  # as the versions of the interface say it


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    machine = SimpleNamespace(total=MACHINE.total, available=MACHINE.available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Says which groups the process is in (lines), and writes one."""
    own, root = tmp_path / "own", tmp_path / "groups"
    monkeypatch.setattr(module, "_OWN_GROUPS", own)
    monkeypatch.setattr(module, "_GROUPS", root)

    def write(version, path, limit, usage, cached=0, mapped=0):
        folder = root / ("memory" if version == 1 else "") / path
        folder.mkdir(parents=True, exist_ok=True)
        names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
        for name, number in zip(names, (limit, usage), strict=True):
            (folder / f"memory.{name}").write_text(f"{number}\n")
        prefix, of_mapped = ("total_", "mapped_file") if version == 1 else ("", "file_mapped")
        lines = [f"{prefix}inactive_file {cached // 2}", f"{prefix}active_file {cached // 2}"]
        lines += [f"{prefix}{of_mapped} {mapped}", "pgfault 123"]
        (folder / "memory.stat").write_text("\n".join(lines) + "\n")

    def enter(*lines):
        own.write_text("\n".join(lines) + "\n")

    return SimpleNamespace(write=write, enter=enter)


LINE = {1: "4:cpu,memory:/a/b", 2: "0::/a/b"}


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_s_limit_counts_less_what_is_used_for_good(groups, version):
    """Cached files can go, but for those whose pages programs use."""
    groups.enter("9:name=systemd:/", LINE[version], "1:cpu:/elsewhere")
    groups.write(version, "a/b", 4 * GIB, 3 * GIB, cached=2 * GIB, mapped=GIB // 2)
    assert memory_at_hand() == (4 * GIB, 2.5 * GIB)


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_counts(groups, version):
    groups.enter(LINE[version])
    groups.write(version, "a/b", NO_LIMIT[version], 3 * GIB)
    groups.write(version, "a", 8 * GIB, 7 * GIB)
    assert memory_at_hand() == (8 * GIB, GIB)


@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_the_group_is_the_root_that_is_seen(groups, version):
    groups.enter(LINE[version])
    groups.write(version, "", 2 * GIB, GIB)
    assert memory_at_hand() == (2 * GIB, GIB)


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_without_a_limit_leaves_the_machine_s(groups, version):
    groups.enter(LINE[version])
    groups.write(version, "a/b", NO_LIMIT[version], 3 * GIB)
    assert memory_at_hand() == MACHINE


@pytest.mark.parametrize("version", [1, 2])
def test_more_than_the_limit_in_use_leaves_nothing(groups, version):
    groups.enter(LINE[version])
    groups.write(version, "a/b", GIB, 2 * GIB)
    assert memory_at_hand() == (GIB, 0)


def test_where_there_are_no_groups_the_machine_counts(groups):
    assert memory_at_hand() == MACHINE  # no /proc, as elsewhere than on Linux
    groups.enter("0::/gone", "no such line")
    assert memory_at_hand() == MACHINE


def test_an_automatic_budget_keeps_to_a_group(groups):
    groups.enter(LINE[2])
    groups.write(2, "a/b", 4 * GIB, GIB)
    limits = resolve(Budget(), None, None)
    assert limits.host_bytes == 3 * GIB - (3 << 29) + limits.runtime_bytes


_LONG_TEXT = """
import re, sys
from ebbtide import LLM

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

# There are no words between which it could be cut: it is encoded at once.
text = "".join(f"{n * 7919 % 100003}, " for n in range(60_000))
llm = LLM.open()
before = status("VmRSS")
ids = llm.tokenizer.encode(text)
print(len(ids), before, status("VmRSS"), status("VmHWM"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(module._malloc_trim() is None, reason="this C library has no malloc_trim")
def test_what_making_tokens_took_is_given_back():
    """The ids stay, some 36 bytes a token of the 400 or more that the library takes for each."""
    run = [sys.executable, "-c", _LONG_TEXT]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    tokens, before, after, most = map(int, told.split())
    assert most - before > tokens * 200 // 1024  # or there is nothing to see
    assert after - before < (most - before) / 2


_SESSIONS = """
import re
from ebbtide import LLM, Budget
from ebbtide.offload.planning.memory_at_hand import give_back_freed_memory

def rss():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

with LLM.open(context=4500, budget=Budget(host_memory="1GiB")) as llm:
    for n in (300, 2000, 40, 4000, 900, 3000, 100, 1500):
        with llm.session() as session:
            session.append(("word " * n)[: 3 * n])
            session.generate("What?", max_new_tokens=8)
    closed = rss()
    give_back_freed_memory()
    print(closed - rss())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(module._malloc_trim() is None, reason="this C library has no malloc_trim")
def test_closed_sessions_leave_nothing_that_adds_up(tmp_path):
    """Of 13 MiB that the C library kept behind eight sessions, more behind more of them."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    run = [sys.executable, "-c", _SESSIONS]
    told = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    assert int(told) < 4 << 10
