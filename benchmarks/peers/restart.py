"""Going on with a long text in a new process, beside llama.cpp.

    make peers PEERS_ARGS=--help                                   (makes the environment)
    .venv-peers/bin/python benchmarks/peers/restart.py FOLDER SCRATCH --tokens 32768

llama.cpp can save a sequence's cache to a file and load it again. FOLDER is a checkpoint
(benchmarks/checkpoints.py), of which a GGUF file of the same shape is made in SCRATCH, a folder on
the disk that is measured. Caches are filled without computing them. Measured, in turn: until the
pages or the cache are back, with nothing of the file in the system's cache (cold) and with all of
it (warm), and then 20 tokens of a question, up to the last one's logits. Weights are loaded and
contexts made before the clock starts; Ebbtide's page store, which a request sizes, is made before
it too. Two threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUESTION = 20


def forget(path: Path) -> None:
    """Drop a file from the system's cache."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(number)


def llama(gguf: Path, scratch: Path, tokens: int, rounds: int) -> list[dict]:
    import llama_cpp
    from llama_program import CACHES, LlamaProgram

    rows = []
    for name in CACHES:
        program = LlamaProgram(str(gguf), 0, caches=())
        path = scratch / "llama.state"
        context = program.make_context(name, tokens + 256)
        program.fill_context(context, tokens)
        ids = (llama_cpp.llama_token * tokens)()
        size = llama_cpp.llama_state_seq_save_file(context, str(path).encode(), 0, ids, tokens)
        assert size, "llama.cpp cannot save its state"
        llama_cpp.llama_free(context)
        row = {"program": "llama.cpp", "cache": name, "bytes": path.stat().st_size}
        for way in ("cold", "warm"):
            loads, asks = [], []
            for _ in range(rounds):
                context = program.make_context(name, tokens + 256)
                llama_cpp.llama_set_n_threads(context, 2, 2)
                if way == "cold":
                    forget(path)
                began = time.perf_counter()
                count = ctypes.c_size_t()
                got = llama_cpp.llama_state_seq_load_file(
                    context, str(path).encode(), 0, ids, tokens, ctypes.byref(count)
                )
                assert got == size and count.value == tokens, "llama.cpp cannot load its state"
                loads.append(time.perf_counter() - began)
                program.run(context, program.prompt()[:QUESTION], tokens)
                asks.append(time.perf_counter() - began)
                llama_cpp.llama_free(context)
            row[f"{way}_s"] = statistics.median(loads)
            row[f"{way}_asked_s"] = statistics.median(asks)
        path.unlink()
        program.close()
        rows.append(row)
    return rows


def ours(folder: Path, scratch: Path, tokens: int, rounds: int) -> list[dict]:
    rows = []
    for bits in ("8", "4"):
        command = [
            *(sys.executable, str(HERE.parent / "prefixes.py"), str(folder), str(scratch)),
            *("--tokens", str(tokens + QUESTION), "--question", str(QUESTION), "--filled"),
            *("--kv-bits", bits, "--rounds", str(rounds)),
        ]
        env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=env)
        found = json.loads(out.stdout.splitlines()[-1])
        row = {"program": "Ebbtide", "cache": bits, "bytes": found["bytes"]}
        for way in ("cold", "warm"):
            row[f"{way}_s"], row[f"{way}_asked_s"] = found[f"{way}_finding_s"], found[f"{way}_s"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--tokens", type=int, default=32768, help="a multiple of 256")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    gguf = given.scratch / f"{given.folder.name}.gguf"
    if not gguf.exists():
        subprocess.run([sys.executable, HERE / "gguf_model.py", given.folder, gguf], check=True)
    rows = []
    for measure, model in ((ours, given.folder), (llama, gguf)):
        rows += measure(model, given.scratch, given.tokens, given.rounds)
    for row in rows:
        print(
            f"{row['program']:<10} {row['cache']:<22} {row['bytes'] / 1e6:8.0f} MB   back after "
            f"{row['cold_s']:.2f} s cold, {row['warm_s']:.2f} warm; asked after "
            f"{row['cold_asked_s']:.2f}, {row['warm_asked_s']:.2f}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
