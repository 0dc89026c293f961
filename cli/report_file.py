"""The option --report, and the file it names: opened before the long work, whole or not at all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output_file import OutputFile

if TYPE_CHECKING:
    from .run import Run

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
    return nullcontext() if path is None else OutputFile(path, "--report")


def write_run_report(
    page: OutputFile, run: Run, what: str, documents: list[Any], fields: dict[str, Any]
) -> None:
    """The page of a run whose answers `run.recorder` has heard. what: before the documents' names;
    fields: the object of `--json`.
    """
    from .report import run_report

    assert run.recorder is not None
    names = ", ".join(document.name for document in documents)
    page.commit(run_report(f"{what}{names}", run.recorder, fields))
    run.terminal.note(f"Wrote {page.path.name}.")
