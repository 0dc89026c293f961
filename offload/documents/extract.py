"""What reading one format gives: a Document without its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import InputError
from .document import Place
from .limits import MAX_SECTIONS, MAX_TEXT_CHARS

Report = Callable[[int, int], None]  # parts done, parts in all


@dataclass
class Extract:
    """See Document for the fields."""

    text: str
    places: list[Place] = field(default_factory=list)
    num_pages: int | None = None
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of_blocks(cls, blocks: Iterable[tuple[str, int]]) -> Extract:
        """Of paragraphs and headings, (text, level or 0), with empty lines between; headings as
        Markdown writes them, each a section."""
        found, parts, size = cls(""), [], 0
        for text, level in blocks:
            if level and len(found.places) < MAX_SECTIONS:
                title = " ".join(text.split())
                found.places.append(Place(size, "section", len(found.places) + 1, title))
                text = "#" * min(level, 6) + " " + title
            parts.append(text + "\n\n")
            size += len(parts[-1])
            if size > MAX_TEXT_CHARS:
                break  # refused by whoever called
        found.text = "".join(parts).rstrip("\n") + "\n"
        return found


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
