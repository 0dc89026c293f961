"""What a layer that keeps a state takes for each token, beside moving that state through memory.

    python benchmarks/recurrence.py [--threads N] [--isa amx|avx512vnni|avx2|...|reference]

Prints the ceiling first: how fast this machine changes memory in place, bytes read and written
together. Then, for the shapes of Qwen3.5 0.8B (Gated DeltaNet), Granite 4 H 1B (Mamba-2), Kimi
Linear 48B-A3B (Kimi Delta Attention) and Jamba Reasoning 3B (Mamba's scan), microseconds a token
and layer, of calls of one token and of 256, and what one reading and one writing of the state would
take. Single tokens go through as many layers in turn as no cache holds together, as decoding does.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod

import torch
from chosen_kernels import add_options, choose
from kernels import BUFFER_BYTES, best_s

from ebbtide.kernels.recurrence import RecurrentShape, RecurrentWeights, recur
from ebbtide.kernels.scan import ScanTokens, scan, silu_conv

SHAPES = {
    "Kimi Linear 48B-A3B": RecurrentShape(
        32, 32, 128, 128, 4, True, norm_heads=1, norm_eps=1e-5, by_channel=True
    ),
    "Qwen3.5 0.8B": RecurrentShape(16, 16, 128, 128, 4, True, norm_heads=1, norm_eps=1e-6),
    "Granite 4 H 1B": RecurrentShape(48, 1, 128, 64, 4, False, norm_heads=48, norm_eps=1e-5),
}
SCAN_CHANNELS, SCAN_DIM, SCAN_WIDTH = 5120, 16, 4  # Jamba Reasoning 3B's
UNCACHED_BYTES = 256 << 20  # of all states together


def token_s(shape: RecurrentShape, tokens: int) -> float:
    """Seconds that a call of so many tokens takes, for each of them."""
    weights = RecurrentWeights(
        conv=torch.randn(shape.conv_width, shape.channels) / 2,
        conv_bias=None if shape.is_delta else torch.randn(shape.channels) / 4,
        step_bias=torch.randn(shape.steps),
        rate=-torch.randn(shape.heads).exp(),
        skip=None if shape.is_delta else torch.randn(shape.heads),
        norm=torch.ones(shape.value_dim if shape.is_delta else shape.values),
    )
    widths = (shape.channels, shape.steps, shape.heads, shape.values)
    mixed, steps, gains, gate = torch.randn(tokens, sum(widths)).split(widths, -1)
    inputs = torch.zeros(shape.conv_width - 1, shape.channels)
    states = uncached(shape.state)

    def call() -> None:
        state = inputs, next(states)
        recur(shape, weights, mixed, steps, gains if shape.is_delta else None, gate, state, state)

    return best_s(call) / tokens


def scan_token_s(tokens: int) -> float:
    """The same of Mamba's convolution and scan, without the projections between them."""
    channels, dim = SCAN_CHANNELS, SCAN_DIM
    widths = (channels, channels, dim, dim, channels)
    taps, inputs = torch.randn(SCAN_WIDTH, channels) / 2, torch.zeros(SCAN_WIDTH - 1, channels)
    rate, skip = -torch.randn(dim, channels).exp(), torch.randn(channels)
    given = ScanTokens(*torch.randn(tokens, sum(widths)).split(widths, -1))
    states = uncached((dim, channels))

    def call() -> None:
        state = next(states)
        mixed = silu_conv(given.x, taps, None, inputs, inputs)
        scan(rate, skip, replace(given, x=mixed), state, state)

    return best_s(call) / tokens


def uncached(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """States in turn, of as many layers as no cache holds together."""
    count = 1 + UNCACHED_BYTES // (4 * prod(shape))
    return itertools.cycle(torch.ones(count, *shape).unbind())  # zeros would not be in memory yet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    options = parser.parse_args()
    report = {"kernels": choose(options), "threads": options.threads}
    torch.manual_seed(0)
    ceiling = 2 * BUFFER_BYTES / best_s(torch.ones(BUFFER_BYTES // 4).neg_)
    report["changed_bytes_per_s"] = round(ceiling)
    print(f"changing memory in place, the ceiling: {ceiling / 1e9:.1f} GB/s")
    timed = {name: (shape.state, partial(token_s, shape)) for name, shape in SHAPES.items()}
    timed["Jamba Reasoning 3B"] = (SCAN_DIM, SCAN_CHANNELS), scan_token_s
    for name, (state, seconds) in timed.items():
        state_bytes = 4 * prod(state)
        moved_us = 2e6 * state_bytes / ceiling
        one_us, many_us = (1e6 * seconds(tokens) for tokens in (1, 256))
        report[name] = {"one_us": one_us, "many_us": many_us, "moved_us": moved_us}
        print(
            f"{name}: {one_us:.0f} us for a token alone, {moved_us / one_us:.2f} of the ceiling: "
            f"{2 * state_bytes / 1e6:.1f} MB are moved in {moved_us:.0f} us; "
            f"{many_us:.1f} us for each of 256"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
