"""Reads the documents named on the command line and joins them into one prompt.

What a file format holds is the business of `ebbtide.read_document`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ebbtide import errors

from .terminal import Terminal

_PATIENCE_S = 2.0


@contextmanager
def waiting_for_input(terminal: Terminal) -> Iterator[None]:
    """Says what is waited for when standard input says nothing for a while."""
    stdin = sys.stdin
    if stdin is not None and stdin.isatty():
        terminal.note("Reading standard input; end it with Ctrl-D on a line of its own.")
        yield
        return
    text = "Waiting for standard input. (Give a FILE, or redirect from /dev/null for none.)"
    timer = threading.Timer(_PATIENCE_S, terminal.note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_documents(paths: list[str], terminal: Terminal) -> list[Any]:
    """The documents, in order; no path, or `-`, is standard input. Raises InputError."""
    import ebbtide

    paths = paths or ["-"]
    if paths.count("-") > 1:
        raise errors.InputError("Standard input (-) can be read only once, and is named twice.")
    documents = []
    for path in paths:
        if path == "-":
            if sys.stdin is None:
                raise errors.InputError("There is no standard input to read; give a FILE.")
            with waiting_for_input(terminal):
                document = ebbtide.read_document("-", sys.stdin.buffer)
        else:
            document = ebbtide.read_document(path)
        if not document.text.strip():
            name = "Standard input" if path == "-" else document.name
            raise errors.InputError(f"{name} holds no text.")
        documents.append(document)
    return documents


def join_documents(documents: list[Any], instruction: str) -> str:
    """One message: the documents, under headings if there are several, a blank line, the
    instruction.
    """
    if len(documents) == 1:
        body = documents[0].text.strip("\n")
    else:
        body = "\n\n".join(f"# {d.name}\n\n" + d.text.strip("\n") for d in documents)
    return f"{body}\n\n{instruction}"
