"""What a session's pages took: the `kv` and `memory` objects of an Output, and its share of each
tier. Reads counters; changes nothing but where the next count begins.
"""

from __future__ import annotations

from collections.abc import Callable

from .output import peak_rss_bytes
from .runtime import Runtime
from .sequence import Sequence


class SessionUsage:
    """Counts from its making on. device_peak_bytes: the most device memory this process took."""

    def __init__(self, runtime: Runtime, sequence: Sequence, device_peak_bytes: Callable[[], int]):
        self._runtime, self._sequence = runtime, sequence
        self._device_peak_bytes = device_peak_bytes
        self._stats_before = runtime.store.stats.snapshot()

    def kv(self) -> dict:
        """The `kv` object: bytes since the last call, what was left out, where pages are."""
        plan, engine = self._runtime.plan, self._runtime.engine
        now = self._runtime.store.stats.snapshot()
        spent, self._stats_before = now - self._stats_before, now
        table = self._sequence.table
        records = sum(table.num_records(layer) for layer in range(table.num_layers))
        return {
            "bits_per_element": plan.kv_bits_per_element,
            "pages": records * engine.geometry.layout.pages_per_record,
            "resident_bytes_per_token": plan.resident_bytes_per_token,
            "bytes_read": dict(spent.bytes_read),
            "bytes_written": dict(spent.bytes_written),
            "hit_rate": spent.hit_rate,
            "stall_s": spent.stall_s,
            **self._selection(),
        }

    def tiers(self) -> dict[str, dict[str, int]]:
        """See Session.tiers."""
        geometry = self._runtime.engine.geometry
        per_span, pages_per_record = geometry.records_per_span, geometry.layout.pages_per_record
        usage = self._runtime.store.usage()
        records = dict.fromkeys(usage, 0)
        for extent in list(self._sequence.table.extents()):
            records[extent.tier] += min(extent.filled, per_span)
        return {
            tier.value: {
                "pages": records[tier] * pages_per_record,
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
        """What was left out since the last call; in exact mode nothing is, and that is all."""
        engine = self._runtime.engine
        if engine.selected is None:
            return {"missed_mass": {"mean": 0.0, "max": 0.0}}
        never, looked = self._sequence.trail.never_selected(), engine.selected.audit.take()
        return {
            **engine.selected.fidelity.take().to_dict(),
            "missed_mass_true_over_estimated": looked.true_over_estimated(),
            "audited_records": looked.num_drawn,
            "pages_never_attended": never * engine.geometry.layout.pages_per_record,
        }
