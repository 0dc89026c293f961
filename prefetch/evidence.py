"""What one query step knows about one layer before anything is read: estimates for every page.

Numbers only: where they come from (a near plane, the true query or a rehearsed one) is the
caller's. Sums run in order, so they do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..kernels.selection import Shares, by_record, page_shares


@dataclass(frozen=True)
class Evidence:
    """The estimates that a selector chooses by. num_rows are the query heads of a KV head's group.

    log_mass      (kv_heads, num_rows, num_pages) float32: log of the page's softmax mass, not
                  normalised; -inf: the page is not there for the choice (it is attended raw, or
                  lies outside a sliding window)
    unevenness    same shape, 0..1: the total variation between the page's own softmax and uniform,
                  which is what replacing the page by its mean value gets wrong per unit of mass
    raw_log_mass  (kv_heads, num_rows) float32: log mass of the keys that are attended raw; -inf if
                  there are none
    effect        (kv_heads, num_rows) float32: what a unit of a head's misplaced mass does to the
                  residual stream, relative to its size (see kernels.effect)
    pages_per_record  the pages that are read together; divides num_pages
    record_tokens     tokens of a record, for selectors whose budget is in tokens
    upper_bound   gives (kv_heads, num_rows, num_pages) bounds of the pages' greatest scores
    rehearsed_log_mass  as log_mass, of the query that was rehearsed
    joint_score   gives (num_pages,) float32: of each page the greatest score that one query for all
                  heads has with a token's keys of all heads, in a basis of low rank
    previous      (num_selected,) int64, what the layer selected a step ago
    continuity    (kv_heads,) float32: cosine of the queries with those of a step ago, group's mean
    """

    log_mass: torch.Tensor
    unevenness: torch.Tensor
    raw_log_mass: torch.Tensor
    pages_per_record: int = 1
    record_tokens: int = 0
    upper_bound: Callable[[], torch.Tensor] | None = None
    rehearsed_log_mass: torch.Tensor | None = None
    joint_score: Callable[[], torch.Tensor] | None = None
    previous: torch.Tensor | None = None
    continuity: torch.Tensor | None = None
    effect: torch.Tensor | None = None

    def __post_init__(self):
        if self.log_mass.shape != self.unevenness.shape or self.log_mass.dim() != 3:
            raise ValueError(
                f"log_mass is {tuple(self.log_mass.shape)}, unevenness "
                f"{tuple(self.unevenness.shape)}; both must be (kv_heads, num_rows, num_pages)"
            )
        if self.raw_log_mass.shape != self.log_mass.shape[:2]:
            raise ValueError(
                f"raw_log_mass is {tuple(self.raw_log_mass.shape)}; it must be "
                f"{tuple(self.log_mass.shape[:2])}, as log_mass without its pages"
            )
        if self.pages_per_record < 1 or self.num_pages % self.pages_per_record:
            raise ValueError(
                f"{self.num_pages} pages are not whole records of {self.pages_per_record}"
            )

    @property
    def num_pages(self) -> int:
        return self.log_mass.shape[-1]

    @property
    def num_records(self) -> int:
        return self.num_pages // self.pages_per_record

    @cached_property
    def shares(self) -> Shares:
        """The share of all mass, that of raw keys included, that lies in each page."""
        return page_shares(self.log_mass, self.raw_log_mass)

    def by_record(self, pages: torch.Tensor) -> torch.Tensor:
        """(..., num_pages) to (..., num_records): sums over the pages of each record."""
        return by_record(pages, self.pages_per_record)

    def present(self) -> torch.Tensor:
        """(num_records,) bool: the records with a page that may be chosen."""
        pages = (self.log_mass > -torch.inf).any(0).any(0)
        return pages.unflatten(0, (self.num_records, self.pages_per_record)).any(-1)


def missed_mass(evidence: Evidence, selected: torch.Tensor) -> torch.Tensor:
    """(kv_heads, num_rows): the estimated share of mass in records outside the selection."""
    return _outside(evidence, evidence.shares.shares, selected)


def misplaced_mass(evidence: Evidence, selected: torch.Tensor) -> torch.Tensor:
    """(kv_heads, num_rows): the estimated total variation between the attention that is used, with
    every page outside the selection spread evenly, and the true one.
    """
    shares = evidence.shares.shares
    pages = torch.where(shares > 0, shares * evidence.unevenness, 0.0)
    return _outside(evidence, pages, selected)


def _outside(evidence: Evidence, pages: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    records = evidence.by_record(pages).index_fill(-1, selected, 0.0)
    if not evidence.num_records:
        return torch.zeros_like(evidence.raw_log_mass)
    return records.cumsum(-1)[..., -1]
