"""`/mem` in a chat: where a session's pages lie, and what moved between the tiers.

Knows what a session and an Output tell, and nothing of how they know.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from ebbtide import format_size

_NAMES = {"device": "GPU", "host": "RAM", "disk": "disk"}


class MemoryTotals:
    """The traffic of all answers of a conversation."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.recomputed_tokens = 0
        self.stall_s = 0.0
        self.last_kv: dict[str, Any] = {}

    def add(self, output: Any) -> None:
        self.last_kv = output.kv
        self.read.update(output.kv["bytes_read"])
        self.written.update(output.kv["bytes_written"])
        self.recomputed_tokens += output.usage["recomputed_tokens"]
        self.stall_s += output.kv["stall_s"]


def memory_table(session: Any, totals: MemoryTotals, budget_bytes: int | None) -> str:
    """The whole view, as lines. budget_bytes: of host memory, None where it is not known."""
    last = totals.last_kv
    head = ("tier", "pages", "in use", "most so far", "room", "read", "read in all", "written")
    rows: list[tuple[str, ...]] = [head]
    tiers: dict[str, dict[str, int]] = session.tiers()
    for tier, now in tiers.items():
        rows.append(
            (
                _NAMES.get(tier, tier),
                f"{now['pages']:,}",
                format_size(now["used_bytes"]),
                format_size(now["peak_bytes"]),
                format_size(now["capacity_bytes"]) if now["capacity_bytes"] else "off",
                format_size(last.get("bytes_read", {}).get(tier, 0)),
                format_size(totals.read[tier]),
                format_size(totals.written[tier]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    if last:
        mass = last["missed_mass"]
        lines.append(
            f"last answer: hit rate {last['hit_rate']:.3f}, {last['stall_s']:.2f} s stalled, "
            f"missed mass {mass['mean']:.4f} on average and {mass['max']:.4f} at most"
            f"{checked_mass(last)}"
        )
    else:
        lines.append("no answer yet; reads and hits are counted from answer to answer")
    lines.append(
        f"read again so far: {totals.recomputed_tokens:,} tokens; "
        f"this process holds {format_size(_resident_bytes())} of RAM"
        + ("" if budget_bytes is None else f" of a budget of {format_size(budget_bytes)}")
    )
    return "\n".join(lines)


def checked_mass(kv: dict) -> str:
    """What the records that were read to check the missed mass say of it; "" where none were."""
    ratio = kv.get("missed_mass_true_over_estimated")
    return "" if ratio is None else f" (checked: {ratio:.2f} times that)"


def tiers_line(session: Any) -> str:
    """One line for below the prompt."""
    parts = [
        f"{_NAMES.get(tier, tier)} {now['pages']:,} pages, {format_size(now['used_bytes'])}"
        for tier, now in session.tiers().items()
        if now["capacity_bytes"]
    ]
    return " | ".join([*parts, f"process {format_size(_resident_bytes())}"])


def _resident_bytes() -> int:
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss
