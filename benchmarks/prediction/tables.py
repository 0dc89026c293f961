"""Which records a step must read, and what it costs not to: the experiments behind bounded mode.

    python benchmarks/prediction/tables.py criteria --kinds story filler BOOK --tokens 8192
    python benchmarks/prediction/tables.py sketches|losses|records|layers|heads|baselines|predictors

A model of the Llama, Qwen2 or Qwen3 type reads a long text exactly; then some of its positions,
those of answers first, are computed again as decode steps that attend to a selection. Everything
is compared with attending to all pages at the same bits. The last line is JSON.

criteria    epsilon and criterion of top-p, near bits, correction for the noise of near keys
sketches    page size, near bits and rotation: mass found with a fixed number of bytes
losses      the same bytes, from the best tokens per head to rehearsed records per layer
records     how many pages are read together
layers      more near bits in some layers than in others
heads       which heads retrieve, and whether to count them more
baselines   other people's selectors, with the bytes that top-p reads
predictors  rehearsal before and after attention and two layers ahead, with and without the mean of
            what is added after it
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from approximate import Outcome, Setting, most_massive, run
from estimate import Estimate
from heads import retrieval
from losses import STEPS, recalls
from network import Network, Reading
from sealed import Near, Sealed
from texts import REPO, Text, make
from tokenizers import Tokenizer

from ebbtide.prefetch.foresight import REHEARSED_EPSILON
from ebbtide.prefetch.registry import make_selector

LABEL = "{:44}"
Nears = Near | tuple[Near, ...]


class Bench:
    """One text, read once, and what was made of it."""

    def __init__(self, network: Network, text: Text):
        self.network, self.text = network, text
        self.reading: Reading = network.read(text.ids)
        self._pages: dict[Nears, list[Sealed]] = {}
        self._exact: dict[Nears, Outcome] = {}
        self.rows: list[dict] = []

    def pages(self, near: Nears) -> list[Sealed]:
        if near not in self._pages:
            nears = near if isinstance(near, tuple) else (near,) * self.network.num_layers
            self._pages = {  # one at a time: they are larger than the text's keys and values
                near: [
                    Sealed(k, v, n)
                    for k, v, n in zip(self.reading.keys, self.reading.values, nears, strict=True)
                ]
            }
        return self._pages[near]

    def measure(self, label: str, near: Nears, setting: Setting, **say) -> dict:
        """Runs a setting, prints its row and keeps it. near: of all layers, or of each."""
        at = (self.network, self.reading, self.pages(near), self.text.positions)
        if near not in self._exact:
            self._exact[near] = run(*at, Setting())
        found = run(*at, setting)
        row = {"text": self.text.name, "setting": label} | compare(
            self.text, self._exact[near].logits, found
        )
        self.rows.append(row)
        print(LABEL.format(label), *(f"{n} {row[n]:.4g}" for n in COLUMNS), flush=True)
        return row


COLUMNS = (
    "read", "read_answers", "kl", "kl_answers", "kl_p95", "kl_max", "same", "same_answers",
    "right", "right_exact", "missed", "missed_estimate", "apart", "misplaced_estimate", "error",
)  # fmt: skip


def compare(text: Text, exact: torch.Tensor, found: Outcome) -> dict:
    """Shares are of 1; `per_layer` holds the means of every measure."""
    p, q = exact.log_softmax(-1), found.logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).float()
    answers = slice(0, text.num_answer_positions)
    means = {n: m.nanmean().item() for n, m in found.measures.items()}
    return {
        **means,
        "read_answers": found.measures["read"][answers].mean().item(),
        "kl": kl.mean().item(),
        "kl_answers": kl[answers].mean().item(),
        "kl_p95": kl.quantile(0.95).item(),
        "kl_max": kl.max().item(),
        "same": same.mean().item(),
        "same_answers": same[answers].mean().item(),
        "right": text.num_right(found.logits),
        "right_exact": text.num_right(exact),
        "per_layer": {n: m.nanmean(0).tolist() for n, m in found.measures.items()},
        "worst": {n: m.nan_to_num(-1).amax().item() for n, m in found.measures.items()},
    }


def top_p(epsilon: float, criterion: str = "effect"):
    return make_selector("top_p", epsilon=epsilon, criterion=criterion).select


def criteria(bench: Bench) -> None:
    for criterion, epsilons in (
        ("mass", (0.05, 0.2, 0.5)),
        ("misplaced", (0.05, 0.2, 0.5)),
        ("effect", (0.02, 0.05, 0.1, 0.2)),
    ):
        for epsilon in epsilons:
            setting = Setting(top_p(epsilon, criterion))
            bench.measure(f"{criterion} {epsilon}", Near(), setting)
    for near, how, name in (
        (Near(bits=1), Estimate(), ""),
        (Near(bits=3), Estimate(), ""),
        (Near(), Estimate(variance=-1), " variance -1"),
        (Near(), Estimate(variance=1), " variance +1"),
        (Near(), Estimate(noise=1), " noise"),
        (Near(), Estimate(whole=True), " whole numbers"),
    ):
        bench.measure(f"effect 0.1 {near.bits} bits{name}", near, Setting(top_p(0.1), how))


def sketches(bench: Bench) -> None:
    """Every row selects 6 % of the records by their mass, heads summed."""
    nears = [Near(64, bits, rotate=turned) for bits in (0, 1, 2, 3) for turned in (False, True)]
    nears += [Near(size, bits) for size in (32, 128) for bits in (1, 2)]
    for near in sorted(nears, key=lambda near: near.page_tokens):
        setting = Setting(most_massive(0.06), pages_per_record=128 // near.page_tokens)
        share = near.resident_share(bench.network.head_dim)
        bench.measure(f"{near}: {100 * share:.1f} % resident", near, setting)
        if near.bits == 2 and not near.rotate:
            exact = replace(setting, sees="true")
            bench.measure(f"P {near.page_tokens}, exact masses", near, exact)


def losses(bench: Bench) -> None:
    """Mean, 5th percentile and least over positions and layers, then the layers' means."""
    for budget in (0.03, 0.06):
        found = recalls(
            bench.network, bench.reading, bench.pages(Near()), bench.text.positions, budget
        )
        for step, shares in zip(STEPS, found, strict=True):
            row = {"mean": shares.mean(), "p5": shares.quantile(0.05), "least": shares.min()}
            row = {n: v.item() for n, v in row.items()}
            layers = [round(v, 3) for v in shares.mean(0).tolist()]
            label = f"{100 * budget:.0f} % as {step}"
            bench.rows.append(
                {"text": bench.text.name, "setting": label, "per_layer": layers} | row
            )
            print(
                LABEL.format(label), *(f"{n} {v:.3f}" for n, v in row.items()), layers, flush=True
            )


def records(bench: Bench) -> None:
    for size in (32, 64, 128):
        for pages in (1, 2, 4):
            setting = Setting(top_p(0.1), pages_per_record=pages)
            bench.measure(f"P {size}, records of {size * pages}", Near(size), setting)


def layers(bench: Bench) -> None:
    """More near bits in the first layers, or in each layer alone."""
    num_layers = bench.network.num_layers

    def measure(epsilon: float, bits: dict[int, int]) -> None:
        nears = tuple(Near(bits=bits.get(layer, 2)) for layer in range(num_layers))
        share = sum(near.resident_share(bench.network.head_dim) for near in nears) / num_layers
        label = f"{epsilon}, {[near.bits for near in nears]}: {100 * share:.1f} % resident"
        bench.measure(label, nears, Setting(top_p(epsilon), pages_per_record=1))

    for epsilon in (0.02, 0.1):
        measure(epsilon, {})
        for first in (1, 2):
            for bits in (3, 4):
                measure(epsilon, dict.fromkeys(range(first), bits))
        measure(epsilon, dict.fromkeys(range(num_layers), 3))
        few = dict.fromkeys(range(2, num_layers), 1)
        measure(epsilon, few)
        measure(epsilon, few | {0: 3, 1: 3})
    for layer in range(1, num_layers):
        measure(0.02, {layer: 4})


def baselines(bench: Bench) -> None:
    row = bench.measure("top_p effect 0.1", Near(), Setting(top_p(0.1)))
    sealed = (len(bench.text.ids) // 256 - 1) * 256
    budget = {"num_tokens": max(128, int(row["read"] * sealed))}
    for name, options, sees in (
        ("quest", budget, "bounds"),
        ("freekv", budget, "bounds"),
        ("infinigen", {}, "rehearsed"),
        ("kvswap", budget, "joint"),
        ("kvswap", budget, "joint, true query"),
        ("random", budget, ""),
        ("window", budget, ""),
        ("window", {}, ""),
    ):
        select = make_selector(name, **options).select
        bench.measure(f"{name} {options} {sees}", Near(), Setting(select, sees=sees))
    # As its authors read: groups of 4 tokens, and nothing in place of the rest.
    select = make_selector("kvswap", num_tokens=budget["num_tokens"]).select
    alone = Setting(select, pages_per_record=1, sees="joint", drops=True)
    bench.measure("kvswap, groups of 4, the rest dropped", Near(page_tokens=4), alone)
    bench.measure("oracle mass", Near(), Setting(most_massive(row["read"]), sees="true"))
    bench.measure("estimated mass", Near(), Setting(most_massive(row["read"])))


def predictors(bench: Bench) -> None:
    """What rehearsed queries name of the records that a layer selects and did not a step ago."""
    num_layers = bench.network.num_layers
    nears = tuple(Near(bits=3 if layer < 2 else 2) for layer in range(num_layers))

    def show(name: str, part: list[float], whole: list[float] | None = None) -> None:
        """Each layer's mean, or its share of a mean; then the same of all layers."""
        whole = whole or [1.0] * num_layers
        shares = [p / w if w else float("nan") for p, w in zip(part, whole, strict=True)]
        each = " ".join(f"{share:7.3f}" for share in shares)
        print(f"    {name:28} {each}   all {sum(part) / max(sum(whole), 1e-9):.3f}", flush=True)

    for epsilon in (0.02, 0.05, 0.1):
        for factor in (2, 1, REHEARSED_EPSILON, 0.5):
            setting = Setting(top_p(epsilon), foresees=top_p(factor * epsilon))
            label = f"effect {epsilon}, foreseen with {factor * epsilon:g}"
            found = bench.measure(label, nears, setting)["per_layer"]
            show("selected", found["chosen"])
            show("new", found["new"])
            for name in ("late", "late, mean", "early", "early, mean", "two", "two, mean"):
                show(f"{name}: cosine", found[f"cosine_{name}"])
                show(f"{name}: named of new", found[f"named_{name}"], found["new"])
                show(f"{name}: in vain", found[f"vain_{name}"], found[f"asked_{name}"])


def heads(bench: Bench) -> None:
    """Heads that retrieve, and what it does to count them more than their effect says."""
    echo, induction = retrieval(bench.network)
    for layer in range(bench.network.num_layers):
        shares = (echo[layer].flatten().tolist(), induction[layer].flatten().tolist())
        shares = [[round(s, 3) for s in found] for found in shares]
        bench.rows.append({"layer": layer, "echo": shares[0], "induction": shares[1]})
        print(f"layer {layer}: echo {shares[0]}, induction {shares[1]}", flush=True)
    share = torch.maximum(echo, induction)
    for weight in (0, 3, 15):
        prior = 1 + weight * share
        prior = prior / prior.square().mean().sqrt()  # so that epsilons read about as much
        for epsilon in (0.05, 0.1, 0.2):
            setting = Setting(top_p(epsilon), pages_per_record=1, prior=prior)
            bench.measure(f"effect {epsilon}, retrieval heads x {1 + weight}", Near(), setting)


TABLES = {
    f.__name__: f
    for f in (criteria, sketches, losses, records, layers, heads, baselines, predictors)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--model", type=Path, default=REPO / "offload" / "builtin" / "model")
    parser.add_argument("--kinds", nargs="+", default=["story"], help="story, filler or a book")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    network = Network(given.model)
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    rows = []
    for kind in given.kinds:
        for num_tokens in given.tokens[:1] if kind == "story" else given.tokens:
            bench = Bench(network, make(kind, num_tokens, tokenizer))
            print(f"\n{bench.text.name} tokens: {given.table}", flush=True)
            TABLES[given.table](bench)
            rows += bench.rows
    print(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(main())
