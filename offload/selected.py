"""Some records of one layer, where they lie: what attention over a selection reads.

A handle: it can neither allocate nor evict. Knows no tier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Source(NamedTuple):
    """Record positions[i] of a selection lies in frames[rows[i]].

    frames: (num_frames, record_bytes) uint8; rows, positions: int64.
    """

    frames: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


@dataclass
class Selected:
    """Records to be read until the end of the `with` block, and never written to.

    near: (num_frames, near_record_bytes) uint8; near_rows: (num_records,) int64, in record order.
    """

    near: torch.Tensor
    near_rows: torch.Tensor
    sources: list[Source] = field(default_factory=list)
    _release: Callable[[], None] | None = None

    def __enter__(self) -> Selected:
        return self

    def __exit__(self, *_) -> None:
        """Gives the frames back, if any were pinned. May be called again."""
        release, self._release = self._release, None
        if release is not None:
            release()
