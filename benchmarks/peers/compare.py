"""Ebbtide beside llama.cpp and transformers: prefill, and decode at depths, on the same shapes.

    python benchmarks/peers/compare.py [--shapes 135m,1b,3b,qwen3.5,granite-h,lfm2,jamba,gpt-oss]
                                       [--prefills 256,2048] [--depths 0,2048,8192]
                                       [--models FOLDER] [--guard COMMAND]

Matrices have 4 bits in Ebbtide and llama.cpp (Q4_0), embedding and head 8 in both (Q8_0);
transformers keeps 16. Every program is a process of its own and keeps its model loaded; they take
turns for `--rounds` rounds, A B A B, and medians are compared. Each program is taken at its best:
of its kinds of cache, with and without flash attention, with one thread and with two. Variants that
are a quarter slower than their program's best in the first round sit out the others.

A run during which other processes took more than 3 % of the machine's processors is thrown away
and made again, and counted. --guard COMMAND: something that keeps the machine quiet while its child
runs, put before a `cat` that lives for as long as one round takes.

Prints the ceilings first (measured read bandwidth and multiply-adds). "of roofline": the longer of
the time that the bytes of weights and pages take at that bandwidth and that of the multiply-adds at
that rate, over the time measured; of gpt-oss these bytes are those of all experts, and say nothing.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ceiling import measure

HERE = Path(__file__).resolve().parent
SHAPES = {
    "135m": "smollm2-135m",
    "1b": "llama-3.2-1b",
    "3b": "llama-3.2-3b",
    "qwen3.5": "qwen3.5-0.8b",
    "granite-h": "granite-4-h-1b",
    "lfm2": "lfm2-1.2b",
    "jamba": "jamba-3b",
    "gpt-oss": "gpt-oss-20b",
}
LAYERS = {"gpt-oss-20b": 6}  # of 24: all programs keep their models in memory at once
RUN_S = 0.4  # aimed at, for one decode run
MOST_OTHERS = 0.03  # of the machine's processors
RETRIES = 3


class Process:
    """A program (see program.py) that answers calls."""

    def __init__(self, name: str, script: str, *arguments: str):
        self.name = name
        command = [sys.executable, str(HERE / script), *arguments]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.facts = self._answer()

    def ask(self, call: str, **arguments) -> dict:
        self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self._process.wait()}")
        return json.loads(line)


@dataclass
class Variant:
    """One way to run one program, and the seconds per token that were measured."""

    process: Process
    name: str
    threads: int
    times_s: list[float] = field(default_factory=list)
    tokens: int = 3  # in a run
    thrown_away: int = 0

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    def measure(self, kind: str, length: int) -> None:
        """One run: decode of some tokens, or a prefill of `length`. Made again while the machine is
        busy."""
        count = self.tokens if kind == "decode" else length
        call = {"variant": self.name, "threads": self.threads, "tokens": count}
        for _ in range(RETRIES):
            before, total = _busy_s(), psutil.cpu_count()
            spent = self.process.ask(kind, **call)
            warm = spent["cpu_s"] * 2 / count if kind == "decode" else 0.0
            others = _busy_s() - before - spent["cpu_s"] - warm
            if others <= MOST_OTHERS * total * spent["wall_s"] + 0.03:  # clocks tick at 0.01 s
                self.times_s.append(spent["wall_s"] / count)
                self.tokens = max(3, min(64, int(RUN_S / self.times_s[-1])))
                return
            self.thrown_away += 1


def _busy_s() -> float:
    """Seconds that all processors have worked for anybody, this machine's host included."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def compare(processes, threads, rounds, kind, length, guard) -> dict[str, Variant]:
    """Each program's best variant, by its name. length: tokens of a prefill, or behind which others
    are decoded."""
    for process in processes:
        if kind == "decode":
            process.ask("fill", depth=length)
    names, counts = "variants", threads
    if kind == "prefill":  # bound by arithmetic: fewer threads are never better
        names, counts = "prefill_variants", [max(threads)]
    variants = [Variant(p, v, t) for p in processes for v in p.facts[names] for t in counts]
    for _ in range(rounds):
        with guarded(guard):
            for variant in variants:
                variant.measure(kind, length)
        measured = [v for v in variants if v.times_s]
        best = {p.name: _best(measured, p) for p in processes}
        variants = [v for v in measured if v.median_s <= 1.25 * best[v.process.name].median_s]
    return {p.name: _best(variants, p) for p in processes}


def _best(variants: list[Variant], process: Process) -> Variant:
    own = [v for v in variants if v.process is process]
    if not own:
        raise SystemExit(f"the machine was too busy to measure {process.name}; --guard may help")
    return min(own, key=lambda v: v.median_s)


@contextmanager
def guarded(command: str):
    """While this is entered, a `cat` runs under the command."""
    if not command:
        yield
        return
    guard = subprocess.Popen(
        [*shlex.split(command), "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    guard.stdin.write("ready\n")
    guard.stdin.flush()
    guard.stdout.readline()
    try:
        yield
        if guard.poll() is not None:
            raise SystemExit("the guard ended before the measurements did")
    finally:
        guard.stdin.close()
        guard.wait()


def row(best: Variant, kind: str, length: int, config: dict, ceilings: dict) -> dict:
    """What one program reached, against the ceilings of as many threads. length: see `compare`."""
    seconds, facts = best.median_s, best.process.facts
    ceiling = ceilings[best.threads]
    per_run, depth = 1.0, float(length)  # how often a token reads the weights, and what it sees
    if kind == "prefill":
        per_run, depth = 1 / length, length / 2
    kv_bytes = facts["kv_bytes_per_token"][best.name] * depth * per_run
    bytes_moved = facts["weight_bytes"] * per_run + kv_bytes
    flop = 0  # a hybrid's are not counted, nor is what lies between its products
    if config["model_type"] == "llama":
        elements = _matrix_elements(config, with_head=kind == "decode")
        flop = 2 * elements + depth * _attention_flop(config)
    least_s = max(bytes_moved / ceiling["read_bytes_per_s"], flop / ceiling["flop_per_s"])
    return {
        "program": best.process.name,
        "variant": best.name,
        "threads": best.threads,
        "seconds_per_token": seconds,
        "tokens_per_s": 1 / seconds,
        "spread": (max(best.times_s) - min(best.times_s)) / seconds,
        "gb_per_s": bytes_moved / seconds / 1e9,
        "gflop_per_s": flop / seconds / 1e9,
        "of_roofline": least_s / seconds,
        "runs": len(best.times_s),
        "thrown_away": best.thrown_away,
    }


def _matrix_elements(c: dict, with_head: bool) -> int:
    hidden, heads = c["hidden_size"], c["num_attention_heads"] + c["num_key_value_heads"]
    layer = 2 * heads * c["head_dim"] * hidden + 3 * hidden * c["intermediate_size"]
    return c["num_hidden_layers"] * layer + with_head * c["vocab_size"] * hidden


def _attention_flop(c: dict) -> int:
    """For each token of the cache."""
    return 4 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"]


def make_models(shape: str, folder: Path) -> tuple[Path, Path]:
    """The checkpoint folder and the GGUF file of a shape, made where they are missing."""
    checkpoint, gguf = folder / shape, folder / f"{shape}.gguf"
    if not (checkpoint / "tokenizer.json").exists():
        layers = ("--layers", LAYERS[shape]) if shape in LAYERS else ()
        _run(HERE.parent / "checkpoints.py", shape, checkpoint, "--positions", 65536, *layers)
    if not gguf.exists():
        _run(HERE / "gguf_model.py", checkpoint, gguf)
    return checkpoint, gguf


def _run(script: Path, *arguments) -> None:
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True)


def compare_shape(shape: str, models: Path, options, ceilings: dict) -> list[dict]:
    checkpoint, gguf = make_models(SHAPES[shape], models)
    config = json.loads((checkpoint / "config.json").read_text())
    most, rows = str(max(*options.depths, *options.prefills)), []
    isa = [options.isa] if options.isa else []
    processes = [
        Process("ebbtide", "ebbtide_program.py", str(checkpoint), most, "4", *isa),
        Process("llama.cpp", "llama_program.py", str(gguf), most),
    ]
    if not options.without_transformers:
        processes.append(Process("transformers", "transformers_program.py", str(checkpoint), most))
    for process in processes:
        size = process.facts["weight_bytes"]
        print(f"{shape}: {process.name} reads {size / 1e9:.3f} GB of weights for a token")
    runs = [("prefill", n) for n in options.prefills] + [("decode", n) for n in options.depths]
    for kind, length in runs:
        best = compare(processes, options.threads, options.rounds, kind, length, options.guard)
        found = [row(v, kind, length, config, ceilings) for v in best.values()]
        for one in found:
            one |= {"shape": shape, "kind": kind, "length": length}
            one["ebbtide_is"] = one["seconds_per_token"] / found[0]["seconds_per_token"]
            _print(one)
        rows += found
    for process in processes:
        process.close()
    return rows


def _print(one: dict) -> None:
    what = f"{one['kind']} {'of' if one['kind'] == 'prefill' else 'at'} {one['length']}"
    print(
        f"{one['shape']:<5}{what:<17}{one['program']:<13}{one['tokens_per_s']:8.1f} tokens/s  "
        f"{one['gb_per_s']:5.1f} GB/s {one['gflop_per_s']:6.1f} GFLOP/s  "
        f"{one['of_roofline']:.2f} of roofline  x{one['ebbtide_is']:.2f}  "
        f"({one['variant']}, {one['threads']} threads; spread {one['spread']:.0%}; "
        f"{one['thrown_away']} thrown away)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--shapes", default="135m,1b,3b", type=lambda text: text.split(","))
    parser.add_argument("--prefills", default=[256, 2048], type=numbers)
    parser.add_argument("--depths", "--depth", default=[0, 2048, 8192], type=numbers)
    parser.add_argument("--threads", default=[1, 2], type=numbers)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=Path, help="where checkpoints are kept (default: nowhere)")
    parser.add_argument("--guard", default="", help="a command that keeps the machine quiet")
    parser.add_argument("--isa", default="", help="Ebbtide's instruction set")
    parser.add_argument("--without-transformers", action="store_true")
    options = parser.parse_args()
    with guarded(options.guard):
        ceilings = measure(options.threads)
    for count, ceiling in ceilings.items():
        print(
            f"{count} threads: {ceiling['read_bytes_per_s'] / 1e9:.1f} GB/s read, "
            f"{ceiling['flop_per_s'] / 1e9:.0f} GFLOP/s"
        )
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or Path(folder)
        models.mkdir(parents=True, exist_ok=True)
        rows = [r for s in options.shapes for r in compare_shape(s, models, options, ceilings)]
    print(json.dumps({"ceilings": ceilings, "rows": rows}))


if __name__ == "__main__":
    main()
