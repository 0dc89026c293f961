"""Linear layers, from raw or group-quantised weights, whose rows never depend on how many rows
there are.

rows == 1 is decode: a matrix-vector product, bound by reading the weight. More rows come in tiles
of ROW_TILE, and each tile is multiplied on its own: the same shapes at the same alignment give the
same bits, so a row of a prefill of 512 tokens equals that row in a prefill of 32. Weights that are
not float32 are converted block by block, once for all tiles; whole float32 copies are never made,
and products in bfloat16 never used (CPUs without native support run them at a hundredth of the
speed).

Group quantisation: 32 neighbouring inputs share a float16 scale; zeros fill the last group.
    8 bits   scale = greatest magnitude / 127, rounded up; code = round(w / scale) in -127 .. 127
             w' = code * scale; |w' - w| <= scale / 2
    4 bits   scale = (the value of greatest magnitude, with its sign) / -8
             code = round(w / scale) + 8, clamped to 0 .. 15
             w' = (code - 8) * scale, as llama.cpp's q4_0; 4.5 bits per weight in all
             |w' - w| <= |scale| * 65 / 64 + 2**-21: a whole step only where a value of the other
             sign is as great

Knows no layers and no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import codec, dispatch

ROW_TILE = 32
GROUP = 32
# Weight rows converted at once on a CPU: 256 rows of 4096 float32 inputs are 4 MiB, which stay in
# cache for all tiles. With it, tiles reach 75-80 % of the speed of one product of all rows; with
# 64, 60 %.
BLOCK_ROWS = 256
# Converted at once while quantising, which makes half a dozen such copies: they stay in cache.
QUANTISED_BYTES = 1 << 20
# In the order of WeightKind in cpu/kernels.h.
_RAW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUP_KINDS = {8: 3, 4: 4}


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight (out_features, in_features) in groups of 32 inputs. Made by `quantise_weight`."""

    bits: int  # 8 or 4
    in_features: int
    # 8 bits: int8 (out, padded_in). 4 bits: uint8 (out, padded_in / 2); byte j of a group's 16
    # holds its inputs j (low half) and j + 16.
    codes: torch.Tensor
    scales: torch.Tensor  # (out, padded_in / 32) float16

    @property
    def out_features(self) -> int:
        return self.scales.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device) -> QuantisedWeight:
        codes, scales = self.codes.to(device), self.scales.to(device)
        return QuantisedWeight(self.bits, self.in_features, codes, scales)

    def part(self, start: int, stop: int) -> QuantisedWeight:
        """Rows start..stop as a weight of their own, which shares its memory with this one."""
        codes, scales = self.codes[start:stop], self.scales[start:stop]
        return QuantisedWeight(self.bits, self.in_features, codes, scales)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop, decoded: (stop - start, in_features) float32."""
        codes, scales = self.codes[start:stop], self.scales[start:stop]
        num_groups = scales.shape[1]
        if self.bits == 8:
            values = codes.to(torch.float32).unflatten(1, (num_groups, GROUP))
        else:
            halves = codes.unflatten(1, (num_groups, GROUP // 2))
            values = torch.cat((halves & 15, halves >> 4), -1).to(torch.float32).sub_(8.0)
        values.mul_(scales.to(torch.float32).unsqueeze(-1))
        return values.flatten(1)[:, : self.in_features]


Weight = torch.Tensor | QuantisedWeight


def quantise_weight(
    w: torch.Tensor, bits: int, empty: Callable[..., torch.Tensor] = torch.empty
) -> QuantisedWeight:
    """w (out, in), any float dtype, to groups of 8 or 4 bits, on w's device.

    Converts some rows at a time, QUANTISED_BYTES of float32. empty(shape, dtype=, device=) gives
    the memory for the result. Raises ValueError for other bits, FloatingPointError for weights that
    are not finite or whose scale float16 cannot hold.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights can be quantised to 8 or 4 bits, not {bits}")
    if w.dim() != 2:
        raise ValueError(f"a weight is (out, in); this one is {tuple(w.shape)}")
    out_features, in_features = w.shape
    num_groups = -(-in_features // GROUP)
    codes = empty(
        (out_features, num_groups * GROUP * bits // 8),
        dtype=torch.int8 if bits == 8 else torch.uint8,
        device=w.device,
    )
    scales = empty((out_features, num_groups), dtype=torch.float16, device=w.device)
    encode = _encode8 if bits == 8 else _encode4
    padding = num_groups * GROUP - in_features
    step = max(1, QUANTISED_BYTES // (4 * max(1, num_groups) * GROUP))
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        block = torch.nn.functional.pad(w[rows].to(torch.float32), (0, padding))
        codes[rows], scales[rows] = encode(block.unflatten(1, (num_groups, GROUP)))
    if not bool(torch.isfinite(scales).all()):
        raise FloatingPointError("weights are not finite, or too large to quantise")
    return QuantisedWeight(bits, in_features, codes, scales)


def _encode8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = codec.half_above(groups.abs().amax(-1) / 127)
    codes = (groups / _divisor(scale)).round_().clamp_(-127, 127)
    return codes.nan_to_num_().to(torch.int8).flatten(1), scale


def _encode4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = groups.abs().argmax(-1, keepdim=True)
    scale = (groups.gather(-1, at).squeeze(-1) / -8).to(torch.float16)
    codes = (groups / _divisor(scale)).round_().add_(8).clamp_(0, 15).nan_to_num_()
    codes = codes.to(torch.uint8)
    low, high = codes[..., : GROUP // 2], codes[..., GROUP // 2 :]
    return (low | (high << 4)).flatten(1), scale


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """Scales (out, groups) as float32 (out, groups, 1), with 1 for 0: zeros have code zero."""
    wide = scale.to(torch.float32).unsqueeze(-1)
    return torch.where(wide == 0, torch.ones_like(wide), wide)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (rows, in) float32 times weight (out, in), transposed, plus bias (out): (rows, out)
    float32.

    rows is 1 or a multiple of ROW_TILE. For any i, linear(x)[32 * i : 32 * i + 32] has the bits of
    linear(x[32 * i : 32 * i + 32]). Raises ValueError for other shapes or dtypes.
    """
    _check(x, weight)
    rows, out_features = x.shape[0], weight.shape[0]
    x = x.contiguous()
    if rows == 1:
        native = dispatch.compiled_for(x, *_tensors(weight))
        out = (
            _vector_reference(x, weight) if native is None else _vector_compiled(native, x, weight)
        )
    else:
        out = torch.empty((rows, out_features), dtype=torch.float32, device=x.device)
        step = BLOCK_ROWS if x.device.type == "cpu" else out_features
        for start in range(0, out_features, step):
            stop = min(start + step, out_features)
            block = _rows(weight, start, stop).t()
            for tile in range(0, rows, ROW_TILE):
                part = out[tile : tile + ROW_TILE, start:stop]
                torch.mm(x[tile : tile + ROW_TILE], block, out=part)
    return out if bias is None else out.add_(bias.to(torch.float32))


def _vector_reference(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    out_features = weight.shape[0]
    parts = [
        torch.mv(_rows(weight, start, min(start + BLOCK_ROWS, out_features)), x[0])
        for start in range(0, out_features, BLOCK_ROWS)
    ]
    return torch.cat(parts).unsqueeze(0)


def _vector_compiled(native, x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """fp32 sums in an order that the number of inputs fixes, and the number of threads does not."""
    if isinstance(weight, QuantisedWeight):
        kind, data, scales = _GROUP_KINDS[weight.bits], weight.codes, weight.scales.data_ptr()
        num_groups = weight.scales.shape[1]
        x = torch.nn.functional.pad(x, (0, num_groups * GROUP - weight.in_features))
    else:
        kind, data, scales = _RAW_DTYPES.index(weight.dtype), weight.contiguous(), 0
    out = torch.empty((1, weight.shape[0]), dtype=torch.float32)
    native.matvec(
        kind,
        x.data_ptr(),
        data.data_ptr(),
        scales,
        x.shape[1],
        out.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _rows(weight: Weight, start: int, stop: int) -> torch.Tensor:
    """Rows start..stop of a weight as float32 (stop - start, in)."""
    if isinstance(weight, QuantisedWeight):
        return weight.rows(start, stop)
    return weight[start:stop].to(torch.float32)


def _tensors(weight: Weight) -> tuple[torch.Tensor, ...]:
    if isinstance(weight, QuantisedWeight):
        return weight.codes, weight.scales
    return (weight,)


def _check(x: torch.Tensor, weight: Weight) -> None:
    if isinstance(weight, torch.Tensor) and (weight.dim() != 2 or weight.dtype not in _RAW_DTYPES):
        raise ValueError(
            f"a weight is (out, in) of {_RAW_DTYPES}, not {weight.dtype} {tuple(weight.shape)}"
        )
    if x.dim() != 2 or x.dtype != torch.float32 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; it must be float32 (rows, {weight.shape[1]})"
        )
    if x.shape[0] != 1 and x.shape[0] % ROW_TILE:
        raise ValueError(f"x has {x.shape[0]} rows; they must be 1 or a multiple of {ROW_TILE}")
