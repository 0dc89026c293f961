"""Norms of rows, each on its own: RMS norm and layer norm.

A row's bits depend on neither the other rows nor their number, but for RMS norm by torch. The
compiled kernel's sums have another order than torch's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import dispatch
from .threads import num_threads


class Norm(NamedTuple):
    """x / rms(x) * (weight + offset) + bias over the last dimension (1910.07467), for a layer norm
    (1607.06450), which takes the mean, the same of x less its mean.

    weight: (n,) float32, contiguous; bias: the same or None. eps: added to the mean square.
    """

    weight: torch.Tensor
    offset: float
    eps: float
    bias: torch.Tensor | None = None
    takes_mean: bool = False


def normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Rows x (..., n) float32, normed."""
    parts = [part for part in (x, norm.weight, norm.bias) if part is not None]
    native = dispatch.compiled_for_floats(*parts)
    if native is None:
        gpu = dispatch.gpu_for(x, norm.weight)
        if gpu is not None and not norm.takes_mean and norm.bias is None:
            return gpu.rows.rms_norm(x, norm.weight, norm.offset, norm.eps)
        return reference(x, norm)
    numbers, floats = norm_numbers(norm)
    x, out = x.contiguous(), torch.empty(x.shape)
    rows = x.numel() // x.shape[-1]
    native.norm(numbers, *floats, x.data_ptr(), x.shape[-1], rows, out.data_ptr(), num_threads())
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """`normed` by an RMS norm without a bias."""
    return normed(x, Norm(weight, offset, eps))


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offset: float, eps: float
) -> torch.Tensor:
    """`normed` by a layer norm."""
    return normed(x, Norm(weight, offset, eps, bias, takes_mean=True))


def norm_numbers(norm: Norm | None) -> tuple[list[int], list[float]]:
    """A norm, or None, as cpu/bindings.h reads it; its tensors must be kept alive."""
    if norm is None:
        return [0, 0, 0], [0.0, 0.0]
    addresses = [vector_address(part) for part in (norm.weight, norm.bias)]
    return [*addresses, int(norm.takes_mean)], [norm.offset, norm.eps]


def vector_address(vector: torch.Tensor | None) -> int:
    """Of float32 numbers side by side; 0 for None."""
    if vector is None:
        return 0
    assert vector.dtype == torch.float32 and vector.is_contiguous(), "vectors are float32"
    return vector.data_ptr()


def reference(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`normed` by torch."""
    weight = norm.weight + norm.offset if norm.offset else norm.weight
    if norm.takes_mean:
        return torch.nn.functional.layer_norm(x, weight.shape, weight, norm.bias, norm.eps)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight
    return x if norm.bias is None else x + norm.bias
