"""A decode step's attention over a whole layer against a softmax in float64, and in pieces."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import COMPILED
from sealed_pages import LAYOUTS, queries, sealed, tolerance

from ebbtide.kernels import dispatch
from ebbtide.kernels.attention import Partial, empty_parts
from ebbtide.kernels.layer_attention import (
    Raw,
    Records,
    attend_layer,
    attend_raw,
    attend_spans,
    join_parts,
)

compiled = pytest.mark.parametrize("kernels", COMPILED, indirect=True)
PER_SPAN = 2


def raw_tokens(layout, dtype, counts=(5, 33, 16)):
    """Runs of raw tokens, each the end of a longer buffer: (Raw, keys, values, the buffers)."""
    generator = torch.Generator().manual_seed(17)
    runs, held, keys, values = [], [], [], []
    for count in counts:
        shape = (2, layout.kv_heads, count + 7, layout.head_dim)
        k, v = torch.randn(shape, generator=generator).to(dtype)
        at = 7 * layout.head_dim * dtype.itemsize
        head_bytes = k.stride(0) * dtype.itemsize
        runs += [k.data_ptr() + at, v.data_ptr() + at, head_bytes, count]
        held.append((k, v))
        keys.append(k[:, 7:].float())
        values.append(v[:, 7:].float())
    return Raw(dtype, runs), torch.cat(keys, 1), torch.cat(values, 1), held


def records_of(layout, near, records, visible, bias=None) -> Records:
    rows = torch.arange(len(records))
    at = (dispatch.addresses(near, rows), dispatch.addresses(records, rows))
    return Records(*at, PER_SPAN, visible, bias)


def softmax64(q, k, v, bias, softcap, null_scores=None) -> torch.Tensor:
    scores = q.double() @ k.double().transpose(1, 2) + bias.double()
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if null_scores is not None:
        scores = torch.cat((scores, null_scores.double().unsqueeze(-1)), -1)
        v = torch.cat((v, torch.zeros_like(v[:, :1])), 1)
    return scores.softmax(-1) @ v.double()


@compiled
@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "pages of 10"])
@pytest.mark.parametrize(
    ("rows", "dtype", "num_records"),
    [(1, torch.bfloat16, 5), (3, torch.float16, 7), (4, torch.float32, 1), (9, torch.bfloat16, 4)],
)
def test_a_layers_attention_is_softmax(kernels, name, rows, dtype, num_records):
    layout = LAYOUTS[name]
    near, records, k, v = sealed(layout, num_records)
    raw, raw_k, raw_v, _held = raw_tokens(layout, dtype)
    q = queries(layout, rows)
    n = k.shape[1]
    for softcap, visible, with_bias in (
        (0.0, (0, n), False),
        (0.0, (layout.page_tokens, n), True),
        (5.0, (3, n - 5), True),
        (0.0, (n, n), False),
    ):
        bias = torch.zeros(*q.shape[:2], n)
        if with_bias:
            bias = torch.randn(bias.shape, generator=torch.Generator().manual_seed(2))
        listed = records_of(layout, near, records, visible, bias if with_bias else None)
        got = attend_layer(q, q, listed, layout, raw, softcap)
        seen = slice(*visible)
        want = softmax64(
            q,
            torch.cat((k[:, seen], raw_k), 1),
            torch.cat((v[:, seen], raw_v), 1),
            torch.cat((bias[..., seen], torch.zeros(*q.shape[:2], raw_k.shape[1])), -1),
            softcap,
        )
        within = tolerance(kernels, layout)
        torch.testing.assert_close(got.double(), want, atol=within, rtol=within)


@compiled
@pytest.mark.parametrize("name", ["usual", "80", "full bf16"])
@pytest.mark.parametrize("low_to_high", [(-2.0, 3.0), (-200.0, -100.0), (30.0, 60.0)])
def test_a_null_score_takes_its_share_and_gives_nothing(kernels, name, low_to_high):
    layout = LAYOUTS[name]
    near, records, k, v = sealed(layout, 5)
    raw, raw_k, raw_v, _held = raw_tokens(layout, torch.bfloat16)
    q = queries(layout, 4)
    scores = torch.linspace(*low_to_high, q.shape[0] * 4).view(q.shape[:2])
    for softcap in (0.0, 5.0):  # which bounds no null score
        for visible in ((0, k.shape[1]), (0, 0)):
            listed = records_of(layout, near, records, visible)
            got = attend_layer(q, q, listed, layout, raw._replace(null_scores=scores), softcap)
            seen, tokens = slice(*visible), visible[1] + raw_k.shape[1]
            want = softmax64(
                q,
                torch.cat((k[:, seen], raw_k), 1),
                torch.cat((v[:, seen], raw_v), 1),
                torch.zeros(*q.shape[:2], tokens),
                softcap,
                scores,
            )
            within = tolerance(kernels, layout)
            torch.testing.assert_close(got.double(), want, atol=within, rtol=within)
    pieces = _in_pieces(q, near, records, layout, raw._replace(null_scores=scores), (0, 0))
    listed = records_of(layout, near, records, (0, 0))
    whole = attend_layer(q, q, listed, layout, raw._replace(null_scores=scores))
    assert torch.equal(pieces, whole)


@compiled
@pytest.mark.parametrize("name", ["usual", "80", "full bf16"])
def test_neither_pieces_nor_threads_nor_other_rows_change_a_bit(kernels, name):
    layout = LAYOUTS[name]
    near, records, k, _ = sealed(layout, 11)
    raw, *_held = raw_tokens(layout, torch.bfloat16)
    q = queries(layout, 6)
    visible = (layout.page_tokens, k.shape[1])
    whole = records_of(layout, near, records, visible)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attend_layer(q, q, whole, layout, raw))
            results.append(_in_pieces(q, near, records, layout, raw, visible))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = q[:, 2:3].contiguous()
    assert torch.equal(attend_layer(alone, alone, whole, layout, raw), results[0][:, 2:3])


def _in_pieces(q, near, records, layout, raw, visible) -> torch.Tensor:
    """Spans one by one, backwards, from copies that lie elsewhere."""
    num_spans = -(-len(records) // PER_SPAN)
    parts = empty_parts(num_spans + 1, q)
    for span in reversed(range(num_spans)):
        rows = slice(span * PER_SPAN, (span + 1) * PER_SPAN)
        part_near, part_records = near[rows].clone(), records[rows].clone()
        base = span * PER_SPAN * layout.record_tokens
        seen = (max(0, visible[0] - base), visible[1] - base)
        one = records_of(layout, part_near, part_records, seen)
        attend_spans(q, one, layout, 0.0, Partial(*(part[span:] for part in parts)))
    attend_raw(q, raw, 0.0, Partial(*(part[-1] for part in parts)))
    return join_parts(parts)
