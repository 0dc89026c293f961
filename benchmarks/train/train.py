"""Trains the network from nothing, on the CPU or one CUDA GPU, for a time given in minutes.

    python benchmarks/train/train.py --work WORK --size nano --minutes 60

Reads WORK/corpus and WORK/tokenizer.json (corpus.py and tokenizer.py write them), keeps
WORK/checkpoint.pt and WORK/log.jsonl. The same command goes on from its checkpoint; --leg-minutes
ends a run early for that. Learning rate and length of examples follow the time trained so far, over
all legs, so that what a faster machine adds is tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import corpus
import evaluate
import selection
import torch
import torch.nn.functional as F
from birth import copy_from_birth
from examples import ANSWER
from export import load
from feed import Feed
from model import SHAPES, Model
from tokenizers import Tokenizer

STEADY_SHARE = 0.35  # of the time; then the learning rate falls to nearly nothing
WARM_UP_STEPS, WARM_UP_STEPS_AGAIN = 100, 12
SAVE_EVERY_S = 120
MOST_LOST = 10  # steps


@dataclass(frozen=True)
class Recipe:
    """Learning rates of matrices (Muon) and of the rest (AdamW), and how examples grow.

    `lengths` are pairs: up to which share of the time a step's examples have how many tokens, each
    length with its share of all tokens. Lengths stay mixed: short ones alone unlearn long ones.
    """

    matrix_rate: float
    rest_rate: float
    batch_tokens: int
    lengths: tuple[tuple[float, dict[int, float]], ...]

    def length(self, share: float, rng: random.Random) -> int:
        """How many tokens each example of a step has."""
        mixed = next(lengths for below, lengths in self.lengths if share <= below)
        # A step of examples that are longer than a batch has more tokens: fewer such steps.
        steps = [part / max(self.batch_tokens, tokens) for tokens, part in mixed.items()]
        return rng.choices(list(mixed), steps)[0]


SHORT = (
    (0.06, {1024: 0.5, 2048: 0.35, 4096: 0.15}),
    (0.17, {1024: 0.3, 2048: 0.35, 4096: 0.35}),
    (0.34, {1024: 0.15, 2048: 0.25, 4096: 0.35, 8192: 0.25}),
    (0.48, {1024: 0.1, 2048: 0.2, 4096: 0.3, 8192: 0.25, 16384: 0.15}),
    (0.57, {2048: 0.05, 4096: 0.1, 8192: 0.2, 16384: 0.65}),
    (0.87, {4096: 0.12, 8192: 0.1, 16384: 0.18, 28672: 0.6}),
    (0.95, {4096: 0.15, 8192: 0.1, 28672: 0.75}),
    (1.0, {4096: 0.6, 28672: 0.4}),
)
# The longest rows take all positions: every step has 65,536 tokens then, which compiles once.
LONG = tuple(
    (until, {32768 if tokens == 28672 else tokens: part for tokens, part in mixed.items()})
    for until, mixed in SHORT
)
# Low rates, for the circuit's sake: 2.4e-3 breaks it within 15 steps and 1e-3 within 25, 20 minutes
# into a run too; 3e-4 leaves it whole for all of one (2,700 steps). The reader bears less, larger
# batches more: at 3e-4 and 8,192 tokens it lost some of its circuit within 23 steps.
RECIPES = {
    "nano": Recipe(3e-4, 2e-4, 4096, SHORT),
    "reader": Recipe(2.5e-4, 1.7e-4, 65536, LONG),
    "tiny": Recipe(3e-3, 2e-3, 2048, ((0.5, {256: 1.0}), (1.0, {256: 0.5, 1024: 0.5}))),
}
# Legs of a trained network, from a third and from a fifth of the rate: all tasks once more, and
# being read in parts.
CONTINUED = Recipe(
    1e-4,
    7e-5,
    4096,
    (
        (0.85, {2048: 0.2, 4096: 0.5, 8192: 0.15, 28672: 0.15}),
        (1.0, {2048: 0.2, 4096: 0.65, 28672: 0.15}),
    ),
)
SELECTING = Recipe(
    6e-5, 4e-5, 4096, ((0.85, {4096: 0.65, 8192: 0.1, 28672: 0.25}), (1.0, {4096: 0.8, 28672: 0.2}))
)


@dataclass(frozen=True)
class Bounded:
    """Rows longer than `dense_tokens` are read without a gradient, which is most of their time, and
    some of their answers computed again as bounded mode computes them.

    The loss of such an answer is its cross entropy, `kl_weight` times its divergence from the dense
    one, and `wrong_weight` times what is wrong beyond `most_wrong` where a layer reads the share
    `aim` of its records. One row in `tokens_per_row` tokens, and an epsilon for each step.
    """

    dense_tokens: int = 8192
    tokens_per_row: int = 96
    epsilons: tuple[float, float] = (0.06, 0.15)
    aim: float = 0.04
    most_wrong: float = 0.05
    kl_weight: float = 1.0
    wrong_weight: float = 0.3


BOUNDED = Bounded()


@dataclass
class Progress:
    """What a checkpoint keeps besides weights and optimisers."""

    steps: int = 0
    tokens: int = 0
    trained_s: float = 0.0


class Trainer:
    def __init__(self, given: argparse.Namespace):
        torch.manual_seed(0)
        self.work, self.size, self.recipe = given.work, given.size, RECIPES[given.size]
        self.device = torch.device(given.device)
        self.dtype = getattr(torch, given.dtype)
        self.total_s, self.seed = given.minutes * 60, given.seed
        self.bounded = BOUNDED if given.bounded else None
        self.goes_on = self.bounded is not None or given.start is not None
        if self.goes_on and self.size == "nano":
            self.recipe = SELECTING if self.bounded else CONTINUED
        self.progress = Progress()
        self.lost = 0  # steps one after the other whose loss was no number
        shape = SHAPES[given.size]
        self.feed = Feed(self.work, shape.max_positions, given.seed, given.workers)
        self.model = Model(shape)
        copy_from_birth(self.model)
        self.model.to(self.device)
        self.optimisers = _optimisers(self.model, self.recipe)
        if (self.work / "checkpoint.pt").is_file() and not given.fresh:
            self._resume()
        elif given.start is not None:
            self.model.load_state_dict(load(given.start).state_dict())
        if given.compile:
            self._compile()
        self.corpus = corpus.read(self.work)
        self.tokenizer = Tokenizer.from_file(str(self.work / "tokenizer.json"))

    def save(self) -> None:
        if self.lost:
            return  # weights that may be no numbers
        state = {
            "size": self.size,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": vars(self.progress),
        }
        partial = self.work / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.work / "checkpoint.pt")

    def _resume(self) -> None:
        state = torch.load(self.work / "checkpoint.pt", map_location="cpu", weights_only=True)
        if state["size"] != self.size:
            raise SystemExit(
                f"{self.work / 'checkpoint.pt'} is of size {state['size']}, not {self.size}: "
                f"give another --work, or --fresh to start anew."
            )
        self.model.load_state_dict(state["model"])
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.progress = Progress(**state["progress"])

    def share(self) -> float:
        """How much of the time is over, from 0 to 1."""
        return min(1.0, self.progress.trained_s / self.total_s)

    def rate_scale(self) -> float:
        """What part of the recipe's learning rates the next step is taken with."""
        warm_up_steps = WARM_UP_STEPS_AGAIN if self.goes_on else WARM_UP_STEPS
        warm = min(1.0, (self.progress.steps + 1) / warm_up_steps)
        return warm * min(1.0, max(0.02, (1 - self.share()) / (1 - STEADY_SHARE)))

    def _batch_shape(self) -> tuple[int, int]:
        rng = random.Random(f"{self.seed} {self.progress.steps}")
        num_tokens = self.recipe.length(self.share(), rng)
        return max(1, self.recipe.batch_tokens // num_tokens), num_tokens

    def _compile(self) -> None:
        """Compile the network before the time counts; what does not compile runs as it is."""
        started, num_tokens = time.monotonic(), min(1024, self.recipe.batch_tokens)
        rows = self.recipe.batch_tokens // num_tokens
        ids = torch.zeros(rows, num_tokens, dtype=torch.long, device=self.device)
        positions = torch.arange(num_tokens, device=self.device).expand_as(ids)
        self.model.compile_parts()
        try:
            with self._computing():
                hidden = self.model.hidden(ids, positions, torch.ones_like(ids, dtype=torch.bool))
            hidden.sum().backward()
            print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
        except Exception as error:  # compilers' errors are of many types
            print(f"goes on without torch.compile: {str(error)[:500]}", flush=True)
            self.model.uncompile()
        self.model.zero_grad()

    def _computing(self) -> AbstractContextManager:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def step(self) -> dict[str, float]:
        """One step. Returns the loss, and loss and share of right tokens of the answers alone."""
        scale = self.rate_scale()
        rates = (self.recipe.matrix_rate, self.recipe.rest_rate)
        for optimiser, rate in zip(self.optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
        batch = self.feed.batch(self.progress.steps, self._batch_shape)
        ids, targets, weights, positions = (part.to(self.device) for part in batch)
        counted = weights > 0  # only there anything is computed that nothing else needs
        whole = not self.bounded or ids.shape[1] <= self.bounded.dense_tokens
        entered: list[torch.Tensor] | None = None if whole else []
        with self._computing(), torch.set_grad_enabled(whole):
            logits = self.model.logits(self.model.hidden(ids, positions, counted, entered))
        wanted, weight = targets[counted], weights[counted]
        losses = F.cross_entropy(logits.float(), wanted, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        measured = {}
        if whole:
            loss.backward()
        else:
            measured = self._backward_bounded(ids, positions, entered, weights, targets, logits)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        # Where one gradient is no number none is by now: such a batch teaches nothing. To ask for
        # that would make the processor wait for the GPU, and then the GPU for the processor.
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.progress.steps += 1
        self.progress.tokens += ids.numel()
        answers = weight == ANSWER
        best = logits.amax(-1, keepdim=True) == logits.gather(-1, wanted[:, None])  # argmax is slow
        right = best[answers].float().mean()
        lost = loss.item()
        self.lost = 0 if math.isfinite(lost) else self.lost + 1
        return {
            "length": ids.shape[1],
            "loss": lost,
            "answer_loss": losses[answers].mean().item(),
            "answer_right": right.item(),
            "counted": counted.float().mean().item(),
            **measured,
        }

    def _backward_bounded(self, ids, positions, entered, weights, targets, logits) -> dict:
        """Gradients of bounded answers, example by example; what was measured of them. Nothing
        flows into what entered the layers: dense answers alone teach how a document is read."""
        bounded, rng = self.bounded, random.Random(f"bounded {self.seed} {self.progress.steps}")
        dense = (weights > 0).flatten().cumsum(0).view_as(weights) - 1  # which row of logits
        low, high = bounded.epsilons
        choice = selection.Choice(low * (high / low) ** rng.random(), bounded.aim)
        sums: dict[str, float] = defaultdict(float)
        drawn = [
            selection.draw_rows(row == ANSWER, rng, len(row) // bounded.tokens_per_row)
            for row in weights
        ]
        total = sum(map(len, drawn))
        for example, tokens in enumerate(drawn):
            if not len(tokens):
                continue
            with self._computing():
                hidden, kept = selection.hidden(
                    self.model,
                    ids[example],
                    positions[example],
                    [x[example].detach() for x in entered],
                    tokens,
                    choice,
                )
                found = self.model.logits(hidden)
            reference = logits[dense[example, tokens]].detach()
            said = F.cross_entropy(found.float(), targets[example, tokens], reduction="sum")
            apart = selection.divergence(reference, found).sum()
            wrong = [(layer.wrong - bounded.most_wrong).clamp_min(0).sum() for layer in kept]
            loss = said + bounded.kl_weight * apart + bounded.wrong_weight * sum(wrong)
            (loss / total).backward()
            sums["bounded_loss"] += said.item()
            sums["kl"] += apart.item()
            sums["same"] += (reference.argmax(-1) == found.argmax(-1)).sum().item()
            for number, layer in enumerate(kept):
                sums[f"wrong_{number}"] += layer.wrong.sum().item()
                sums[f"read_{number}"] += layer.read.sum().item()
        return {name: value / total for name, value in sums.items()}

    def log(self, entry: dict) -> None:
        entry = vars(self.progress) | {"share": round(self.share(), 4)} | entry
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()})
        print(line, flush=True)
        with open(self.work / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def _optimisers(model: Model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=recipe.rest_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(trainer: Trainer, until_s: float, log_steps: int, evaluate_s: float) -> None:
    """Train until the time is used up, or until time.monotonic() is `until_s`; one step at least,
    so that legs which are too short come to an end too."""
    # One thread's own time: what others take of the machine is no training.
    alone = trainer.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.monotonic
    last_save = last_evaluation = time.monotonic()
    means: dict[str, float] = {}
    begun = trainer.progress.steps
    while trainer.share() < 1 and (trainer.progress.steps == begun or time.monotonic() < until_s):
        started = clock()
        measured = trainer.step()
        for name, value in measured.items():
            if value == value:  # a batch may hold no answer
                means[name] = 0.95 * means.get(name, value) + 0.05 * value
        means["length"] = measured["length"]
        if trainer.lost > MOST_LOST:
            raise SystemExit(
                f"The loss is no number, {trainer.lost} steps one after the other, at step "
                f"{trainer.progress.steps}. {trainer.work / 'checkpoint.pt'} is from before: "
                f"go on from it with another --seed."
            )
        step_s = clock() - started
        trainer.progress.trained_s += step_s
        if trainer.progress.steps % log_steps == 0:
            tokens = max(trainer.recipe.batch_tokens, measured["length"])
            trainer.log({**means, "tokens_per_s": round(tokens / step_s)})
        if time.monotonic() - last_evaluation > evaluate_s:
            # Uncompiled: what is compiled is compiled for training's number of tokens.
            with torch.compiler.set_stance("force_eager"):
                counts = evaluate.quick(trainer.model, trainer.tokenizer, trainer.corpus)
            trainer.log({"right": counts})
            last_evaluation = time.monotonic()
        if time.monotonic() - last_save > SAVE_EVERY_S:
            trainer.save()
            last_save = time.monotonic()
    trainer.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, default="nano")
    parser.add_argument("--minutes", type=float, default=60, help="of all legs together")
    parser.add_argument("--leg-minutes", type=float, default=float("inf"), help="of this run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw examples")
    parser.add_argument("--start", type=Path, help="exported model whose weights to begin with")
    parser.add_argument("--bounded", action="store_true", help="with answers of bounded mode too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="do not go on from a checkpoint")
    parser.add_argument("--log-steps", type=int, default=50)
    parser.add_argument("--evaluate-minutes", type=float, default=4)
    given = parser.parse_args()
    until_s = time.monotonic() + given.leg_minutes * 60
    torch.set_num_threads(given.threads)
    trainer = Trainer(given)
    train(trainer, until_s, given.log_steps, given.evaluate_minutes * 60)
    trainer.feed.close()
    print(f"{trainer.progress.tokens:,} tokens in {trainer.progress.trained_s / 60:.1f} minutes")


if __name__ == "__main__":
    main()
