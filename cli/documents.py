"""Reads the documents named on the command line, shows how far that is, and joins them into one
prompt.

What a file format holds is the business of `ebbtide.read_document`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ebbtide import errors

from .progress import ProgressDisplay
from .shared_options import checked
from .terminal import Terminal

_PATIENCE_S = 2.0

FilesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE",
        help="PDF, EPUB, DOCX, PPTX, XLSX, ODT, ODP, ODS, RTF, HTML, Markdown or text; none or -: "
        "standard input.",
        show_default=False,
    ),
]


def _page_ranges(text: str) -> Any:
    import ebbtide

    return ebbtide.PageRanges.parse(text)


PagesOption = Annotated[
    str | None,
    typer.Option(
        "--pages",
        metavar="PAGES",
        callback=checked(_page_ranges),
        envvar="EBBTIDE_PAGES",
        show_default=False,
        help="Pages of a PDF, or slides, from 1: 10-40, 7, 90- or several with commas.",
    ),
]


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


def read_documents(
    paths: list[str],
    terminal: Terminal,
    *,
    pages: str | None = None,
    keep_in: Path | None = None,
    check: Callable[[], None] = lambda: None,
    taken: Iterable[str] = (),
) -> list[Any]:
    """The documents, in order; no path, or `-`, is standard input. Raises InputError.

    Warnings of a document are told. pages, keep_in: as `ebbtide.read_document` takes them; check
    may raise, which is how a wish to stop reaches a long extraction. taken: names of other
    documents, which these are told apart from.
    """
    import ebbtide

    paths = paths or ["-"]
    if paths.count("-") > 1:
        raise errors.InputError("Standard input (-) can be read only once, and is named twice.")
    documents = []
    for path, name in zip(paths, names_apart(paths, taken), strict=True):
        with ProgressDisplay(terminal, check, title=path if len(paths) > 1 else "") as progress:
            options = {"pages": pages, "on_progress": _reporter(progress), "keep_in": keep_in}
            if path == "-":
                if sys.stdin is None:
                    raise errors.InputError("There is no standard input to read; give a FILE.")
                with waiting_for_input(terminal):
                    data = sys.stdin.buffer
                    document = ebbtide.read_document("-", data, **options)
            else:
                document = replace(ebbtide.read_document(path, **options), name=name)
        for warning in document.warnings:
            terminal.warn(warning if len(paths) == 1 else f"{document.name}: {warning}")
        documents.append(document)
    return documents


def names_apart(paths: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """The file's name of each path, or as much of the path as no other ends in, and as is not
    taken; the whole path where none of it is.
    """

    def ends(path: str) -> list[str]:
        parts = Path(path).parts
        return [Path(*parts[at:]).as_posix() for at in reversed(range(len(parts)))]

    num_paths = Counter(end for path in set(paths) for end in ends(path))
    num_paths.update(taken)  # which count as another path that ends so
    return [
        next((end for end in ends(path) if num_paths[end] == 1), Path(path).as_posix())
        for path in paths
    ]


def _reporter(progress: ProgressDisplay) -> Callable[[int, int], None]:
    import ebbtide

    began_s = time.monotonic()

    def report(done: int, total: int) -> None:
        elapsed_s = time.monotonic() - began_s
        speed = done / elapsed_s if elapsed_s else 0.0
        left_s = (total - done) / speed if speed else None
        progress(ebbtide.Progress("extract", done, total, elapsed_s, speed, left_s))

    return report


def refuse_too_long(llm: Any, documents: Sequence[Any]) -> None:
    """Before documents that no context holds are joined, which takes their memory again. Raises
    ContextOverflow or DoesNotFit."""
    llm.refuse_too_long([{"role": "user", "content": document.text} for document in documents])


def join_documents(documents: list[Any], instruction: str) -> str:
    """One message: the documents, under headings if there are several, a blank line, the
    instruction.
    """
    import ebbtide

    return f"{ebbtide.join_documents(documents).text}\n\n{instruction}"
