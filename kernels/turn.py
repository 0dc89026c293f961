"""Rotary position embedding (RoFormer, 2104.09864) of queries or keys, by angles that are given."""

from __future__ import annotations

import torch

from . import dispatch
from .threads import num_threads


def turn(
    x: torch.Tensor,  # (tokens, heads, head_dim) float32
    cosines: torch.Tensor,  # (tokens, 1, width) float32: of the first width elements of a head
    sines: torch.Tensor,
    interleaved: bool,  # neighbours make a pair; else the width's halves do
    scale: float = 1.0,
    heads_first: bool = False,
) -> torch.Tensor:
    """x turned, times scale: (tokens, heads, head_dim), or (heads, tokens, head_dim). x stays as it
    is. Both ways have the same bits."""
    native = dispatch.compiled_for_floats(x, cosines, sines)
    if native is None:
        gpu = dispatch.gpu_for(x, cosines, sines)
        served = gpu.rows.turn if gpu is not None else reference
        return served(x, cosines, sines, interleaved, scale, heads_first)
    x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
    tokens, heads, dim = x.shape
    shape = (heads, tokens, dim) if heads_first else x.shape
    out = torch.empty(shape)
    token_stride, head_stride = out.stride(int(heads_first)), out.stride(int(not heads_first))
    native.turn(
        x.data_ptr(),
        tokens,
        heads,
        dim,
        cosines.shape[-1],
        interleaved,
        cosines.data_ptr(),
        sines.data_ptr(),
        scale,
        out.data_ptr(),
        token_stride,
        head_stride,
        num_threads(),
    )
    return out


def reference(x, cosines, sines, interleaved, scale, heads_first) -> torch.Tensor:
    """`turn` by torch."""
    width = cosines.shape[-1]
    if width:
        part = x[..., :width]
        if interleaved:
            crossed = torch.stack((-part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)
        else:
            crossed = torch.cat((-part[..., width // 2 :], part[..., : width // 2]), dim=-1)
        turned = part * cosines + crossed * sines
        x = turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)
    if scale != 1:
        x = x * scale
    return x.transpose(0, 1).contiguous() if heads_first else x
