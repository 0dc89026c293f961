"""One root session's machinery: a page store sized by a plan, and an engine over it. Forks share
it.

Opened after the plan was admitted, closed when the last sequence that uses it is. Knows no text.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..disk.disk import KEPT_FREE_BYTES, ScratchFile, check_space
from ..mode import Mode
from ..models.model_config import ModelConfig
from ..pages.geometry import Geometry
from ..pages.page_table import Tier
from ..pages.pager import PageStore
from ..pages.store_options import StoreOptions
from ..pages.windows import Windows
from ..planning.filling import WRITE_BUFFERS
from ..planning.memory_at_hand import give_back_freed_memory
from ..planning.page_room import PageRoom
from ..planning.page_spans import PageSpans
from ..planning.plan import Plan
from ..weights.weights import WeightStore
from .engine import Engine
from .sequence import Sequence

# What guesses are made with: a coarse selection is right nearly as often as a finer one, and is had
# for two thirds of the time or less (docs/log.md).
_DRAFTS = Mode("bounded", selector_options={"epsilon": 0.2})


class Runtime:
    """A store and an engine. `open` and `fork` hand out sequences, `release` takes them back. room:
    what the open ones may still take.

    store_options: of StoreOptions (overlap, policy, predictor, read_delay ...), in place of what is
    chosen here; they change time only. Raises DoesNotFit when the volume has too little room,
    InputError for an unusable spill folder.
    """

    def __init__(
        self,
        plan: Plan,
        config: ModelConfig,
        weights: WeightStore,
        geometry: Geometry,
        device: torch.device,
        spill_dir: Path | None,
        *,
        num_sequences: int = 1,
        mode: Mode | None = None,
        **store_options,
    ):
        if plan.drafts == "selection":
            geometry = geometry.selecting(config)
        geometry = geometry.with_pages(near_resident=plan.near_resident)
        per_span = geometry.records_per_span
        disk_spans = plan.disk["far planes"] // geometry.span_bytes
        disk_bytes = disk_spans * geometry.span_bytes
        num_layers = config.num_page_layers
        windows = Windows(config, geometry)
        most = windows.most_spans(plan.context, plan.sweep_cells, num_sequences)
        host_spans = plan.far_spans["host"]
        if not disk_spans:  # else what forks copy is there
            host_spans += PageSpans(config, geometry, plan.context, num_sequences).spare
        frames = {
            Tier.DEVICE: plan.far_spans.get("device", 0) * per_span,
            Tier.HOST: host_spans * per_span,
            Tier.DISK: disk_spans * per_span,
        }
        self.plan = plan
        if disk_spans:
            assert spill_dir is not None, "a disk tier without a folder"
            check_space(spill_dir, disk_bytes, KEPT_FREE_BYTES)
        options = StoreOptions(
            policy="first_layers" if mode and mode.selects else "interleave",
            staging_slots=plan.staging_slots,
            write_buffers=WRITE_BUFFERS,
            hot_records=plan.hot_records,
        )
        options = replace(options, **store_options)
        self.store = PageStore(
            num_layers,
            geometry.layout.record_bytes,
            [of.near_record_bytes for of in geometry.layouts(range(num_layers))],
            per_span,
            frames,
            device,
            (lambda: ScratchFile(spill_dir, most_bytes=disk_bytes)) if disk_spans else None,
            pages_of=config.kv_pages,
            spans_at_once=list(map(geometry.spans_at_once, range(num_layers))),
            most_spans=most,
            spans_first=windows.spans_of_one(plan.context, plan.sweep_cells),
            options=options,
        )
        try:
            self.engine = Engine(
                config,
                weights,
                self.store,
                geometry,
                device,
                sweep_cells=plan.sweep_cells,
                overlap=options.overlap,
                mode=mode,
            )
        except BaseException:
            self.store.close()
            raise
        self.room = PageRoom(plan, self.store, geometry, windows)
        self._drafter: Engine | None = None
        self.is_open = True

    def make_drafter(self) -> Engine | None:
        """The engine's twin that guesses tokens by few pages, made once; None where none may."""
        if self._drafter is None and self.plan.drafts == "selection":
            self._drafter = self.engine.twin(_DRAFTS)
        return self._drafter

    def open(self, expected_tokens: int) -> Sequence:
        """An empty sequence, which may come to have so many tokens."""
        sequence = self.engine.sequences.open(expected_tokens)
        self.room.add(sequence)
        return sequence

    def fork(self, sequence: Sequence) -> Sequence:
        """A sequence with the same tokens, whose pages the two share."""
        other = self.engine.sequences.fork(sequence)
        self.room.add(other)
        return other

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's pages; the last one closes the store."""
        self.engine.sequences.close(sequence)
        self.room.remove(sequence)
        if not self.room:
            self.close()

    def close(self) -> None:
        self.is_open = False
        for engine in filter(None, (self.engine, self._drafter)):
            engine.close()
        try:
            self.store.close()
        finally:  # what is left in pieces between other memory adds up from session to session
            give_back_freed_memory()
