"""What reading one format gives: a Document without its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .document import Place

Report = Callable[[int, int], None]  # parts done, parts in all


@dataclass
class Extract:
    """See Document for the fields."""

    text: str
    places: list[Place] = field(default_factory=list)
    num_pages: int | None = None
    warnings: list[str] = field(default_factory=list)
