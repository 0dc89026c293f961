"""A model whose weights take more than the memory at hand, beside llama.cpp, which maps the file.

    make peers PEERS_ARGS=--help                                   (makes the environment)
    sudo .venv-peers/bin/python benchmarks/peers/small_memory.py MODEL.gguf --memory 650MiB

llama.cpp is run twice: as it is by default, which puts some formats in another order in memory of
its own, and without that, all of the file mapped. All decode in turn, each in a process of its own
and in a control group that has no more memory than that, the system's cache of the model's file
included: Linux with root's rights. Ebbtide gets --memory as its budget and SLACK_BYTES more in its
group, which counts what the system's cache holds of files that are read once. The file's cache is
emptied before each run. One that the system kills for its memory is said to be.

Prints tokens/s, what was read from the disk for a token and how fast, and the disk's own speed. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = list(range(5, 70))
WARM_UP = 2
SLACK_BYTES = 40 << 20
CONTEXT = 1024


def bytes_read() -> int:
    """From the disk by this process, its mapped files' pages included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def measured(decode, tokens: int) -> dict:
    """decode(): one token more."""
    for _ in range(WARM_UP):
        decode()
    times, before = [], bytes_read()
    for _ in range(tokens):
        began = time.perf_counter()
        decode()
        times.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(times),
        "bytes": (bytes_read() - before) / tokens,
        "bytes_per_s": (bytes_read() - before) / sum(times),
    }


def llama(model: Path, memory: str, tokens: int, *, repacks: bool = True) -> dict:
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def params():
        found = defaults()
        found.use_extra_bufts = repacks
        return found

    llama_cpp.llama_cpp.llama_model_default_params = params
    began = time.perf_counter()
    llm = llama_cpp.Llama(
        str(model), n_ctx=CONTEXT, n_threads=2, n_threads_batch=2, verbose=False, use_mmap=True
    )
    load_s, began = time.perf_counter() - began, time.perf_counter()
    llm.eval(PROMPT)
    prefill_s = time.perf_counter() - began
    return {
        "load_s": load_s,
        "prefill_s": prefill_s,
        **measured(lambda: llm.eval([100]), tokens),
    }


def ebbtide(model: Path, memory: str, tokens: int) -> dict:
    import torch

    from ebbtide import LLM, Budget
    from ebbtide.offload.options import Options

    torch.set_num_threads(2)
    began = time.perf_counter()
    options = Options(
        model=str(model), context=CONTEXT, draft=False, budget=Budget(host_memory=memory)
    )
    llm = LLM(options)
    with llm.open_session(CONTEXT, sequences=1) as session:
        engine, sequence = session._engine, session._sequence
        load_s, began = time.perf_counter() - began, time.perf_counter()
        sequence.tokens.extend(PROMPT)
        engine.logits(engine.prefill(sequence))
        prefill_s = time.perf_counter() - began

        def decode() -> None:
            sequence.tokens.append(100)
            engine.logits(engine.decode(sequence))

        found = measured(decode, tokens)
    plan = llm.admission.latest_plan
    print(f"Ebbtide streams {plan.layers_streamed} layers", file=sys.stderr)
    return {"load_s": load_s, "prefill_s": prefill_s, **found}


PROGRAMS = {
    "ebbtide": ebbtide,
    "llama.cpp": llama,
    "llama.cpp, all mapped": functools.partial(llama, repacks=False),
}


class Group:
    """A control group of so much memory, by either version of the system's interface."""

    def __init__(self, num_bytes: int):
        root = Path("/sys/fs/cgroup")
        is_old = (root / "memory").is_dir()
        self.folder = (root / "memory" if is_old else root) / f"ebbtide-{os.getpid()}"
        self.folder.mkdir()
        limit = "memory.limit_in_bytes" if is_old else "memory.max"
        (self.folder / limit).write_text(str(num_bytes))

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        self.folder.rmdir()


def run(program: str, given: argparse.Namespace, num_bytes: int) -> dict | None:
    """None: it was killed."""
    subprocess.run(["sync"], check=True)
    number = os.open(given.model, os.O_RDONLY)
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(number)
    group = Group(num_bytes + (SLACK_BYTES if program == "ebbtide" else 0))
    try:
        command = [sys.executable, __file__, given.model, "--memory", given.memory]
        command += ["--tokens", str(given.tokens), "--program", program]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=group.enter)
    finally:
        group.close()
    if out.returncode == -signal.SIGKILL:
        return None
    out.check_returncode()
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="650MiB")
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.program:
        measure = PROGRAMS[given.program]
        print(json.dumps(measure(given.model, given.memory, given.tokens)))
        return
    from ebbtide.offload.planning.bandwidth import measure_disk
    from ebbtide.offload.planning.budget import parse_size

    disk = measure_disk(given.model.parent).bytes_per_s
    print(f"the disk reads {disk / 1e9:.2f} GB/s")
    rows: dict[str, list[dict | None]] = {program: [] for program in PROGRAMS}
    for _ in range(given.rounds):
        for program, found in rows.items():
            found.append(run(program, given, parse_size(given.memory)))
    for program, found in rows.items():
        if None in found:
            print(f"{program}: killed, in {found.count(None)} of {len(found)} runs")
            continue
        each = ", ".join(f"{1 / row['seconds']:.2f}" for row in found)
        middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
        print(
            f"{program}: {each} tokens/s; {middle['bytes'] / 1e6:.0f} MB from disk for a token, "
            f"{middle['bytes_per_s'] / 1e9:.2f} GB/s; ready after {middle['load_s']:.1f} s, "
            f"{len(PROMPT)} tokens read in {middle['prefill_s']:.1f} s"
        )
    print(json.dumps({"disk_bytes_per_s": disk, "rows": rows}))


if __name__ == "__main__":
    main()
