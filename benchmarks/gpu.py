"""The kernels for GPUs beside the torch reference and the device's memory.

    python benchmarks/gpu.py [--rounds N]

Needs a CUDA device. First the bandwidth of copying within its memory; then products of one row and
of 512 with weights of 8B's shape, attention of one token over 32,768 tokens of pages, and of a
cell's rows over a span: milliseconds, bytes over time as a share of that bandwidth, and how many
times as fast as the reference. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable

import torch

from ebbtide.kernels import dispatch, layer_attention, matmul, paged_attention
from ebbtide.kernels.attention import empty_parts
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.pages import seal
from ebbtide.kernels.quantised import quantise_weight

TOKENS, SPAN_TOKENS, KV_HEADS, GROUPS, DIM = 32768, 1024, 8, 4, 128
SHAPES = {"attention": (4096, 4096), "up": (14336, 4096), "down": (4096, 14336)}


class Measured:
    def __init__(self, rounds: int):
        self._rounds, self.lines = rounds, {}
        plain = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        other = torch.empty_like(plain)
        seconds = self._median_s(lambda: other.copy_(plain))
        self.bytes_per_s = 2 * len(plain) / seconds
        print(f"copying {self.bytes_per_s / 1e9:.0f} GB/s")

    def add(self, name: str, num_bytes: int, run: Callable[[], object]) -> None:
        """num_bytes: the least that must be read."""
        seconds = {}
        for kernels in ("auto", "reference"):
            os.environ["EBBTIDE_KERNELS"] = kernels
            seconds[kernels] = self._median_s(run)
        took, reference = seconds["auto"], seconds["reference"]
        share, times = num_bytes / took / self.bytes_per_s, reference / took
        self.lines[name] = {"ms": took * 1e3, "of_bandwidth": share, "of_reference": times}
        print(f"{name:<32} {took * 1e3:8.3f} ms  {share:5.2f} of bandwidth  {times:6.1f} times")

    def _median_s(self, run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        taken = []
        for _ in range(self._rounds):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(taken)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    device = torch.device("cuda", torch.cuda.current_device())
    print(torch.cuda.get_device_name(device), dispatch.gpu_fault(device) or "kernels serve")
    measured = Measured(options.rounds)
    for name, (out, inputs) in SHAPES.items():
        plain = torch.randn(out, inputs, device=device)
        for bits in (4, 8):
            weight = quantise_weight(plain, bits)
            for rows in (1, 512):
                x = torch.randn(rows, inputs, device=device)
                label = f"{name}, {bits} bits, {rows} rows"
                measured.add(label, weight.num_bytes, lambda x=x, w=weight: matmul.linear(x, w))
        x, raw = torch.randn(1, inputs, device=device), plain.to(torch.bfloat16)
        measured.add(f"{name}, raw", raw.nbytes, lambda x=x, w=raw: matmul.linear(x, w))
    for bits in (8, 4):
        key_bits = 5 if bits == 4 else bits
        layout = PageLayout(KV_HEADS, DIM, 64, 1, key_bits=key_bits, value_bits=bits, near_bits=2)
        planes = seal(*torch.randn((2, SPAN_TOKENS, KV_HEADS, DIM), device=device), layout)
        planes = [plane.repeat(TOKENS // SPAN_TOKENS, 1) for plane in planes]
        rows = torch.arange(len(planes[0]), device=device)
        at = [dispatch.addresses(plane, rows) for plane in planes]
        listed = layer_attention.Records(*at, SPAN_TOKENS // 64, (0, TOKENS))
        q = torch.randn(KV_HEADS, GROUPS, DIM, device=device)
        parts = empty_parts(TOKENS // SPAN_TOKENS, q)
        num_bytes, name = sum(plane.nbytes for plane in planes), f"a token, pages of {bits} bits"

        def attend(q=q, listed=listed, layout=layout, parts=parts, planes=planes) -> None:
            if os.environ["EBBTIDE_KERNELS"] == "auto":
                layer_attention.attend_spans(q, listed, layout, 0.0, parts)
            else:
                paged_attention.attend_pages(q, *planes, layout)

        measured.add(name, num_bytes, attend)
        q = torch.randn(KV_HEADS, GROUPS * 256, DIM, device=device)
        span = [plane[: SPAN_TOKENS // 64] for plane in planes]
        measured.add(
            f"a cell, a span of {bits} bits",
            sum(plane.nbytes for plane in span),
            lambda q=q, span=span, layout=layout: paged_attention.attend_pages(q, *span, layout),
        )
    print(json.dumps({"copy_bytes_per_s": measured.bytes_per_s, **measured.lines}))


if __name__ == "__main__":
    main()
