"""The option --report, and the file it names: opened before the long work, whole or not at all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import typer

from .output_file import OutputFile

ReportOption = Annotated[
    str | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Also write a page (HTML) with the plan, charts of the run, and the result.",
        show_default=False,
    ),
]


def report_file(path: str | None) -> AbstractContextManager[OutputFile | None]:
    """Raises InputError, now, where the file cannot be written."""
    return nullcontext() if path is None else OutputFile(path)
