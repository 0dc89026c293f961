"""What a summary will take: tokens, parts, bytes of every tier, time. Told before the work, and all
that `--dry-run` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ebbtide import format_size

from .speeds import Speeds
from .values import counted, show_duration

# The items of a Plan that hold the text's keys and values.
_KV_ITEMS = ("near planes", "far planes", "raw tokens")
TIER_NAMES = {"device": "GPU memory", "host": "RAM", "disk": "disk"}


@dataclass
class SummaryPlan:
    """num_tokens: of the prompt, read whole. most_answer: tokens the answer may have. parts: of
    map-reduce, else empty. plan: the Plan of one context, the longest. largest: the most tokens one
    context may reach. speeds: of earlier runs. prefix_cache: bytes that may be kept for the next
    time, or "auto".
    """

    documents: list[Any]
    num_tokens: int
    most_answer: int
    largest: int
    parts: list[Any]
    plan: Any
    speeds: Speeds
    prefix_cache: int | str

    @property
    def num_contexts(self) -> int:
        return max(1, len(self.parts))

    @property
    def fits(self) -> bool:
        return self.plan.fits and (bool(self.parts) or self.num_tokens < self.largest)

    def kv_bytes(self) -> dict[str, int]:
        """Keys and values of one context, by tier."""
        tiers = {tier: getattr(self.plan, tier) or {} for tier in TIER_NAMES}
        found = {
            tier: sum(items.get(name, 0) for name in _KV_ITEMS) for tier, items in tiers.items()
        }
        return {tier: count for tier, count in found.items() if count}

    def disk_write_bytes(self) -> int:
        """Of the whole run: each part's pages are written once."""
        return self.kv_bytes().get("disk", 0) * self.num_contexts

    def kept_bytes(self) -> int:
        """About as much stays on disk for the next time, at most: every part's pages, and what it
        takes to go on from some places, which is up to a third of them more."""
        found = sum(self.kv_bytes().values()) * self.num_contexts * 4 // 3
        return found if self.prefix_cache == "auto" else min(found, int(self.prefix_cache))

    def seconds(self) -> float | None:
        """By earlier runs' speeds, reading and writing as much as there may be."""
        lengths, most = self._lengths(), self.most_answer
        known = [s for s in map(self.speeds.reading_s, lengths) if s is not None]
        if len(known) < len(lengths):
            return None
        return sum(known) + sum(self.speeds.writing_s(most, length) or 0.0 for length in lengths)

    def least_s(self) -> float | None:
        """What reading takes at least where nothing of it was kept, by the plan's measurements."""
        found = [self.plan.reading_least_s(length) for length in self._lengths()]
        return None if None in found else sum(found)

    def _lengths(self) -> list[int]:
        """Tokens of each text that is read."""
        return [part.num_tokens for part in self.parts] or [self.num_tokens]

    def lines(self) -> list[str]:
        """For people."""
        out = []
        for document in self.documents:
            name = "slide" if document.format in ("pptx", "odp") else "page"
            pages = f"{counted(document.num_pages, name)}, " if document.num_pages else ""
            if document.num_pages and len(document.places) < document.num_pages:
                pages += f"{len(document.places):,} of them read, "
            out.append(
                f"{document.name}: {document.format}, {pages}{len(document.text):,} characters"
            )
        asked = f"{self.num_tokens:,} tokens with the question"
        if self.num_tokens < self.largest:  # else the text alone is too long
            asked += f" and up to {self.most_answer:,} for the answer"
        if self.parts:
            longest = max(part.num_tokens for part in self.parts)
            parts = counted(len(self.parts), "part")
            out.append(
                f"{asked}, more than one context holds ({self.largest:,}): read in {parts} of up "
                f"to {longest:,} tokens"
            )
            for number, part in enumerate(self.parts, 1):
                out.append(f"  {number:>4}  {part.num_tokens:>9,} tokens  {part.label}")
        elif not self.fits:
            out.append(
                f"{asked} do NOT FIT into one context ({self.largest:,}); --overflow map-reduce "
                "would read them in parts"
            )
        else:
            out.append(
                f"{self.num_tokens:,} tokens with the question, read whole in one context; up to "
                f"{self.most_answer:,} for the answer"
            )
        where = [f"{format_size(n)} {TIER_NAMES[tier]}" for tier, n in self.kv_bytes().items()]
        each = " for each part" if self.parts else ""
        out.append(f"keys and values{each}: {', '.join(where) or 'none'}")
        out.append(f"written to disk: {format_size(self.disk_write_bytes())} in all")
        if kept := self.kept_bytes():
            out.append(f"kept on disk for the next time: up to about {format_size(kept)}")
        out.append(self._time())
        return out

    def _time(self) -> str:
        seconds = self.seconds()
        if seconds is not None:
            return f"time: about {show_duration(seconds)} or less, at the speed of earlier runs"
        bounds, least_s = [], self.least_s()
        if least_s is not None:
            bounds.append(f"; reading at least {show_duration(least_s)}, if nothing of it is kept")
        if ceiling := self.plan.decode_ceiling_tokens_per_s:
            bounds.append(f"; writing at most {ceiling:,.1f} tokens/s")
        return f"time: not known before this model has read something here{''.join(bounds)}"

    def to_dict(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        return {
            "schema": 1,
            "documents": [describe(document) for document in self.documents],
            "prompt_tokens": self.num_tokens,
            "most_answer_tokens": self.most_answer,
            "largest_context": self.largest,
            "fits": self.fits,
            "parts": [{"label": part.label, "num_tokens": part.num_tokens} for part in self.parts],
            "kv_bytes": self.kv_bytes(),
            "disk_write_bytes": self.disk_write_bytes(),
            "kept_bytes": self.kept_bytes(),
            "eta_s": self.seconds(),
            "reading_least_s": self.least_s(),
            "plan": self.plan.to_dict(),
        }


def describe(document: Any) -> dict[str, Any]:
    """A document in a line of JSON, without its text."""
    fields = document.to_dict()
    return {name: fields[name] for name in ("name", "format", "num_pages", "num_chars", "warnings")}
