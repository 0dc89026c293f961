"""Where everything will lie, as users see it: printable, comparable, or an error with numbers.

Made by planner.py; computes nothing but sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..errors import ContextOverflow, DoesNotFit
from ..weights.expert_cache import PASSING_SLOTS
from .bandwidth import disk_caveat
from .budget import format_size


class Loaded(NamedTuple):
    """How a model's weights lie. expert_slots: room for routed experts; 0: all are with their
    layers. quick_too: whether layers and blocks of the head that are streamed are converted once
    also where that is quick, see kept_tensors.converted_once."""

    layers_streamed: int
    head_resident: bool
    expert_slots: int = 0
    quick_too: bool = False


@dataclass(frozen=True)
class Request:
    """What a plan is for.

    context: tokens. sequences: how many raw tails are kept (forks, snapshots). sweep_cells: 0 =
    choose. text: whether prompts come as text. loaded: how weights lie that are loaded already;
    shrinks: experts among them may give up room. workspace_bytes: at least so many, since others
    work there too. output_bytes: of what the caller gets, such as logits. drafts: whether tokens
    may be guessed, as far as there is memory for that.
    """

    context: int
    sequences: int = 1
    sweep_cells: int = 0
    text: bool = True
    loaded: Loaded | None = None
    shrinks: bool = False
    workspace_bytes: int = 0
    output_bytes: int = 0
    drafts: bool = False


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
    hot_records: int
    far_spans: dict[str, int]
    num_spans: int
    padding_share: float
    resident_bytes_per_token: float
    far_bytes_per_token: float
    kv_far_bytes: int
    fixed_host_bytes: int
    decode_bytes: dict[str, int]
    decode_page_bytes: dict[str, int]  # of those, what grows with the text
    prefill_far_bytes: int
    prefill_operations: dict[str, int] = field(default_factory=dict)  # see operations.py
    bandwidth: dict[str, float] = field(default_factory=dict)
    operations_per_s: dict[str, float] = field(default_factory=dict)
    shortage: dict[str, Any] | None = None
    selects: bool = False  # pages: then decode_bytes has no far planes
    # How tokens are guessed: by what was said before ("lookup"), by few pages too ("selection").
    drafts: str | None = None
    # Where not all routed experts are in memory: room for how many, of how many. 0: all are.
    expert_slots: int = 0
    num_experts: int = 0
    quick_too: bool = False  # see Loaded
    window_layers: int = 0  # keep the pages of their windows; bytes per token are of the others
    quantised_by: str = ""  # the method by which the files have weights; "" where they are plain

    @property
    def loaded(self) -> Loaded:
        """How the weights lie under this plan: where it is equal, nothing is loaded anew."""
        slots = self.expert_slots
        return Loaded(self.layers_streamed, self.head_resident, slots, self.quick_too)

    @property
    def reads_weights(self) -> bool:
        """Whether some are read from files for each token."""
        return bool(self.layers_streamed or self.expert_slots) or not self.head_resident

    @property
    def decode_ceiling_tokens_per_s(self) -> float | None:
        """Behind the whole context, by the measured bandwidths; see `decode_ceiling`."""
        return self.decode_ceiling(self.context, self.bandwidth)

    def decode_ceiling(self, length: int, bandwidth: Mapping[str, float]) -> float | None:
        """Tokens per second behind `length` others if a token did nothing but read its bytes, from
        all tiers at once, as reads go on while others are computed with. Pages count in proportion
        to the length, but for what windows show, and weights whole.

        bandwidth: bytes per second by tier. None where one that is read from is missing, as that of
        a disk which has no room.
        """
        seconds = 0.0
        for tier, whole in self.decode_bytes.items():
            unread = 1 - min(1.0, length / self.context)
            if count := whole - self.decode_page_bytes.get(tier, 0) * unread:
                if not bandwidth.get(tier):
                    return None
                seconds = max(seconds, count / bandwidth[tier])
        return 1 / seconds if seconds else None

    @property
    def prefill_least_s(self) -> float | None:
        """Of the whole context; see `reading_least_s`."""
        return self.reading_least_s(self.context)

    def reading_least_s(self, length: int) -> float | None:
        """What reading `length` tokens of the context takes at least: its operations at the speed
        that was measured, or the pages that come from disk. None where nothing was measured.

        Pages are read as often as the square of the length, or less where there are windows.
        """
        share, rates = length / self.context, self.operations_per_s
        if not rates:
            return None
        weights_s = share * self.prefill_operations["weights"] / rates["weights"]
        seconds = weights_s + share**2 * self.prefill_operations["pages"] / rates["pages"]
        if "disk" in self.bandwidth and not self.selects:  # which may have them at hand
            from_disk = self.prefill_far_bytes * self.far_spans["disk"] / max(1, self.num_spans)
            seconds = max(seconds, share**2 * from_disk / self.bandwidth["disk"])
        return seconds

    @property
    def disk_caveat(self) -> str:
        """What is to be known of the disk's speed, where all was measured and that was not, or with
        little; see bandwidth.py."""
        return disk_caveat(self.budget_bytes["disk"] or 0) if self.bandwidth else ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON prints it."""
        return {
            **asdict(self),
            "decode_ceiling_tokens_per_s": self.decode_ceiling_tokens_per_s,
            "prefill_least_s": self.prefill_least_s,
            "disk_caveat": self.disk_caveat,
        }

    def explain(self) -> str:
        """The plan in sentences and a table."""
        return str(self)

    def raise_if_unfit(self) -> Plan:
        """Self, or DoesNotFit / ContextOverflow with the numbers."""
        if self.context > self.model_context:
            raise ContextOverflow(
                f"{self.context:,} tokens are asked for, and {self.model} was made for "
                f"{self.model_context:,}. "
                "Ask for fewer, or use a model with a longer context.",
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
            disk = ""
            kept = sum(self.host.values()) - self.host["far planes"]
            if tier == "host" and self.budget_bytes["disk"] == 0 and kept <= have:
                disk = "make room on disk (--spill-dir, --disk-memory), "
            shorter = "lower --context " if self.largest_context else ""
            raise DoesNotFit(
                f"{self.context:,} tokens of {self.model} need {format_size(needed)} of {tier} "
                f"memory, and the budget is {format_size(have)}. {most} Raise --{tier}-memory, "
                f"{disk}{shorter}or choose fewer --kv-bits or --weight-bits.",
                tier=tier,
                needed_bytes=needed,
                available_bytes=have,
                largest_context=self.largest_context or None,
            )
        return self

    def _but_for(self) -> Iterator[str]:
        """What a speed may exceed the ceiling by."""
        if self.drafts == "selection":
            yield ", times the tokens that one reading verifies"
        if self.reads_weights:
            yield ", but for files in the system's cache"
        if self.expert_slots:
            yield " and experts that are chosen again"

    def __str__(self) -> str:
        if self.context == 1:
            fit = "1 token " + ("fits" if self.fits else "DOES NOT FIT")
        else:
            fit = f"{self.context:,} tokens " + ("fit" if self.fits else "DO NOT FIT")
        largest = self.largest_context
        most = f"largest that fits {largest:,}" if largest else "no context fits"
        lines = [f"{self.model}: {fit} (model's limit {self.model_context:,}, {most})"]
        for tier, items in (("device", self.device), ("host", self.host), ("disk", self.disk)):
            budget = self.budget_bytes[tier]
            if items is None or budget is None:
                continue
            total = sum(items.values())
            lines.append(f"  {tier:<7}{format_size(total):>12}  of {format_size(budget)}")
            lines += [f"    {format_size(n):>11}  {name}" for name, n in items.items() if n]
        lines.append(
            f"  KV      {self.kv_bits_per_element:.2f} bits per element all told, "
            f"{self.resident_bytes_per_token:,.0f} bytes per token resident, "
            f"{self.far_bytes_per_token:,.0f} far; padding {100 * self.padding_share:.1f} %"
        )
        if self.window_layers:
            lines.append(
                f"  windows {self.window_layers} layers keep the pages of their windows alone; "
                "bytes per token are of the others"
            )
        places = ", ".join(f"{n} in {t}" for t, n in self.far_spans.items() if n)
        spare = sum(self.far_spans.values()) - self.num_spans
        if spare > 0:
            places += f" ({spare} of them for forks)"
        lines.append(f"  far     spans of pages: {places or 'none'}")
        if self.quantised_by:
            bits = "16" if self.weight_bits == "full" else self.weight_bits
            how = f"quantised in the files ({self.quantised_by})"
            lines.append(f"  weights most in {bits} bits; {how}")
        if self.layers_streamed or not self.head_resident:
            head = "" if self.head_resident else " and the output head"
            lines.append(
                f"  weights {self.layers_streamed} layers{head} stream from disk for each step"
            )
        if converted := self.disk["weights"]:
            lines.append(
                f"  scratch {format_size(converted)} of weights are converted once, while they "
                "load, to a file that goes with the process"
            )
        if self.expert_slots:
            lines.append(
                f"  experts {self.expert_slots - PASSING_SLOTS} of {self.num_experts} in memory; "
                "others are read from disk when they are chosen"
            )
        ceiling = self.decode_ceiling_tokens_per_s
        if ceiling:
            moved = ", ".join(
                f"{format_size(n)} from {t}" for t, n in self.decode_bytes.items() if n
            )
            lines.append(
                f"  speed   at most {ceiling:,.1f} tokens/s at full context ({moved} per token)"
                + "".join(self._but_for())
            )
        if self.disk_caveat:
            lines.append(f"  disk    its speed is {self.disk_caveat}")
        return "\n".join(lines)
