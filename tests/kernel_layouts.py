"""Prints layouts of pages for kernel_bits.cpp, one a line: `make neon` and `make vnni` run both."""

from __future__ import annotations

import torch

from ebbtide.kernels.dispatch import layout_numbers
from ebbtide.kernels.layout import PageLayout

# Usual ones, heads that are no whole vectors, one page and several to a record.
LAYOUTS = [
    PageLayout(2, 64, 64, 2, key_bits=5, value_bits=4),
    PageLayout(2, 128, 64, 2, key_bits=8, value_bits=8, value_means=True),
    PageLayout(2, 64, 32, 1, key_bits=6, value_bits=6, value_means=True),
    PageLayout(3, 80, 32, 2, key_bits=6, value_bits=6),
    PageLayout(2, 40, 16, 1, key_bits=5, value_bits=4, value_means=True),
    PageLayout(2, 64, 64, 1, key_bits=5, near_bits=3, value_means=True),
    PageLayout(2, 64, 32, 1, key_bits=6, near_bits=3, value_bits=6, value_means=True),
    PageLayout(2, 128, 32, 1, key_bits=8, near_bits=3, value_bits=8, least_record_bytes=32768),
    PageLayout(2, 72, 18, 1, key_bits=8, value_bits=8, value_means=True),
    PageLayout(2, 64, 16, 2, codec="full", raw_dtype=torch.bfloat16),
    PageLayout(2, 40, 16, 2, codec="full", raw_dtype=torch.float16),
    PageLayout(1, 80, 16, 2, codec="full", raw_dtype=torch.float32),
    PageLayout(1, 576, 64, 1, key_bits=8, value_means=True, near_bits=2, shared_from=64),
    PageLayout(1, 56, 16, 1, key_bits=5, near_bits=1, shared_from=16),
]

if __name__ == "__main__":
    for layout in LAYOUTS:
        print(*layout_numbers(layout))
