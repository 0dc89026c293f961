"""Attention over a run of keys, as a partial result that can be merged with those of other runs.

A partial of a query row over keys k_j and values v_j is
    max = max_j q.k_j,   sum = sum_j exp(q.k_j - max),   out = sum_j exp(q.k_j - max) v_j
(online softmax: Milakov and Gimelshein 2018; its merging: FlashAttention's split over keys). `out`
is not normalised; `finish` divides. Everything is float32. With a soft-cap c, c * tanh(q.k_j / c)
stands for q.k_j (Gemma 2, 2408.00118, section 2).

A row that sees no key has max = UNSEEN, sum = 0, out = 0: merging it changes nothing. All numbers
are finite, so no step needs a test for infinity.

Knows no pages and no order of arrival: the caller fixes which keys make a partial, and in which
tree partials are merged. Equal shapes give equal bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import dispatch
from .threads import num_threads

# The score of a key that a row does not see: below any score, and exp(UNSEEN - score) is 0.
UNSEEN = -1e30
# A weight below LEAST_WEIGHT, next to a greatest weight of 1, counts as none; exp(LEAST_EXPONENT)
# is below it.
LEAST_EXPONENT = -87.0
LEAST_WEIGHT = 2e-38
# Query rows that torch scores at once. Bounds the workspace; from 256 rows on, the number makes no
# difference in speed.
BLOCK_ROWS = 512


class Partial(NamedTuple):
    """What attention over one run of keys leaves behind. float32."""

    max: torch.Tensor  # (kv_heads, num_rows)
    sum: torch.Tensor  # (kv_heads, num_rows)
    out: torch.Tensor  # (kv_heads, num_rows, head_dim), not divided by sum


def empty_parts(count: int, q: torch.Tensor) -> Partial:
    """Room for `count` partials of the rows of q (kv_heads, num_rows, head_dim)."""
    kv_heads, num_rows, dim = q.shape
    sizes = q.new_empty((2, count, kv_heads, num_rows))
    return Partial(sizes[0], sizes[1], q.new_empty((count, kv_heads, num_rows, dim)))


def attend(
    q: torch.Tensor,  # (kv_heads, groups * rows, head_dim) float32, scaled; row = group * rows + i
    k: torch.Tensor,  # (kv_heads, n, head_dim) float32
    v: torch.Tensor,  # (kv_heads, n, head_dim) float32
    mask: torch.Tensor | None = None,  # (rows, n) bool, True = visible; the same for every group
    softcap: float = 0.0,  # the bound of scores; 0 = none
) -> Partial:
    """The partial of every query row over the n keys. Nothing is written to the arguments.

    Workspace in float32: kv_heads * n * head_dim, twice that where head_dim is no multiple of 16,
    and 48 * n for each thread; by torch alone, BLOCK_ROWS * n.
    """
    kv_heads, num_rows, dim = q.shape
    if k.shape != v.shape or k.shape[0] != kv_heads or k.shape[2] != dim:
        raise ValueError(
            f"queries are {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}: "
            "keys and values must be (kv_heads, n, head_dim)"
        )
    n = k.shape[1]
    sizes = q.new_empty((2, kv_heads, num_rows))
    result = Partial(sizes[0], sizes[1], q.new_empty((kv_heads, num_rows, dim)))
    if n == 0 or num_rows == 0:
        sizes[0], sizes[1] = UNSEEN, 0.0
        result.out.zero_()
        return result
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != n or num_rows % len(mask)):
        raise ValueError(f"mask is {tuple(mask.shape)}; there are {num_rows} rows and {n} keys")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; it must be bool")
    native = dispatch.compiled_for_floats(q, k, v)
    if native is None:
        _attend(q, k, v, mask, softcap, result)
    else:
        _compiled(native, q, k, v, mask, softcap, result)
    return result


def _compiled(native, q, k, v, mask, softcap: float, result: Partial) -> None:
    q, k, v = q.contiguous(), _by_heads(k), _by_heads(v)
    mask = None if mask is None else mask.contiguous()
    native.attend_rows(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        *q.shape[:2],
        *k.shape[1:],
        k.stride(0),
        v.stride(0),
        0 if mask is None else mask.data_ptr(),
        1 if mask is None else len(mask),
        softcap,
        *(part.data_ptr() for part in result),
        num_threads(),
    )


def _by_heads(x: torch.Tensor) -> torch.Tensor:
    """x (kv_heads, n, dim) where each head's tokens lie side by side, or such a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _attend(q, k, v, mask, softcap: float, result: Partial) -> None:
    kv_heads, num_rows, _ = q.shape
    n, bias = k.shape[1], None if mask is None else _bias(mask)
    if kv_heads * num_rows <= BLOCK_ROWS:
        # Few rows, as in decode: one product for all heads costs a third of one product for each.
        scores = cap(torch.bmm(q, k.transpose(1, 2)), softcap)
        if bias is not None:
            scores.unflatten(1, (-1, len(bias))).add_(bias)
        _reduce(scores, v, result.max, result.sum, result.out)
    else:
        step = min(num_rows, BLOCK_ROWS)
        scratch = q.new_empty((step, n))
        for head in range(kv_heads):
            keys, values = k[head].t(), v[head]
            for start in range(0, num_rows, step):
                block = slice(start, min(start + step, num_rows))
                scores = scratch[: block.stop - start]
                cap(torch.mm(q[head, block], keys, out=scores), softcap)
                if bias is not None:
                    _add_bias(scores, bias, start)
                _reduce(scores, values, *(part[head, block] for part in result))
    if bias is not None:
        unseen = result.max == UNSEEN
        result.sum.masked_fill_(unseen, 0.0)
        result.out.masked_fill_(unseen.unsqueeze(-1), 0.0)


def cap(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """The scores, bound by a soft-cap in place; as they are when it is 0."""
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def attend_scores(scores: torch.Tensor, v: torch.Tensor) -> Partial:
    """The partial of scores (kv_heads, num_rows, n), which are used up, over v (kv_heads, n, d)."""
    kv_heads, num_rows, _ = scores.shape
    result = Partial(
        scores.new_empty((kv_heads, num_rows)),
        scores.new_empty((kv_heads, num_rows)),
        scores.new_empty((kv_heads, num_rows, v.shape[2])),
    )
    _reduce(scores, v, *result)
    return result


def _reduce(scores, values, highest, total, out) -> None:
    """Scores (..., rows, n) to the three parts of a partial, in place; scores are used up."""
    torch.amax(scores, -1, out=highest)
    # exp of what underflows runs at a fifth of the speed on CPUs, and masked keys all do: so they
    # are kept from underflowing and made zero afterwards (a causal mask cost 1.7 times the whole,
    # now 1.06).
    scores.sub_(highest.unsqueeze(-1)).clamp_(min=LEAST_EXPONENT).exp_()
    torch.threshold_(scores, LEAST_WEIGHT, 0.0)
    torch.sum(scores, -1, out=total)
    torch.matmul(scores, values, out=out)


def _bias(mask: torch.Tensor) -> torch.Tensor:
    """mask (rows, n) to what is added to scores: 0 where visible, UNSEEN where not.

    float32 cannot tell UNSEEN plus a score from UNSEEN. Adding runs at five times the speed of
    masked_fill.
    """
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, UNSEEN)


def _add_bias(scores: torch.Tensor, bias: torch.Tensor, start: int) -> None:
    """Add bias (rows, n), which repeats for every group, to scores of the query rows start, ..."""
    done = 0
    while done < len(scores):
        row = (start + done) % len(bias)
        count = min(len(bias) - row, len(scores) - done)
        scores[done : done + count].add_(bias[row : row + count])
        done += count


def merge(a: Partial, b: Partial) -> Partial:
    """The partial over a's keys and b's. Commutes to the bit; associates up to rounding."""
    highest = torch.maximum(a.max, b.max)
    share_a = torch.exp(a.max - highest)
    share_b = torch.exp(b.max - highest)
    total = a.sum * share_a + b.sum * share_b
    out = a.out * share_a.unsqueeze(-1) + b.out * share_b.unsqueeze(-1)
    return Partial(highest, total, out)


def merge_into(a: Partial, b: Partial) -> Partial:
    """`merge`, up to rounding. Both are used up: the result may lie where a did."""
    native = dispatch.compiled_for_floats(*a, *b)
    if native is None:
        return merge(a, b)
    assert all(part.is_contiguous() for part in (*a, *b))
    dim = a.out.shape[-1]
    addresses = (part.data_ptr() for part in (*a, *b))
    native.join_two(a.max.numel(), dim, *addresses, num_threads())
    return a


def finish(p: Partial) -> torch.Tensor:
    """The attention output (kv_heads, num_rows, head_dim). Every row must have seen a key."""
    return p.out / p.sum.unsqueeze(-1)


def finish_rows(p: Partial, num_tokens: int) -> torch.Tensor:
    """`finish`, as (num_tokens, num_heads * head_dim): heads in the model's order.

    p: num_rows = groups * num_tokens, row = group * num_tokens + i.
    """
    kv_heads, num_rows, dim = p.out.shape
    native = dispatch.compiled_for_floats(p.sum, p.out)
    if native is None:
        out = finish(p).view(kv_heads, -1, num_tokens, dim).permute(2, 0, 1, 3)
        return out.reshape(num_tokens, -1)
    assert p.out.is_contiguous() and p.sum.is_contiguous()
    num_heads = kv_heads * num_rows // num_tokens
    out = torch.empty(num_tokens, num_heads * dim)
    threads = num_threads()
    where = (p.sum.data_ptr(), p.out.data_ptr())
    native.finish_rows(*where, num_heads, num_tokens, dim, out.data_ptr(), threads)
    return out
