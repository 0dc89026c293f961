"""Which pages a decode step attends to in full: all, those that matter, or those that are there.

exact     every page
bounded   the fewest whose absence would matter more than epsilon, whatever it takes to fetch them
deadline  the same, as far as they have arrived; never waits

A mode is part of what fixes a result; foresight is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MODES = ("exact", "bounded", "deadline")


@dataclass(frozen=True)
class Mode:
    """selector, selector_options: see prefetch.registry. foresight: see prefetch.foresight."""

    name: str = "exact"
    selector: str = "top_p"
    selector_options: dict[str, Any] = field(default_factory=dict)
    foresight: str = "rehearsal"

    @property
    def selects(self) -> bool:
        """Whether near planes are needed to choose by."""
        return self.name != "exact"
