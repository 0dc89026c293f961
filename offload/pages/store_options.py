"""How a page store moves what it holds: a setting changes time, and never a byte. Plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...prefetch.source import Predictor
from .eviction import Eviction
from .policy import Policy


@dataclass(frozen=True)
class StoreOptions:
    """policy, predictor, eviction: a name or an object.

    staging_slots, write_buffers: spans of host memory each, for what is on its way from and to the
    disk. hot_records: frames of host memory for single records from disk, which selections need
    where there is a disk tier; eviction says which of them go first.
    overlap=False is the plain twin: no threads, no prefetch, the same bytes.
    read_delay: seconds to wait before each read, for tests. stall_limit_s: after so long without
    progress the disk is given up. copy_to_compute: copies records to the compute device although it
    could read the host's memory; what CUDA always needs, for tests without one.
    """

    policy: Policy | str = "interleave"
    predictor: Predictor | str = "in_order"
    eviction: Eviction | str = "least_frequent"
    staging_slots: int = 8
    write_buffers: int = 2
    hot_records: int = 0
    io_threads: int = 8
    overlap: bool = True
    read_delay: Callable[[], float] | None = None
    stall_limit_s: float = 120.0
    copy_to_compute: bool = False
