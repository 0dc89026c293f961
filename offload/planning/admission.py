"""What one model may run: its limits, the plan of each request, and the weights that are loaded.

A request is admitted before anything is allocated for it: its plan is made from what open requests
leave of the limits, weights are loaded as the plan wants them, and a Runtime is opened. Knows no
text and no tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import DoesNotFit
from ..mode import Mode
from ..models.checkpoint import Checkpoint
from ..output import Progress
from ..pages.geometry import Geometry
from ..running.runtime import Runtime
from ..weights.weights import WeightStore
from .bandwidth import measure_disk, measure_memory
from .budget import Limits, format_size
from .device import rows_stand_alone
from .filling import fewest_hot_records
from .footprint import Facts
from .operations import measure_operations
from .plan import Loaded, Plan, Request
from .planner import lay_out, make_plan

_REQUEST_ITEMS = (  # of a Plan: what a request holds for itself; the rest is shared
    "text",
    "staging",
    "hot pages",
    "selection",
    "raw tokens",
    "recurrent states",
    "near planes",
    "far planes",
)


class Admission:
    """limits: what all requests together may take. bandwidth: measured bytes per second by tier,
    for the speeds that plans name. latest_plan: of the last request that was admitted. load_s: what
    loading the weights took. store_options: see Runtime.
    """

    def __init__(
        self,
        facts: Facts,
        checkpoint: Checkpoint,
        geometry: Geometry,
        limits: Limits,
        device: torch.device,
        spill_dir: Path | None,
        mode: Mode,
        drafts: bool,
        store_options: dict,
    ):
        self.facts, self.geometry, self.limits = facts, geometry, limits
        self.bandwidth: dict[str, float] = {}
        self._operations_per_s: dict[str, float] = {}
        self.latest_plan: Plan | None = None
        self.weights: WeightStore | None = None
        self.load_s = 0.0
        self._checkpoint, self._device, self._spill_dir = checkpoint, device, spill_dir
        self._mode, self._store_options = mode, store_options
        self._drafts = drafts and mode.name != "deadline" and rows_stand_alone(device)
        self._loaded: Loaded | None = None
        self._runtimes: list[Runtime] = []

    @property
    def selects(self) -> bool:
        """Whether requests choose among pages, and near planes are made for that."""
        return self._mode.selects

    def request(self, context: int, sequences: int, **request) -> Request:
        """With what all requests share; see Request for what it may say besides."""
        shared = {"drafts": self._drafts, "workspace_bytes": self._workspace()}
        return Request(context, sequences, **{**shared, **request})

    def plan(self, context: int, sequences: int = 1, **request) -> Plan:
        """The plan for a request; see `request`. Allocates nothing."""
        asked = self.request(context, sequences, **request)
        speeds = self.bandwidth, self._operations_per_s
        return make_plan(self.facts, self.geometry, self._free(), asked, *speeds)

    def measure(self) -> None:
        """Find out how fast memory, disk and products are, for the speeds that plans name. What a
        GPU has of its own is not measured."""
        memory = measure_memory(torch.get_num_threads()).bytes_per_s
        self.bandwidth["host"] = memory
        if self._device.type != "cuda":
            self.bandwidth["device"] = memory
        if self._device.type == "cpu":
            self._operations_per_s = measure_operations(self.facts.said_bits != "full")
        if self._spill_dir is not None:
            allowed = self._free().disk_bytes
            with contextlib.suppress(DoesNotFit):  # as the plan says: `disk_caveat`
                disk = measure_disk(self._spill_dir, disk_memory=allowed)
                self.bandwidth["disk"] = disk.bytes_per_s

    def natural_context(self, sequences: int = 1) -> int:
        """The longest context that streams no more weights than a short one would: the model's
        limit, if it fits.
        """
        most, cell = self.facts.config.max_positions, self.geometry.cell_tokens
        short = self.plan(min(most, 4 * cell), sequences)
        loaded = self._loaded or short.loaded
        if loaded.expert_slots:  # a longer text may take the room of some experts
            few = max(self.facts.fewest_expert_slots, loaded.expert_slots // 2)
            loaded = loaded._replace(expert_slots=few)
        largest = self.plan(min(most, 4 * cell), sequences, loaded=loaded).largest_context
        return max(1, min(most, largest))

    def keep_in_memory(self, share: float, context: int, sequences: int = 1, **request) -> None:
        """Lower the host limit until at most `share` of such a request's far planes lies in memory,
        or fits there as hot pages, and the rest on disk. (Where pages are selected, memory for a
        tenth as hot pages comes on top; what drafts take is taken from the share.)

        For demonstrations, tests and measurements: a limit in bytes of the whole process would
        follow from what the process happens to take. Raises DoesNotFit.
        """
        asked = self.request(context, sequences, **request | {"drafts": False})

        def laid_out() -> Plan:
            return lay_out(self.facts, self.geometry, self._free(), asked)

        whole = laid_out()

        def keeps_more(host_bytes: int) -> bool:
            self.limits = replace(self.limits, host_bytes=host_bytes)
            plan = laid_out()
            per_span = self.geometry.records_per_span
            fewest = fewest_hot_records(self.geometry, plan.num_spans)
            in_memory = plan.num_spans - plan.far_spans.get("disk", 0)
            in_memory += max(0, plan.hot_records - fewest) / per_span
            return (
                plan.fits
                and plan.near_resident
                # Below some limit weights stream, and leave their room to pages.
                and _ways(plan.loaded) == _ways(whole.loaded)
                and in_memory > share * plan.num_spans
            )

        few, more = 0, self.limits.host_bytes
        while more - few > 1:
            middle = (few + more) // 2
            few, more = (few, middle) if keeps_more(middle) else (middle, more)
        self.limits = replace(self.limits, host_bytes=few)
        self.plan(context, sequences, **request).raise_if_unfit()

    def set_aside(self, num_bytes: int, what: str) -> None:
        """Count so much host memory more as the runtime's, from now on. what: takes it, for the
        DoesNotFit where open requests have left less."""
        plans = [runtime.plan for runtime in self._open_runtimes()]
        if plans:
            shared = {n: size for n, size in plans[-1].host.items() if n not in _REQUEST_ITEMS}
            left = self._free().host_bytes - sum(shared.values())
            if left < num_bytes:
                raise DoesNotFit(
                    f"{what} takes {format_size(num_bytes)}, and open sessions have left "
                    f"{format_size(max(0, left))}: raise the host budget, or open them afterwards.",
                    tier="host",
                    needed_bytes=num_bytes,
                    available_bytes=max(0, left),
                )
        runtime_bytes = self.limits.runtime_bytes + num_bytes
        self.limits = replace(self.limits, runtime_bytes=runtime_bytes)

    def admit(
        self,
        context: int,
        sequences: int,
        reach: int,
        on_progress: Callable[[Progress], None],
        **request,
    ) -> Runtime:
        """A Runtime for a request of `context` tokens; weights are loaded if need be.

        reach: how long the text may become, for RoPE scalings that depend on it. on_progress:
        called while weights load. request: see Request. Raises DoesNotFit.
        """
        plan = self.plan(context, sequences, loaded=self._loaded, **request)
        if not plan.fits and self._loaded is not None and self._loaded.expert_slots:
            plan = self.plan(context, sequences, loaded=self._loaded, shrinks=True, **request)
        if not plan.fits and self._loaded is not None and not self._open_runtimes():
            plan = self.plan(context, sequences, **request)
        plan.raise_if_unfit()
        self.latest_plan = plan
        weights = self._load(plan, on_progress)
        runtime = Runtime(
            plan,
            self.facts.config.fixed_for(reach),
            weights,
            self.geometry,
            self._device,
            self._spill_dir,
            num_sequences=sequences,
            mode=self._mode,
            **self._store_options,
        )
        self._runtimes.append(runtime)
        return runtime

    def check_fork(self, num_open: int, sequences: int) -> None:
        """Raises DoesNotFit where a session has no room for a fork. num_open: it and its forks;
        sequences: it was planned for, two snapshots among them."""
        if num_open < sequences - 2:
            return
        plan = self.latest_plan
        raw_bytes = 0 if plan is None else plan.host.get("raw tokens", 0) // sequences
        raise DoesNotFit(
            f"a session has room for {sequences - 3} fork at a time; close one first",
            tier="host",
            needed_bytes=(num_open + 1) * raw_bytes,
            available_bytes=num_open * raw_bytes,
        )

    def close(self) -> None:
        """Let go of the weights. May be called again."""
        if self.weights is not None:
            self.weights.close()
            self.weights = self._loaded = None

    def _open_runtimes(self) -> list[Runtime]:
        self._runtimes = [runtime for runtime in self._runtimes if runtime.is_open]
        return self._runtimes

    def _workspace(self) -> int:
        """Bytes that some open request works in."""
        plans = [runtime.plan for runtime in self._open_runtimes()]
        return max(((plan.device or plan.host)["workspace"] for plan in plans), default=0)

    def _free(self) -> Limits:
        """The limits less what open requests hold; weights and workspace are shared."""
        plans = [runtime.plan for runtime in self._open_runtimes()]

        def held(tier: str) -> int:
            items = [getattr(plan, tier) or {} for plan in plans]
            return sum(sum(i.get(name, 0) for name in _REQUEST_ITEMS) for i in items)

        device = self.limits.device_bytes
        return replace(
            self.limits,
            device_bytes=None if device is None else device - held("device"),
            host_bytes=self.limits.host_bytes - held("host"),
            disk_bytes=self.limits.disk_bytes - held("disk"),
        )

    def _load(self, plan: Plan, on_progress: Callable[[Progress], None]) -> WeightStore:
        loaded = self._loaded  # None also where loading was interrupted at its very end
        if loaded is not None and self.weights is not None:
            if loaded == plan.loaded:
                return self.weights
            if _ways(loaded) == _ways(plan.loaded) and plan.expert_slots < loaded.expert_slots:
                self.weights.shrink_experts(plan.expert_slots)
                self._loaded = plan.loaded
                return self.weights
        self.close()  # loading may be interrupted
        began = time.perf_counter()

        def on_load(done: int, total: int) -> None:
            elapsed = time.perf_counter() - began
            speed = done / elapsed if elapsed else 0.0
            eta = (total - done) / speed if speed else None
            on_progress(Progress("load", done, total, elapsed, speed, eta))

        self.weights = WeightStore(
            self.facts.config,
            self._checkpoint,
            self._device,
            bits=self.facts.weight_bits,
            num_streamed=plan.layers_streamed,
            expert_slots=plan.expert_slots,
            head_resident=plan.head_resident,
            quick_too=plan.quick_too,
            spill_dir=self._spill_dir,
            on_load=on_load,
        )
        self._loaded, self.load_s = plan.loaded, time.perf_counter() - began
        return self.weights


def _ways(loaded: Loaded) -> Loaded:
    """How weights are held, however many experts are in memory."""
    return loaded._replace(expert_slots=min(1, loaded.expert_slots))
