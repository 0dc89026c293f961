"""What the tests of attention over sealed pages share: layouts, pages, queries and the oracle."""

from __future__ import annotations

import dataclasses
import math

import torch

from ebbtide.kernels import pages
from ebbtide.kernels.attention import finish
from ebbtide.kernels.layout import PageLayout

LAYOUTS = {
    "usual": PageLayout(2, 64, 32, 4, key_bits=5, value_bits=4, near_bits=1),
    "one head": PageLayout(1, 128, 64, 2, key_bits=6, value_bits=4, near_bits=2),
    "80": PageLayout(3, 80, 16, 3, key_bits=4, value_bits=3, near_bits=1),
    "tiny": PageLayout(1, 8, 16, 1, key_bits=3, value_bits=2, near_bits=1),
    "256": PageLayout(1, 256, 256, 1, key_bits=8, value_bits=8, near_bits=0),
    "pages of 20": PageLayout(2, 24, 20, 3, key_bits=7, value_bits=5, near_bits=4),
    "pages of 10": PageLayout(2, 64, 10, 2, key_bits=7, value_bits=5, near_bits=4),
    "full bf16": PageLayout(2, 64, 32, 2, codec="full"),
    "full f16": PageLayout(3, 88, 16, 1, codec="full", raw_dtype=torch.float16),
    "full f32": PageLayout(1, 112, 16, 2, codec="full", raw_dtype=torch.float32),
}
# What models have: two near bits, and every way in which planes of codes are read.
for dim in (16, 32, 64, 96, 128):
    key_bits, value_bits = {16: (6, 6), 32: (5, 4), 64: (5, 4), 96: (6, 6), 128: (8, 8)}[dim]
    LAYOUTS[f"{dim}, two near bits"] = PageLayout(
        1, dim, 32, 2, key_bits=key_bits, value_bits=value_bits, near_bits=2
    )
for bits in (6, 8):
    LAYOUTS[f"64, {bits} bits"] = PageLayout(
        2, 64, 16, 2, key_bits=bits, value_bits=bits, near_bits=2
    )
# Heads whose runs are no whole tiles, in pages as models have them.
for dim, bits in ((80, 8), (96, 6), (112, 8)):
    LAYOUTS[f"{dim}, pages of 64"] = PageLayout(
        1, dim, 64, 1, key_bits=bits, value_bits=bits, near_bits=2
    )
# Gemma 4's global layers.
for bits in (6, 8):
    LAYOUTS[f"512, {bits} bits"] = PageLayout(
        1, 512, 32, 1, key_bits=bits, value_bits=bits, near_bits=2
    )
LAYOUTS["512, full"] = PageLayout(1, 512, 16, 2, codec="full")
# And what their first layers have.
for dim, key_bits, value_bits in ((16, 5, 4), (64, 5, 4), (64, 6, 6), (64, 8, 8), (128, 8, 8)):
    LAYOUTS[f"{dim}, {key_bits} bits, three near bits"] = PageLayout(
        2, dim, 16, 2, key_bits=key_bits, value_bits=value_bits, near_bits=3,
        least_record_bytes=32768,
    )  # fmt: skip
# Values that are the keys, as of latent attention.
for bits in (8, 6, 5):
    LAYOUTS[f"shared, {bits} bits"] = PageLayout(
        1, 576, 64, 1, key_bits=bits, near_bits=2, shared_from=64
    )
LAYOUTS["shared, 56"] = PageLayout(1, 56, 16, 2, key_bits=8, near_bits=2, shared_from=16)
LAYOUTS["shared, pages of 20"] = PageLayout(2, 40, 20, 3, key_bits=7, near_bits=4, shared_from=8)
LAYOUTS["shared bf16"] = PageLayout(1, 56, 32, 2, codec="full", shared_from=16)
LAYOUTS["near in record"] = dataclasses.replace(LAYOUTS["usual"], near_resident=False)
LAYOUTS["rotated"] = dataclasses.replace(LAYOUTS["usual"], rotate=True)


def sealed(layout: PageLayout, num_records: int = 4):
    """(near, records, k, v): pages, and what they hold as (kv_heads, num_tokens, d)."""
    generator = torch.Generator().manual_seed(layout.head_dim)
    shape = (num_records * layout.record_tokens, layout.kv_heads, layout.head_dim)
    k, v = torch.randn((2, *shape), generator=generator)
    k[..., 3] += 5
    near, records = pages.seal(k, v, layout)
    k, v = torch.empty((2, shape[1], shape[0], shape[2]))
    pages.unpack(near, records, layout, k, v)
    return near, records, k, v


def queries(layout: PageLayout, rows: int) -> torch.Tensor:
    shape = (layout.kv_heads, rows, layout.head_dim)
    q = torch.randn(shape, generator=torch.Generator().manual_seed(rows))
    return q * (2 / math.sqrt(layout.head_dim))


def tolerance(kernels: str, layout: PageLayout) -> float:
    """How far attention may be from float64: float32's rounding of scores, passed through exp. For
    codes the compiled kernels round a page's queries and weights to 2**-15 of the greatest: 64
    elements of codes up to 255 make errors of 2**-12 of scores and values of a few units.
    """
    return 2e-5 if kernels == "reference" or layout.is_full else 1e-3


def check(p, q, k, v, visible, bias=None, softcap=0.0, within=2e-5) -> None:
    """That the partial p is attention's over the visible tokens, within a tolerance."""
    seen = slice(*visible)
    scores = q.double() @ k[:, seen].double().transpose(1, 2)
    if bias is not None:
        scores += bias[..., seen].double()
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    tolerance = {"atol": within, "rtol": within}
    want = scores.softmax(-1) @ v[:, seen].double()
    torch.testing.assert_close(finish(p).double(), want, **tolerance)
    # The parts too, since they are merged with those of other spans.
    torch.testing.assert_close(p.max.double(), scores.amax(-1), **tolerance)
    log_mass = p.max.double() + p.sum.double().log()
    torch.testing.assert_close(log_mass, scores.logsumexp(-1), **tolerance)
