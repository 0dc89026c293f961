"""What the traffic of pages was: how often in time, how many bytes where, how long anyone waited.

Counts only. Tiers are names here; what a tier is stands in `offload`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields


@dataclass
class Stats:
    """Counters of one page store since it was opened; all only grow.

    resident: fetches served from a memory tier. Fetches from disk are one of
    hits (ready when asked for), late (wished for, not there yet) or misses (never wished for).
    foreseen: those hits that a wish had brought since the record was last used.
    wasted: what was read from disk and nobody used. A fetch is of a span's records where every page
    is attended, and of one record where some are selected. Bytes are of records (far planes), per
    tier; near planes, which are written to the compute device only, are counted apart.
    """

    resident: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    foreseen: int = 0
    wasted: int = 0
    stall_s: float = 0.0  # the caller waited for a read
    write_stall_s: float = 0.0  # the caller waited for a free write buffer
    given_bytes: int = 0  # handed to write(): what the bytes written are compared with
    near_bytes_written: int = 0
    kept_bytes_written: int = 0  # to files that stay when the store is closed
    bytes_read: dict[str, int] = field(default_factory=dict)
    bytes_written: dict[str, int] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Share of the fetches from disk that did not wait; 1 when there were none."""
        asked = self.hits + self.late + self.misses
        return self.hits / asked if asked else 1.0

    @property
    def write_amplification(self) -> float:
        """Bytes written in all tiers for each byte given: 1 is write-once, more is copies."""
        return sum(self.bytes_written.values()) / self.given_bytes if self.given_bytes else 1.0

    def snapshot(self) -> Stats:
        """A copy that later traffic does not change."""
        return copy.deepcopy(self)

    def __sub__(self, earlier: Stats) -> Stats:
        """What happened since `earlier`, a snapshot of the same store."""
        difference = Stats()
        for f in fields(self):
            now, then = getattr(self, f.name), getattr(earlier, f.name)
            if isinstance(now, dict):
                value = {tier: amount - then.get(tier, 0) for tier, amount in now.items()}
            else:
                value = now - then
            setattr(difference, f.name, value)
        return difference
