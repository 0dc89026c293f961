"""How many operations reading a text takes, and how many of them this machine does in a second: for
plans, which say how long reading takes at least. Reads no weights.
"""

from __future__ import annotations

import functools
import time

import torch

from ..kernels.matmul import linear
from ..kernels.quantised import quantise_weight
from .footprint import Facts

# Of the product that is timed: rows as a cell has, and weights that stay in a core's cache.
_ROWS, _SIZE = 256, 1024


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
    products on the CPU, with as many threads as torch has; cached. is_quantised: whether weights
    are in groups of few bits. Of pages it is the fastest product of any kind.
    """
    rates = [_rate(kind, torch.get_num_threads()) for kind in (False, True)]
    return {"weights": rates[is_quantised], "pages": max(rates)}


@functools.lru_cache(maxsize=8)
def _rate(is_quantised: bool, num_threads: int, seconds: float = 0.1) -> float:
    """The best of some; num_threads is torch's."""
    x, weight = torch.ones(_ROWS, _SIZE), torch.ones(_SIZE, _SIZE)
    kept = quantise_weight(weight, 8) if is_quantised else weight
    linear(x, kept)
    best_s, started = float("inf"), time.perf_counter()
    while (began := time.perf_counter()) < started + seconds:
        linear(x, kept)
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * _ROWS * _SIZE * _SIZE / best_s
