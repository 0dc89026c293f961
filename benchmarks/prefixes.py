"""What kept pages save: a text is read, read while its pages are kept, and asked about later.

    python benchmarks/checkpoints.py llama-3.2-1b FOLDER
    OMP_WAIT_POLICY=passive python benchmarks/prefixes.py FOLDER SCRATCH --tokens 16384
    OMP_WAIT_POLICY=passive python benchmarks/prefixes.py FOLDER SCRATCH --tokens 130000 --filled

"" in place of FOLDER is the built-in model. A later run finds the pages on disk. A run is a new
LLM, and the text ends with a question of its own; times end with the logits of its last token and
leave out loading the weights. *cold*: the system's cache holds none of the kept files;
*reading_files*: a loop that does nothing but read the same files, as cold. With --filled the text
is not read: its pages are random, and what reading takes is not known. --share: of the far planes
that memory has room for; the rest is written to disk once more. *peak_bytes*: of the process, all
runs included. Needs a quiet machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import torch
from random_state import fill, random_weight

from ebbtide import LLM, Budget, prefix_dir
from ebbtide.offload.options import Options
from ebbtide.offload.output import peak_rss_bytes
from ebbtide.offload.weights import weights


def opened(given, share: float, keeps: bool) -> LLM:
    options = Options(
        model=given.folder or None,
        budget=Budget(host_memory=given.host_memory, disk_memory="64GiB"),
        kv_bits=given.kv_bits,
        weight_bits=given.weight_bits,
        spill_dir=given.scratch,
        context=given.tokens + 64,
        prefix_cache="60GiB" if keeps else 0,
        draft=given.draft,
    )
    llm = LLM(options)
    if share < 1:
        llm.admission.keep_in_memory(share, given.tokens + 64, 1)
    return llm


def run(given, question: list[int], *, keeps: bool, filled: bool = False):
    """Seconds until the last token's logits, how many tokens were found, and seconds that took."""
    drawn = torch.randint(300, (given.tokens,), generator=torch.Generator().manual_seed(1))
    ids = [1] * given.tokens if given.filled else drawn.tolist()
    ids[given.tokens - given.question :] = question
    with (
        opened(given, given.share, keeps) as llm,
        llm.open_session(given.tokens + 64, sequences=1) as session,
    ):
        if filled:
            sequence = session._sequence
            fill(session._engine, sequence, given.tokens)
            for index, token in enumerate(ids):
                sequence.tokens[index] = sequence.processed[index] = token
            session._runtime.store.flush()
            began = time.perf_counter()
            session._prefixes.keep(sequence, decoded=False)
            return time.perf_counter() - began, 0, 0.0
        session.append(ids, process=False)
        began = time.perf_counter()
        session.find_kept()
        found = time.perf_counter() - began
        session.last_logits()
        return time.perf_counter() - began, session.take_restored(), found


def files(given) -> list[Path]:
    return sorted(prefix_dir(given.scratch).iterdir())


def forget(given) -> None:
    """Drop the files from the system's cache."""
    for path in files(given):
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def read_alone(given) -> float:
    forget(given)
    began = time.perf_counter()
    buffer = bytearray(4 << 20)
    for path in files(given):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("scratch", help="a folder on the disk that is measured")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--question", type=int, default=20, help="tokens that differ at the end")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--host-memory", default="64GiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-bits", default="8")
    parser.add_argument("--weight-bits", default="4")
    parser.add_argument("--filled", action="store_true")
    parser.add_argument("--draft", action="store_true", help="near planes to guess tokens by")
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.folder:
        weights.quantise_weight = random_weight
    folder = prefix_dir(given.scratch)
    shutil.rmtree(folder, ignore_errors=True)
    row = {"tokens": given.tokens, "share": given.share}
    questions = iter(range(2, 1000))

    def asked() -> list[int]:
        return [next(questions)] * given.question

    if given.filled:
        row["keeping_s"] = run(given, asked(), keeps=True, filled=True)[0]
    else:
        row["reading_s"] = run(given, asked(), keeps=False)[0]
        row["reading_and_keeping_s"] = run(given, asked(), keeps=True)[0]
    row["bytes"] = sum(path.stat().st_size for path in files(given))
    for name, before in (("warm", lambda given: None), ("cold", forget)):
        runs = []
        for _ in range(given.rounds):
            before(given)
            runs.append(run(given, asked(), keeps=True))
        row[f"{name}_s"] = statistics.median(r[0] for r in runs)
        row[f"{name}_finding_s"] = statistics.median(r[2] for r in runs)
        row["found_tokens"] = runs[0][1]
    row["peak_bytes"] = peak_rss_bytes()
    row["reading_files_s"] = statistics.median(read_alone(given) for _ in range(given.rounds))
    for name, value in row.items():
        print(f"{name:24} {value:,.3f}" if name.endswith("_s") else f"{name:24} {value:,}")
    print(json.dumps(row))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
