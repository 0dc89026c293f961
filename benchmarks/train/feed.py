"""Batches in time: drawn where they are needed, or ahead of time by other processes.

A row depends on the seed, the number of the step and its own number alone: not on how many
processes draw, nor on where a run was interrupted. One process draws some 250,000 tokens a second,
which is more than a CPU trains and less than a large GPU does.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import corpus
import numpy as np
import torch
from examples import Examples
from tokenizers import Tokenizer

Batch = tuple[torch.Tensor, ...]
AHEAD = 3  # batches that are being drawn
_examples: Examples | None = None


def _open(work: Path, max_positions: int) -> None:
    global _examples
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    _examples = Examples(tokenizer, corpus.read(work), max_positions)


def _open_elsewhere(work: Path, max_positions: int) -> None:
    """In another process, which ends with the one that started it, also where that is killed."""
    starter = multiprocessing.parent_process()
    assert starter is not None

    def end_with_it() -> None:
        starter.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    _open(work, max_positions)


def _is_open() -> bool:
    return _examples is not None


def _draw(seed: str, rows: range, num_tokens: int) -> list[np.ndarray]:
    """The parts of `rows` of a batch. Arrays, which go to another process by their bytes: tensors
    would go by files in memory that is shared, of which there may be little."""
    assert _examples is not None
    drawn = []
    for row in rows:
        _examples.reseed(random.Random(f"{seed} {row}"))
        drawn.append(_examples.batch(1, num_tokens))
    return [torch.cat(parts).numpy() for parts in zip(*drawn, strict=True)]


class Feed:
    """`shape_at` gives the (rows, tokens) of the batch that comes next."""

    def __init__(self, work: Path, max_positions: int, seed: int, workers: int):
        self.seed, self.workers = seed, workers
        self._ahead: collections.deque = collections.deque()
        self._pool = None
        if workers:
            # New processes, not copies of this one: it may hold a GPU, and threads that hold locks.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                workers,
                multiprocessing.get_context("spawn"),
                initializer=_open_elsewhere,
                initargs=(work, max_positions),
            )
            for _ in range(workers):  # they open the corpus while others make the network
                self._pool.submit(_is_open)
        else:
            _open(work, max_positions)

    def batch(self, step: int, shape_at: Callable[[], tuple[int, int]]) -> Batch:
        """The batch of `step`. With workers the shape is chosen a few steps ahead."""
        if self._pool is None:
            size, num_tokens = shape_at()
            return _tensors([_draw(f"{self.seed} {step}", range(size), num_tokens)])
        while len(self._ahead) < AHEAD:
            ahead = step + len(self._ahead)
            size, num_tokens = shape_at()
            parts = min(size, self.workers)
            cuts = [size * part // parts for part in range(parts + 1)]
            self._ahead.append(
                [
                    self._pool.submit(_draw, f"{self.seed} {ahead}", range(*rows), num_tokens)
                    for rows in itertools.pairwise(cuts)
                ]
            )
        return _tensors([future.result() for future in self._ahead.popleft()])

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _tensors(parts: list[list[np.ndarray]]) -> Batch:
    return tuple(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
