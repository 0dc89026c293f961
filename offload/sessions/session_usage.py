"""What a session's pages took: the `kv` and `memory` objects of an Output, and its share of each
tier. Reads counters; only `begin_count` changes some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from ..output import peak_rss_bytes
from ..pages.page_table import Tier
from ..running.runtime import Runtime
from ..running.sequence import Sequence


class SessionUsage:
    """Counts from its making on. device_peak_bytes: the most device memory this process took."""

    def __init__(self, runtime: Runtime, sequence: Sequence, device_peak_bytes: Callable[[], int]):
        self._runtime, self._sequence = runtime, sequence
        self._device_peak_bytes = device_peak_bytes
        self._stats_before = runtime.store.stats.snapshot()

    def begin_count(self) -> None:
        """What `kv` counts begins here."""
        self._stats_before = self._runtime.store.stats.snapshot()
        selected = self._runtime.engine.selected
        if selected is not None:
            selected.fidelity.take()
            selected.audit.take()

    def kv(self) -> dict:
        """The `kv` object: bytes and what was left out since the count began, where pages are."""
        plan = self._runtime.plan
        spent = self._runtime.store.stats.snapshot() - self._stats_before
        table = self._sequence.table
        pages = self._pages({n: table.num_kept(n) for n in range(table.num_layers)})
        return {
            "bits_per_element": plan.kv_bits_per_element,
            "pages": pages,
            "resident_bytes_per_token": plan.resident_bytes_per_token,
            "bytes_read": dict(spent.bytes_read),
            "bytes_written": dict(spent.bytes_written),
            "bytes_kept": spent.kept_bytes_written,
            "hit_rate": spent.hit_rate,
            "stall_s": spent.stall_s,
            **self._selection(),
        }

    def tiers(self) -> dict[str, dict[str, int]]:
        """See Session.tiers."""
        per_span = self._runtime.engine.geometry.records_per_span
        usage = self._runtime.store.usage()
        records: dict[Tier, Counter[int]] = {tier: Counter() for tier in usage}
        for extent in list(self._sequence.table.extents()):
            records[extent.tier][extent.layer] += min(extent.filled, per_span)
        return {
            tier.value: {
                "pages": self._pages(records[tier]),
                "used_bytes": use.used_bytes,
                "peak_bytes": use.peak_bytes,
                "capacity_bytes": use.capacity_bytes,
            }
            for tier, use in usage.items()
        }

    def memory(self) -> dict:
        """The `memory` object: budgets, and the most that was taken so far."""
        plan, peak = self._runtime.plan, peak_rss_bytes()
        usage = {tier.value: use for tier, use in self._runtime.store.usage().items()}
        device = None
        if plan.device is not None:
            device = {
                "budget_bytes": plan.budget_bytes["device"],
                "peak_bytes": self._device_peak_bytes(),
            }
        return {
            "device": device,
            "host": {"budget_bytes": plan.budget_bytes["host"], "peak_bytes": peak},
            "disk": {
                "budget_bytes": plan.budget_bytes["disk"],
                "peak_bytes": usage["disk"].peak_bytes,
            },
            "peak_rss_bytes": peak,
        }

    def _selection(self) -> dict:
        """What was left out; in exact mode nothing is, and that is all."""
        engine = self._runtime.engine
        if engine.selected is None:
            return {"missed_mass": {"mean": 0.0, "max": 0.0}}
        never = self._pages(self._sequence.trail.never_selected())
        looked = engine.selected.audit
        return {
            **engine.selected.fidelity.to_dict(),
            "missed_mass_true_over_estimated": looked.true_over_estimated(),
            "audited_records": looked.num_drawn,
            "pages_never_attended": never,
        }

    def _pages(self, records: Mapping[int, int]) -> int:
        """In so many records of layers, by their numbers among those that attend."""
        layouts = self._runtime.engine.attention.layouts
        return sum(layouts[layer].pages_per_record * count for layer, count in records.items())
