"""What a head can do to the residual stream: the weight of its misplaced mass.

Attention that is wrong by a unit of mass moves a head's output by about the spread of its values,
and the residual by that times the head's columns of the output projection. Relative to the size of
the residual this differs tenfold between layers, and reading is worth most where it is large.
Knows no pages, and nothing that a selection could change.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import NamedTuple

import torch

from . import dispatch
from .attention import Partial
from .layer_attention import Raw
from .layout import PageLayout
from .matmul import Weight, decoded_rows
from .threads import num_threads


class Standing(NamedTuple):
    """What a query step knows of a layer besides its pages.

    raw: the partial of the keys that are attended raw; raw_log_mass, effect: (kv_heads, num_rows)
    float32, the log of their mass, and what `head_effect` says.
    """

    raw: Partial
    raw_log_mass: torch.Tensor
    effect: torch.Tensor


def stand(
    q: torch.Tensor,  # (kv_heads, num_rows, head_dim) float32 contiguous, scaled
    raw: Raw,
    layout: PageLayout,
    softcap: float,
    output_norms: torch.Tensor,  # (kv_heads, num_rows) float32 contiguous
    x: torch.Tensor,  # (1, hidden_size) float32 contiguous: the residual that enters the layer
) -> Standing:
    """All that is known before pages are looked at, in one call: compiled kernels alone. What it
    is of, the functions below and `attention.attend` are the reference."""
    shape = q.shape[:2]
    part = Partial(q.new_empty(shape), q.new_empty(shape), torch.empty_like(q))
    log_mass, effect = q.new_empty(shape), q.new_empty(shape)
    dispatch.compiled().stand_raw(
        q.data_ptr(),
        q.shape[1],
        dispatch.layout_numbers(layout),
        *raw.numbers,
        softcap,
        output_norms.data_ptr(),
        x.data_ptr(),
        x.shape[1],
        *(one.data_ptr() for one in part),
        log_mass.data_ptr(),
        effect.data_ptr(),
        num_threads(),
    )
    return Standing(part, log_mass, effect)


def head_effect(
    output_norms: torch.Tensor,
    residual_norm: torch.Tensor | float,
    raw_out: torch.Tensor,
    value_spread: torch.Tensor,
) -> torch.Tensor:
    """(kv_heads, num_rows) float32: by how much of its own size a unit of misplaced mass in each
    query head moves the residual stream after attention.

    output_norms   (kv_heads, num_rows): Frobenius norm of the columns of the output projection that
                   belong to the query head, over the square root of head_dim
    residual_norm  of the residual that enters the layer
    raw_out        (kv_heads, num_rows, head_dim): attention to the raw keys alone
    value_spread   (kv_heads,): root mean square of |value - mean value| over the raw tokens
    """
    # Before attention the residual may be a thirtieth of what it is after it (first layers), so
    # what attention adds is estimated from the raw keys, heads being as good as orthogonal.
    added = (output_norms**2 * (raw_out**2).sum(-1)).sum()
    size = (added + residual_norm**2).sqrt()
    effect = output_norms * value_spread.unsqueeze(-1)
    return torch.where(
        size > 0, effect / torch.where(size > 0, size, 1.0), torch.zeros_like(effect)
    )


def value_spread(values: torch.Tensor) -> torch.Tensor:
    """(kv_heads,) float32 of values (kv_heads, num_tokens, head_dim); 0 where there are none."""
    if not values.shape[1]:
        return torch.zeros(len(values))
    values = values.to(torch.float32)
    return (values - values.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt()


def output_norms(weight: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """(kv_heads, num_rows) of an output projection (hidden, query heads * head_dim)."""
    heads = weight.to(torch.float32).unflatten(1, (kv_heads, -1, head_dim))
    return heads.square().sum((0, 3)).sqrt() / head_dim**0.5


def composed_norms(parts: Iterable[torch.Tensor], values: Weight, num_heads: int) -> torch.Tensor:
    """`output_norms` (1, num_heads) where a head's output, a latent, is multiplied with `values`
    (num_heads * value_dim, latent_dim) before the projection: those of both in one.

    parts: the rows of the projection (hidden, num_heads * value_dim), some at a time, float32.
    """
    # |P V|^2 is the sum of (P^T P) * (V V^T): neither product is as large as P V.
    each = (rows.unflatten(1, (num_heads, -1)) for rows in parts)
    squares = reduce(add, (torch.einsum("nhi,nhj->hij", heads, heads) for heads in each))
    value_dim, norms = values.shape[0] // num_heads, torch.empty(1, num_heads)
    for head, square in enumerate(squares.cpu()):
        own = decoded_rows(values, head * value_dim, (head + 1) * value_dim).cpu()
        norms[0, head] = (square * (own @ own.t())).sum().clamp(min=0).sqrt()
    return norms.to(squares.device) / values.shape[1] ** 0.5
