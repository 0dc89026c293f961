"""Reads one file of a kind in `parsing.FORMATS` from standard input; see there for what is said.

Run as a process. Limits its own memory where the system can, and ends when its parent does. Knows
nothing of where the file came from.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from dataclasses import astuple
from typing import Any

from ..errors import InputError
from . import limits
from .extract import Extract, Report
from .page_ranges import PageRanges


def extract(format: str, data: bytes, pages: str | None, report: Report) -> Extract:
    """The text of a file. Raises InputError whose words follow the file's name."""
    module = importlib.import_module(f".{format}", __package__)
    found = module.extract(data, None if pages is None else PageRanges.parse(pages), report)
    if not found.text.strip():
        raise InputError("holds no text")
    if len(found.text) > limits.MAX_TEXT_CHARS:
        most = limits.MAX_TEXT_CHARS // 2**20
        raise InputError(f"holds more than {most} million characters, the most allowed")
    return found


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints must not be taken for ours

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    stdin = sys.stdin.buffer
    header = json.loads(stdin.readline())
    data = stdin.read(header["size"])
    threading.Thread(target=_end_with_parent, args=[stdin], daemon=True).start()
    _limit_memory(header["memory_bytes"])
    try:
        found = extract(
            header["format"],
            data,
            header["pages"],
            lambda done, total: say(done=done, total=total),
        )
        say(found={**vars(found), "places": [astuple(place) for place in found.places]})
    except InputError as error:
        say(refused=str(error))
    except MemoryError:
        say(refused="cannot be read: parsing it takes more memory than a document should")
    except RecursionError:
        say(refused="cannot be read: its parts are nested too deeply")
    except Exception as error:
        say(refused=f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    out.flush()
    os._exit(0)  # some libraries take long to tidy up, and there is nothing to tidy


def _end_with_parent(stdin: Any) -> None:
    """Nobody wants the answer when the other end of standard input is closed."""
    try:
        stdin.read(1)
    finally:
        os._exit(1)


def _limit_memory(num_bytes: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # Windows has none, macOS does not keep to it
        pass


if __name__ == "__main__":
    main()
