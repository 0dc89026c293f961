"""How fast weights are multiplied with activations, next to what memory and arithmetic allow.

    python benchmarks/products.py [--threads N] [--isa amx|avx512vnni|avx2|...|reference]
                                  [--kinds int4,int8,...] [--widths 2048,8192]

Prints the ceilings first: the read bandwidth, by summing a buffer far larger than the caches, and
the multiply-adds of float32, by the best of torch's large products. Then, for each kind of weight
and number of inputs, the bytes of weights per second for one row, and the operations per second for
more rows (a product and a sum are two). The bandwidth of a shared machine wanders: each product is
timed between two readings of the ceiling, and its fraction is the median of those. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import torch
from chosen_kernels import add_options, choose

from ebbtide.kernels.matmul import linear
from ebbtide.kernels.quantised import QuantisedWeight, quantised_shapes
from ebbtide.offload.pages.tier import aligned_bytes

BUFFER_BYTES = 256 << 20  # above most caches
ROWS = (2, 4, 8, 32, 256)
OUTPUTS = 2048  # where there are several rows
KINDS = ("int4", "affine4", "mxfp4", "int8", "bfloat16", "float16", "float32")
BITS = {"int4": 4, "affine4": 4, "mxfp4": 4, "int8": 8}  # in groups
SCALE_BITS = {"int4": 0.5, "affine4": 1, "mxfp4": 0.5, "int8": 0.5}


def now() -> float:
    """With one thread, a clock that counts only while the thread runs."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(call) -> float:
    start = now()
    call()
    return now() - start


def best_s(call, least_s: float = 0.3) -> float:
    call()
    times = [seconds(call)]
    while sum(times) < least_s or len(times) < 3:
        times.append(seconds(call))
    return min(times)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory as a loaded model's weights have it: in large pages of the system where there are."""
    return aligned_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def make_weight(kind: str, outputs: int, inputs: int):
    """A weight of random codes, and its bytes; quantising as many real ones would take minutes."""
    if kind not in BITS:
        weight = empty((outputs, inputs), getattr(torch, kind)).uniform_(-1, 1)
        return weight, weight.nbytes
    bits = BITS[kind]
    is_affine = kind == "affine4"
    of_codes, of_scales = quantised_shapes((outputs, inputs), bits, is_affine)
    codes = empty(of_codes, torch.int32).random_()
    scales = empty(of_scales, torch.float16).fill_(0.01)
    flags = {"is_float": kind == "mxfp4", "is_affine": is_affine}
    weight = QuantisedWeight(bits, inputs, outputs, codes, scales, **flags)
    return weight, weight.num_bytes


def vector_rate(kind: str, inputs: int, read) -> dict[str, float]:
    """Bytes of weights per second, and that next to what reading reaches at the same time."""
    bits = BITS[kind] + SCALE_BITS[kind] if kind in BITS else 32 if kind == "float32" else 16
    outputs = int(BUFFER_BYTES / 2 / (inputs * bits / 8)) // 64 * 64
    weight, num_bytes = make_weight(kind, outputs, inputs)
    x = torch.randn(1, inputs)
    linear(x, weight)
    times, shares = [], []
    for _ in range(9):
        before = seconds(read)
        times.append(seconds(lambda: linear(x, weight)))
        reading = min(before, seconds(read))
        shares.append(num_bytes / times[-1] / (BUFFER_BYTES / reading))
    return {"bytes_per_s": num_bytes / min(times), "share_of_reading": statistics.median(shares)}


def row_rates(kind: str, inputs: int) -> dict[int, float]:
    """Operations per second by the number of rows."""
    weight, _ = make_weight(kind, OUTPUTS, inputs)
    rates = {}
    for rows in ROWS:
        x = torch.randn(rows, inputs)
        rates[rows] = 2 * rows * OUTPUTS * inputs / best_s(lambda x=x: linear(x, weight))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--widths", default="2048,8192", help="numbers of inputs")
    options = parser.parse_args()
    kernels = choose(options)

    buffer = empty((BUFFER_BYTES // 4,), torch.float32).fill_(1)
    matrix, x = buffer.view(-1, 4096), torch.ones(4096)
    by_sum, by_product = best_s(buffer.sum), best_s(lambda: torch.mv(matrix, x))
    read = buffer.sum if by_sum < by_product else lambda: torch.mv(matrix, x)
    ceiling = BUFFER_BYTES / min(by_sum, by_product)
    a, b = torch.randn(512, 2048), torch.randn(2048, 2048)
    peak = 2 * a.numel() * 2048 / best_s(lambda: a @ b)
    print(f"{'read bandwidth':<28}{ceiling / 1e9:8.1f} GB/s")
    print(f"{'float32 products of torch':<28}{peak / 1e9:8.1f} GFLOP/s")
    report = {"kernels": kernels, "threads": options.threads}
    report |= {"read_bytes_per_s": round(ceiling), "flop_per_s": round(peak), "products": {}}
    for kind in options.kinds.split(","):
        for inputs in map(int, options.widths.split(",")):
            name = f"{kind}, {inputs} inputs"
            vector, rows = vector_rate(kind, inputs, read), row_rates(kind, inputs)
            print(
                f"{name:<28}{vector['bytes_per_s'] / 1e9:8.1f} GB/s "
                f"{vector['share_of_reading']:5.2f} of reading;  rows, G operations/s (of torch's "
                f"float32): "
                + ", ".join(f"{n}: {r / 1e9:.0f} ({r / peak:.2f})" for n, r in rows.items()),
                flush=True,
            )
            report["products"][name] = vector | {f"{n} rows": round(r) for n, r in rows.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
