"""Has a file parsed by `worker`, in a process of its own.

Parsers are large, some of them C, and are fed what came from anywhere. In a process of their own a
crash is a sentence, memory and time have limits, and what they leave behind is gone before the
model is loaded.

    parent -> worker   one line of JSON, then the file's bytes
    worker -> parent   lines of JSON: {"done", "total"} ..., then {"found"} or {"refused"}
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import limits
from .document import Place
from .page_ranges import PageRanges

# Format -> the packages of which one must be there to read it.
FORMATS: dict[str, tuple[str, ...]] = {
    "pdf": ("pypdfium2", "pypdf"),
    "epub": (),
    "docx": (),
    "odt": (),
    "ods": (),
    "odp": (),
    "rtf": (),
    "pptx": ("pptx",),
    "xlsx": ("openpyxl",),
    "html": ("trafilatura",),
}
# A part of the key of what is kept: raised when a format is read differently.
_VERSION = 4
OnProgress = Callable[[int, int], None]


def parse(
    source: str,
    format: str,
    data: bytes,
    ranges: PageRanges | None,
    on_progress: OnProgress | None,
    keep_in: Path | None,
) -> dict[str, Any]:
    """The fields of a Document but name and format. Raises InputError."""
    packages = FORMATS[format]
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise InputError(
            f"{source} is {_with_article(format)}, and what reads it is not installed; install it "
            "with: pip install 'ebbtide[docs]'"
        )
    kept = None
    if keep_in is not None:
        key = f"{_VERSION} {format} {ranges} ".encode() + hashlib.sha256(data).digest()
        kept = keep_in / f"{hashlib.sha256(key).hexdigest()}.json"
        if (found := _load(kept)) is not None:
            return found
    told = _run(source, format, data, ranges, on_progress)
    text = told["text"].replace("\r\n", "\n").replace("\r", "\n")
    assert text.strip(), "the worker refuses what holds no text"
    if kept is not None:
        _save(kept, told)
    return _fields(told)


def _with_article(format: str) -> str:
    return f"{'an' if format in ('html', 'xlsx') else 'a'} {format.upper()}"


def _fields(told: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": told["text"],
        "places": tuple(Place(*place) for place in told["places"]),
        "num_pages": told["num_pages"],
        "warnings": tuple(told["warnings"]),
    }


def _run(
    source: str,
    format: str,
    data: bytes,
    ranges: PageRanges | None,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    header = {
        "format": format,
        "size": len(data),
        "pages": None if ranges is None else str(ranges),
        "memory_bytes": limits.PARSER_MEMORY_BYTES + 2 * len(data),
    }
    with _worker() as process:
        with contextlib.suppress(OSError):  # it ended early, and has said why
            process.stdin.write(json.dumps(header).encode() + b"\n")
            process.stdin.write(data)
            process.stdin.flush()
        for message in _messages(source, process):
            if "found" in message:
                return message["found"]
            if "refused" in message:
                raise InputError(f"{source} {message['refused']}")
            if on_progress is not None:
                on_progress(message["done"], message["total"])
        code = process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise InputError(
            f"{source} cannot be read: the {format.upper()} parser crashed on it ({how}). "
            "The file is damaged, or made to do that."
        )


@contextlib.contextmanager
def _worker() -> Iterator[Any]:
    # -P: a file in the current folder must not stand in for a library.
    command = [sys.executable, "-P", "-m", f"{__package__}.worker"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()
        process.stdout.close()


def _messages(source: str, process: Any) -> Iterator[dict[str, Any]]:
    """What the worker says, until it ends. InputError when it says nothing for too long."""
    lines: queue.Queue[bytes] = queue.Queue()

    def listen() -> None:
        with contextlib.suppress(OSError, ValueError):  # closed under our hands
            for line in process.stdout:
                lines.put(line)
        lines.put(b"")

    threading.Thread(target=listen, daemon=True).start()
    done = 0
    while True:
        line = _next_line(lines)
        if line is None:
            raise InputError(
                f"{source} cannot be read: its part {done + 1} took longer than "
                f"{limits.SILENCE_S:.0f} s, which no honest document needs"
            )
        if not line:
            return
        message = json.loads(line)
        done = message.get("done", done)
        yield message


def _next_line(lines: queue.Queue[bytes]) -> bytes | None:
    """None where the worker says nothing for too long. That is counted by the second: while both
    processes stand still (Ctrl-Z, a frozen container) no silence goes by."""
    left = limits.SILENCE_S
    while left > 0:
        try:
            return lines.get(timeout=min(left, 1.0))
        except queue.Empty:
            left -= 1.0
    return None


def _load(path: Path) -> dict[str, Any] | None:
    """What was kept; None when nothing was, or it is damaged."""
    try:
        return _fields(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(path: Path, told: dict[str, Any]) -> None:
    """Keeps it for the next time; that it could not be kept is no failure."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(told, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
