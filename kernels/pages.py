"""Seal tokens into pages, read pages back, and lay them out in another way.

The byte layout is layout.py's, the arithmetic codec.py's. The reference is written in torch and
runs on any device; on CPU tensors `seal` and `unpack` are served by the compiled kernels, to the
bit the same.

Knows no tiers, and no attention beyond which tensors it wants.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from . import checks, codec, dispatch
from .layout import PageLayout
from .threads import num_threads


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x (..., d) times a normalised Hadamard matrix, in blocks of the largest power of two that
    divides d.

    float32 in and out; symmetric and its own inverse up to rounding, so scores q.k survive when
    both are rotated. Sums and differences only, one rounding each: a row's bits do not depend on
    the other rows.
    """
    dim = x.shape[-1]
    block = dim & -dim
    y = x.to(torch.float32)
    half = 1
    while half < block:
        pairs = y.reshape(*x.shape[:-1], dim // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((first + second, first - second), -2)
        half *= 2
    return y.reshape(x.shape) * (1 / math.sqrt(block))


def seal(
    k: torch.Tensor,  # (num_tokens, kv_heads, head_dim)
    v: torch.Tensor,  # (num_tokens, kv_heads, head_dim)
    layout: PageLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole records of keys and values to bytes. Values are not looked at where they are the keys.

    Returns near (num_records, near_record_bytes) and records (num_records, record_bytes), both
    uint8; padding is zero. Raises ValueError for shapes that do not fit the layout,
    FloatingPointError for keys or values that are not finite or beyond what the float16 of the
    parameters, or of the means of values, can hold.
    """
    checks.check_tokens(k, v, layout)
    k, v = k.to(torch.float32), v.to(torch.float32)
    if layout.rotate:
        k = rotate(k)
    native = dispatch.compiled_for(k, v)
    if native is not None and not layout.is_full:
        return _seal_compiled(native, k, v, layout)
    return _seal_reference(k, v, layout)


def unpack(
    near: torch.Tensor,  # (num_records, near_record_bytes) uint8
    records: torch.Tensor,  # (num_records, record_bytes) uint8
    layout: PageLayout,
    out_k: torch.Tensor,  # (kv_heads, num_tokens, head_dim) float32
    out_v: torch.Tensor,  # (kv_heads, num_tokens, head_dim) float32
) -> None:
    """Fill out_k and out_v with the keys (as sealed: rotated, if the layout rotates) and the
    values.

    The out tensors may be views; each head's tokens must be contiguous.
    """
    num_tokens = checks.check_records(near, records, layout)
    shape = (layout.kv_heads, num_tokens, layout.head_dim)
    for name, out in (("out_k", out_k), ("out_v", out_v)):
        if out.shape != shape or out.dtype != torch.float32 or not out[0].is_contiguous():
            raise ValueError(
                f"{name} is {out.dtype} {tuple(out.shape)}; "
                f"it must be float32 {shape}, each head contiguous"
            )
    native = dispatch.compiled_for(near, records, out_k, out_v)
    if native is None:
        _unpack_reference(near, records, layout, out_k, out_v)
    elif num_tokens:
        near, records = near.contiguous(), records.contiguous()
        native.unpack(
            near.data_ptr(),
            records.data_ptr(),
            dispatch.layout_numbers(layout),
            len(records),
            out_k.data_ptr(),
            out_k.stride(0),
            out_v.data_ptr(),
            out_v.stride(0),
            num_threads(),
        )


def repack(
    near: torch.Tensor,  # (num_records, near_record_bytes) uint8
    records: torch.Tensor,  # (num_records, record_bytes) uint8
    layout: PageLayout,
    wanted: PageLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pages as `seal` would have laid them out in another layout: (near, records), to the
    bit; what was given, where the two layouts are one.

    The layouts may differ in what near blocks hold and where they lie: near_bits, near_resident,
    value_means and padding. Raises ValueError for others.
    """
    if layout == wanted:
        return near, records
    arranged = {
        name: getattr(wanted, name)
        for name in ("near_bits", "near_resident", "value_means", "least_record_bytes")
    }
    if replace(layout, **arranged) != wanted:
        raise ValueError(f"pages of {layout} hold other numbers than those of {wanted}")
    checks.check_records(near, records, layout)
    heads = _heads(records, layout)
    blocks = _every_near_block(near, heads, layout)
    parameters = blocks[..., layout.key_min_offset : layout.value_mean_offset]
    keys, values = heads[..., : layout.value_offset], heads[..., layout.value_offset :]
    values = values[..., : layout.far_head_used_bytes - layout.value_offset]
    near_parts, far_parts = [parameters], [keys, values]
    if not layout.is_full:
        near_parts.insert(0, blocks[..., : layout.near_codes_bytes])
        if layout.near_bits != wanted.near_bits:
            codes = _key_codes(blocks, heads, layout)
            near_parts[0] = codec.pack(codes >> wanted.far_key_bits, wanted.near_bits)
            far_codes = codes & (2**wanted.far_key_bits - 1)
            far_parts[0] = codec.pack(far_codes, wanted.far_key_bits)
        if wanted.value_means and layout.value_means:
            near_parts.append(blocks[..., layout.value_mean_offset : layout.near_head_bytes])
        elif wanted.value_means:
            near_parts.append(_bytes(_mean(_values(blocks, heads, layout))))
    return _lay_out(near_parts, far_parts, wanted)


def near_keys(near: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Keys (kv_heads, num_tokens, head_dim) float32 as the near plane alone knows them.

    Each lies in the middle of its near code's bin; with near_bits 0, in the middle of its channel's
    box.
    """
    codes, scale = near_codes(near, layout)
    lo = _key_parameters(_near_blocks(near, layout), layout)[0].flatten(0, 1)
    keys = codec.decode_near(codes, lo, scale, layout.box_bits - layout.near_code_bits)
    return keys.transpose(0, 1).flatten(1, 2)


def near_codes(near: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale): near codes (num_pages, kv_heads, P, head_dim) uint8, and the scale of their
    channels (num_pages, kv_heads, 1, head_dim) float32.
    """
    blocks = _near_blocks(near, layout)
    codes = codec.unpack(
        blocks[..., : layout.near_codes_bytes],
        layout.near_code_bits,
        layout.page_tokens,
        layout.head_dim,
    )
    scale = _key_parameters(blocks, layout)[1].to(torch.float32)
    return codes.flatten(0, 1), scale.flatten(0, 1)


def key_box(near: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(lo, hi), each (num_pages, kv_heads, head_dim) float32: lo <= k <= hi for every key of the
    page.

    The keys are as sealed: rotated, if the layout rotates.
    """
    lo, scale = _key_parameters(_near_blocks(near, layout), layout)
    lo = lo.to(torch.float32).flatten(0, 1).squeeze(-2)
    width = scale.to(torch.float32).flatten(0, 1).squeeze(-2) * (2**layout.box_bits - 1)
    return lo, lo + width


def value_means(near: torch.Tensor, rows: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The mean value of every page, (kv_heads, num_pages, head_dim) float32.

    near (num_frames, near_record_bytes) uint8; rows (num_records,) int64: the frames of the
    records, in their order. The mean is that of the values as they are read back, rounded to
    float16. Raises ValueError for a layout without means.
    """
    if not layout.value_means:
        raise ValueError("this layout keeps no means of values: value_means must be True")
    start = layout.value_mean_offset
    blocks = _near_blocks(near, layout)[..., start : start + 2 * layout.head_dim][rows]
    return blocks.view(torch.float16).flatten(0, 1).transpose(0, 1).to(torch.float32)


# --- the reference --------------------------------------------------------------------------------
# Blocks are viewed as (num_records, pages_per_record, kv_heads, bytes), tokens of one page and head
# as (P, d).


def _seal_reference(k, v, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = _pages(k, layout), _pages(v, layout)
    far_parts, k = _raw_parts(k, v, layout) if layout.is_full else ([], k)
    key_lo, key_scale = codec.box(k, -2, layout.box_bits, "keys")
    near_parts = [_bytes(key_lo), _bytes(key_scale)]
    if not layout.is_full:
        codes = codec.encode(k, key_lo, key_scale, layout.key_bits)
        near_codes = codes >> layout.far_key_bits
        near_parts.insert(0, codec.pack(near_codes, layout.near_bits))
        far_parts = [codec.pack(codes & (2**layout.far_key_bits - 1), layout.far_key_bits)]
        if layout.shares_values:
            read_back = codec.decode(codes, key_lo, key_scale)
        else:
            value_lo, value_scale = codec.box(v, -1, layout.value_bits, "values")
            value_codes = codec.encode(v, value_lo, value_scale, layout.value_bits)
            far_parts.append(codec.pack(value_codes, layout.value_bits))
            far_parts += [_bytes(value_lo), _bytes(value_scale)]
            read_back = codec.decode(value_codes, value_lo, value_scale)
        if layout.value_means:
            near_parts.append(_bytes(_mean(read_back)))
    return _lay_out(near_parts, far_parts, layout)


def _lay_out(
    near_parts: list[torch.Tensor], far_parts: list[torch.Tensor], layout: PageLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """(near, records) of parts (num_records, pages_per_record, kv_heads, bytes), in their order."""
    near_blocks = torch.cat(near_parts, -1)
    num_records = len(near_blocks)
    records = near_blocks.new_zeros((num_records, layout.record_bytes))
    heads = _heads(records, layout)
    start = 0
    for part in far_parts:
        heads[..., start : start + part.shape[-1]] = part
        start += part.shape[-1]
    if layout.near_resident:
        return near_blocks.reshape(num_records, layout.near_record_bytes), records
    heads[..., layout.far_head_bytes : layout.far_head_bytes + layout.near_head_bytes] = near_blocks
    return near_blocks.new_empty((num_records, 0)), records


def _raw_parts(k, v, layout: PageLayout) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A full page's far block, and its keys as they will be read back."""
    raw_k, raw_v = k.to(layout.raw_dtype), v.to(layout.raw_dtype)
    for name, raw in (("keys", raw_k), ("values", raw_v)):
        if not bool(torch.isfinite(raw).all()):
            raise FloatingPointError(f"{name} are not finite (NaN or infinity) in {raw.dtype}")
    parts = [_bytes(raw_k.flatten(-2))]
    if not layout.shares_values:
        parts.append(_bytes(raw_v.flatten(-2)))
    return parts, raw_k.to(torch.float32)


def _mean(v: torch.Tensor) -> torch.Tensor:
    """The mean of v (..., P, d) over its tokens, added first to last, as float16 (..., 1, d)."""
    total = torch.zeros_like(v[..., 0, :])
    for t in range(v.shape[-2]):
        total += v[..., t, :]
    mean = (total * (1 / v.shape[-2])).to(torch.float16).unsqueeze(-2)
    if not bool(torch.isfinite(mean).all()):
        raise FloatingPointError(
            f"means of values up to {float(total.abs().max() / v.shape[-2]):g} do not fit float16"
        )
    return mean


def _unpack_reference(near, records, layout: PageLayout, out_k, out_v) -> None:
    heads = _heads(records, layout)
    if layout.is_full:
        shape = (*heads.shape[:3], layout.page_tokens, layout.head_dim)
        for out, start in ((out_k, 0), (out_v, layout.value_offset)):
            raw = heads[..., start : start + layout.raw_bytes].contiguous()
            out.copy_(_tokens(raw.view(layout.raw_dtype).reshape(shape), layout))
        return
    blocks = _every_near_block(near, heads, layout)
    out_k.copy_(_tokens(_keys(blocks, heads, layout), layout))
    out_v.copy_(_tokens(_values(blocks, heads, layout), layout))


def _every_near_block(near, heads: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The near blocks, wherever they lie: (num_records, pages_per_record, kv_heads, bytes)."""
    if layout.near_resident:
        return _near_blocks(near, layout)
    return heads[..., layout.far_head_bytes : layout.far_head_bytes + layout.near_head_bytes]


def _key_codes(blocks: torch.Tensor, heads: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Whole codes of keys, (num_records, pages_per_record, kv_heads, P, d) uint8."""
    tokens, dim = layout.page_tokens, layout.head_dim
    near_codes = codec.unpack(blocks[..., : layout.near_codes_bytes], layout.near_bits, tokens, dim)
    far_codes = codec.unpack(heads[..., : layout.value_offset], layout.far_key_bits, tokens, dim)
    return (near_codes << layout.far_key_bits) | far_codes


def _keys(blocks: torch.Tensor, heads: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The keys as they are read back, (num_records, pages_per_record, kv_heads, P, d) float32."""
    codes = _key_codes(blocks, heads, layout)
    return codec.decode(codes, *_key_parameters(blocks, layout))


def _values(blocks: torch.Tensor, heads: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The values likewise."""
    if layout.shares_values:
        return _keys(blocks, heads, layout)
    tokens, parameters = layout.page_tokens, layout.value_min_offset
    codes = codec.unpack(
        heads[..., layout.value_offset : parameters], layout.value_bits, tokens, layout.head_dim
    )
    lo = _halves(heads, parameters, tokens).unsqueeze(-1)
    scale = _halves(heads, parameters + 2 * tokens, tokens).unsqueeze(-1)
    return codec.decode(codes, lo, scale)


def _pages(x: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """(num_tokens, kv_heads, d) to (num_records, pages_per_record, kv_heads, P, d)."""
    shape = (-1, layout.pages_per_record, layout.page_tokens, layout.kv_heads, layout.head_dim)
    return x.reshape(shape).transpose(2, 3)


def _tokens(x: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """(num_records, pages_per_record, kv_heads, P, d) to (kv_heads, num_tokens, d)."""
    return x.permute(2, 0, 1, 3, 4).reshape(layout.kv_heads, -1, layout.head_dim)


def _heads(records: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Records to a view (num_records, pages_per_record, kv_heads, head_stride_bytes)."""
    payload = records[:, : layout.record_payload_bytes]
    return payload.unflatten(1, (layout.pages_per_record, layout.kv_heads, -1))


def _near_blocks(near: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Near records to a view (num_records, pages_per_record, kv_heads, near_head_bytes)."""
    if not layout.near_resident:
        raise ValueError(
            "this layout keeps near blocks in the records: there is no near plane to read"
        )
    shape = (layout.pages_per_record, layout.kv_heads, layout.near_head_bytes)
    return near.unflatten(1, shape)


def _key_parameters(blocks: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(lo, scale) of near blocks, each (..., 1, d) float16."""
    start, dim = layout.key_min_offset, layout.head_dim
    return (
        _halves(blocks, start, dim).unsqueeze(-2),
        _halves(blocks, start + 2 * dim, dim).unsqueeze(-2),
    )


def _halves(blocks: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` float16 numbers that start `start` bytes into each block. (..., count)"""
    return blocks[..., start : start + 2 * count].contiguous().view(torch.float16)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of x (record, page, head, ...): (record, page, head, num_bytes) uint8."""
    return x.flatten(3).contiguous().view(torch.uint8)


# --- the compiled kernels -------------------------------------------------------------------------


def _seal_compiled(native, k, v, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    num_records = len(k) // layout.record_tokens
    near = torch.empty((num_records, layout.near_record_bytes), dtype=torch.uint8)
    records = torch.zeros((num_records, layout.record_bytes), dtype=torch.uint8)
    k, v = k.contiguous(), v.contiguous()
    if num_records and not native.seal(
        k.data_ptr(),
        v.data_ptr(),
        dispatch.layout_numbers(layout),
        num_records,
        near.data_ptr(),
        records.data_ptr(),
        num_threads(),
    ):
        return _seal_reference(k, v, layout)  # which says what is wrong with the numbers
    return near, records
