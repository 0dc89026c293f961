"""Mamba's selective scan (2312.00752), and the short convolution before it: what a layer computes
whose state is a few numbers for each channel. Between the two stand projections of what the
convolution gives, which are the caller's.

Tokens are taken one after the other, as in recurrence.py: bits depend on no cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import silu, softplus

from . import dispatch
from .recurrence import address, convolution_numbers, convolve, rows_of, state_numbers
from .threads import num_threads


@dataclass(frozen=True)
class ScanTokens:
    """n tokens, float32, a row's numbers side by side: x, what the convolution gave, and steps,
    before the softplus, (n, channels); keys and queries, which the papers call B and C, (n, dim);
    gate (n, channels), before its SiLU."""

    x: torch.Tensor
    steps: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor
    gate: torch.Tensor


def silu_conv(
    x: torch.Tensor,
    conv: torch.Tensor,
    bias: torch.Tensor | None,
    before: torch.Tensor,
    after: torch.Tensor,
) -> torch.Tensor:
    """SiLU of a causal convolution of n tokens, (n, channels) float32.

    x: (n, channels) float32; conv: (conv_width, channels); bias: (channels,) or None; before,
    after: the last inputs (conv_width - 1, channels), as `recur` in recurrence.py has them.
    """
    native = dispatch.compiled_for_floats(x)
    if native is None:
        after.copy_(before)
        out = torch.empty_like(x)
        for t in range(len(x)):  # one at a time: torch's bits depend on how many there are
            out[t] = silu(convolve(x[t : t + 1], conv, bias, after))[0]
        return out
    out = torch.empty(x.shape)
    native.silu_conv(
        convolution_numbers(conv, bias),
        state_numbers((before, None), (after, None)),
        *rows_of(x, conv.shape[1]),
        len(x),
        out.data_ptr(),
        num_threads(),
    )
    return out


def scan(
    rate: torch.Tensor,
    skip: torch.Tensor,
    tokens: ScanTokens,
    before: torch.Tensor,
    after: torch.Tensor,
) -> torch.Tensor:
    """The gated outputs (n, channels) float32 of n tokens:

        S = exp(step rate) S + key (x) step x,   out = (S^T query + skip x) silu(gate)

    rate: (dim, channels), below 0; skip: (channels,); before, after: S before the first and behind
    the last token, (dim, channels), float32, contiguous; `after` is written, and may be `before`.
    """
    n, channels = tokens.x.shape
    native = dispatch.compiled_for_floats(tokens.x)
    if native is None:
        return _reference(rate, skip, tokens, before, after)
    out = torch.empty((n, channels))
    widths = channels, channels, len(rate), len(rate), channels
    places = [rows_of(x, width) for x, width in zip(vars(tokens).values(), widths, strict=True)]
    native.scan(
        scan_numbers(rate, skip),
        state_numbers((None, before), (None, after)),
        [number for place in places for number in place],
        n,
        out.data_ptr(),
        num_threads(),
    )
    return out


def scan_numbers(rate: torch.Tensor, skip: torch.Tensor) -> list[int]:
    """As cpu/recur.h reads them; the tensors must be kept alive."""
    return [len(skip), len(rate), address(rate), address(skip)]


def _reference(rate, skip, tokens: ScanTokens, before, after) -> torch.Tensor:
    state, out = before.clone(), torch.empty_like(tokens.x)
    for t in range(len(out)):
        x, step = tokens.x[t], softplus(tokens.steps[t])
        state = (step * rate).exp() * state + tokens.keys[t][:, None] * (step * x)
        found = (state * tokens.queries[t][:, None]).sum(0) + skip * x
        out[t] = found * silu(tokens.gate[t])
    after.copy_(state)
    return out
