"""From the estimates of pages to the records that are read, and what is left out: steps of bounded
decoding, each for all heads at once.

A page's share is exp(log mass) over all mass, that of raw keys included. What a query head gets
wrong without a record is, over its pages, the sum of

    share * unevenness * effect

(see `score` for unevenness, `effect` for effect). Records add up, heads add in quadrature, and all
heads share one order of records, by what all of them together would get wrong: sets of their own,
joined, hold a tenth more for the same result.

Knows numbers only: no pages, and nothing that is resident or on its way. Sums run in an order that
does not depend on the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import checks, dispatch
from .threads import num_threads


class Shares(NamedTuple):
    """shares: (kv_heads, num_rows, num_pages) float32, 0 for what is not there; log_total:
    (kv_heads, num_rows), the log of all mass, -inf where there is none."""

    shares: torch.Tensor
    log_total: torch.Tensor


class LeftOut(NamedTuple):
    """shares: as in Shares, 0 for the pages of chosen records. missed, misplaced: (kv_heads,
    num_rows), their sum, and that of shares times unevenness."""

    shares: torch.Tensor
    missed: torch.Tensor
    misplaced: torch.Tensor


def page_shares(log_mass: torch.Tensor, raw_log_mass: torch.Tensor) -> Shares:
    """log_mass (kv_heads, num_rows, num_pages), -inf for pages that are not there, and
    raw_log_mass (kv_heads, num_rows), float32 both, to shares. Raises ValueError for others."""
    checks.check_same("raw_log_mass", raw_log_mass, log_mass.shape[:2])
    checks.check_same("log_mass", log_mass, (*raw_log_mass.shape, log_mass.shape[-1]))
    native = dispatch.compiled_for(log_mass, raw_log_mass)
    if native is None:
        return _page_shares(log_mass, raw_log_mass)
    log_mass, raw_log_mass = log_mass.contiguous(), raw_log_mass.contiguous()
    result = Shares(torch.empty_like(log_mass), torch.empty_like(raw_log_mass))
    native.page_shares(
        log_mass.data_ptr(),
        raw_log_mass.data_ptr(),
        raw_log_mass.numel(),
        log_mass.shape[-1],
        *(part.data_ptr() for part in result),
        num_threads(),
    )
    return result


def choose_records(
    shares: torch.Tensor,  # (kv_heads, num_rows, num_pages) float32
    unevenness: torch.Tensor | None,  # the same shape; None: 1 everywhere
    effect: torch.Tensor | None,  # (kv_heads, num_rows) float32; None: 1 everywhere
    pages_per_record: int,
    epsilon: float,
) -> torch.Tensor:
    """The fewest records without which no more than epsilon goes wrong: their numbers, costliest
    first, ties to the lowest, (num_chosen,) int64. Records that cost nothing are never taken.
    Raises ValueError for shapes that do not fit."""
    checks.check_same("shares", shares, shares.shape)
    if unevenness is not None:
        checks.check_same("unevenness", unevenness, shares.shape)
    if effect is not None:
        checks.check_same("effect", effect, shares.shape[:2])
    if shares.shape[-1] % pages_per_record:
        raise ValueError(f"{shares.shape[-1]} pages are not whole records of {pages_per_record}")
    given = [t for t in (shares, unevenness, effect) if t is not None]
    native = dispatch.compiled_for(*given)
    if native is None:
        return _choose_records(shares, unevenness, effect, pages_per_record, epsilon)
    shares, num_pages = shares.contiguous(), shares.shape[-1]
    unevenness = unevenness if unevenness is None else unevenness.contiguous()
    effect = effect if effect is None else effect.contiguous()
    ranked = torch.empty(num_pages // pages_per_record, dtype=torch.int64)
    count = native.choose(
        shares.data_ptr(),
        0 if unevenness is None else unevenness.data_ptr(),
        0 if effect is None else effect.data_ptr(),
        shares.shape[0] * shares.shape[1],
        num_pages,
        pages_per_record,
        epsilon,
        ranked.data_ptr(),
        num_threads(),
    )
    return ranked[:count]


def leave_out(
    shares: torch.Tensor, unevenness: torch.Tensor, chosen: torch.Tensor, pages_per_record: int
) -> LeftOut:
    """What lies outside the records `chosen` (n,) int64, by the reference."""
    left = shares.clone()
    left.unflatten(-1, (-1, pages_per_record))[:, :, chosen] = 0.0
    return LeftOut(left, left.sum(-1), (left * unevenness).sum(-1))


def _page_shares(log_mass, raw_log_mass) -> Shares:
    masses = torch.cat([raw_log_mass.unsqueeze(-1), log_mass], -1)
    greatest = masses.amax(-1, keepdim=True)
    shift = torch.where(torch.isfinite(greatest), greatest, 0.0)
    total = ((masses - shift).exp().cumsum(-1)[..., -1:].log() + shift).squeeze(-1)
    # Where there is no mass at all, no page has a share of it.
    shares = (log_mass - torch.where(torch.isfinite(total), total, 0.0).unsqueeze(-1)).exp()
    return Shares(shares, total)


def record_costs(
    shares: torch.Tensor,
    unevenness: torch.Tensor | None,
    effect: torch.Tensor | None,
    pages_per_record: int,
) -> torch.Tensor:
    """(query heads, num_records): what each head gets wrong without each record; arguments as
    choose_records has them."""
    pages = shares
    if unevenness is not None:
        # A page that is not there has no unevenness that means anything.
        pages = torch.where(pages > 0, pages * unevenness, 0.0)
    if effect is not None:
        pages = pages * effect.unsqueeze(-1)
    return by_record(pages, pages_per_record).flatten(0, 1)


def by_record(pages: torch.Tensor, pages_per_record: int) -> torch.Tensor:
    """(..., num_pages) to (..., num_records): sums over the pages of each record."""
    if pages_per_record == 1:
        return pages
    return pages.unflatten(-1, (-1, pages_per_record)).cumsum(-1)[..., -1]


def _choose_records(shares, unevenness, effect, pages_per_record, epsilon) -> torch.Tensor:
    cost = record_costs(shares, unevenness, effect, pages_per_record)
    order = cost.cumsum(0)[-1].sort(descending=True, stable=True).indices
    # What is left outside if the selection stops before this record; summed from the small end.
    left = cost[:, order].flip(-1).cumsum(-1).flip(-1)
    wrong = (left**2).cumsum(0)[-1].sqrt()
    return order[: int((wrong > epsilon).sum())]
