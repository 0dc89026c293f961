"""Norms of rows, each on its own: RMS norm, and layer norm, which is torch's.

A row's bits depend on neither the other rows nor their number, but for RMS norm by torch. The
compiled kernel's sums have another order than torch's.
"""

from __future__ import annotations

import torch

from . import dispatch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """x / rms(x) * (weight + offset) over the last dimension (1910.07467).

    x: (..., n) float32; weight: (n,) float32.
    """
    native = dispatch.compiled_for_floats(x, weight)
    if native is None:
        gpu = dispatch.gpu_for(x, weight)
        served = gpu.rows.rms_norm if gpu is not None else reference
        return served(x, weight, offset, eps)
    x, weight, out = x.contiguous(), weight.contiguous(), torch.empty(x.shape)
    native.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        offset,
        eps,
        x.shape[-1],
        x.numel() // x.shape[-1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offset: float, eps: float
) -> torch.Tensor:
    """(x - mean(x)) / deviation(x) * (weight + offset) + bias over the last dimension (1607.06450).

    x: (..., n) float32; weight, bias: (n,) float32.
    """
    weight = weight + offset if offset else weight
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def reference(x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """`rms_norm` by torch."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)
