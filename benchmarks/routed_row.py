"""A decoded token's row through the routed experts of a layer, on one thread, in two ways.

    python benchmarks/routed_row.py [--hidden 2048] [--inner 768] [--experts 128] [--chosen 8]

An expert in one call of the compiled kernels, or by products, gathering and scattering as for many
rows. 4-bit weights; the defaults are Qwen3 30B-A3B's. Prints medians in microseconds of the
process's own time, and what reading the chosen experts' weights alone takes at one thread's
measured bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ebbtide.kernels.quantised import quantise_weight
from ebbtide.offload.layers import mlp
from ebbtide.offload.models.layer_config import Experts
from ebbtide.offload.planning.bandwidth import measure_memory
from ebbtide.offload.weights.weights import LayerTensors

LAYERS = 3  # so that no cache holds the experts of the row before
ROWS = 60


def made(experts: Experts, hidden: int) -> LayerTensors:
    inner = experts.intermediate_size
    w = LayerTensors({f"{experts.router}.weight": torch.randn(experts.count, hidden)})
    for number in range(experts.count):
        for path in (experts.gate, experts.up):
            weight = torch.randn(inner, hidden) * hidden**-0.5
            w[f"{path.format(number)}.weight"] = quantise_weight(weight, 4)
        weight = torch.randn(hidden, inner) * inner**-0.5
        w[f"{experts.down.format(number)}.weight"] = quantise_weight(weight, 4)
    return w


@torch.inference_mode()
def median_us(layers: list[LayerTensors], experts: Experts, rows: list[torch.Tensor]) -> float:
    times = []
    for i, row in enumerate(rows):
        began = time.process_time()
        mlp.routed_mlp(layers[i % LAYERS], row, slice(0, 1), "silu", experts)
        times.append(time.process_time() - began)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--chosen", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    experts = Experts(given.experts, given.chosen, given.inner, True)
    layers = [made(experts, given.hidden) for _ in range(LAYERS)]
    rows = [torch.randn(1, given.hidden) for _ in range(ROWS)]
    weight = layers[0][f"{experts.down.format(0)}.weight"]
    speed = measure_memory(1).one_thread_bytes_per_s
    print(f"reading alone {1e6 * 3 * weight.num_bytes * given.chosen / speed:.0f} us")
    native = mlp.native_for
    for _ in range(3):
        mlp.native_for = native
        print(f"one call each {median_us(layers, experts, rows):.0f} us", end=", ")
        mlp.native_for = lambda *tensors: None
        print(f"as for many rows {median_us(layers, experts, rows):.0f} us")


if __name__ == "__main__":
    main()
