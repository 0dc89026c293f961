"""What will lie where before anything is loaded: computed from config.json and the safetensors
headers alone.

Order in which memory is given away: what every run needs (runtime, workspace, raw tokens), near
planes, weights, then far planes, fastest tier first. Whatever does not fit streams (weights) or
goes to disk (far planes); near planes that do not fit join their far planes. Only when even that is
too much does a request not fit. Results of the model do not depend on any of it. Loads and reserves
nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from .budget import Limits, format_size
from .errors import ContextOverflow, DoesNotFit
from .geometry import Geometry
from .model_config import DTYPE_BYTES, ModelConfig
from .sequence import RawPages
from .skeleton import layer_of
from .weights import HEAD_BLOCK_ROWS, stored_bytes

STAGING_SLOTS, WRITE_BUFFERS = 6, 2
# Memory that torch, BLAS and the allocator take for themselves while they work, measured on the
# 135M shape.
_SLACK_BYTES = 40 << 20
# Text, encoding and ids of a token while a prompt is encoded.
_TEXT_BYTES_PER_TOKEN = 256
_IDS_BYTES_PER_TOKEN = 48  # as a list of ints and as an array
_ATTENTION_SCRATCH_ROWS = 512


@dataclass(frozen=True)
class Request:
    """What a plan is for.

    context: tokens. sequences: how many raw tails are kept (forks, snapshots). sweep_cells: 0 =
    choose. text: whether prompts come as text. loaded: (layers streamed, head resident) of weights
    that are loaded already.
    """

    context: int
    sequences: int = 1
    sweep_cells: int = 0
    text: bool = True
    loaded: tuple[int, bool] | None = None


@dataclass(frozen=True)
class Plan:
    """Where everything will lie. Sizes are bytes; `host` and the rest are items by name. Printable
    and comparable.
    """

    model: str
    fits: bool
    context: int
    model_context: int
    largest_context: int
    device: dict[str, int] | None
    host: dict[str, int]
    disk: dict[str, int]
    budget_bytes: dict[str, int | None]
    weight_bits: str
    kv_bits_per_element: float
    layers_streamed: int
    head_resident: bool
    near_resident: bool
    sweep_cells: int
    staging_slots: int
    far_spans: dict[str, int]
    num_spans: int
    padding_share: float
    resident_bytes_per_token: float
    far_bytes_per_token: float
    kv_far_bytes: int
    fixed_host_bytes: int
    decode_bytes: dict[str, int]
    prefill_far_bytes: int
    bandwidth: dict[str, float] = field(default_factory=dict)
    shortage: dict | None = None

    @property
    def decode_ceiling_tokens_per_s(self) -> float | None:
        """Bytes a token must move over the measured bandwidths; None without measurements."""
        if not self.bandwidth:
            return None
        seconds = sum(count / self.bandwidth[tier] for tier, count in self.decode_bytes.items())
        return 1 / seconds if seconds else None

    def to_dict(self) -> dict:
        """As JSON prints it."""
        return {**asdict(self), "decode_ceiling_tokens_per_s": self.decode_ceiling_tokens_per_s}

    def explain(self) -> str:
        """The plan in sentences and a table."""
        return str(self)

    def raise_if_unfit(self) -> Plan:
        """Self, or DoesNotFit / ContextOverflow with the numbers."""
        if self.context > self.model_context:
            raise ContextOverflow(
                f"{self.context:,} tokens are asked for, and {self.model} was made for "
                f"{self.model_context:,}. "
                "Shorten the document, or use a model with a longer context.",
                needed_tokens=self.context,
                available_tokens=self.model_context,
            )
        if self.shortage is not None:
            tier, needed = self.shortage["tier"], self.shortage["needed_bytes"]
            have = self.shortage["available_bytes"]
            most = (
                f"At most {self.largest_context:,} tokens fit."
                if self.largest_context
                else "Not even a short prompt fits."
            )
            raise DoesNotFit(
                f"{self.context:,} tokens of {self.model} need {format_size(needed)} of {tier} "
                "memory, and the "
                f"budget is {format_size(have)}. {most} Raise --{tier}-memory, lower --context "
                "or choose fewer "
                "--kv-bits or --weight-bits.",
                tier=tier,
                needed_bytes=needed,
                available_bytes=have,
                largest_context=self.largest_context or None,
            )
        return self

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.context:,} tokens "
            + ("fit" if self.fits else "DO NOT FIT")
            + f" (model's limit {self.model_context:,}, largest that fits {self.largest_context:,})"
        ]
        for tier, items in (("device", self.device), ("host", self.host), ("disk", self.disk)):
            if items is None:
                continue
            total, budget = sum(items.values()), self.budget_bytes[tier]
            lines.append(f"  {tier:<7}{format_size(total):>12}  of {format_size(budget)}")
            lines += [f"    {format_size(n):>11}  {name}" for name, n in items.items() if n]
        lines.append(
            f"  KV      {self.kv_bits_per_element:.2f} bits per element all told, "
            f"{self.resident_bytes_per_token:,.0f} bytes per token resident, "
            f"{self.far_bytes_per_token:,.0f} far; padding {100 * self.padding_share:.1f} %"
        )
        places = ", ".join(f"{n} in {t}" for t, n in self.far_spans.items() if n)
        spare = sum(self.far_spans.values()) - self.num_spans
        if spare > 0:
            places += f" ({spare} of them for forks)"
        lines.append(f"  far     spans of pages: {places or 'none'}")
        if self.layers_streamed or not self.head_resident:
            head = "" if self.head_resident else " and the output head"
            lines.append(
                f"  weights {self.layers_streamed} layers{head} stream from disk for each step"
            )
        ceiling = self.decode_ceiling_tokens_per_s
        if ceiling:
            moved = ", ".join(
                f"{format_size(n)} from {t}" for t, n in self.decode_bytes.items() if n
            )
            lines.append(
                f"  speed   at most {ceiling:,.1f} tokens/s at full context ({moved} per token)"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Facts:
    """The model as the planner sees it: sizes by tensor name, nothing else.

    item_bytes: of a tensor's elements in the files, which may differ from config.json's dtype;
    what is not named there has that dtype.
    """

    name: str
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    weight_bits: int | None
    item_bytes: dict[str, int] = field(default_factory=dict)

    def _item(self, name: str) -> int:
        return self.item_bytes.get(name, DTYPE_BYTES[self.config.dtype])

    @property
    def _head_item(self) -> int:
        tied = self.config.tied_embeddings
        return self._item("model.embed_tokens.weight" if tied else "lm_head.weight")

    @cached_property
    def layer_sizes(self) -> list[int]:
        """Bytes of every layer's tensors as they are kept, smallest first."""
        sizes = [0] * self.config.num_layers
        for name, shape in self.shapes.items():
            layer = layer_of(name)
            if layer is not None:
                sizes[layer] += stored_bytes(shape, self._item(name), self.weight_bits)
        return sorted(sizes)

    def head_bytes(self) -> int:
        shape = (self.config.vocab_size, self.config.hidden_size)
        bits = None if self.weight_bits is None else 8
        return stored_bytes(shape, self._head_item, bits)

    def head_block_bytes(self) -> int:
        rows = min(HEAD_BLOCK_ROWS, self.config.vocab_size)
        return rows * self.config.hidden_size * self._head_item

    @cached_property
    def largest_tensor_bytes(self) -> int:
        return max(
            s[0] * s[1] * self._item(n)
            for n, s in self.shapes.items()
            if len(s) == 2 and layer_of(n) is not None
        )


def workspace_bytes(config: ModelConfig, geometry: Geometry, sweep_cells: int) -> int:
    """The most that activations, tiles and scores of prefill take at once."""
    cell, heads = geometry.cell_tokens, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    raw_tokens = 2 * cell + geometry.layout.page_tokens
    longest = max(geometry.span_tokens, raw_tokens)
    merges = 2 + max(1, (config.max_positions // geometry.span_tokens).bit_length())
    per_cell = config.hidden_size + heads * (2 + merges)
    once = (
        cell * (4 * config.hidden_size + 4 * heads + 8 * kv + 3 * config.intermediate_size)
        + cell * longest * 2
        + 2 * kv * (geometry.span_tokens + raw_tokens)
        + _ATTENTION_SCRATCH_ROWS * longest
        + 256 * max(config.hidden_size, config.intermediate_size)
        + 4 * config.vocab_size
    )
    return 4 * (sweep_cells * cell * per_cell + once) + _SLACK_BYTES


def make_plan(
    facts: Facts,
    geometry: Geometry,
    limits: Limits,
    request: Request,
    bandwidth: dict[str, float] | None = None,
) -> Plan:
    """The plan for a request; `fits` says whether it can be carried out, `shortage` what is missing
    if not.
    """
    plan = _fill(facts, geometry, limits, request)
    largest = _largest_context(facts, geometry, limits, request, plan)
    if request.context > facts.config.max_positions:
        plan = replace(plan, fits=False)
    return replace(plan, largest_context=largest, bandwidth=bandwidth or {})


def _largest_context(facts, geometry, limits, request, plan) -> int:
    """Tokens, by bisection over cells; 0 when nothing fits."""
    most = facts.config.max_positions
    if plan.fits and plan.context >= most:
        return most

    def fits(tokens: int) -> bool:
        return _fill(facts, geometry, limits, replace(request, context=tokens)).fits

    if fits(most):
        return most
    low, high = 0, -(-most // geometry.cell_tokens)  # fits, does not fit; in cells
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * geometry.cell_tokens) else (low, middle)
    return low * geometry.cell_tokens


def _fill(facts: Facts, geometry: Geometry, limits: Limits, request: Request) -> Plan:
    """Try the ways to lay a request out, best first."""
    plan = None
    for near_resident in (True, False):
        layout = replace(geometry.layout, near_resident=near_resident)
        plan = _Filling(facts, replace(geometry, layout=layout), limits, request).plan()
        if plan.fits:
            break
    return plan


class _Filling:
    """One way to lay a request out: near planes resident, or with the far planes."""

    def __init__(self, facts: Facts, geometry: Geometry, limits: Limits, request: Request):
        self.facts, self.geometry, self.limits, self.request = facts, geometry, limits, request
        self.config = facts.config
        self.layers = range(self.config.num_layers)
        self.on_device = limits.device_bytes is not None
        # Where weights, raw tokens, near planes and activations lie.
        self.fast_bytes = limits.device_bytes if self.on_device else limits.host_bytes
        sealed = geometry.sealed_tokens(request.context)
        self.near_bytes = int(sealed * geometry.layout.near_bytes_per_token) * len(self.layers)
        self.num_spans = geometry.num_spans(request.context) * len(self.layers)

    def plan(self) -> Plan:
        sweep = self.request.sweep_cells or 1
        streamed, head_resident = self._choose_streaming(sweep)
        spills = self._far(sweep, streamed, head_resident)["disk"] > 0
        if not self.request.sweep_cells and (spills or streamed):
            # Reading once for several cells pays for their activations, as long as those stay
            # small.
            needed = self._fast(1, streamed, head_resident)
            for cells in (8, 4, 2):
                extra = self._fast(cells, streamed, head_resident) - needed
                room = self.fast_bytes - needed
                if extra <= room // 4 and self._fits(cells, streamed, head_resident):
                    sweep = cells
                    break
        return self._result(sweep, streamed, head_resident)

    # ---- sizes -------------------------------------------------------------------------------

    def _items(self, sweep: int, streamed: int, head_resident: bool) -> dict[str, int]:
        """What lies in the fast tier, far planes aside."""
        facts, geometry, config = self.facts, self.geometry, self.config
        sizes = facts.layer_sizes
        buffers = 2 * sizes[-1] if streamed else 0
        resident = sum(sizes[: len(sizes) - streamed])
        head = facts.head_bytes() if head_resident else 2 * facts.head_block_bytes()
        slots = max(2, sweep + 1)
        layout = geometry.layout
        raw = RawPages.num_bytes(
            config.num_layers,
            slots,
            layout.kv_heads,
            geometry.cell_tokens,
            layout.head_dim,
            layout.page_tokens,
            layout.raw_dtype,
        )
        work = workspace_bytes(config, geometry, sweep)
        return {
            "weights": resident + head,
            "weights being streamed": buffers,
            "raw tokens": raw * self.request.sequences,
            "near planes": self.near_bytes,
            "workspace": max(work, facts.largest_tensor_bytes * 2 + _SLACK_BYTES),
        }

    def _host_only(self, spills: bool, streamed: int) -> dict[str, int]:
        """What always lies in host memory."""
        span = self.geometry.span_bytes
        text = self.request.context * (
            _TEXT_BYTES_PER_TOKEN if self.request.text else _IDS_BYTES_PER_TOKEN
        )
        return {
            "runtime": self.limits.runtime_bytes,
            "text": text,
            "staging": (STAGING_SLOTS + WRITE_BUFFERS) * span if spills else 0,
            # On the way to a device, streamed layers pass through host memory.
            "weights in flight": 2 * self.facts.layer_sizes[-1] * bool(streamed and self.on_device),
        }

    def _fast(self, sweep: int, streamed: int, head_resident: bool) -> int:
        """Bytes of the fast tier that are needed before any far plane."""
        total = sum(self._items(sweep, streamed, head_resident).values())
        return total if self.on_device else total + sum(self._host_only(True, streamed).values())

    def _choose_streaming(self, sweep: int) -> tuple[int, bool]:
        """The fewest streamed layers that leave room for the rest, far planes included where the
        disk does not take them; the head streams last.
        """
        if self.request.loaded is not None:
            return self.request.loaded
        nearest = None  # what to name the shortage of, when nothing fits
        for head_resident in (True, False):
            for streamed in range(len(self.layers) + 1):
                if self._fast(sweep, streamed, head_resident) > self.fast_bytes:
                    continue
                if self._fits(sweep, streamed, head_resident):
                    return streamed, head_resident
                nearest = nearest or (streamed, head_resident)
        if nearest is not None and self.limits.disk_bytes > 0:
            return nearest
        return len(self.layers), False

    def _fits(self, sweep: int, streamed: int, head_resident: bool) -> bool:
        far = self._far(sweep, streamed, head_resident)
        return self._shortage(*self._tiers(sweep, streamed, head_resident, far)) is None

    def _far(self, sweep: int, streamed: int, head_resident: bool) -> dict[str, int]:
        """Spans of far planes per tier; what no tier holds counts as disk."""
        items = sum(self._items(sweep, streamed, head_resident).values())
        left, span, far = self.num_spans, self.geometry.span_bytes, {}
        if self.on_device:
            far["device"] = min(left, max(0, self.fast_bytes - items) // span)
            left -= far["device"]
            items = 0
        for spills in (False, True):  # staging is needed only if something spills
            room = self.limits.host_bytes - items - sum(self._host_only(spills, streamed).values())
            room -= 0 if spills else self._spare_spans * span
            far["host"] = min(left, max(0, room) // span)
            if far["host"] == left:
                break
        far["disk"] = left - far["host"]
        return far

    @property
    def _spare_spans(self) -> int:
        """A fork copies the last span of each layer before it writes to it."""
        return len(self.layers) * 2 * (self.request.sequences > 1) * (self.num_spans > 0)

    # ---- the plan ----------------------------------------------------------------------------

    def _tiers(self, sweep: int, streamed: int, head_resident: bool, far: dict[str, int]):
        """Items by name of device (or None), host and disk."""
        items, span = self._items(sweep, streamed, head_resident), self.geometry.span_bytes
        spills = far["disk"] > 0
        host = self._host_only(spills, streamed)
        if not self.on_device:
            host |= items
        host["far planes"] = (far["host"] + (0 if spills else self._spare_spans)) * span
        device = {**items, "far planes": far["device"] * span} if self.on_device else None
        scratch = sum(self.facts.layer_sizes[len(self.layers) - streamed :])
        disk = {
            "far planes": (far["disk"] + (self._spare_spans if spills else 0)) * span,
            "weights": scratch if self.facts.weight_bits is not None else 0,
        }
        return device, host, disk

    def _shortage(self, device, host, disk) -> dict | None:
        """The first tier that lacks room, and how much of it is needed; None when all have."""
        limits = self.limits
        if device is not None and sum(device.values()) > limits.device_bytes:
            return _lack("device", sum(device.values()), limits.device_bytes)
        if sum(host.values()) > limits.host_bytes:
            return _lack("host", sum(host.values()), limits.host_bytes)
        if sum(disk.values()) <= limits.disk_bytes:
            return None
        if limits.disk_bytes > 0:
            return _lack("disk", sum(disk.values()), limits.disk_bytes)
        # Without a disk tier its share would have to lie in memory, and nothing is staged.
        needed = sum(host.values()) - host["staging"] + sum(disk.values())
        return _lack("host", max(needed, limits.host_bytes + 1), limits.host_bytes)

    def _result(self, sweep: int, streamed: int, head_resident: bool) -> Plan:
        facts, geometry, config, limits = self.facts, self.geometry, self.config, self.limits
        items = self._items(sweep, streamed, head_resident)
        far = self._far(sweep, streamed, head_resident)
        span, layout = geometry.span_bytes, geometry.layout
        device, host, disk = self._tiers(sweep, streamed, head_resident, far)
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
        decode = {tier: count * span for tier, count in far.items()}
        decode[fast] += items["weights"] + items["near planes"]
        decode["disk"] += streamed_bytes
        spans_walked = sum(
            geometry.num_spans(end)
            for end in range(0, self.request.context, sweep * geometry.cell_tokens)
        )
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
            weight_bits="full" if facts.weight_bits is None else str(facts.weight_bits),
            kv_bits_per_element=layout.bits_per_element,
            layers_streamed=streamed,
            head_resident=head_resident,
            near_resident=layout.near_resident,
            sweep_cells=sweep,
            staging_slots=STAGING_SLOTS,
            far_spans=far,
            num_spans=self.num_spans,
            padding_share=layout.padding_share,
            resident_bytes_per_token=layout.near_bytes_per_token * config.num_layers,
            far_bytes_per_token=layout.far_bytes_per_token * config.num_layers,
            kv_far_bytes=self.num_spans * span,
            fixed_host_bytes=fixed,
            decode_bytes=decode,
            prefill_far_bytes=spans_walked * span * config.num_layers,
            shortage=shortage,
        )


def _lack(tier: str, needed: int, available: int) -> dict:
    return {"tier": tier, "needed_bytes": needed, "available_bytes": available}
