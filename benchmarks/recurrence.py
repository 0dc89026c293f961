"""What a layer that keeps a state takes for each token, beside moving that state through memory.

    python benchmarks/recurrence.py [--threads N] [--isa amx|avx512vnni|avx2|...|reference]

Prints the ceiling first: how fast this machine changes memory in place, bytes read and written
together. Then, for the shapes of Qwen3.5 0.8B (Gated DeltaNet) and Granite 4 H 1B (Mamba-2),
microseconds a token and layer, of calls of one token and of 256, and what one reading and one
writing of the state would take. Single tokens go through as many layers in turn as no cache holds
together, as decoding does. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json

import torch
from chosen_kernels import add_options, choose
from kernels import BUFFER_BYTES, best_s

from ebbtide.kernels.recurrence import RecurrentShape, RecurrentWeights, recur

SHAPES = {
    "Qwen3.5 0.8B": RecurrentShape(16, 16, 128, 128, 4, True, norm_heads=1, norm_eps=1e-6),
    "Granite 4 H 1B": RecurrentShape(48, 1, 128, 64, 4, False, norm_heads=48, norm_eps=1e-5),
}
UNCACHED_BYTES = 256 << 20  # of all states together


def token_s(shape: RecurrentShape, tokens: int) -> float:
    """Seconds that a call of so many tokens takes, for each of them."""
    weights = RecurrentWeights(
        conv=torch.randn(shape.conv_width, shape.channels) / 2,
        conv_bias=None if shape.is_delta else torch.randn(shape.channels) / 4,
        step_bias=torch.randn(shape.heads),
        rate=-torch.randn(shape.heads).exp(),
        skip=None if shape.is_delta else torch.randn(shape.heads),
        norm=torch.ones(shape.value_dim if shape.is_delta else shape.values),
    )
    widths = (shape.channels, shape.heads, shape.heads, shape.values)
    mixed, steps, gains, gate = torch.randn(tokens, sum(widths)).split(widths, -1)
    inputs = torch.zeros(shape.conv_width - 1, shape.channels)
    count = 1 + UNCACHED_BYTES // state_bytes(shape)
    matrices = torch.zeros(count, shape.heads, shape.key_dim, shape.value_dim)
    states = itertools.cycle([(inputs, of_layer) for of_layer in matrices])

    def call() -> None:
        state = next(states)
        recur(shape, weights, mixed, steps, gains if shape.is_delta else None, gate, state, state)

    for _ in range(count):
        call()
    return best_s(call) / tokens


def state_bytes(shape: RecurrentShape) -> int:
    return shape.values * shape.key_dim * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    options = parser.parse_args()
    report = {"kernels": choose(options), "threads": options.threads}
    torch.manual_seed(0)
    ceiling = 2 * BUFFER_BYTES / best_s(torch.ones(BUFFER_BYTES // 4).neg_)
    report["changed_bytes_per_s"] = round(ceiling)
    print(f"changing memory in place, the ceiling: {ceiling / 1e9:.1f} GB/s")
    for name, shape in SHAPES.items():
        moved_us = 2e6 * state_bytes(shape) / ceiling
        one_us, many_us = (1e6 * token_s(shape, tokens) for tokens in (1, 256))
        report[name] = {"one_us": one_us, "many_us": many_us, "moved_us": moved_us}
        print(
            f"{name}: {one_us:.0f} us for a token alone, {moved_us / one_us:.2f} of the ceiling: "
            f"{2 * state_bytes(shape) / 1e6:.1f} MB are moved in {moved_us:.0f} us; "
            f"{many_us:.1f} us for each of 256"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
