"""What attention takes for each query row, by how many there are, and what key biases add to it.

    python benchmarks/rows.py [--threads N] [--isa amx|avx512vnni|avx2|...]

Over a span of 1,024 tokens, 8 KV heads, 8-bit and 4-bit pages: nanoseconds for each row and page of
64 tokens by packed pages, and by pages that are unpacked to float32 first, as prefill has it where
that is faster. Then, for the shapes of Qwen2.5, milliseconds that a decoded token's key biases take
in a layer of 32,768 tokens, and attending to its pages. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json

import torch
from chosen_kernels import add_options, choose
from kernels import ATTENDED, best_s

from ebbtide.kernels import dispatch
from ebbtide.kernels.attention import attend, empty_parts
from ebbtide.kernels.layer_attention import Records, attend_spans
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.pages import seal, unpack
from ebbtide.kernels.rope_scores import block_turns, rope_scores

PAGE_TOKENS, SPAN_TOKENS, DECODED_TOKENS = 64, 1024, 32768
# KV heads, query heads to each, head_dim
QWEN_SHAPES = {"0.5B": (2, 7, 64), "1.5B": (2, 6, 128), "7B": (4, 7, 128)}


class Span:
    """Sealed pages of normal keys and values, `repeats` times the same ones."""

    def __init__(self, heads: int, dim: int, codec: dict, repeats: int = 1):
        self.layout = PageLayout(heads, dim, PAGE_TOKENS, 1, **codec)
        self.planes = seal(*torch.randn((2, SPAN_TOKENS, heads, dim)), self.layout)
        rows = torch.arange(SPAN_TOKENS // PAGE_TOKENS).repeat(repeats)
        at = (dispatch.addresses(plane, rows) for plane in self.planes)
        self.records = Records(*at, SPAN_TOKENS // PAGE_TOKENS, (0, SPAN_TOKENS * repeats))
        self.num_spans = repeats

    def packed_s(self, q: torch.Tensor) -> float:
        parts = empty_parts(self.num_spans, q)
        return best_s(lambda: attend_spans(q, self.records, self.layout, 0.0, parts))

    def unpacked_s(self, q: torch.Tensor) -> float:
        k, v = torch.empty((2, len(q), SPAN_TOKENS, q.shape[2]))

        def run() -> None:
            unpack(*self.planes, self.layout, k, v)
            attend(q, k, v)

        return best_s(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    options = parser.parse_args()
    report = {"kernels": choose(options), "threads": options.threads, "row_ns": {}, "bias_ms": {}}
    torch.manual_seed(0)
    for bits in ("8", "4"):
        for dim in (64, 128):
            span, costs = Span(8, dim, ATTENDED[bits]), {}
            for num_rows in (1, 4, 8, 32, 1024):
                q = torch.randn(8, num_rows, dim) / 8
                each = 1e9 / (8 * num_rows * SPAN_TOKENS // PAGE_TOKENS)
                costs[num_rows] = each * span.packed_s(q)
            costs["unpacked"] = each * span.unpacked_s(q)  # of as many rows as there were last
            report["row_ns"][f"{bits} bits, d {dim}"] = costs
            listed = ", ".join(f"{rows}: {ns:.0f}" for rows, ns in costs.items())
            print(f"{bits} bits, head_dim {dim}: ns a row and page, by rows {listed}", flush=True)
    for name, (heads, groups, dim) in QWEN_SHAPES.items():
        turns = block_turns(1e6 ** -(torch.arange(dim // 2) / (dim // 2)))
        factors = torch.randn((2, heads, groups, dim // 2))
        constant = torch.zeros(heads, groups)
        biases = best_s(
            lambda f=factors, c=constant, t=turns: rope_scores(*f, c, t, 0, DECODED_TOKENS)
        )
        span = Span(heads, dim, ATTENDED["8"], DECODED_TOKENS // SPAN_TOKENS)
        pages = span.packed_s(torch.randn(heads, groups, dim) / 8)
        report["bias_ms"][name] = {"biases": 1e3 * biases, "pages": 1e3 * pages}
        print(f"Qwen2.5 {name}: biases {1e3 * biases:.2f} ms a layer, pages {1e3 * pages:.2f}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
