"""What reading one format gives: a Document without its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import InputError
from .document import Place

Report = Callable[[int, int], None]  # parts done, parts in all


@dataclass
class Extract:
    """See Document for the fields."""

    text: str
    places: list[Place] = field(default_factory=list)
    num_pages: int | None = None
    warnings: list[str] = field(default_factory=list)


@contextmanager
def refused_if_damaged(what: str) -> Iterator[None]:
    """A library that is fed a damaged file may raise anything: all of it becomes an InputError, but
    for what the worker has words of its own for."""
    try:
        yield
    except (InputError, MemoryError, RecursionError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"is a damaged {what}: {reason}") from None
