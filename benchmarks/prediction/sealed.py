"""Pages of one layer as the runtime would hold them: far keys and values, and what stays near.

Uses the real quantiser. Tokens beyond the last whole record stay raw. Knows no queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ebbtide.kernels import codec
from ebbtide.kernels.pages import rotate


@dataclass(frozen=True)
class Near:
    """How much of a key stays near. bits 0: mean and variance of the page's keys instead."""

    page_tokens: int = 64
    bits: int = 2
    key_bits: int = 8
    value_bits: int = 8
    rotate: bool = False

    def resident_share(self, head_dim: int) -> float:
        """Near bytes, mean values included, for each byte of the 16-bit KV."""
        codes = self.page_tokens * head_dim * self.bits / 8
        # A variance in fp16 comes to the box where there are no codes.
        vectors = 2 * head_dim * (3 if self.bits else 4)
        return (codes + vectors) / (self.page_tokens * head_dim * 4)

    def __str__(self):
        turned = " rotated" if self.rotate else ""
        return f"P {self.page_tokens}, {self.bits} near bits{turned}"


class Sealed:
    """All whole pages of one layer.

    keys, values  (kv_heads, num_tokens, d): what a query attends to in the far plane
    near_keys     same shape, from the near bits alone; None for 0 bits
    bin_widths    (kv_heads, num_pages, d): width of a near code's bin
    least, greatest, key_means, key_variances, value_means  (kv_heads, num_pages, d)
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, near: Near):
        self.near = near
        size = near.page_tokens
        num_tokens = keys.shape[1] // size * size
        k = _pages(rotate(keys.contiguous()) if near.rotate else keys, num_tokens, size)
        v = _pages(values, num_tokens, size)
        lo, scale = codec.box(k, -2, near.key_bits, "keys")
        codes = codec.encode(k, lo, scale, near.key_bits)
        decoded = codec.decode(codes, lo, scale)
        self.keys = decoded.flatten(1, 2)
        value_lo, value_scale = codec.box(v, -1, near.value_bits, "values")
        value_codes = codec.encode(v, value_lo, value_scale, near.value_bits)
        v = codec.decode(value_codes, value_lo, value_scale)
        self.values = v.flatten(1, 2)
        self.value_means = v.mean(-2).half().float()
        self.least = lo.squeeze(-2).float()
        self.greatest = self.least + (2**near.key_bits - 1) * scale.squeeze(-2).float()
        self.key_means, self.key_variances = decoded.mean(-2), decoded.var(-2, correction=0)
        self.near_keys = None
        if near.bits:
            far_bits = near.key_bits - near.bits
            coarse = codec.decode_near(codes >> far_bits, lo, scale, far_bits)
            self.near_keys = coarse.flatten(1, 2)
            self.bin_widths = scale.squeeze(-2).float() * 2**far_bits


def _pages(x: torch.Tensor, num_tokens: int, size: int) -> torch.Tensor:
    """(kv_heads, num_tokens, d) to (kv_heads, num_pages, P, d)."""
    return x[:, :num_tokens].unflatten(1, (-1, size))
