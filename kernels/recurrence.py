"""What a layer computes that keeps a state of fixed size in place of keys and values: Gated
DeltaNet (2412.06464), Kimi Delta Attention (2510.26692), Mamba-2 (2405.21060) and gated short
convolutions (LFM2). Mamba's selective scan stands in scan.py.

A state is what all tokens so far left: the last inputs of a short causal convolution, and for all
but the last a matrix for each head, to which every token adds a product of a key and a value:

    Gated DeltaNet   S = decay S + k (x) gain (v - (decay S)^T k),   out = S^T q
    Mamba-2          S = decay S + k (x) gain v,                     out = S^T q + skip v

In Kimi Delta Attention, a Gated DeltaNet, each row of S has a decay of its own.

Tokens are taken one after the other, so that a token's bits depend on what was before it alone: not
on how a text was cut. Knows rows, and neither weights' files nor sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import silu, softplus

from . import dispatch
from .threads import num_threads

_NORM_EPS = 1e-6  # of a key's and a query's length, as flash-linear-attention has it
# An epsilon beside which no mean square counts, and a weight that undoes what it does to a row: by
# these two, powers of two, the kernels leave outputs as they are where there is no norm.
_NO_NORM = 2.0**100, 2.0**50


@dataclass(frozen=True)
class RecurrentShape:
    """heads share key_heads keys and queries. conv_width: tokens that the convolution sees, the
    newest included. is_delta: Gated DeltaNet, else Mamba-2. norm_heads: over how many heads' values
    each root mean square is taken. step_limits: of Mamba-2's steps. most_gain: what DeltaNet's
    gains stay below; above 1 a token may turn around what its key finds. by_channel: Kimi Delta
    Attention, whose decays are of each number of a key and whose gates are sigmoids.
    least_log_decay: below 0: its decays are exp(least_log_decay sigmoid(-rate step)); 0: as the
    others', exp(rate softplus(step)).

    Rows of the convolution's input hold queries, keys and values (DeltaNet) or values, keys and
    queries (Mamba-2, which calls them x, B and C), of all heads side by side.
    """

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    is_delta: bool
    norm_heads: int
    norm_eps: float
    step_limits: tuple[float, float] = (0.0, float("inf"))
    most_gain: float = 1.0
    by_channel: bool = False
    least_log_decay: float = 0.0

    @property
    def state(self) -> tuple[int, int, int]:
        """The shape of all heads' matrices."""
        return self.heads, self.key_dim, self.value_dim

    @property
    def steps(self) -> int:
        """Numbers of a row's steps, of which decays are made."""
        return self.heads * (self.key_dim if self.by_channel else 1)

    @property
    def keys(self) -> int:
        """Numbers of a row's keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return 2 * self.keys + self.values


@dataclass(frozen=True)
class RecurrentWeights:
    """Of one layer, float32. conv: (conv_width, channels); conv_bias: (channels,) or None;
    step_bias: (shape.steps,); rate: (heads,), below 0; skip: (heads,), Mamba-2's alone, else None;
    norm: (value_dim,) for all heads alike, or (heads * value_dim,); None: what is gated is not
    normed."""

    conv: torch.Tensor
    conv_bias: torch.Tensor | None
    step_bias: torch.Tensor
    rate: torch.Tensor
    skip: torch.Tensor | None
    norm: torch.Tensor | None

    def copied(self) -> RecurrentWeights:
        parts = {name: part for name, part in vars(self).items() if part is not None}
        return replace(self, **{name: part.clone() for name, part in parts.items()})


def recur(
    shape: RecurrentShape,
    weights: RecurrentWeights,
    mixed: torch.Tensor,
    steps: torch.Tensor,
    gains: torch.Tensor | None,
    gate: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor],
    after: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The outputs (n, heads * value_dim) float32 of n tokens, gated and normed.

    mixed: (n, channels), what goes into the convolution; steps: (n, shape.steps), before their bias
    and softplus; gains: (n, heads), before the sigmoid, DeltaNet's alone; gate: (n, heads *
    value_dim). All float32; a row's numbers lie side by side. before, after: the states before the
    first and behind the last token, each the convolution's last inputs (conv_width - 1, channels)
    and the matrices (heads, key_dim, value_dim), float32, contiguous; `after` is written, and may
    be `before`.
    """
    native = dispatch.compiled_for_floats(mixed)
    if native is not None:
        return _compiled(native, shape, weights, (mixed, steps, gains, gate), before, after)
    inputs, matrices = before[0].clone(), before[1].clone()
    out = mixed.new_empty(len(mixed), shape.values)
    for t in range(len(mixed)):  # one at a time: torch's bits depend on how many there are
        row = silu(convolve(mixed[t : t + 1], weights.conv, weights.conv_bias, inputs))[0]
        gain = None if gains is None else gains[t].sigmoid() * shape.most_gain
        out[t] = _step(shape, weights, row, steps[t], gain, gate[t], matrices)
    after[0].copy_(inputs)
    after[1].copy_(matrices)
    return out


def _step(
    shape: RecurrentShape, weights: RecurrentWeights, row, step, gain, gate, matrices: torch.Tensor
) -> torch.Tensor:
    """The output (heads * value_dim,) of one token, `matrices` being changed. row: (channels,),
    behind the convolution; gain: DeltaNet's."""
    if shape.is_delta:
        q, k, v = row.split([shape.keys, shape.keys, shape.values])
    else:
        v, k, q = row.split([shape.values, shape.keys, shape.keys])
    q, k = (x.view(shape.key_heads, shape.key_dim) for x in (q, k))
    v = v.view(shape.heads, shape.value_dim)
    step = (step + weights.step_bias).view(shape.heads, -1)
    rate = weights.rate[:, None]
    if shape.least_log_decay < 0:
        log_decay = shape.least_log_decay * (-rate * step).sigmoid()
    else:
        step = softplus(step)
        if not shape.is_delta:
            step = step.clamp(*shape.step_limits)
            gain = step[:, 0]
        log_decay = step * rate
    if shape.is_delta:
        q, k = _unit(q) * shape.key_dim**-0.5, _unit(k)
    per_key = shape.heads // shape.key_heads
    q, k = (x.repeat_interleave(per_key, 0)[:, :, None] for x in (q, k))
    matrices *= log_decay.exp()[:, :, None]
    new = v - (matrices * k).sum(1) if shape.is_delta else v
    matrices += k * (new * gain[:, None])[:, None]
    out = (matrices * q).sum(1)
    if weights.skip is not None:
        out += v * weights.skip[:, None]
    return _gated_norm(shape, weights.norm, out, gate.view_as(out)).flatten()


def short_conv(
    mixed: torch.Tensor,
    conv: torch.Tensor,
    bias: torch.Tensor | None,
    before: torch.Tensor,
    after: torch.Tensor,
) -> torch.Tensor:
    """The outputs (n, channels) float32 of n tokens of a gated short convolution: c conv(b x).

    mixed: (n, 3 * channels) float32: b, c and x; conv: (conv_width, channels); bias: (channels,) or
    None; before, after: the convolution's last inputs (conv_width - 1, channels), as in `recur`.
    """
    native = dispatch.compiled_for_floats(mixed)
    if native is not None:
        out = torch.empty((len(mixed), conv.shape[1]))
        native.short_conv(
            convolution_numbers(conv, bias),
            state_numbers((before, None), (after, None)),
            *rows_of(mixed, 3 * conv.shape[1]),
            len(mixed),
            out.data_ptr(),
            num_threads(),
        )
        return out
    b, c, x = mixed.chunk(3, -1)
    after.copy_(before)
    return c * convolve(b * x, conv, bias, after)


def _compiled(
    native, shape: RecurrentShape, weights: RecurrentWeights, tokens, before, after
) -> torch.Tensor:
    """`recur` in one call."""
    mixed, steps, gains, gate = tokens
    out = torch.empty((len(mixed), shape.values))
    described = Described.of(shape, weights)
    rows = [
        *rows_of(mixed, shape.channels),
        *rows_of(steps, shape.steps),
        *(rows_of(gains, shape.heads) if shape.is_delta else (0, 0)),
        *rows_of(gate, shape.values),
    ]
    native.recur(
        described.numbers,
        described.floats,
        state_numbers(before, after),
        rows,
        len(mixed),
        out.data_ptr(),
        num_threads(),
    )
    return out


@dataclass(frozen=True)
class Described:
    """A layer as cpu/recur.h reads it. kept: tensors that must stay alive."""

    numbers: list[int]
    floats: list[float]
    kept: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, shape: RecurrentShape, weights: RecurrentWeights) -> Described:
        norm, norm_eps = weights.norm, shape.norm_eps
        if norm is None:
            norm_eps, weight = _NO_NORM
            norm = torch.full((shape.value_dim,), weight)
        of_heads = weights.step_bias, weights.rate, weights.skip, norm
        numbers = [
            *convolution_numbers(weights.conv, weights.conv_bias),
            shape.heads,
            shape.key_heads,
            shape.key_dim,
            shape.value_dim,
            shape.norm_heads,
            int(shape.is_delta),
            int(shape.by_channel),
            *map(address, of_heads),
            0 if len(norm) == shape.value_dim else shape.value_dim,
        ]
        kept = weights.conv, weights.conv_bias, *of_heads
        floats = [norm_eps, *shape.step_limits, shape.least_log_decay, shape.most_gain]
        return cls(numbers, floats, kept)


def convolution_numbers(conv: torch.Tensor, bias: torch.Tensor | None) -> list[int]:
    """Of conv (conv_width, channels) and bias (channels,), which must be kept alive."""
    return [*conv.shape, address(conv), address(bias)]


def state_numbers(before, after) -> list[int]:
    """Of states as `recur` has them."""
    return [*map(address, before), *map(address, after)]


def address(x: torch.Tensor | None) -> int:
    if x is None:
        return 0
    assert x.is_contiguous() and x.dtype == torch.float32
    return x.data_ptr()


def rows_of(x: torch.Tensor, width: int) -> tuple[int, int]:
    """Where the rows begin, and the floats from one to the next."""
    stride, within = x.stride()
    assert x.shape[1] == width and (within == 1 or width == 1) and x.dtype == torch.float32
    return x.data_ptr(), stride


def convolve(x, conv, bias, inputs: torch.Tensor) -> torch.Tensor:
    """(n, channels): each channel's last conv_width inputs, weighed, oldest first. inputs: the
    ones before x (n, channels); they become those before what follows."""
    seen = torch.cat([inputs, x])
    inputs.copy_(seen[len(x) :])
    out = torch.zeros_like(x) if bias is None else bias.expand_as(x).clone()
    for k in range(len(conv)):
        out += seen[k : k + len(x)] * conv[k]
    return out


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)


def _gated_norm(shape: RecurrentShape, norm, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """(heads, value_dim). DeltaNet norms before it gates, Mamba-2 gates before it norms."""
    opened = gate.sigmoid() if shape.by_channel else silu(gate)
    if not shape.is_delta:
        out = out * opened
    if norm is None:
        return out
    parts = out.view(-1, shape.norm_heads * shape.value_dim)
    parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + shape.norm_eps)
    out = (parts.view(-1, len(norm)) * norm).view_as(out)
    return out * opened if shape.is_delta else out
