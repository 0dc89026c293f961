"""Trains the built-in model from nothing: about an hour on two CPU cores.

    python benchmarks/train/train.py --work WORK [--tokens 30e6] [--threads 2] [--shape tiny]

Reads WORK/tokenizer.json and WORK/natural.jsonl (tokenizer.py writes them) and keeps
WORK/checkpoint.pt, from which the same command goes on. Copying is trained first, until nine copied
tokens in ten are right; then documents, whose length grows from 256 to 4096 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from examples import FIRST_ORDINARY_ID, Examples
from model import SHAPES, Model, look_back_from_birth
from tokenizers import Tokenizer

LEARNING_RATE = 1.2e-3
WARM_UP_STEPS = 40
COPYING_TOKENS = 128  # the length of an example in the first phase
COPYING_IS_LEARNT = 0.9
# The length of an example up to a share of the training.
LENGTHS = ((0.45, 256), (0.7, 512), (0.8, 1024), (0.93, 2048), (1.0, 4096))


@dataclass
class Progress:
    """What a checkpoint keeps besides weights and optimiser."""

    tokens: int = 0
    copying: bool = True


class Trainer:
    def __init__(self, work: Path, shape_name: str, seed: int, copying: bool):
        torch.manual_seed(0)
        self.path, self.shape_name = work / "checkpoint.pt", shape_name
        self.model = Model(SHAPES[shape_name])
        look_back_from_birth(self.model)
        self.optimiser = _optimiser(self.model)
        self.progress = Progress(copying=copying)
        lines = (work / "natural.jsonl").read_text(encoding="utf-8").splitlines()
        self.examples = Examples(
            Tokenizer.from_file(str(work / "tokenizer.json")),
            [json.loads(line) for line in lines],
            random.Random(seed),
            copying,
            self.model.shape.max_positions,
        )

    def save(self) -> None:
        state = {
            "shape": self.shape_name,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": vars(self.progress),
        }
        torch.save(state, self.path)

    def resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])
        self.examples.copying = self.progress.copying

    def step(self, share: float, warm_up: float) -> tuple[float, float, float]:
        """One optimiser step at `share` of the training.

        Returns the loss, and the loss and the share of right tokens of the answers alone (nan where
        the batch has none).
        """
        num_tokens = self.num_tokens(share)
        budget = 2048 if self.progress.copying else 4096
        size = max(1, budget // num_tokens)
        decay = 1.0 if share < 0.5 else max(0.02, 2 * (1 - share))
        for group in self.optimiser.param_groups:
            group["lr"] = LEARNING_RATE * warm_up * decay
        ids, targets, weights, positions = self.examples.batch(size, num_tokens)
        counted = weights > 0  # logits are computed where they count only
        logits = self.model.logits(self.model.hidden(ids, positions)[counted])
        losses = F.cross_entropy(logits, targets[counted], reduction="none")
        weight, answers = weights[counted], weights[counted] == 1
        loss = (losses * weight).sum() / weight.sum()
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.progress.tokens += size * num_tokens
        right = (logits.argmax(-1) == targets[counted])[answers].float().mean().item()
        return loss.item(), losses[answers].mean().item(), right

    def num_tokens(self, share: float) -> int:
        if self.progress.copying:
            return COPYING_TOKENS
        return next(tokens for below, tokens in LENGTHS if share < below)

    @torch.no_grad()
    def copying_accuracy(self) -> float:
        """The share of right tokens in the second half of a random sequence said twice."""
        once = torch.randint(FIRST_ORDINARY_ID, self.model.shape.vocab, (32, 48))
        twice = torch.cat([once, once], 1)
        positions = torch.arange(95)[None].expand(32, -1)
        hidden = self.model.hidden(twice[:, :-1], positions)[:, 52:]
        return (self.model.logits(hidden).argmax(-1) == twice[:, 53:]).float().mean().item()

    def end_copying_when_learnt(self) -> None:
        accuracy = self.copying_accuracy()
        print(f"copying {accuracy:.3f}", flush=True)
        if accuracy > COPYING_IS_LEARNT:
            self.progress.copying = self.examples.copying = False
            print("copying is learnt: documents from here on", flush=True)


def _optimiser(model: Model) -> torch.optim.Optimizer:
    """AdamW; embeddings and norms do not decay."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "embed" not in name else rest).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


def train(trainer: Trainer, num_tokens: float) -> None:
    start_s, start_tokens = time.time(), trainer.progress.tokens
    mean_loss = mean_right = None
    step = 0
    while trainer.progress.tokens < num_tokens:
        share = trainer.progress.tokens / num_tokens
        loss, answer_loss, right = trainer.step(share, min(1, (step + 1) / WARM_UP_STEPS))
        step += 1
        mean_loss = loss if mean_loss is None else 0.95 * mean_loss + 0.05 * loss
        if answer_loss == answer_loss:  # not nan
            mean_right = right if mean_right is None else 0.95 * mean_right + 0.05 * right
        if step % 20 == 0:
            if trainer.progress.copying:
                trainer.end_copying_when_learnt()
            speed = (trainer.progress.tokens - start_tokens) / (time.time() - start_s)
            print(
                f"step {step}: {trainer.progress.tokens / 1e6:.2f} million tokens, "
                f"length {trainer.num_tokens(share)}, loss {mean_loss:.3f}, "
                f"answers {answer_loss:.3f} ({mean_right or 0:.4f} right), {speed:.0f} tokens/s",
                flush=True,
            )
        if step % 60 == 0:
            trainer.save()
    trainer.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=30e6, help="how many in all")
    parser.add_argument("--shape", choices=SHAPES, default="nano")
    parser.add_argument("--seed", type=int, default=7, help="of the examples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="do not go on from a checkpoint")
    parser.add_argument("--no-copying", action="store_true", help="begin with documents")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    trainer = Trainer(given.work, given.shape, given.seed, copying=not given.no_copying)
    if trainer.path.exists() and not given.fresh:
        trainer.resume()
        print(f"going on after {trainer.progress.tokens:,} tokens")
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{num_parameters / 1e6:.2f} million parameters")
    train(trainer, given.tokens)


if __name__ == "__main__":
    main()
