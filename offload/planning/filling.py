"""One way to lay a request out: how many weights are held, how many cells a sweep has, and how many
far planes lie in each tier.

Order in which memory is given away: what every run needs (runtime, workspace, raw tokens), near
planes, weights, then far planes, fastest tier first. Whatever does not fit streams (weights) or
goes to disk (far planes).

Where all layers select pages and not all far planes fit, host memory is for hot pages, and for
those far planes that the disk has no room for: the same bytes keep at hand what is selected again
and again, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from statistics import fmean as mean
from typing import Any, TypeVar, cast

from ..layers.states import States
from ..models.past_cache import whole_blocks
from ..pages.geometry import Geometry
from ..running.sequence import MOST_SNAPSHOTS, RawPages, raw_slots
from ..weights.expert_cache import PASSING_SLOTS
from ..weights.rereading import bounce_bytes
from .budget import Limits
from .footprint import Facts, selection_bytes, verify_bytes, workspace_bytes
from .page_spans import PageSpans
from .plan import Loaded, Plan, Request

WRITE_BUFFERS = 2
# Reading goes on while a layer's other work is done: slots for a few milliseconds of it, but a
# small part of all spans, which had better stay in memory.
_STAGING_BYTES, _STAGING_SHARE, _FEWEST_SLOTS = 4 << 20, 1 / 8, 6
# Of all far planes: what is kept at hand at least of those on disk, where pages are selected, and
# where few are, for drafts.
_LEAST_HOT_SHARE, _DRAFTS_HOT_SHARE = 0.1, 0.05
# Text, encoding and ids of a token while a prompt is encoded.
_TEXT_BYTES_PER_TOKEN = 256
_IDS_BYTES_PER_TOKEN = 48  # as a list of ints and as an array


def fewest_hot_records(geometry: Geometry, num_spans: int, *, for_drafts: bool = False) -> int:
    """How many records from disk are kept at hand at least; num_spans: of all layers."""
    per_span = geometry.records_per_span
    share = _DRAFTS_HOT_SHARE if for_drafts else _LEAST_HOT_SHARE
    return max(2 * per_span, int(share * num_spans * per_span))


def staging_slots(span_bytes: int, num_spans: int) -> int:
    """How many spans may be on their way from disk at once; num_spans: of all layers."""
    return max(_FEWEST_SLOTS, min(_STAGING_BYTES // span_bytes, int(_STAGING_SHARE * num_spans)))


_Sized = TypeVar("_Sized", bound=Callable[..., Any])


def _remembered(method: _Sized) -> _Sized:
    """A method of Filling that a plan asks the same hundreds of times. What it gives stays as it
    is."""
    name = method.__name__

    @wraps(method)
    def remembered(self: Filling, *given: Any) -> Any:
        known = self._known.setdefault(name, {})
        if given not in known:
            known[given] = method(self, *given)
        return known[given]

    return cast(_Sized, remembered)


class Filling:
    """One way to lay a request out: near planes resident, or with the far planes. selects_drafts:
    pages are selected to guess tokens by, while all are read to verify them."""

    def __init__(
        self,
        facts: Facts,
        geometry: Geometry,
        limits: Limits,
        request: Request,
        *,
        selects_drafts: bool = False,
    ):
        self.facts, self.geometry, self.limits, self.request = facts, geometry, limits, request
        self.selects_drafts = selects_drafts
        self.config = facts.config
        self.layers = range(self.config.num_layers)
        self.page_layers = range(self.config.num_page_layers)
        self.on_device = limits.device_bytes is not None
        # Where weights, raw tokens, near planes and activations lie.
        device_bytes = limits.device_bytes
        self.fast_bytes = limits.host_bytes if device_bytes is None else device_bytes
        self.layouts = geometry.layouts(self.page_layers)
        self.spans = PageSpans(self.config, geometry, request.context, request.sequences)
        self.selects = geometry.layout.value_means
        # What is verified attends to all pages: for that a cache is of no use.
        self.caches = self.selects and not selects_drafts
        self.fewest_spans = self.spans.total(1)
        fewest = fewest_hot_records(geometry, self.fewest_spans, for_drafts=selects_drafts)
        self.fewest_hot = fewest if self.selects else 0
        self._known: dict[str, dict[tuple, Any]] = {}

    def plan(self) -> Plan:
        sweep = self.request.sweep_cells or 1
        held = self._choose_loaded(sweep)
        spills = self._far(sweep, held)["disk"] > 0
        if not self.request.sweep_cells and (spills or held.layers_streamed or held.expert_slots):
            # Reading once for several cells pays for their activations, as long as those stay
            # small.
            free = self.fast_bytes - self._fast(1, held)
            room = free // 4
            if held.expert_slots:  # which take what room there is, and may leave a quarter of it
                room = free + held.expert_slots * self.facts.expert_bytes // 4
            for cells in (8, 4, 2):
                extra = self._fast(cells, held) - self._fast(1, held)
                others = self._choose_loaded(cells)
                same = others == held._replace(expert_slots=others.expert_slots)
                if extra <= room and same and self._fits(cells, others):
                    sweep, held = cells, others
                    break
        return self._result(sweep, held)

    def _drafts(self, workspace: int) -> str | None:
        """How tokens may be guessed: by what was said before only where no more memory is needed
        than prefill needs."""
        if self.selects_drafts:
            return "selection"
        return "lookup" if self.request.drafts and self._verify_bytes() <= workspace else None

    def _verify_bytes(self) -> int:
        return verify_bytes(self.config, self.geometry, self.request.context)

    # ---- sizes -------------------------------------------------------------------------------

    def _items(self, sweep: int, held: Loaded) -> dict[str, int]:
        """What lies in the fast tier, far planes aside."""
        return {**self._weights(held), **self._beside_weights(sweep)}

    @_remembered
    def _weights(self, held: Loaded) -> dict[str, int]:
        facts, sizes = self.facts, self.facts.layer_sizes
        buffers = self._stream_bytes(held)
        resident = sum(sizes[: len(sizes) - held.layers_streamed])
        experts = {}
        if held.expert_slots:
            resident -= facts.experts_bytes
            experts["routed experts"] = held.expert_slots * facts.expert_bytes
            buffers += facts.expert_staging_bytes
        head = facts.head_bytes() if held.head_resident else 0
        return {
            "weights": resident + head + facts.unlayered_bytes,
            **experts,
            "weights being streamed": buffers,
        }

    @_remembered
    def _beside_weights(self, sweep: int) -> dict[str, int]:
        facts, geometry, config = self.facts, self.geometry, self.config
        raw = RawPages.num_bytes(self.layouts, raw_slots(sweep), geometry.cell_tokens)
        work = workspace_bytes(config, geometry, sweep)
        if self.selects_drafts:
            work = max(work, self._verify_bytes())
        states = {"recurrent states": self._state_bytes(sweep)} if config.recurrent else {}
        return {
            "raw tokens": raw * self.request.sequences,
            **states,
            "near planes": self.spans.near_bytes(sweep),
            "selection": selection_bytes(config, geometry, self.request.context),
            "workspace": max(work, facts.load_bytes, self.request.workspace_bytes),
        }

    def _stream_bytes(self, held: Loaded) -> int:
        """Of the buffers of what is streamed, and of what reading it takes."""
        facts, largest, staging, most_read = self.facts, 0, 0, 0
        if held.layers_streamed:
            largest = facts.layer_sizes[-1]
            if not facts.keeps_layers(quick_too=held.quick_too):
                staging, most_read = facts.layer_staging_bytes, facts.layer_read_bytes
        if not held.head_resident:
            largest = max(largest, facts.head_block_bytes())
            if not facts.keeps_head(quick_too=held.quick_too):
                staging = max(staging, facts.head_staging_bytes)
                most_read = max(most_read, facts.head_read_bytes)
        return 2 * whole_blocks(largest) + staging + bounce_bytes(most_read)

    def _state_bytes(self, sweep: int) -> int:
        """Of all sequences, snapshots among them where there are several; and of convolutions and
        rates as they are used."""
        recurrent, sequences = self.config.recurrent, self.request.sequences
        snapshots = min(MOST_SNAPSHOTS, sequences - 1)
        copies = (sequences - snapshots) * States.num_copies(sweep) + snapshots
        # As they lie in the files, in float32, and as the kernels take them.
        turned = 2 * 4 * sum(r.turned_numbers for r in recurrent)
        return copies * States.num_bytes(recurrent) + turned

    @_remembered
    def _host_only(self, spills: bool, held: Loaded) -> dict[str, int]:
        """What always lies in host memory."""
        span = self.geometry.span_bytes
        text = self.request.context * (
            _TEXT_BYTES_PER_TOKEN if self.request.text else _IDS_BYTES_PER_TOKEN
        )
        return {
            "runtime": self.limits.runtime_bytes,
            "text": text,
            "output": self.request.output_bytes,
            "staging": (staging_slots(span, self.fewest_spans) + WRITE_BUFFERS) * span
            if spills
            else 0,
            "hot pages": self.fewest_hot * self.geometry.layout.record_bytes if spills else 0,
            # On the way to a device, what is streamed passes through host memory.
            "weights in flight": self._stream_bytes(held) * self.on_device,
        }

    @_remembered
    def _fast(self, sweep: int, held: Loaded) -> int:
        """Bytes of the fast tier that are needed before any far plane."""
        total = sum(self._items(sweep, held).values())
        return total if self.on_device else total + sum(self._host_only(True, held).values())

    def _choose_loaded(self, sweep: int) -> Loaded:
        """All weights, if they leave room for the rest, far planes included where the disk does not
        take them; else as many routed experts as do; else the fewest streamed layers. The head
        streams last.
        """
        loaded = self.request.loaded
        if loaded is not None:
            if not (self.request.shrinks and loaded.expert_slots):
                return loaded
            slots = self._expert_slots(sweep, loaded.head_resident, loaded.expert_slots)
            return loaded._replace(expert_slots=slots or self.facts.fewest_expert_slots)
        nearest = None  # what to name the shortage of, when nothing fits
        for head_resident in (True, False):
            for held in self._ways_to_hold(sweep, head_resident):
                if self._fast(sweep, held) > self.fast_bytes:
                    continue
                if self._fits(sweep, held):
                    return held
                nearest = nearest or held
        if nearest is not None and self.limits.disk_bytes > 0:
            return nearest
        return min(self._leanest(), key=lambda held: self._fast(sweep, held))

    def _leanest(self) -> Iterator[Loaded]:
        """Among these is the way that takes least: what to name the shortage of."""
        for head_resident in (False, True):  # a small one takes less than reading it does
            if self.facts.fewest_expert_slots and not self.on_device:
                yield Loaded(0, head_resident, self.facts.fewest_expert_slots)
            for streamed in range(len(self.layers) + 1):
                yield from self._streaming(streamed, head_resident)

    def _ways_to_hold(self, sweep: int, head_resident: bool) -> Iterator[Loaded]:
        """Best first."""
        yield from self._streaming(0, head_resident)
        slots = self._expert_slots(sweep, head_resident, self.facts.num_experts)
        if slots:
            yield Loaded(0, head_resident, slots)
        for streamed in range(1, len(self.layers) + 1):
            yield from self._streaming(streamed, head_resident)

    def _streaming(self, streamed: int, head_resident: bool) -> Iterator[Loaded]:
        """Best first. What was converted once is read two to seven times as fast as what is
        converted on the way; so it is where the disk has room for as much again."""
        plain = Loaded(streamed, head_resident)
        converted = plain._replace(quick_too=True)
        size = self._scratch_bytes(converted)
        if self._scratch_bytes(plain) < size <= self.limits.disk_bytes // 2:
            yield converted
        yield plain

    def _expert_slots(self, sweep: int, head_resident: bool, most: int) -> int:
        """How many slots for routed experts to have, `most` at most; 0: there is no room for as few
        as it takes.

        Far planes come first: a token reads all of them, and of experts those that it chooses.
        Where pages are selected and do not all fit, half of what is left is for either.
        """
        fewest = self.facts.fewest_expert_slots
        if not fewest or self.on_device or fewest > most:
            return 0

        def fits(slots: int) -> bool:
            held = Loaded(0, head_resident, slots)
            return self._fast(sweep, held) <= self.fast_bytes and self._fits(sweep, held)

        def spills(slots: int) -> bool:
            return self._far(sweep, Loaded(0, head_resident, slots))["disk"] > 0

        if not fits(fewest):
            return 0
        if not spills(fewest):
            return self._most(fewest, most, lambda slots: fits(slots) and not spills(slots))
        chooses = self.selects and not self.selects_drafts
        most = self._most(fewest, most, fits) if chooses else fewest
        return (fewest + most) // 2

    @staticmethod
    def _most(fewest: int, most: int, is_good: Callable[[int], bool]) -> int:
        """The most slots that are good, where fewer are; `fewest` are."""
        low, high = fewest, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_good(middle) else (low, middle)
        return low

    def _fits(self, sweep: int, held: Loaded) -> bool:
        return self._shortage(*self._tiers(sweep, held, self._far(sweep, held))) is None

    def _far(self, sweep: int, held: Loaded) -> dict[str, int]:
        """Spans of far planes per tier; what no tier holds counts as disk."""
        items = sum(self._items(sweep, held).values())
        left, span, far = self.spans.total(sweep), self.geometry.span_bytes, {}
        if self.on_device:
            far["device"] = min(left, max(0, self.fast_bytes - items) // span)
            left -= far["device"]
            items = 0
        for spills in (False, True):  # staging is needed only if something spills
            room = self.limits.host_bytes - items - sum(self._host_only(spills, held).values())
            room -= 0 if spills else self.spans.spare * span
            # What spills is a span at least: its forks' copies have no room in memory then.
            far["host"] = min(max(0, left - spills), max(0, room) // span)
            if far["host"] == left:
                break
            if spills and self.caches:
                # Windows are attended whole; else memory is for hot pages, as far as the disk has
                # room.
                spare = self._scratch_bytes(held) + self.spans.spare * span
                on_disk = max(0, self.limits.disk_bytes - spare) // span
                most = max(self.spans.of_windows(sweep), left - on_disk)
                far["host"] = min(far["host"], most)
        far["disk"] = left - far["host"]
        return far

    def _hot_records(self, host: dict[str, int], far: dict[str, int]) -> int:
        """How many records from disk are kept at hand. host: what lies there, with the fewest."""
        if not (self.selects and far["disk"]):
            return 0
        room = max(0, self.limits.host_bytes - sum(host.values())) if self.caches else 0
        most = far["disk"] * self.geometry.records_per_span
        hot = self.fewest_hot + room // self.geometry.layout.record_bytes
        return max(self.fewest_hot, min(most, hot))

    @_remembered
    def _scratch_bytes(self, held: Loaded) -> int:
        """Of weights on disk, in the form in which they are used."""
        facts, total = self.facts, 0
        if not held.head_resident and facts.keeps_head(quick_too=held.quick_too):
            total = facts.head_scratch_bytes()
        if held.expert_slots:
            total += facts.experts_scratch_bytes()
        elif facts.keeps_layers(quick_too=held.quick_too):
            streamed = facts.layer_sizes[len(self.layers) - held.layers_streamed :]
            total += sum(map(whole_blocks, streamed))
        return total

    # ---- the plan ----------------------------------------------------------------------------

    def _tiers(self, sweep: int, held: Loaded, far: dict[str, int]):
        """Items by name of device (or None), host and disk."""
        items, span = self._items(sweep, held), self.geometry.span_bytes
        spills = far["disk"] > 0
        host = {**self._host_only(spills, held), **({} if self.on_device else items)}
        host["far planes"] = (far["host"] + (0 if spills else self.spans.spare)) * span
        if spills:
            hot = self._hot_records(host, far)
            host["hot pages"] = hot * self.geometry.layout.record_bytes
        device = {**items, "far planes": far["device"] * span} if self.on_device else None
        disk = {
            "far planes": (far["disk"] + (self.spans.spare if spills else 0)) * span,
            "weights": self._scratch_bytes(held),
        }
        return device, host, disk

    def _shortage(self, device, host, disk) -> dict | None:
        """The first tier that lacks room, and how much of it is needed; None when all have."""
        limits = self.limits
        if device is not None and sum(device.values()) > self.fast_bytes:
            return _lack("device", sum(device.values()), self.fast_bytes)
        on_disk = sum(disk.values())
        if on_disk and limits.disk_bytes <= 0:
            # Without a disk tier its share would have to lie in memory, and nothing is staged.
            needed = sum(host.values()) - host["staging"] - host["hot pages"] + on_disk
            return _lack("host", max(needed, limits.host_bytes + 1), limits.host_bytes)
        if sum(host.values()) > limits.host_bytes:
            return _lack("host", sum(host.values()), limits.host_bytes)
        return _lack("disk", on_disk, limits.disk_bytes) if on_disk > limits.disk_bytes else None

    def _result(self, sweep: int, held: Loaded) -> Plan:
        facts, geometry, config, limits = self.facts, self.geometry, self.config, self.limits
        items, far = self._items(sweep, held), self._far(sweep, held)
        streamed, head_resident = held.layers_streamed, held.head_resident
        span, layouts = geometry.span_bytes, self.layouts
        device, host, disk = self._tiers(sweep, held, far)
        fixed = sum(host.values()) - host["far planes"]
        budget = {
            "device": limits.device_bytes,
            "host": limits.host_bytes,
            "disk": limits.disk_bytes,
        }
        shortage = self._shortage(device, host, disk)
        sizes = facts.layer_sizes
        streamed_bytes = sum(sizes[len(sizes) - streamed :])
        streamed_bytes += 0 if head_resident else facts.head_bytes()
        fast = "device" if self.on_device else "host"
        # What is selected follows from the text, and may all be at hand: a bound without it.
        bounded = self.selects and not self.selects_drafts
        reads = self.spans.read(sweep, dict.fromkeys(far, 0) if bounded else far)
        decode, of_pages = (
            {tier: round(count * span) for tier, count in those.items()} for those in reads
        )
        of_pages[fast] += items["near planes"]
        decode[fast] += facts.multiplied_bytes(len(sizes) - streamed) + items["near planes"]
        decode[fast] += facts.unlayered_bytes + (facts.head_bytes() if head_resident else 0)
        decode[fast] += 2 * States.num_bytes(config.recurrent)  # read and written
        if held.expert_slots:  # as if every expert were as likely
            missing = 1 - (held.expert_slots - PASSING_SLOTS) / facts.num_experts
            from_disk = int(missing * facts.chosen_bytes)
            decode[fast] -= from_disk
            decode["disk"] += from_disk
        decode["disk"] += streamed_bytes
        num_spans = self.spans.total(sweep)
        keeping = [layouts[layer] for layer in self.spans.keeping]
        return Plan(
            model=facts.name,
            fits=shortage is None,
            context=self.request.context,
            model_context=config.max_positions,
            largest_context=0,
            device=device,
            host=host,
            disk=disk,
            budget_bytes=budget,
            weight_bits=facts.said_bits,
            quantised_by=facts.config.quantisation.method if facts.config.quantisation else "",
            kv_bits_per_element=mean(of.bits_per_element for of in layouts),
            layers_streamed=streamed,
            head_resident=head_resident,
            expert_slots=held.expert_slots,
            quick_too=held.quick_too,
            num_experts=facts.num_experts,
            near_resident=geometry.layout.near_resident,
            sweep_cells=sweep,
            staging_slots=staging_slots(span, self.fewest_spans),
            hot_records=host["hot pages"] // geometry.layout.record_bytes,
            far_spans=far,
            num_spans=num_spans,
            padding_share=mean(of.padding_share for of in layouts),
            resident_bytes_per_token=sum(of.near_bytes_per_token for of in keeping),
            far_bytes_per_token=sum(of.far_bytes_per_token for of in keeping),
            window_layers=len(layouts) - len(keeping),
            kv_far_bytes=num_spans * span,
            fixed_host_bytes=fixed,
            decode_bytes=decode,
            decode_page_bytes=of_pages,
            prefill_far_bytes=self.spans.walked(sweep) * span,
            shortage=shortage,
            selects=bounded,
            drafts=self._drafts(items["workspace"]),
        )


def _lack(tier: str, needed: int, available: int) -> dict:
    return {"tier": tier, "needed_bytes": needed, "available_bytes": available}
