"""Attention of query rows over spans of sealed pages and over raw tokens, and the joining of their
partials.

A program takes one span and one KV head, page by page, and codes as they are: a query times a
page's key scales, and a page's weights times its value scales, are split into two float16 numbers
each, whose products with codes are exact in float32. So a span's partial depends on neither the
other spans nor where any record lies. Raw tokens and full pages are multiplied in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import PageLayout

_UNSEEN = tl.constexpr(-1e30)  # attention.UNSEEN
_MOST_RUNS = 3  # of raw tokens: the sink, the cell before, a token's own
_JOINED = 16  # partials that are added at once
_STAGES = 2  # pages that are under way at once: three do not fit in what programs share
IS_INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(IS_INTERPRETED)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def serves(layout: PageLayout) -> bool:
    """Whether pages of such a layout are taken: of a power of two of tokens, sixteen or more, with
    values of their own."""
    tokens = layout.page_tokens
    return tokens >= 16 and tokens & (tokens - 1) == 0 and not layout.shares_values


def attend_spans(
    q: torch.Tensor,  # (kv_heads, num_rows, head_dim) float32
    near_at: torch.Tensor,  # (num_records,) int64 on q's device
    record_at: torch.Tensor,
    records_per_span: int,
    visible: tuple[int, int],
    score_bias: torch.Tensor | None,  # (kv_heads, num_rows, num_tokens) float32
    layout: PageLayout,
    softcap: float,
    parts: tuple[torch.Tensor, ...],  # contiguous: max, sum, out, each with a row for each span
) -> None:
    """Fills the first rows of `parts` with the partials of spans, one after the other."""
    kv_heads, num_rows, dim = q.shape
    num_records = len(record_at)
    if not num_records or not num_rows:
        return
    q = q.contiguous()
    rows = _rows_at_once(num_rows, dim)
    if layout.is_full:  # more do not fit in the memory that programs share
        rows = min(rows, 16 if layout.raw_dtype == torch.float32 else 32)
    grid = (triton.cdiv(num_records, records_per_span), kv_heads, triton.cdiv(num_rows, rows))
    _attend_spans[grid](
        q,
        near_at.contiguous(),
        record_at.contiguous(),
        q if score_bias is None else score_bias.contiguous(),
        *parts,
        num_rows,
        num_records,
        records_per_span,
        *visible,
        num_records * layout.record_tokens,
        softcap,
        KV_HEADS=kv_heads,
        DIM=dim,
        DIMS=_padded(dim),
        PAGE_TOKENS=layout.page_tokens,
        TOKENS=min(layout.page_tokens, _tokens_at_once(dim)),
        PAGES=layout.pages_per_record,
        IS_FULL=layout.is_full,
        RAW=_TYPES[layout.raw_dtype],
        NEAR_BITS=layout.near_code_bits,
        FAR_BITS=layout.far_key_bits,
        VALUE_BITS=layout.value_bits,
        NEAR_RESIDENT=layout.near_resident,
        NEAR_HEAD_BYTES=layout.near_head_bytes,
        KEY_MIN_OFFSET=layout.key_min_offset,
        VALUE_OFFSET=layout.value_offset,
        VALUE_MIN_OFFSET=0 if layout.is_full else layout.value_min_offset,
        FAR_HEAD_BYTES=layout.far_head_bytes,
        HEAD_STRIDE_BYTES=layout.head_stride_bytes,
        HAS_BIAS=score_bias is not None,
        HAS_CAP=bool(softcap),
        ROWS=rows,
        num_warps=_warps(rows),
        num_stages=_STAGES,
    )


def attend_raw(
    q: torch.Tensor,
    dtype: torch.dtype,
    runs: list[int],
    null_scores: torch.Tensor | None,
    softcap: float,
    part: tuple[torch.Tensor, ...],
) -> None:
    """Fills the partial of raw tokens; runs and null scores as layer_attention.Raw has them."""
    kv_heads, num_rows, dim = q.shape
    assert len(runs) <= 4 * _MOST_RUNS, "more runs of raw tokens than a kernel takes"
    places = runs + [0] * (4 * _MOST_RUNS - len(runs))
    q = q.contiguous()
    rows = _rows_at_once(num_rows, dim)
    _attend_raw[(kv_heads, triton.cdiv(num_rows, rows))](
        q,
        q if null_scores is None else null_scores.contiguous(),
        *part,
        num_rows,
        softcap,
        *places,
        DIM=dim,
        DIMS=_padded(dim),
        TOKENS=min(32 if dtype == torch.float32 else 64, _tokens_at_once(dim)),
        RAW=_TYPES[dtype],
        HAS_NULL=null_scores is not None,
        HAS_CAP=bool(softcap),
        ROWS=rows,
        num_warps=_warps(rows),
        num_stages=_STAGES,
    )


def join(parts: tuple[torch.Tensor, ...], is_whole: bool = True) -> list[torch.Tensor]:
    """[max, sum, out] of partials along their leading dimension, first to last. is_whole: out is
    divided by the sum, attention's output."""
    parts = [part.contiguous() for part in parts]
    count, kv_heads, num_rows, dim = parts[2].shape
    joined = [torch.empty_like(part[0]) for part in parts]
    rows = kv_heads * num_rows
    shape = {"DIM": dim, "DIMS": _padded(dim), "COUNT": _JOINED}
    _join[(rows,)](*parts, *joined, count, rows, IS_WHOLE=is_whole, **shape)
    return joined


def _rows_at_once(num_rows: int, dim: int) -> int:
    return 16 if num_rows <= 16 or dim > 128 else 64


def _warps(rows: int) -> int:
    return 8 if rows == 64 else 4


def _tokens_at_once(dim: int) -> int:
    """Of keys and values, as many as fit in the memory that programs share."""
    return 64 if dim <= 128 else 32 if dim <= 256 else 16


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def _bytes(address):
    return address.to(tl.pointer_type(tl.uint8))


@triton.jit
def _floats(address, TYPE: tl.constexpr):
    return address.to(tl.pointer_type(TYPE))


@triton.jit
def _codes(at, tokens, dims, BITS: tl.constexpr, PAGE_TOKENS: tl.constexpr, DIM: tl.constexpr):
    """Codes of BITS bits that lie in planes from `at` on (layout.py): int32 (tokens, dims)."""
    codes = tokens[:, None] * 0 + dims[None, :] * 0
    start = at
    below = BITS
    for i in tl.static_range(4):
        width = 8 >> i
        if BITS & width:
            below -= width
            run = DIM * width // 8
            byte = tokens[:, None] * run + (dims % run)[None, :]
            # A page begins at sixteen bytes, and addresses that were read say nothing of that.
            where = _bytes(start) + byte
            if run % 16 == 0:
                where = tl.multiple_of(where, (1, 16))
            elif run % 8 == 0:
                where = tl.multiple_of(where, (1, 8))
            plane = tl.load(where, mask=dims[None, :] < DIM, other=0).to(tl.int32)
            part = (plane >> ((dims // run) * width)[None, :]) & ((1 << width) - 1)
            codes = codes | (part << below)
            start += PAGE_TOKENS * run
    return codes


@triton.jit
def _two_halves(x):
    """x as the sum of two float16 numbers: to 22 bits of the greatest, where that is about 1."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _products(x, y):
    """Rows x, float32, times y in a model's own floats. x is split into as many of these as hold
    all of its bits, whose products are exact: float32 alone has no units of its own."""
    if y.dtype == tl.bfloat16:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return _dot(high, y) + (_dot(middle, y) + _dot(low, y))
    elif y.dtype == tl.float16:
        high, low = _two_halves(x)
        return _dot(high, y) + _dot(low, y)
    else:
        return _dot(x, y)


@triton.jit
def _dot(x, y):
    if _INTERPRETED:  # the interpreter takes bfloat16 for whole numbers there
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _capped(scores, softcap):
    """softcap * tanh(scores / softcap)."""
    return softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))


@triton.jit
def _weigh(scores, is_seen, highest, total):
    """Scores (rows, tokens) as weights: (them, what earlier ones are multiplied with, the highest
    score so far, the sum of all weights)."""
    scores = tl.where(is_seen[None, :], scores, _UNSEEN)
    above = tl.maximum(highest, tl.max(scores, 1))
    kept = tl.exp(highest - above)
    weights = tl.where(is_seen[None, :], tl.exp(scores - above[:, None]), 0.0)
    return weights, kept, above, total * kept + tl.sum(weights, 1)


@triton.jit
def _attend_spans(
    q,
    near_at,
    record_at,
    score_bias,
    out_max,
    out_sum,
    out,
    num_rows,
    num_records,
    records_per_span,
    first,
    stop,
    num_tokens,
    softcap,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGES: tl.constexpr,
    IS_FULL: tl.constexpr,
    RAW: tl.constexpr,
    NEAR_BITS: tl.constexpr,
    FAR_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    NEAR_RESIDENT: tl.constexpr,
    NEAR_HEAD_BYTES: tl.constexpr,
    KEY_MIN_OFFSET: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    VALUE_MIN_OFFSET: tl.constexpr,
    FAR_HEAD_BYTES: tl.constexpr,
    HEAD_STRIDE_BYTES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr,
):
    span, head = tl.program_id(0), tl.program_id(1)
    rows, dims = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIMS)
    is_row, is_dim = rows < num_rows, dims < DIM
    head_rows = head.to(tl.int64) * num_rows + rows
    is_there = is_row[:, None] & is_dim[None, :]
    queries = tl.load(q + head_rows[:, None] * DIM + dims[None, :], mask=is_there, other=0.0)

    highest = tl.full((ROWS,), _UNSEEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, DIMS), tl.float32)
    last = tl.minimum(num_records, (span + 1) * records_per_span)
    for record in range(span * records_per_span, last):
        near_address, record_address = tl.load(near_at + record), tl.load(record_at + record)
        for part in range(PAGES * (PAGE_TOKENS // TOKENS)):
            page, block = part // (PAGE_TOKENS // TOKENS), part % (PAGE_TOKENS // TOKENS)
            within = block * TOKENS + tl.arange(0, TOKENS)  # of the page
            tokens = (record * PAGES + page) * PAGE_TOKENS + within  # of the list
            is_seen = (tokens >= first) & (tokens < stop)
            far = record_address + (page * KV_HEADS + head) * HEAD_STRIDE_BYTES
            if IS_FULL:
                at = within[:, None] * DIM + dims[None, :]
                keys_at = tl.multiple_of(_floats(far, RAW) + at, (1, 16))
                keys = tl.load(keys_at, mask=is_dim[None, :], other=0.0)
                scores = _products(queries, tl.trans(keys))
            else:
                if NEAR_RESIDENT:
                    near = near_address + (page * KV_HEADS + head) * NEAR_HEAD_BYTES
                else:
                    near = far + FAR_HEAD_BYTES
                least_at = _floats(near + KEY_MIN_OFFSET, tl.float16) + dims
                least = tl.load(least_at, mask=is_dim, other=0.0).to(tl.float32)
                scale = tl.load(least_at + DIM, mask=is_dim, other=0.0).to(tl.float32)
                codes = _codes(near, within, dims, NEAR_BITS, PAGE_TOKENS, DIM) << FAR_BITS
                codes = codes | _codes(far, within, dims, FAR_BITS, PAGE_TOKENS, DIM)
                codes = tl.trans(codes.to(tl.float16))
                scaled = queries * scale[None, :]
                greatest = tl.max(tl.abs(scaled), 1)
                greatest = tl.where(greatest > 0, greatest, 1.0)
                high, low = _two_halves(scaled * (1.0 / greatest)[:, None])
                scores = _dot(high, codes) + _dot(low, codes)
                scores = scores * greatest[:, None] + tl.sum(queries * least[None, :], 1)[:, None]
            if HAS_BIAS:
                at = head_rows[:, None] * num_tokens + tokens[None, :]
                scores += tl.load(score_bias + at, mask=is_row[:, None], other=0.0)
            if HAS_CAP:
                scores = _capped(scores, softcap)
            weights, kept, highest, total = _weigh(scores, is_seen, highest, total)
            if IS_FULL:
                at = within[:, None] * DIM + dims[None, :]
                values_at = tl.multiple_of(_floats(far + VALUE_OFFSET, RAW) + at, (1, 16))
                values = tl.load(values_at, mask=is_dim[None, :], other=0.0)
                attended = attended * kept[:, None] + _products(weights, values)
            else:
                least_at = _floats(far + VALUE_MIN_OFFSET, tl.float16) + within
                least = tl.load(least_at).to(tl.float32)
                scale = tl.load(least_at + PAGE_TOKENS).to(tl.float32)
                codes = _codes(far + VALUE_OFFSET, within, dims, VALUE_BITS, PAGE_TOKENS, DIM)
                codes = codes.to(tl.float16)
                greatest = tl.max(scale, 0)
                greatest = tl.where(greatest > 0, greatest, 1.0)
                high, low = _two_halves(weights * (scale * (1.0 / greatest))[None, :])
                sums = _dot(high, codes) + _dot(low, codes)
                attended = attended * kept[:, None] + sums * greatest
                attended += tl.sum(weights * least[None, :], 1)[:, None]

    place = span.to(tl.int64) * KV_HEADS * num_rows + head_rows
    tl.store(out_max + place, highest, mask=is_row)
    tl.store(out_sum + place, total, mask=is_row)
    tl.store(out + place[:, None] * DIM + dims[None, :], attended, mask=is_there)


@triton.jit(do_not_specialize=["tokens_0", "tokens_1", "tokens_2"])
def _attend_raw(
    q,
    null_scores,
    out_max,
    out_sum,
    out,
    num_rows,
    softcap,
    keys_0,
    values_0,
    head_bytes_0,
    tokens_0,
    keys_1,
    values_1,
    head_bytes_1,
    tokens_1,
    keys_2,
    values_2,
    head_bytes_2,
    tokens_2,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
    RAW: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(0)
    rows, dims = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIMS)
    is_row, is_dim = rows < num_rows, dims < DIM
    head_rows = head.to(tl.int64) * num_rows + rows
    is_there = is_row[:, None] & is_dim[None, :]
    queries = tl.load(q + head_rows[:, None] * DIM + dims[None, :], mask=is_there, other=0.0)

    highest = tl.full((ROWS,), _UNSEEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, DIMS), tl.float32)
    if HAS_NULL:  # a score without a value
        highest = tl.load(null_scores + head_rows, mask=is_row, other=0.0)
        total += 1.0
    for run in tl.static_range(3):
        if run == 0:
            keys_at, values_at, head_bytes, count = keys_0, values_0, head_bytes_0, tokens_0
        elif run == 1:
            keys_at, values_at, head_bytes, count = keys_1, values_1, head_bytes_1, tokens_1
        else:
            keys_at, values_at, head_bytes, count = keys_2, values_2, head_bytes_2, tokens_2
        keys_of = _floats(keys_at + head.to(tl.int64) * head_bytes, RAW)
        values_of = _floats(values_at + head.to(tl.int64) * head_bytes, RAW)
        for start in range(0, count, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            is_token = tokens < count
            at, is_here = tokens[:, None] * DIM + dims[None, :], is_token[:, None] & is_dim[None, :]
            keys = tl.load(tl.multiple_of(keys_of + at, (1, 16)), mask=is_here, other=0.0)
            scores = _products(queries, tl.trans(keys))
            if HAS_CAP:
                scores = _capped(scores, softcap)
            weights, kept, highest, total = _weigh(scores, is_token, highest, total)
            values = tl.load(tl.multiple_of(values_of + at, (1, 16)), mask=is_here, other=0.0)
            attended = attended * kept[:, None] + _products(weights, values)

    tl.store(out_max + head_rows, highest, mask=is_row)
    tl.store(out_sum + head_rows, total, mask=is_row)
    tl.store(out + head_rows[:, None] * DIM + dims[None, :], attended, mask=is_there)


@triton.jit
def _join(
    part_max,
    part_sum,
    part_out,
    out_max,
    out_sum,
    out,
    count,
    num_rows,
    IS_WHOLE: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One row: COUNT partials at a time."""
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, DIMS)
    highest = tl.full((COUNT,), _UNSEEN, tl.float32)
    for start in range(0, count, COUNT):
        parts = start + tl.arange(0, COUNT)
        tops = tl.load(part_max + parts * num_rows + row, mask=parts < count, other=_UNSEEN)
        highest = tl.maximum(highest, tops)
    top = tl.max(highest, 0)
    total = tl.zeros((COUNT,), tl.float32)
    joined = tl.zeros((COUNT, DIMS), tl.float32)
    for start in range(0, count, COUNT):
        parts = start + tl.arange(0, COUNT)
        is_part, at = parts < count, parts.to(tl.int64) * num_rows + row
        shares = tl.exp(tl.load(part_max + at, mask=is_part, other=_UNSEEN) - top)
        shares = tl.where(is_part, shares, 0.0)
        total += shares * tl.load(part_sum + at, mask=is_part, other=0.0)
        places = at[:, None] * DIM + dims[None, :]
        is_here = is_part[:, None] & (dims < DIM)[None, :]
        joined += shares[:, None] * tl.load(part_out + places, mask=is_here, other=0.0)
    result, whole = tl.sum(joined, 0), tl.sum(total, 0)
    tl.store(out_max + row, top)
    tl.store(out_sum + row, whole)
    if IS_WHOLE:
        result = result / whole
    tl.store(out + row * DIM + dims, result, mask=dims < DIM)
