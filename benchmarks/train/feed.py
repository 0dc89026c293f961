"""Batches in time: drawn where they are needed, or ahead of time by other processes.

A batch depends on the seed and the number of the step alone: not on how many processes draw, nor
on where a run was interrupted. One process draws some 300,000 tokens a second, which is more than
a CPU trains and less than a large GPU does.
"""

from __future__ import annotations

import collections
import concurrent.futures
import random
from collections.abc import Callable
from pathlib import Path

import corpus
import torch
from examples import Examples
from tokenizers import Tokenizer

Batch = tuple[torch.Tensor, ...]
_examples: Examples | None = None


def _open(work: Path, max_positions: int) -> None:
    global _examples
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    _examples = Examples(tokenizer, corpus.read(work), max_positions)


def _draw(seed: str, size: int, num_tokens: int) -> Batch:
    assert _examples is not None
    _examples.reseed(random.Random(seed))
    return _examples.batch(size, num_tokens)


class Feed:
    """`shape_at` gives the (rows, tokens) of the batch that comes next."""

    def __init__(self, work: Path, max_positions: int, seed: int, workers: int):
        self.seed, self.workers = seed, workers
        self._ahead: collections.deque = collections.deque()
        self._pool = None
        if workers:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                workers, initializer=_open, initargs=(work, max_positions)
            )
        else:
            _open(work, max_positions)

    def batch(self, step: int, shape_at: Callable[[], tuple[int, int]]) -> Batch:
        """The batch of `step`. With workers the shape is chosen a few steps ahead."""
        if self._pool is None:
            return _draw(f"{self.seed} {step}", *shape_at())
        while len(self._ahead) < 3:
            ahead = step + len(self._ahead)
            size, num_tokens = shape_at()
            parts = min(size, self.workers)
            sizes = [size // parts + (part < size % parts) for part in range(parts)]
            self._ahead.append(
                [
                    self._pool.submit(_draw, f"{self.seed} {ahead} {part}", rows, num_tokens)
                    for part, rows in enumerate(sizes)
                ]
            )
        parts = [future.result() for future in self._ahead.popleft()]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
