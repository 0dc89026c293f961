"""From a query and a near plane to the evidence of every page: log mass and unevenness.

`variance` says what is done about the error of near keys, whose variance in a score is that of a
uniform error within the bins: -1 takes half of it from the log mass (as if the error came on top of
the true score), +1 adds half (as if the true score varied around the near one), 0 leaves it.
`noise` treats the unevenness likewise, as that of normally distributed scores. Without near bits,
scores are taken to be normal with the page's mean and variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sealed import Sealed


@dataclass(frozen=True)
class Estimate:
    variance: float = 0.0
    noise: float = 0.0
    whole: bool = False  # the products of queries and codes in whole numbers, as the kernels do


def page_evidence(q: torch.Tensor, sealed: Sealed, how: Estimate):
    """(log_mass, unevenness), each (kv_heads, num_rows, num_pages), of q (kv_heads, num_rows, d)
    scaled, and rotated if the pages are.
    """
    size = sealed.near.page_tokens
    squares = q * q
    if sealed.near_keys is None:
        variance = squares @ sealed.key_variances.mT
        log_mass = q @ sealed.key_means.mT + variance / 2 + math.log(size)
        return log_mass, spread_to_unevenness(variance)
    if how.whole:
        scores = _whole_number_scores(q, sealed)
    else:
        scores = (q @ sealed.near_keys.mT).unflatten(-1, (-1, size))
    log_mass, unevenness = from_scores(scores)
    if how.variance or how.noise:
        variance = squares @ (sealed.bin_widths**2 / 12).mT
        log_mass = log_mass + how.variance / 2 * variance
        if how.noise:
            spread = unevenness_to_spread(unevenness) + how.noise * variance
            unevenness = spread_to_unevenness(spread.clamp_min(0))
    return log_mass, unevenness


def _whole_number_scores(q: torch.Tensor, sealed: Sealed) -> torch.Tensor:
    """(kv_heads, num_rows, num_pages, P): a query times a bin's width is rounded to 8 bits."""
    widths = sealed.bin_widths.unsqueeze(1)
    products = q.unsqueeze(2) * widths  # (kv_heads, num_rows, num_pages, d)
    step = (products.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    rounded = (products / step).round_() * step / widths.clamp_min(1e-30)
    keys = sealed.near_keys.unflatten(1, (-1, sealed.near.page_tokens))
    middles = (sealed.least + sealed.greatest).unsqueeze(1) / 2
    apart = ((q.unsqueeze(2) - rounded) * middles).sum(-1, keepdim=True)
    return torch.einsum("hrpd,hptd->hrpt", rounded, keys).add_(apart)


def from_scores(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log_mass, unevenness), each (...), of the scores (..., page_tokens) of pages."""
    log_mass = scores.logsumexp(-1)
    weights = (scores - log_mass.unsqueeze(-1)).exp_()
    return log_mass, weights.sub_(1 / scores.shape[-1]).abs_().sum(-1) / 2


def spread_to_unevenness(variance: torch.Tensor) -> torch.Tensor:
    """Of many normally distributed scores with that variance."""
    return torch.erf(variance.sqrt() / (2 * math.sqrt(2)))


def unevenness_to_spread(unevenness: torch.Tensor) -> torch.Tensor:
    """The inverse: a variance."""
    return (torch.erfinv(unevenness.clamp(0, 0.9999)) * (2 * math.sqrt(2))) ** 2
