"""Some records of one layer, where they lie: what attention over a selection reads.

A handle: it can neither allocate nor evict. Knows no tier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch


class Source(NamedTuple):
    """Record positions[i] of a selection lies in frames[rows[i]].

    frames: (num_frames, record_bytes) uint8; rows, positions: int64.
    """

    frames: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


@dataclass
class _Held:
    """Some of the records that were asked for, to be read until the end of the `with` block, and
    never written to. positions: (n,) int64 ascending, which of them.
    """

    positions: torch.Tensor
    release: Callable[[], None] | None = field(default=None, kw_only=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        """Gives the frames back, if any were pinned. May be called again."""
        release, self.release = self.release, None
        if release is not None:
            release()


@dataclass
class Selected(_Held):
    """near: (num_frames, near_record_bytes) uint8; near_rows: (n,) int64, in the order of
    positions. Sources count within these n."""

    near: torch.Tensor
    near_rows: torch.Tensor
    sources: list[Source] = field(default_factory=list)


@dataclass
class Placed(_Held):
    """record_at: (n,) int64, where each record starts in memory."""

    record_at: torch.Tensor
