"""Linear layers, from raw or group-quantised weights, whose rows never depend on one another.

Compiled kernels sum every output in an order that the number of inputs alone fixes: rows may be any
number, and a row has the same bits alone and among others. On GPUs it has them among others,
wherever it stands, and other ones alone. The reference multiplies tiles of
ROW_TILE rows, zeros filling the last: a row's bits depend on its place in a tile at most. (A single
row is a product of its own there.) Weights that are not float32 are converted block by block;
whole float32 copies are never made, and products in bfloat16 never used (CPUs without native
support run them at a hundredth of the speed).

Quantised weights are multiplied with quantised rows (quantised.py says how), as whole numbers
within a group of inputs; raw weights with float32 rows.

Knows no layers and no files.
"""

from __future__ import annotations

import torch

from . import dispatch
from .layout import RAW_DTYPES
from .quantised import QuantisedWeight, rounded_rows
from .threads import num_threads

ROW_TILE = 32
# Weight rows converted at once by the reference on a CPU: 256 rows of 4096 float32 inputs are
# 4 MiB, which stay in cache for all tiles.
BLOCK_ROWS = 256
# By bits, is_float and is_affine, in the order of WeightKind in cpu/kernels.h.
_GROUP_KINDS = {
    (8, False, False): 3,
    (4, False, False): 4,
    (4, True, False): 5,
    (4, False, True): 6,
}

Weight = torch.Tensor | QuantisedWeight


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (rows, in) float32 times weight (out, in), transposed, plus bias (out): (rows, out)
    float32.

    linear(x)[i] has the bits of linear(x[i : i + 1]) (of the reference: of any x that holds the
    row at a place of the same remainder by ROW_TILE; on GPUs of any other x of several rows).
    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check(x, weight)
    native = dispatch.compiled_for(x, *_tensors(weight))
    gpu = dispatch.gpu_for(x, *_tensors(weight)) if native is None else None
    if gpu is not None and (isinstance(weight, QuantisedWeight) or len(x) == 1):
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        if isinstance(weight, torch.Tensor):
            return gpu.products.linear_raw(x, weight, bias)
        return gpu.products.linear(x, weight, bias)
    out = reference(x, weight) if native is None else _compiled(native, x, weight)
    return out if bias is None else out.add_(bias.to(torch.float32))


def linear_heads(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """`linear` of each head by rows of its own: x (rows, heads, in) float32 times weight
    (heads * out, in), head after head: (rows, heads, out) float32.
    """
    rows, heads, in_features = x.shape
    if in_features != weight.shape[1] or weight.shape[0] % heads or x.dtype != torch.float32:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and the weight {tuple(weight.shape)}; they must be "
            "float32 (rows, heads, in) and (heads * out, in)"
        )
    each = weight.shape[0] // heads
    out = torch.empty((rows, heads, each), dtype=torch.float32, device=x.device)
    native = dispatch.compiled_for(x, *_tensors(weight))
    if native is not None:
        x = x if x.stride(2) == 1 else x.contiguous()
        weight = weight if isinstance(weight, QuantisedWeight) else weight.contiguous()
        sizes = in_features, each, heads
        native.multiply_heads(
            *weight_numbers(weight),
            *sizes,
            x.data_ptr(),
            *x.stride()[:2],
            rows,
            out.data_ptr(),
            num_threads(),
        )
        return out
    for head in range(heads):
        out[:, head] = linear(x[:, head], rows_of(weight, head * each, (head + 1) * each))
    return out


def dot_heads(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Products of x (heads, rows, n) float32 and one vector of each head, (heads, n) float32:
    (heads, rows)."""
    if x.shape[-1] == 0 or dispatch.compiled_for(x, vectors) is None:
        return (x * vectors[:, None]).sum(-1)
    return linear_heads(x.transpose(0, 1), vectors).squeeze(-1).T


def reference(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """`linear` by torch."""
    rows, out_features = x.shape[0], weight.shape[0]
    if isinstance(weight, QuantisedWeight):
        x = rounded_rows(x)
    if rows > 1:
        x = torch.nn.functional.pad(x, (0, 0, 0, -rows % ROW_TILE))
    out = torch.empty((len(x), out_features), dtype=torch.float32, device=x.device)
    step = BLOCK_ROWS if x.device.type == "cpu" else max(1, out_features)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        block = decoded_rows(weight, start, stop)
        if rows == 1:
            torch.mv(block, x[0], out=out[0, start:stop])
            continue
        for tile in range(0, rows, ROW_TILE):
            part = out[tile : tile + ROW_TILE, start:stop]
            torch.mm(x[tile : tile + ROW_TILE], block.t(), out=part)
    return out[:rows]


def _compiled(native, x: torch.Tensor, weight: Weight) -> torch.Tensor:
    rows, (out_features, in_features) = x.shape[0], weight.shape
    if isinstance(weight, torch.Tensor):
        weight = weight.contiguous()
    x = x.contiguous()
    out = torch.empty((rows, out_features), dtype=torch.float32)
    native.multiply(
        *weight_numbers(weight),
        in_features,
        out_features,
        x.data_ptr(),
        in_features,
        rows,
        out.data_ptr(),
        out_features,
        num_threads(),
    )
    return out


def weight_numbers(weight: Weight) -> tuple[int, int, int, int]:
    """A weight as the extension takes it: its kind, where it and its scales lie, and its first
    output's place in a strip. A raw one must be contiguous.
    """
    if isinstance(weight, QuantisedWeight):
        codes, scales = weight.codes.data_ptr(), weight.scales.data_ptr()
        kind = _GROUP_KINDS[weight.bits, weight.is_float, weight.is_affine]
        return kind, codes, scales, weight.first
    assert weight.is_contiguous()
    return RAW_DTYPES.index(weight.dtype), weight.data_ptr(), 0, 0


def decoded_rows(weight: Weight, start: int, stop: int) -> torch.Tensor:
    """Rows start..stop of a weight as float32 (stop - start, in)."""
    if isinstance(weight, QuantisedWeight):
        return weight.rows(start, stop)
    return weight[start:stop].to(torch.float32)


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Rows start..stop of a weight, sharing its memory."""
    if stop - start == weight.shape[0]:
        return weight
    return weight.part(start, stop) if isinstance(weight, QuantisedWeight) else weight[start:stop]


def _tensors(weight: Weight) -> tuple[torch.Tensor, ...]:
    if isinstance(weight, QuantisedWeight):
        return weight.codes, weight.scales
    return (weight,)


def _check(x: torch.Tensor, weight: Weight) -> None:
    if isinstance(weight, torch.Tensor) and (weight.dim() != 2 or weight.dtype not in RAW_DTYPES):
        raise ValueError(
            f"a weight is (out, in) of {RAW_DTYPES}, not {weight.dtype} {tuple(weight.shape)}"
        )
    if x.dim() != 2 or x.dtype != torch.float32 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; it must be float32 (rows, {weight.shape[1]})"
        )
