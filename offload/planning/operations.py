"""How many operations reading a text takes, and how many of them this machine does in a second: for
plans, which say how long reading takes at least. Reads no weights.
"""

from __future__ import annotations

import functools
import time

import torch

from ...kernels.matmul import linear
from ...kernels.quantised import quantise_weight
from .footprint import Facts

# Of the product that is timed: rows as a cell has, with which these are about the fastest.
_ROWS, _SIZE, _BITS = 256, 2048, 4
_TIMES, _WORKED_S = 5, 0.02


def reading_operations(facts: Facts, tokens: int) -> dict[str, int]:
    """Operations of a prefill of `tokens`, where a product and a sum are two: of every token with
    the "weights" of its layers (of experts, those that it chooses), and with what it sees of
    "pages", which are keys and values.

    Fewer than are done: see Facts.prefill_numbers; what lies between is not counted either.
    """
    config, attention = facts.config, 0
    for layer, window in zip(config.kv_layers, config.kv_windows, strict=True):
        if layer < config.last_keeper:
            head_dim = config.shape_of(layer).head_dim
            dims = 2 * head_dim - (config.values_from or 0)
            pairs = _pairs(tokens, window, in_chunks=config.chunked)
            attention += config.heads_of(layer) * dims * pairs
    return {"weights": 2 * facts.prefill_numbers * tokens, "pages": 2 * attention}


def _pairs(tokens: int, window: int | None, *, in_chunks: bool) -> int:
    """How many pairs there are of a token and one that it sees, itself included."""

    def below(count: int) -> int:
        return count * (count + 1) // 2

    if window is None or tokens <= window:
        return below(tokens)
    if in_chunks:
        return tokens // window * below(window) + below(tokens % window)
    return below(window) + (tokens - window) * window


def measure_operations(is_quantised: bool) -> dict[str, float]:
    """The most operations per second with "weights" and with "pages", by a fraction of a second of
    products on the CPU; cached. is_quantised: whether weights are in groups of few bits. Of pages
    it is the faster kind of product.

    As if each of torch's threads were as fast as one alone, whoever else works on the machine now.
    """
    rates = [_rate(kind) * torch.get_num_threads() for kind in (False, True)]
    return {"weights": rates[is_quantised], "pages": max(rates)}


@functools.cache
def _rate(is_quantised: bool) -> float:
    """Of one thread, the best of some times that it worked."""
    weight = torch.ones(_SIZE, _SIZE)
    x, kept = torch.ones(_ROWS, _SIZE), quantise_weight(weight, _BITS) if is_quantised else weight
    num_threads, best = torch.get_num_threads(), 0.0
    torch.set_num_threads(1)
    try:
        for _ in range(_TIMES):
            began, spent, count = time.thread_time(), 0.0, 0
            while spent < _WORKED_S:
                linear(x, kept)
                count, spent = count + 1, time.thread_time() - began
            best = max(best, count / spent)
    finally:
        torch.set_num_threads(num_threads)
    return best * 2 * _ROWS * _SIZE * _SIZE
