"""Where every record of one layer lies, as arrays: so that choosing some of them takes no loop.

Made from a page table and kept until the table changes. Knows frame numbers, no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .page_table import Extent, PageTable, Tier

TIERS = tuple(Tier)
NOWHERE = -1


@dataclass(frozen=True)
class RecordMap:
    """The first num_records records of a layer, in order.

    near_rows: int64 tensor, each record's row of the layer's arena of near planes, on the compute
    device.
    tier: int8, index into TIERS; frame: int64, row of that tier's arena, or of the scratch file.
    extents: of each span, None where it was dropped or skipped: its records have tier NOWHERE.
    """

    version: int
    layer: int
    near_rows: torch.Tensor
    tier: np.ndarray
    frame: np.ndarray
    extents: list[Extent | None]
    records_per_span: int

    def extent(self, span: int) -> Extent:
        """Of a span that was neither dropped nor skipped."""
        extent = self.extents[span]
        assert extent is not None
        return extent

    @cached_property
    def tiers(self) -> tuple[int, ...]:
        """The tiers that occur, by index."""
        return tuple(index for index in np.unique(self.tier).tolist() if index != NOWHERE)


def make_record_map(table: PageTable, layer: int, device: torch.device) -> RecordMap:
    """The map of all records that the layer has now."""
    count, per_span = table.num_records(layer), table.records_per_span
    extents = table.entries(layer)
    within = np.arange(per_span, dtype=np.int64)

    def spread(firsts: list[int]) -> np.ndarray:
        if not firsts:
            return np.empty(0, dtype=np.int64)
        return (np.array(firsts, dtype=np.int64)[:, None] + within).reshape(-1)[:count]

    near = torch.from_numpy(spread([e.near_base if e else 0 for e in extents])).to(device)
    tiers = np.array([TIERS.index(e.tier) if e else NOWHERE for e in extents], dtype=np.int8)
    return RecordMap(
        table.version,
        layer,
        near,
        np.repeat(tiers, per_span)[:count],
        spread([e.base if e else 0 for e in extents]),
        extents,
        per_span,
    )
